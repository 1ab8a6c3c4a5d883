"""A causal language model with padded prompts: heads learn on the labelled tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxcollab

pytestmark = pytest.mark.slow
VOCABULARY, PROMPT = 60, 4


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def batch() -> dict[str, Tensor]:
    """Three sequences with prompts that aren't labelled, two of them padded."""
    ids = torch.randint(VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    attended[1, 8:] = attended[2, 6:] = 0
    labels = ids.masked_fill(attended == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def test_a_causal_language_model_in_three_lines() -> None:
    model, inputs = llama(), batch()
    labels = inputs.pop("labels")
    train_model = fxcollab.transform(model, splits="model.layers.1", pattern="simple", example_inputs=inputs, seed=0)
    loss = fxcollab.CollaborativeLoss(tokens="shifted")
    outputs = train_model(**inputs)
    loss(outputs, labels).backward()

    assert all(parameter.grad is not None for parameter in train_model.parameters())
    torch.testing.assert_close(loss.parts(outputs, labels).hard[0], model(**inputs, labels=labels).loss)


def test_tokens_without_labels_send_no_gradient() -> None:
    inputs = batch()
    labels = inputs.pop("labels")
    train_model = fxcollab.transform(
        llama(), splits="model.layers.1", pattern="simple", example_inputs=inputs, seed=0
    )
    logits = [output.logits.detach().requires_grad_() for output in train_model(**inputs)]
    fxcollab.CollaborativeLoss(tokens="shifted")(logits, labels).backward()
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != -100
    for head in logits:
        assert head.grad is not None
        assert not head.grad[~scored].any()
        assert head.grad[scored].abs().sum(-1).all()
