"""Networks that no single value cuts well: what is chosen, and the whole proof at it.

Several are of other libraries; what is not installed stands in the results as missing. Models have random weights,
and sizes at which the proof takes seconds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxcollab
from fxcollab.splits.option import LEAST
from tests.benchmarks.rows import Row
from tests.splits.test_wide_cuts import Siamese, TwoInputs

Made = tuple[nn.Module, tuple[Tensor, ...]]


def _images(size: int, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def _smp(name: str) -> Callable[[], Made]:
    return lambda: (_of("segmentation_models_pytorch", name)("resnet18", encoder_weights=None), _images(64))


def _timm(name: str, size: int, **options: Any) -> Callable[[], Made]:
    return lambda: (_of("timm", "create_model")(name, num_classes=5, **options), _images(size))


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _segformer() -> Made:
    config = _of("transformers", "SegformerConfig")(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16
    )
    return _of("transformers", "SegformerForSemanticSegmentation")(config), _images(64)


def _swin_unetr() -> Made:
    return _of("monai.networks.nets", "SwinUNETR")(1, 2, feature_size=12, spatial_dims=2), _images(64, 1)


def _attention_unet() -> Made:
    return _of("monai.networks.nets", "AttentionUnet")(2, 1, 2, (8, 16, 32), (2, 2)), _images(32, 1)


def _unet_2d() -> Made:
    model = _of("diffusers", "UNet2DModel")(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (*_images(16), torch.tensor([3, 5]))


def _vit_pytorch() -> Made:
    model = _of("vit_pytorch", "ViT")(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=6, heads=2, mlp_dim=64, dim_head=16
    )
    return model, _images(32)


def _x_transformers() -> Made:
    layers = _of("x_transformers", "Decoder")(dim=32, depth=6, heads=2, attn_dim_head=16)
    model = _of("x_transformers", "TransformerWrapper")(num_tokens=64, max_seq_len=32, attn_layers=layers)
    return model, (torch.randint(0, 64, (2, 16)),)


def _modified_resnet() -> Made:
    model = _of("open_clip.modified_resnet", "ModifiedResNet")((1, 1, 1, 1), 16, 4, image_size=64, width=8)
    return model, _images(64)


CASES: dict[str, Callable[[], Made]] = {
    "smp Unet": _smp("Unet"),
    "smp FPN": _smp("FPN"),
    "smp DeepLabV3Plus": _smp("DeepLabV3Plus"),
    "timm hrnet_w18_small": _timm("hrnet_w18_small", 64),
    "timm xcit_nano_12_p16_224": _timm("xcit_nano_12_p16_224", 64, img_size=64),
    "timm crossvit_tiny_240": _timm("crossvit_tiny_240", 240),
    "timm coat_lite_tiny": _timm("coat_lite_tiny", 64, img_size=64),
    "timm dla34": _timm("dla34", 64),
    "transformers Segformer": _segformer,
    "monai SwinUNETR": _swin_unetr,
    "monai AttentionUnet": _attention_unet,
    "diffusers UNet2DModel": _unet_2d,
    "vit_pytorch ViT": _vit_pytorch,
    "x_transformers Decoder": _x_transformers,
    "open_clip ModifiedResNet": _modified_resnet,
    "siamese": lambda: (Siamese(), (torch.randn(3, 16), torch.randn(3, 16))),
    "two inputs": lambda: (TwoInputs(), (torch.randn(3, 16), torch.randn(3, 16))),
}


def cut(name: str) -> Row:
    """What is chosen for one network, the shares of its levels, and the proof."""
    torch.manual_seed(0)
    try:
        model, inputs = CASES[name]()
    except ImportError as error:
        return {"result": f"missing: {error}"}
    start = time.perf_counter()
    try:
        choice = fxcollab.choose_splits(model, inputs)
    except fxcollab.FxCollabError as error:
        return {"result": f"{type(error).__name__}: {error.what} {error.why}"}
    searched = time.perf_counter() - start
    shares = choice.option.shares
    train_model = fxcollab.transform(model, splits=choice, example_inputs=inputs, init="copy-anyway", seed=0)
    report = fxcollab.verify(model, train_model, inputs)
    return {
        "result": "proved" if report else str(report),
        "splits": choice.splits,
        "shares": [round(share, 3) for share in shares],
        "even": min(shares) >= LEAST / len(shares),
        "crossing": [cut.crossing[0] for cut in choice.option.cuts],
        "seconds": round(searched, 1),
    }
