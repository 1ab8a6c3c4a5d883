"""A training model where transformers trains: the loss inside the forward, and its Trainer."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import CaptureError, ObjectiveError, StateError
from fxcollab.integrations.transformers import with_loss


class Classifier(nn.Module):
    """As models of transformers are; its embedding is tied to a layer behind the splits."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"labels": 5}
        self.embedding, self.body, self.last = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5, bias=False)
        self.fc.weight = self.embedding.weight

    def forward(self, ids: Tensor, weights: Any = None, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        h = self.embedding(ids)
        h = (h if weights is None else h * weights[..., None]).sum(1)
        logits = self.fc(self.last(self.body(h).tanh()))
        items = kwargs.get("num_items_in_batch")
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
        return {"loss": loss if items is None else loss / items, "logits": logits}


def batch(size: int = 6) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 5, (size, 3)), "labels": torch.randint(0, 5, (size,))}


def made(loss: fxcollab.Objective | None = None) -> tuple[Classifier, Any]:
    torch.manual_seed(0)
    model = Classifier()
    train_model = fxcollab.transform(model, splits="body", seed=0, example_inputs={"ids": batch()["ids"]})
    return model, with_loss(train_model, loss or fxcollab.CollaborativeLoss())


def test_in_train_mode_the_total_loss_comes_with_head_0() -> None:
    model, train_model = made()
    inputs = batch()
    found = train_model(**inputs)
    heads = train_model.train_model(inputs["ids"])
    assert torch.equal(found["logits"], heads[0]["logits"])
    assert torch.equal(found["loss"], fxcollab.CollaborativeLoss()(heads, inputs["labels"]))
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in train_model.parameters())
    assert model.body.weight.grad is not None


def test_in_eval_mode_it_is_the_original() -> None:
    model, train_model = made()
    train_model.eval()
    inputs = batch() | {"num_items_in_batch": torch.tensor(6)}
    expected, found = model(**inputs), train_model(**inputs)
    assert torch.equal(found["loss"], expected["loss"]) and torch.equal(found["logits"], expected["logits"])
    assert train_model(batch()["ids"]).keys() == {"logits"}


def test_losses_of_accumulated_batches_add_up_to_that_of_all() -> None:
    _, train_model = made()
    whole = batch(8)
    parts = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 5), slice(5, 8))]
    total = sum(train_model(**part, num_items_in_batch=torch.tensor(8))["loss"] for part in parts)
    torch.testing.assert_close(total, train_model(**whole)["loss"])


def test_it_looks_like_the_original() -> None:
    model, train_model = made()
    assert train_model.config is model.config and type(train_model).__name__ == "Classifier"
    assert inspect.signature(train_model.forward) == inspect.signature(model.forward)
    assert not hasattr(train_model, "generate")
    copied = copy.deepcopy(train_model)
    inputs = batch()
    assert torch.equal(copied(**inputs)["loss"], train_model(**inputs)["loss"]) and copied.config == model.config


def test_labels_and_inputs_that_are_missing_are_told() -> None:
    _, train_model = made()
    with pytest.raises(ObjectiveError, match=r"(?s)no labels.*label_smoothing_factor.*CrossEntropyLoss"):
        train_model(ids=batch()["ids"])
    with pytest.raises(CaptureError, match=r"(?s)no input weights, only ids.*weights in the example_inputs"):
        train_model(**batch(), weights=torch.ones(6, 3))


def test_its_checkpoint_has_no_ties_loads_again_and_is_pruned(tmp_path: Path) -> None:
    model, train_model = made()
    save_file(train_model.state_dict(), tmp_path / "model.safetensors")  # raises where memory is shared
    checkpoint = load_file(tmp_path / "model.safetensors")
    _, other = made()
    nn.init.zeros_(other.train_model.body.weight)
    other.load_state_dict(checkpoint)
    assert torch.equal(other.train_model.body.weight, model.body.weight)
    plain = Classifier()
    plain.load_state_dict(fxcollab.prune_state_dict(checkpoint))
    inputs = batch()
    assert torch.equal(plain(**inputs)["loss"], model(**inputs)["loss"])


# ------------------------------------------------------------------------------------------ the Trainer itself


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": ids, "labels": ids[0] % 3} for ids in torch.randint(1, 20, (40, 6), generator=generator())]
    usual = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    usual |= {"eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 1e-2, "report_to": []}
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **usual | options)

    def metrics(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return transformers.Trainer(
        model, arguments, train_dataset=data[:25], eval_dataset=data[25:], compute_metrics=metrics
    )


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def collaborative(model: nn.Module, **options: Any) -> nn.Module:
    splits = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    example = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    train_model = fxcollab.transform(model, splits=splits, example_inputs=example, seed=0)
    return with_loss(train_model, fxcollab.CollaborativeLoss(**options))


@pytest.mark.slow
def test_the_trainer_evaluates_head_0_as_it_does_the_plain_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "activation_checkpointing": True}
    train_model = collaborative(bert(), hard=smooth)
    running = trainer(train_model, tmp_path, **best)
    running.add_callback(transformers.EarlyStoppingCallback(3))
    running.train()
    assert train_model.is_activation_checkpointing
    found = running.evaluate()
    running.save_model()
    plain = bert()
    plain.load_state_dict(fxcollab.prune_state_dict(load_file(tmp_path / "model.safetensors")))
    expected = trainer(plain, tmp_path).evaluate()
    assert (found["eval_loss"], found["eval_accuracy"]) == (expected["eval_loss"], expected["eval_accuracy"])


@pytest.mark.slow
def test_the_trainer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    straight = collaborative(bert())
    trainer(straight, tmp_path).train()
    first = min(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    again = collaborative(bert())
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(first))
    for name, value in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.slow
def test_the_trainer_accumulates_as_if_the_batch_were_whole(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_train_epochs": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "max_grad_norm": 0,
    }
    states = []
    for sizes in ({}, {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}):
        train_model = collaborative(bert())
        for module in train_model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer(train_model, tmp_path, optim="sgd", **options, **sizes).train()
        states.append(train_model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_that_was_replaced_is_evaluated_too() -> None:
    _, train_model = made()
    train_model.train_model.last = nn.Linear(8, 8)
    train_model.eval()
    inputs = batch()
    found = train_model(**inputs)["logits"]
    assert torch.equal(found, train_model.train_model(inputs["ids"])["logits"])


@pytest.mark.parametrize("training", [True, False])
def test_all_heads_are_reached_through_it(training: bool) -> None:
    _, train_model = made()
    train_model.train(training)
    ids = batch()["ids"]
    heads = fxcollab.all_heads(train_model)(ids=ids)
    expected = fxcollab.all_heads(train_model.train_model)(ids)
    assert len(heads) == 2
    assert all(torch.equal(one["logits"], other["logits"]) for one, other in zip(heads, expected, strict=True))


def test_it_pickles_and_copies() -> None:
    _, train_model = made()
    inputs = batch()
    for again in (pickle.loads(pickle.dumps(train_model)), copy.deepcopy(train_model)):
        assert torch.equal(again(**inputs)["loss"], train_model(**inputs)["loss"])
        assert type(again).__name__ == "Classifier"


def test_another_output_in_eval_mode_is_refused() -> None:
    made_with_mean = fxcollab.transform(
        Classifier(), splits="body", seed=0, example_inputs={"ids": batch()["ids"]}, eval_output="mean"
    )
    with pytest.raises(StateError, match="more than head 0's output") as caught:
        with_loss(made_with_mean, fxcollab.CollaborativeLoss())
    assert "eval_output='head'" in str(caught.value.hint)
