"""Modules, parameters, buffers and plain tensors may have names that the library, torch.fx or Python uses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab.codegen.module import CollabGraphModule
from tests.speeds import slow_but

NAMES = ("graph", "code", "meta", "root", "class", "_graph")
MORE = (
    "modes", "constants", "recompute", "in_mode", "batched", "global", "from", "import", "print_readable", "_code",
    "returns_all", "_eval_graph", "_eval_out_spec",
    "_root", "_modes", "_own", "_constants", "_recompute", "_lineno_map", "_tracer_cls", "shape_env",
)  # fmt: skip
ALL = (*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE))


class Child(nn.Module):
    """Has a module called ``name``, behind the first layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.first, self.last = name, nn.Linear(4, 4), nn.Linear(4, 2)
        self.place(name)

    def place(self, name: str) -> None:
        self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def middle(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, self.name)(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(torch.relu(self.first(x))))
        return found


class OfDict(Child):
    def place(self, name: str) -> None:
        self.members = nn.ModuleDict({name: nn.Linear(4, 4)})

    def middle(self, x: Tensor) -> Tensor:
        found: Tensor = self.members[self.name](x)
        return found


class Parameter(Child):
    def place(self, name: str) -> None:
        self.register_parameter(name, nn.Parameter(torch.ones(4)))

    def middle(self, x: Tensor) -> Tensor:
        found: Tensor = x * getattr(self, self.name)
        return found


class Counter(Parameter):
    def place(self, name: str) -> None:
        self.register_buffer(name, torch.zeros(4))

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            getattr(self, self.name).add_(1)
        return super().middle(x)


class Plain(Parameter):
    def place(self, name: str) -> None:
        setattr(self, name, torch.full((4,), 2.0))


class Nested(Child):
    def place(self, name: str) -> None:
        self.add_module(name, Child(name))
        getattr(self, name).last = nn.Linear(4, 4)


def assert_trains_prunes_and_copies(model: nn.Module, split: str) -> None:
    x, keys = torch.randn(3, 4), list(model.state_dict())
    train_model = fxcollab.transform(model, splits=[split], seed=0)
    report = fxcollab.verify(model, train_model, (x,))
    assert report.ok, report
    assert list(train_model.state_dict())[: len(keys)] == keys
    sum(output.sum() for output in train_model(x)).backward()
    assert all(p.grad is not None for p in train_model.parameters())
    for copied in (copy.copy(train_model), copy.deepcopy(train_model), pickle.loads(pickle.dumps(train_model))):
        copied.load_state_dict(train_model.state_dict())
        for one, other in zip(
            fxcollab.all_heads(copied.eval())(x), fxcollab.all_heads(train_model.eval())(x), strict=True
        ):
            assert torch.equal(one, other)
    for head in range(2):
        pruned = fxcollab.prune(train_model, head).eval()
        assert list(pruned.state_dict()) == keys and torch.equal(
            pruned(x), fxcollab.all_heads(train_model.eval())(x)[head]
        )
        fxcollab.prune(train_model, head, into=copy.deepcopy(model))
    assert isinstance(train_model.graph, fx.Graph) and isinstance(train_model.root, nn.Module)
    train_model.double()(x.double())
    assert all(p.dtype == torch.float64 for p in model.parameters())


KINDS = (Child, OfDict, Parameter, Counter, Plain, Nested)
CASES = [
    pytest.param(kind, name, id=f"{kind.__name__}, {name}")
    for kind in KINDS
    for name in (*NAMES, *(MORE if kind in (Child, Parameter) else ()))
]
FAST = [f"{kind.__name__}, {name}" for kind in KINDS for name in ("graph", "class", "root")]


@pytest.mark.parametrize(("kind", "name"), slow_but(FAST, CASES))
@pytest.mark.filterwarnings("ignore:no module initialises", "ignore:.*no module initialises")
def test_a_name_of_the_library_is_free_for_the_model(kind: type[Child], name: str) -> None:
    assert_trains_prunes_and_copies(kind(name), "first")


@pytest.mark.parametrize("name", slow_but(["graph", "class"], ALL))
def test_a_split_at_a_module_and_inside_one_with_such_a_name(name: str) -> None:
    assert_trains_prunes_and_copies(Child(name), name)
    assert_trains_prunes_and_copies(Nested(name), f"{name}.{name}")


@pytest.mark.parametrize("name", ["graph", "class"])
def test_a_model_with_such_names_is_captured_again_and_compiled(name: str) -> None:
    captured = fxcollab.capture(Child(name))
    assert_trains_prunes_and_copies(captured, "first")
    train_model = fxcollab.transform(captured.float(), splits=["first"])
    x = torch.randn(3, 4)
    compiled = torch.compile(train_model, backend="eager", fullgraph=True)
    for one, other in zip(
        fxcollab.all_heads(compiled.eval())(x), fxcollab.all_heads(train_model.eval())(x), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [Child, Counter])
def test_branches_with_such_names_are_computed_again(kind: type[Child]) -> None:
    model, x = kind("graph"), torch.randn(3, 4)
    train_model = fxcollab.transform(model, splits=["first"], recompute="heads")
    assert fxcollab.verify(model, train_model, (x,)).ok


def test_a_model_with_such_names_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = Child("graph"), torch.randn(3, 4)
    train_model = fxcollab.transform(model, splits=["first"])
    fxcollab.save(train_model, tmp_path / "run")
    loaded = fxcollab.load(tmp_path / "run", model=Child("graph"))
    for one, other in zip(
        fxcollab.all_heads(loaded.eval())(x), fxcollab.all_heads(train_model.eval())(x), strict=True
    ):
        assert torch.equal(one, other)


def test_a_module_with_such_a_name_can_be_replaced() -> None:
    train_model: CollabGraphModule = fxcollab.transform(Child("meta"), splits=["first"])
    setattr(train_model, "meta", nn.Identity())  # noqa: B010
    assert isinstance(train_model.get_submodule("meta"), nn.Identity) and isinstance(train_model.meta, dict)
    train_model(torch.randn(3, 4))
