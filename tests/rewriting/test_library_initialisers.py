"""Peers of models whose library initialises them; attributes and marks of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcollab
from tests.rewriting.state_helpers import Mlp
from tests.untouched import Untouched


class PreTrainedModel(nn.Module):
    """Stands for transformers' class of this name, whose models initialise their modules by a method."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            module.bias.data.fill_(0.25)


class Pretrained(PreTrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_model_that_knows_its_modules_initialisation_is_asked() -> None:
    train_model = fxcollab.transform(Pretrained(), splits=["a"], pattern="simple", seed=0)
    peer = train_model.get_submodule("peers.b1.b")
    assert abs(peer.weight.std().item() - 0.02) < 0.002
    assert (peer.bias == 0.25).all()


def loaded_bert(folder: Path) -> tuple[nn.Module, str]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 8}
    BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder)
    return BertForSequenceClassification.from_pretrained(folder), "bert.encoder.layer.0"


def loaded_gpt2(folder: Path) -> tuple[nn.Module, str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=8, n_positions=8)).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder, use_cache=False), "transformer.h.0"


def peers_of_a_loaded_model(load: Callable[[Path], Any], folder: Path, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model that was trained and loaded, and the peer of all behind its split."""
    model, split = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # trained, since it was born
    marked = Untouched(model)
    ids = torch.randint(0, 8, (2, 8), generator=torch.Generator().manual_seed(0))
    train_model = fxcollab.transform(model, "simple", [split], example_inputs=(ids,), seed=0, **options)
    assert marked.differences() == []
    return model, train_model.get_submodule("peers.b1")


def test_peers_of_a_loaded_bert_start_as_the_library_would_start_them(tmp_path: Path) -> None:
    _, peer = peers_of_a_loaded_model(loaded_bert, tmp_path)
    dense = peer.get_submodule("bert.encoder.layer.1.intermediate.dense")
    norm = peer.get_submodule("bert.encoder.layer.1.output.LayerNorm")
    assert abs(dense.weight.std().item() - 0.02) < 0.002 and abs(dense.weight.mean().item()) < 0.002
    assert (dense.bias == 0).all() and (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.slow
def test_peers_of_a_loaded_gpt2_start_as_the_library_would_start_them(tmp_path: Path) -> None:
    _, peer = peers_of_a_loaded_model(loaded_gpt2, tmp_path)
    block = peer.get_submodule("transformer.h.1")
    assert abs(block.mlp.c_fc.weight.std().item() - 0.02) < 0.002 and (block.mlp.c_fc.bias == 0).all()
    assert abs(block.mlp.c_proj.weight.std().item() - 0.01) < 0.001  # 0.02 / sqrt(2 layers): by the block around it


@pytest.mark.slow
def test_an_init_of_the_callers_may_use_the_librarys(tmp_path: Path) -> None:
    model, _ = loaded_bert(tmp_path)
    _, peer = peers_of_a_loaded_model(
        loaded_bert, tmp_path, init=lambda branch, path: branch.apply(model._initialize_weights) and None
    )
    dense = peer.get_submodule("bert.encoder.layer.1.intermediate.dense")
    assert abs(dense.weight.std().item() - 0.02) < 0.002 and (dense.bias == 0).all()


def test_other_attributes_of_tensors_and_marks_are_kept() -> None:
    model = Mlp()
    model.second.weight.purpose, model.second.weight._is_hf_initialized = "decayed", True
    model.second._is_hf_initialized = True
    fresh = fxcollab.transform(model, "simple", ["first"], seed=0).get_submodule("peers.b1.second")
    same = fxcollab.transform(model, "simple", ["first"], init="copy-anyway").get_submodule("peers.b1.second")
    for peer in (fresh, same):
        assert vars(peer.weight) == vars(model.second.weight) and peer._is_hf_initialized
