"""A training model stands in for its original: attributes, names, parameter groups."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.errors import StateError
from tests.references import SmallConvNet
from tests.speeds import slow_but


class Configured(SmallConvNet):
    """Has attributes and methods that scripts ask for."""

    kind = "small"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.scale = {"classes": 5}, torch.tensor(2.0)
        self.token = nn.Parameter(torch.zeros(5))
        self.calls = 0

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def no_weight_decay(self) -> set[str]:
        return {"tok*", "conv1.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|bn1", "blocks": [(r"^layer(\d+)", None), (r"^fc|token", (99999,))]}

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, classes: int) -> None:
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.token


def made(**options: Any) -> tuple[Configured, fxcollab.CollabGraphModule]:
    torch.manual_seed(0)
    model = Configured()
    return model, fxcollab.transform(model, splits=["layer1", "layer2"], seed=0, **options)


def itself(model: Any) -> Any:
    return model


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIES = slow_but([itself], [itself, copy.deepcopy, copy.copy, unpickled])


@pytest.mark.parametrize("copied", COPIES)
def test_attributes_are_read_through(copied: Any) -> None:
    _, train_model = made()
    train_model = copied(train_model)
    assert train_model.config == {"classes": 5} and train_model.kind == "small"
    assert train_model.device == torch.device("cpu") and not hasattr(train_model, "something_else")
    fxcollab.original(train_model).config = {"classes": 6}
    assert train_model.config == {"classes": 6}
    assert type(train_model(torch.randn(2, 3, 12, 12))) is tuple


def test_what_is_set_on_the_training_model_stays_there() -> None:
    model, train_model = made()
    train_model.calls = 7
    assert (train_model.calls, model.calls) == (7, 0)
    assert "calls" not in vars(made()[1])


def test_a_captured_model_is_read_as_it_was() -> None:
    assert not hasattr(fxcollab.capture(Configured()), "config")


def test_other_methods_are_those_of_the_original() -> None:
    model, train_model = made()
    assert not hasattr(train_model, "reset_classifier")  # scripts that look for it find none
    with pytest.raises(AttributeError, match=r"'reset_classifier'.*training model.*fxcollab.original\(train_model\)"):
        train_model.reset_classifier(3)
    with pytest.raises(AttributeError, match="no attribute 'something_else'"):
        train_model.something_else()
    del train_model.fc
    assert not hasattr(train_model, "fc")
    assert fxcollab.original(train_model) is model and model.fc.out_features == 5


def test_values_that_can_be_called_are_values() -> None:
    class Net(SmallConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.norm_layer, self.activation = partial(nn.LayerNorm, eps=1e-6), torch.relu

    train_model = fxcollab.transform(Net(), splits="layer1")
    assert train_model.norm_layer.keywords == {"eps": 1e-6} and train_model.activation is torch.relu


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(
    "make", [fx.symbolic_trace, lambda model: fxcollab.prune(fxcollab.transform(model, splits="layer1"))]
)
def test_copies_of_models_made_of_graph_modules_can_be_called(make: Any, copied: Any) -> None:
    train_model = copied(fxcollab.transform(make(SmallConvNet()), splits="layer1", seed=0))
    assert len(train_model(torch.randn(2, 3, 12, 12))) == 2


def test_methods_that_know_names_answer_for_all_branches() -> None:
    model, train_model = made(peers="others")
    assert train_model.get_classifier() is model.fc
    found = train_model.no_weight_decay()
    assert found == {"conv1.weight", "tok*", "others.b0_1.token", "others.b1_0.token", "others.b1_1.token"}


def test_parameters_are_grouped_by_depth_as_in_the_original() -> None:
    timm_optim = pytest.importorskip("timm.optim")
    model, train_model = made()

    def groups(of: nn.Module) -> dict[str, tuple[float, float]]:
        optimizer = timm_optim.create_optimizer_v2(of, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
        names = {id(parameter): name for name, parameter in of.named_parameters()}
        return {
            names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    expected, found = groups(model), groups(train_model)
    assert found.keys() == dict(train_model.named_parameters()).keys()
    assert {name: found[name] for name in found if found[name] != expected[fxcollab.original_name(name)]} == {}
    assert len(set(expected.values())) > 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("peers.b1.layer3.0.conv1.weight", "layer3.0.conv1.weight"),
        ("peers.b0_1.fc", "fc"),
        ("layer1.0.weight", "layer1.0.weight"),
        ("peers.b1", "peers.b1"),
        ("peers.b01.fc", "peers.b01.fc"),
        ("encoder.peers.b1.fc", "encoder.peers.b1.fc"),
        ("peers.bias", "peers.bias"),
    ],
)
def test_names_in_the_original(name: str, expected: str) -> None:
    assert fxcollab.original_name(name) == expected


@pytest.mark.parametrize("form", ["tensors", "names", "pairs", "a generator", "one tensor"])
def test_groups_of_the_original_take_the_peers_in(form: str) -> None:
    model, train_model = made()
    parameters = dict(model.named_parameters())
    heads = [name for name in parameters if name.startswith("fc")]
    forms: dict[str, Any] = {
        "tensors": [parameters[name] for name in heads],
        "names": heads,
        "pairs": [(name, parameters[name]) for name in heads],
        "a generator": (parameters[name] for name in heads),
        "one tensor": parameters["fc.weight"],
    }
    rest = [parameter for name, parameter in parameters.items() if name not in heads]
    first, second = fxcollab.parameter_groups(train_model, [{"params": forms[form], "lr": 0.1}, {"params": rest}])
    assert first["lr"] == 0.1 and "lr" not in second
    count = 4 if form == "one tensor" else 8
    assert len(first["params"]) == count and first["params"][0] is model.fc.weight
    if count == 8:
        both = [*first["params"], *second["params"]]
        assert {id(p) for p in both} == {id(p) for p in train_model.parameters()} and len(both) == len(
            list(train_model.parameters())
        )
    torch.optim.SGD([first, second], lr=0.01)


def test_groups_of_another_model_are_refused() -> None:
    _, train_model = made()
    with pytest.raises(StateError, match=r"(?s)'fc.weigth'.*did you mean fc.weight"):
        fxcollab.parameter_groups(train_model, [{"params": ["fc.weigth"]}])
    with pytest.raises(StateError, match="a tensor that is not a parameter"):
        fxcollab.parameter_groups(train_model, [{"params": SmallConvNet().parameters()}])
    with pytest.raises(StateError, match="not a training model"):
        fxcollab.original(SmallConvNet())


def test_a_bare_tensor_is_one_example_input() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = SmallConvNet()
    train_model = fxcollab.transform(model, splits="layer1", example_inputs=x)
    assert fxcollab.verify(model, train_model, x).ok
    assert fxcollab.training_costs(model, splits="layer1", example_inputs=x) == fxcollab.training_costs(
        model, splits="layer1", example_inputs=(x,)
    )


def test_a_plain_checkpoint_and_one_of_another_tree_are_told_as_such() -> None:
    model, train_model = SmallConvNet(), fxcollab.transform(SmallConvNet(), splits="layer1", seed=0)
    plain = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(StateError, match="that of a single network") as caught:
        train_model.load_state_dict(plain)
    assert "fxcollab.original(train_model).load_state_dict(checkpoint)" in str(caught.value.hint)
    fxcollab.original(train_model).load_state_dict(plain)
    assert torch.equal(train_model.state_dict()["fc.weight"], plain["fc.weight"])
    other = fxcollab.transform(SmallConvNet(), splits=["layer1", "layer2"], seed=0).state_dict()
    with pytest.raises(StateError, match="with 4 heads, this one has 2") as caught:
        train_model.load_state_dict(other)
    assert "prune_state_dict(checkpoint, head=0)" in str(caught.value.hint)
    assert "strict=False" in str(caught.value.hint)
    assert train_model.load_state_dict(plain, strict=False).missing_keys


@pytest.mark.parametrize(
    ("saved", "resumed", "fresh"), [(2, 4, {"b2", "b3"}), pytest.param(4, 2, set(), marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_another_number_of_heads_is_resumed(saved: int, resumed: int, fresh: set[str]) -> None:
    def made(heads: int, seed: int) -> fxcollab.CollabGraphModule:
        return fxcollab.transform(SmallConvNet(), "simple", ["layer1"], heads=heads, seed=seed)

    checkpoint = {name: value + 1 for name, value in made(saved, 0).state_dict().items()}
    train_model = made(resumed, 1)
    expected = {name: value.clone() for name, value in train_model.state_dict().items()}
    expected |= {name: value for name, value in checkpoint.items() if name in expected}
    missing = train_model.load_state_dict(checkpoint, strict=False).missing_keys
    assert all(torch.equal(value, expected[name]) for name, value in train_model.state_dict().items())
    assert {name.split(".")[1] for name in missing} == fresh


def test_other_errors_of_loading_are_torchs() -> None:
    _, train_model = made()
    state = train_model.state_dict()
    train_model.load_state_dict(state)
    del state["peers.b1.layer2.1.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        train_model.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "why"), [("layer2", "it lacks layer2.0, layer2.1"), ("conv1", "it has bn1, layer1.0, layer1.1 as well")]
)
def test_a_checkpoint_of_other_splits_says_which_modules_differ(saved: str, why: str) -> None:
    train_model = fxcollab.transform(SmallConvNet(), splits=["layer1"])
    other = fxcollab.transform(SmallConvNet(), splits=[saved])
    with pytest.raises(StateError, match="other modules in its branches") as caught:
        train_model.load_state_dict(other.state_dict())
    assert why in str(caught.value.why) and caught.value.where == "peers.b1"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_a_checkpoint_of_a_wrapper_says_what_to_take_away(prefix: str) -> None:
    _, train_model = made()
    state = {f"{prefix}{name}": value for name, value in train_model.state_dict().items()}
    with pytest.raises(StateError, match="that of a module around the training model") as caught:
        train_model.load_state_dict(state)
    names = eval(str(caught.value.hint).partition(": ")[2], {"checkpoint": state})
    train_model.load_state_dict(names)


def test_parameters_alone_are_one_group() -> None:
    model, train_model = made()
    [group] = fxcollab.parameter_groups(train_model, model.parameters())
    assert {id(p) for p in group["params"]} == {id(p) for p in train_model.parameters()}
