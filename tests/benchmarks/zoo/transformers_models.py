"""The classifiers of transformers, each with a small configuration and random weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tests.benchmarks.zoo.models import Entry

TASKS = ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification", "ForAudioClassification")
BATCH, LENGTH, LABELS = 2, 32, 5
PAD, BOS, EOS, IMAGE_TOKEN, FIRST_WORD, VOCABULARY = 0, 1, 2, 3, 4, 128
IMAGE, SAMPLES, FRAMES = 64, 1600, 64

# The greatest whole numbers that a small configuration has. Configurations name one thing in many ways.
_LIMITS = [
    (VOCABULARY, "vocab_size entity_vocab_size shape_vocab_size pronunciation_vocab_size num_hash_buckets"),
    (32, "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim d_latents projection_dim"),
    (32, "entity_emb_size shape_embed_dim pronunciation_embed_dim output_dim out_hidden_size pooler_hidden_size"),
    (4, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers"),
    (4, "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_self_attends_per_block num_self_attention_heads num_cross_attention_heads"),
    (8, "head_dim d_head d_kv kv_channels attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim"),
    (8, "linear_key_head_dim linear_value_head_dim index_head_dim rotary_dim"),
    (64, "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner dff hidden_dim feed_forward_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size intra_bottleneck_size"),
    (16, "kv_lora_rank q_lora_rank adapter_rank mamba_dt_rank num_latents num_landmarks segment_means_seq_len"),
    (4, "num_experts num_local_experts n_routed_experts index_n_heads linear_num_value_heads n_mamba_heads"),
    (2, "num_experts_per_tok linear_num_key_heads"),
    (1, "n_group topk_group num_random_blocks"),
    (64, "max_position_embeddings n_positions max_2d_position_embeddings"),
    (8, "sliding_window local_attention attention_window window_size chunk_size local_transformer_stride index_topk"),
    (8, "local_attn_chunk_length lsh_attn_chunk_length"),
    (4, "block_size"),
    (IMAGE, "image_size input_size"),
    (16, "patch_size num_mel_bins feature_projection_input_dim classifier_proj_size num_conv_pos_embeddings"),
    (16, "max_depth"),
]
LIMITS = {name: limit for limit, names in _LIMITS for name in names.split()}
NEEDED = ("head_dim", "num_experts_per_tok")  # where the default is None, some models can't be built with it
SPECIAL_TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

_CONVOLUTIONS = {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 2, 2, 1)}
_NO_CACHE = {"use_cache": False}  # for a forward without that parameter

# What the limits cannot say, by the part of a class's name before its task.
_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("Bros BrosSpadeEE BrosSpadeEL", {"hidden_size": 64}),
    ("ConvNext ConvNextV2 PoolFormer", _CONVOLUTIONS),
    ("DonutSwin Swin Swinv2", {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 2}),
    ("Esm Esmc", {"vocab_size": VOCABULARY}),
    (
        "Data2VecAudio Hubert SEW SEWD UniSpeech UniSpeechSat Wav2Vec2 Wav2Vec2Conformer WavLM",
        {"conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)},
    ),
    ("MobileNetV1 MobileNetV2", {"depth_multiplier": 0.25}),
    ("ModernVBert UltraVBert", {"vision_config": {"num_hidden_layers": 2}}),
    ("Pvt PvtV2 Segformer", _CONVOLUTIONS | {"num_attention_heads": (1, 2, 3, 4)}),
    ("T5Gemma T5Gemma2", {"decoder": _NO_CACHE}),
    ("Zamba Zamba2", {"layers_block_type": ["linear_attention", "hybrid"] * 2}),
    ("AST", {"max_length": FRAMES}),
    ("Albert", {"num_hidden_groups": 4}),  # with one group there is nothing to split
    ("Bit", _CONVOLUTIONS | {"num_groups": 4, "embedding_size": 8}),
    ("Bloom", {"n_layer": 4}),
    ("CohereCompassText", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    ("Cvt", {"embed_dim": (16, 32, 48), "num_heads": (1, 2, 3), "depth": (1, 2, 3)}),
    ("EfficientNet", {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}),
    ("FocalNet", {"embed_dim": 8, "depths": (1, 2, 2, 1)}),
    ("Funnel", {"block_sizes": (4, 1, 1), "num_decoder_layers": 2}),
    ("GPTNeo", {"attention_types": [[["global", "local"], 2]]}),
    ("Gemma3", {"text_config": _NO_CACHE}),
    (
        "HGNetV2",
        {
            "stem_channels": (3, 8, 16),
            "stage_in_channels": (16, 16, 24, 32),
            "stage_mid_channels": (8, 8, 8, 8),
            "stage_out_channels": (16, 24, 32, 48),
            "hidden_sizes": (16, 24, 32, 48),
            "stage_numb_of_layers": (2, 2, 2, 2),
        },
    ),
    ("Hiera", {"image_size": (64, 64), "embed_dim": 8, "depths": (1, 2, 2, 1)}),
    ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0}),
    ("LayoutLMv3", {"coordinate_size": 4, "shape_size": 8}),
    ("Levit", {"hidden_sizes": (32, 48, 64), "key_dim": (8, 8, 8)}),
    ("Lilt", {"hidden_size": 48}),
    ("Mistral4", {"head_dim": 16}),
    ("MobileViT", {"hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8, 8, 16, 16, 24, 32, 64)}),
    ("MobileViTV2", {"width_multiplier": 0.25}),
    ("PPLCNet", {"scale": 0.25, "class_expand": 64}),
    ("Qwen3ASR", {"audio_config": {"encoder_layers": 2, "downsample_hidden_size": 16}}),
    ("Qwen3_5", {"text_config": _NO_CACHE, "vision_config": {"depth": 2}}),
    (
        "Reformer",
        {
            "attn_layers": ["local", "lsh", "local", "lsh"],
            "axial_pos_shape": (4, LENGTH // 4),
            "axial_pos_embds_dim": (8, 24),
            "num_buckets": 4,
        },
    ),
    ("RegNet", _CONVOLUTIONS | {"groups_width": 8, "embedding_size": 8}),
    ("ResNet", _CONVOLUTIONS | {"embedding_size": 8}),
    (
        "ShieldGemma2",
        {
            "image_token_index": IMAGE_TOKEN,
            "mm_tokens_per_image": 4,
            "yes_token_index": FIRST_WORD,
            "no_token_index": FIRST_WORD + 1,
        },
    ),
    ("Siglip2", {"vision_config": {"num_patches": 16}}),
    ("SwiftFormer", {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 2, 1)}),
    ("T5", {"decoder_start_token_id": PAD}),
    ("TextNet", {"hidden_sizes": (8, 8, 16, 24, 32), "stem_out_channels": 8}),
    ("TimmWrapper", {"architecture": "test_resnet"}),
    ("Whisper", {"max_source_positions": FRAMES // 2}),
    ("Xmod", {"default_language": "en_XX"}),
]
CHANGES = {name: changes for names, changes in _CHANGES for name in names.split()}


_LAYER_DROP = "Data2VecAudio Hubert SEW UniSpeech UniSpeechSat Wav2Vec2 Wav2Vec2Bert Wav2Vec2Conformer WavLM"
LAYER_DROP = frozenset(_LAYER_DROP.split())
"""What leaves out layers at random: a graph can't, and splits between them are refused unless none is left out."""


