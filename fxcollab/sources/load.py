"""Load: from a source to its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fxcollab.sources.code import load_file, load_module
from fxcollab.sources.libraries import load_hf, load_timm, load_torchvision
from fxcollab.sources.loaded import Loaded
from fxcollab.sources.source import Kind, Source

_LOADERS: Mapping[Kind, Callable[[Source], Loaded]] = {
    "file": load_file, "module": load_module, "torchvision": load_torchvision, "timm": load_timm, "hf": load_hf,
}  # fmt: skip


def load(source: Source) -> Loaded:
    """Execute or import what a source names, and build its model.

    The model of a file without a name is its ``model``, else its ``build_model``, ``get_model``, ``create_model``
    or ``make_model``, else its only module instance with parameters (so that a loss doesn't count), else the only
    module class that the file itself defines and that needs no further argument.

    The models of torchvision and timm have random weights unless ``weights=`` or ``pretrained=`` is given; those of
    transformers the saved ones, unless ``pretrained=false``, and the class in their configuration, unless
    ``architecture=`` names another.

    Raises:
        SourceError: no model was found, or several, or the code behind the source failed.
    """
    return _LOADERS[source.kind](source)
