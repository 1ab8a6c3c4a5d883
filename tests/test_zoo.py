"""A sample of the zoo: ``python -m tests.benchmarks.zoo`` runs the whole of it."""

import pytest
import torch
import torchvision

import fxcollab
from tests.benchmarks.zoo.models import entries
from tests.benchmarks.zoo.summary import summary
from tests.benchmarks.zoo.trial import try_structure, try_values

# One of each kind of trouble: shape checks, iteration, finfo, parts that are None, numpy's random numbers, shared
# modules, lists of images, questions about data.
STRUCTURE = [
    "timm:crossvit_9_240", "timm:naflexvit_base_patch16_gap", "timm:twins_pcpvt_small", "timm:test_vit",
    "timm:resnet18", "torchvision:raft_small", "torchvision:googlenet", "torchvision:fcn_resnet50",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
]  # fmt: skip
VALUES = [
    "timm:test_resnet", "timm:test_vit", "timm:test_efficientnet", "torchvision:squeezenet1_1",
    "transformers:BertForSequenceClassification", "transformers:BloomForTokenClassification",
    "transformers:ASTForAudioClassification", "transformers:Zamba2ForSequenceClassification",
    "transformers:T5ForSequenceClassification",
]  # fmt: skip


def _known(name: str) -> str:
    pytest.importorskip(name.partition(":")[0])
    assert name in entries()
    return name


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURE)
def test_a_model_goes_in_and_comes_back_exactly(name: str) -> None:
    row = try_structure(_known(name))
    assert row["result"] == "ok", row


def test_the_whole_proof_holds_on_a_network_of_torchvision() -> None:
    model = torchvision.models.squeezenet1_1(num_classes=10)
    train_model = fxcollab.transform(model, splits=["features.4", "features.8"], seed=0)
    assert fxcollab.verify(model, train_model, (torch.randn(2, 3, 64, 64),)).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_the_whole_proof_holds_on_real_weights(name: str) -> None:
    row = try_values(_known(name))
    assert row["result"] == "ok", row
    assert row["checks"] > 15


@pytest.mark.slow
def test_layers_that_are_dropped_at_random_are_refused_with_the_split_that_keeps_them_whole() -> None:
    row = try_structure(_known("transformers:Wav2Vec2ForSequenceClassification"))
    assert row["result"] == "refused" and "random numbers that the forward draws" in row["error"]["why"]
    assert "that works is 'wav2vec2.encoder', which stays whole" in row["error"]["hint"]


@pytest.mark.slow
def test_a_refusal_is_a_line_with_its_reason_and_the_model_is_untouched() -> None:
    row = try_structure(_known("transformers:HubertForSequenceClassification"))
    assert row["result"] == "refused"
    assert all(row["error"][part] for part in ("what", "where", "why", "hint"))
    assert "site-packages" not in str(row)
    assert any("HubertForSequenceClassification" in line and "refused" in line for line in summary([row], []))
