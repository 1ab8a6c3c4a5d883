"""What is chosen for thirty models, with and without budgets."""

from __future__ import annotations

import torch
from torch import nn

from fxcollab import Choice, SplitError, choose_splits
from fxcollab.tracing.examples import USUAL_IMAGES, guess_inputs
from tests.benchmarks.rows import Row

BATCH = 32
MODELS = (
    *(
        f"torchvision:{name}"
        for name in (
            "resnet18", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "vgg16", "densenet121",
            "densenet201", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
            "convnext_tiny", "regnet_y_400mf", "swin_t", "swin_b", "vit_b_16", "mnasnet1_0", "shufflenet_v2_x1_0",
        )
    ),
    *(
        f"timm:{name}"
        for name in (
            "deit_tiny_patch16_224", "mixer_b16_224", "nfnet_f0", "coatnet_0_rw_224", "pvt_v2_b0",
            "efficientformer_l1", "eva02_tiny_patch14_224", "xcit_nano_12_p16_224", "hrnet_w18", "dla34",
        )
    ),
)  # fmt: skip
BUDGETS: dict[str, dict[str, float]] = {
    "time 1.75x": {"max_time": 1.75},
    "memory 1.5x": {"max_memory": 1.5},
    "time 1.5x, memory 1.4x": {"max_time": 1.5, "max_memory": 1.4},
    "time 1.02x": {"max_time": 1.02},
}


def pick(name: str) -> Row:
    """The choice for one model, and those under each budget."""
    model = build(name)
    [spec] = guess_inputs(model, USUAL_IMAGES).inputs
    inputs = (torch.empty(BATCH, *(spec.shape or ())[1:], device="meta"),)
    return {
        **_row(choose_splits(model, inputs)),
        "budgets": {budget: _within(model, inputs, limits) for budget, limits in BUDGETS.items()},
    }


def build(name: str) -> nn.Module:
    """A model without values."""
    library, _, model = name.partition(":")

    def make() -> nn.Module:
        if library == "timm":
            import timm

            made: nn.Module = timm.create_model(model)
        else:
            import torchvision

            made = getattr(torchvision.models, model)()
        return made

    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:  # a constructor that computes with values
        return make().to("meta")


def _within(model: nn.Module, inputs: tuple[torch.Tensor, ...], limits: dict[str, float]) -> Row:
    try:
        choice = choose_splits(model, inputs, **limits)  # type: ignore[arg-type]  # budgets alone
    except SplitError as error:
        return {"kept": None, "why": error.why}
    time, memory = limits.get("max_time", choice.costs.time), limits.get("max_memory", choice.costs.memory)
    return {"kept": choice.costs.time <= time and choice.costs.memory <= memory, **_row(choice)}


def _row(choice: Choice) -> Row:
    costs = choice.costs
    return {
        "splits": choice.splits,
        "time": round(costs.time, 2),
        "memory": round(costs.memory, 2),
        "why": choice.reason,
    }
