"""Sources that name a model of torchvision, timm or transformers: of the installed packages, not of a folder's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fxcollab.errors import SourceError
from fxcollab.sources.loaded import Loaded, build_from, did_you_mean, loaded_from, user_code
from fxcollab.sources.source import REMOTE, Source


def load_torchvision(source: Source) -> Loaded:
    """Random weights, unless an argument names others."""
    with user_code("torchvision can't be imported", None, "torchvision"):
        from torchvision import models
    try:
        builder = models.get_model_builder(source.location)
    except ValueError as error:
        hint = did_you_mean(source.location, models.list_models(), "torchvision.models.list_models() lists them")
        raise SourceError(f"torchvision has no model `{source.location}`", hint=hint) from error
    weights = [name for name in inspect.signature(builder).parameters if name.startswith("weights")]
    pretrained = any(value is not None for name, value in source.arguments if name in weights)
    defaults: dict[str, Any] = dict.fromkeys(weights)  # segmentation models download a backbone otherwise
    if not pretrained and source.location.lower().endswith(("googlenet", "inception_v3")):
        defaults["init_weights"] = True  # their default, without its warning
    loaded = loaded_from(source, partial(builder, **defaults), None)
    return replace(loaded, factory=None) if pretrained else loaded


def load_timm(source: Source) -> Loaded:
    """Random weights, unless ``pretrained=true``; the factory's are always random."""
    with user_code("timm can't be imported", None, "timm", hint="pip install timm"):
        import timm
    if not timm.is_model(source.location):
        hint = did_you_mean(source.location, timm.list_models(), "timm.list_models() lists them")
        raise SourceError(f"timm has no model `{source.location}`", hint=hint)
    return _pretrained_or_fresh(source, lambda **arguments: timm.create_model(source.location, **arguments), False)


def load_hf(source: Source) -> Loaded:
    """The saved weights, unless ``pretrained=false``; the factory's are always random."""
    with user_code("transformers can't be imported", None, "transformers", hint="pip install transformers"):
        import transformers

    def build(*, pretrained: bool = True, architecture: str | None = None, **arguments: Any) -> nn.Module:
        arguments.setdefault(REMOTE, False)  # else it would ask on the terminal
        config, unused = transformers.AutoConfig.from_pretrained(
            source.location, return_unused_kwargs=True, **arguments
        )
        if unused:
            raise SourceError(
                f"{type(config).__name__} doesn't take {', '.join(unused)}",
                where=source.location,
                hint=f"help(transformers.{type(config).__name__}) says what it takes",
            )
        name = architecture or next(iter(config.architectures or ()), "AutoModel")
        cls = getattr(transformers, name, None)
        if cls is None:
            raise SourceError(
                f"transformers has no class `{name}`",
                hint="name one that takes this configuration: --model-arg architecture=BertForSequenceClassification",
            )
        remote = {REMOTE: arguments[REMOTE]}
        if pretrained:
            # from safetensors alone: no pickle
            model: nn.Module = cls.from_pretrained(source.location, config=config, use_safetensors=True, **remote)
            return model.train()
        made: nn.Module = cls.from_config(config, **remote) if name.startswith("Auto") else cls(config)
        return made

    return _pretrained_or_fresh(source, build, True)


def _pretrained_or_fresh(source: Source, build: Callable[..., nn.Module], by_default: bool) -> Loaded:
    """The model with its weights, and a factory of ones with random weights."""
    arguments = dict(source.arguments)
    pretrained = bool(arguments.pop("pretrained", by_default))
    plain = replace(source, arguments=tuple(sorted(arguments.items())))
    fresh = partial(build, pretrained=False)
    if not pretrained:
        return replace(loaded_from(plain, fresh, None), source=source)
    loaded = loaded_from(plain, partial(build, pretrained=True), None)
    return replace(loaded, source=source, factory=partial(build_from, plain, fresh, None))