def transformers_entries() -> Iterator[Entry]:
    """Every class for images, sequences, tokens and audio; `LAYER_DROP` a second time, with all layers."""
    try:
        import transformers
    except ImportError:
        return
    for name in dir(transformers):
        if name.endswith(TASKS) and not name.startswith(("Auto", "DataCollator")):
            family = getattr(transformers, name).__module__
            yield Entry(f"transformers:{name}", functools.partial(build, name), inputs, family, real=True)
            if name.rpartition("For")[0] in LAYER_DROP:
                whole = functools.partial(build, name, layerdrop=0.0)
                yield Entry(f"transformers:{name}, layerdrop=0", whole, inputs, family, real=True)


def build(name: str, **options: Any) -> nn.Module:
    """The class of that name with a small configuration and options of it, all of it on the default device."""
    import transformers

    model_class: Any = getattr(transformers, name)
    changes = CHANGES.get(name.rpartition("For")[0], {})
    model = model_class(small(model_class.config_class(), changes | {"num_labels": LABELS} | options))
    return model.to(torch.get_default_device())


def small(default: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration of the type of a default one, small, and so are those inside it."""
    import transformers

    arguments: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            changes = {**changes, name: small(value, changes.get(name, {}))}
        elif name == "num_key_value_heads":
            arguments[name] = 2 if value is not None and value < default.num_attention_heads else 4
        elif name in LIMITS and (isinstance(value, int) or name in NEEDED):
            arguments[name] = LIMITS[name] if value is None else min(value, LIMITS[name])
        elif name in SPECIAL_TOKENS:
            arguments[name] = SPECIAL_TOKENS[name]
    return type(default)(**{**arguments, **changes})


def inputs(model: nn.Module) -> dict[str, Any]:
    """Example inputs for a model, on its device, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    made = MAKERS[str(model.main_input_name)](model.config, generator)
    if "bbox" in accepted:
        made["bbox"] = _boxes(model.config, generator)
    if model.config.model_type in ("shieldgemma2", "vilt"):
        made |= _images(model.config, generator)
    if type(model).__name__ == "BrosSpadeEEForTokenClassification":
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    made = {name: tensor.to(model.device) for name, tensor in made.items()}
    return {**made, "use_cache": False} if "use_cache" in accepted else made


def _tokens(config: Any, generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(FIRST_WORD, VOCABULARY, (BATCH, LENGTH), generator=generator)
    if config.is_encoder_decoder:
        ids[:, -1] = EOS
    if config.model_type == "shieldgemma2":
        ids[:, : config.mm_tokens_per_image] = IMAGE_TOKEN
    return {"input_ids": ids}


def _boxes(config: Any, generator: torch.Generator) -> torch.Tensor:
    corners = torch.randint(0, 32, (BATCH, LENGTH, 2, 2), generator=generator).cumsum(2).flatten(2)
    return corners / 64 if config.model_type == "bros" else corners


def _images(config: Any, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    if vision.model_type == "siglip2_vision_model":
        side = math.isqrt(vision.num_patches)
        patches = torch.randn(BATCH, side * side, 3 * vision.patch_size**2, generator=generator)
        mask = torch.ones(BATCH, side * side, dtype=torch.int64)
        shapes = torch.full((BATCH, 2), side)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)}


def _waves(config: Any, generator: torch.Generator) -> dict[str, Any]:
    shape = (FRAMES, config.num_mel_bins) if config.model_type == "audio-spectrogram-transformer" else (SAMPLES,)
    return {"input_values": torch.randn(BATCH, *shape, generator=generator)}


def _spectra(config: Any, generator: torch.Generator) -> dict[str, Any]:
    whisper = config.model_type == "whisper"
    shape = (config.num_mel_bins, FRAMES) if whisper else (FRAMES, config.feature_projection_input_dim)
    return {"input_features": torch.randn(BATCH, *shape, generator=generator)}


MAKERS: dict[str, Callable[[Any, torch.Generator], dict[str, Any]]] = {
    "input_ids": _tokens,
    "inputs": _tokens,
    "pixel_values": _images,
    "input_values": _waves,
    "input_features": _spectra,
}
