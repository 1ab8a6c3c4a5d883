"""Arguments of other types than public functions take: refused by name, before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcollab
from fxcollab.arguments import fits
from fxcollab.errors import ArgumentTypeError, CaptureError, FxCollabError

OPERATORS = {"rescale", "private_copy"}  # stand in users' forwards, where proxies are handed to them
FUNCTIONS = {
    name: value for name, value in vars(fxcollab).items() if name in fxcollab.__all__ and inspect.isfunction(value)
}


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        result: torch.Tensor = self.b(self.a(x))
        return result


def parameters() -> Iterator[tuple[str, str]]:
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters.values():
            if name not in OPERATORS and parameter.kind is not parameter.VAR_KEYWORD:
                yield name, parameter.name


@pytest.fixture(scope="module")
def others() -> dict[str, Any]:
    """Arguments of their types, by name."""
    tree, train_model = fxcollab.HeadTree.from_heads(("a",), [(0,), (1,)]), fxcollab.transform(Net, splits=["a"])
    captured = fxcollab.capture(Net(), ["a"])
    return {
        "train_model": train_model, "part": train_model, "captured": captured, "model": Net(), "tree": tree,
        "partition": fxcollab.partition(captured, tree), "directory": "nowhere", "checkpoint": {}, "batches": [],
        "metric": len, "name": "x", "plan": {}, "groups": [],
    }  # fmt: skip


@pytest.mark.parametrize(("function", "parameter"), [*parameters()])
def test_every_argument_of_every_public_function_is_checked(
    function: str, parameter: str, others: dict[str, Any]
) -> None:
    signature = inspect.signature(FUNCTIONS[function])
    required = [each.name for each in signature.parameters.values() if each.default is each.empty]
    given = {each: others[each] for each in required if each in others and each != parameter}
    with pytest.raises(ArgumentTypeError) as raised:
        FUNCTIONS[function](**given, **{parameter: object()})
    assert raised.value.what == f"{parameter} is of type object."
    assert raised.value.where == f"fxcollab.{function}({parameter}=...)"
    assert raised.value.why == f"its type is {signature.parameters[parameter].annotation}"


def test_nothing_is_done_before_arguments_are_refused(tmp_path: Path) -> None:
    train_model = fxcollab.transform(Net, splits=["a"], seed=0)
    with pytest.raises(TypeError, match="page is of type bytes"):
        fxcollab.save(train_model, tmp_path / "made", page=b"")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("head", [1.0, True, None, "1", torch.ones(2)])
def test_a_head_is_an_integer(head: Any) -> None:
    state = fxcollab.transform(Net, splits=["a"], seed=0).state_dict()
    with pytest.raises(ArgumentTypeError, match="head is of type"):
        fxcollab.prune_state_dict(state, head)


def test_integers_of_other_libraries_are_taken() -> None:
    state = fxcollab.transform(Net, splits=["a"], seed=0).state_dict()
    expected = fxcollab.prune_state_dict(state, 1)
    best = torch.tensor([3.0, 2.0]).argmin()
    assert all(torch.equal(value, expected[key]) for key, value in fxcollab.prune_state_dict(state, best).items())  # type: ignore[arg-type]


def test_a_list_of_something_else_is_described() -> None:
    with pytest.raises(ArgumentTypeError, match="splits is of type list of NoneType, str"):
        fxcollab.transform(Net, splits=["a", None])  # type: ignore[list-item]


def test_a_call_that_lacks_an_argument_says_what_python_says() -> None:
    with pytest.raises(TypeError, match=r"prune\(\) missing 1 required positional argument: 'train_model'"):
        fxcollab.prune()  # type: ignore[call-arg]


def test_a_factory_that_makes_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="returned something of type int, not a module"):
        fxcollab.transform(Net(), splits=["a"], factory=lambda: 5)  # type: ignore[arg-type, return-value]


MODEL = fxcollab.transform(Net(), splits=["a"], init="copy-anyway")
PAIR = (torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxcollab.evaluate_heads(MODEL, [], lambda output, target: output.argmax(1) != target),
        lambda: fxcollab.evaluate_heads(MODEL, [1], lambda output, target: output.argmax(1) != target),  # type: ignore[list-item]
        lambda: fxcollab.evaluate_heads(MODEL, [PAIR], lambda output, target: (output.argmax(1) != target).sum()),
        lambda: fxcollab.parallel_plan(MODEL, {1: 2}),  # type: ignore[dict-item]
        lambda: fxcollab.parameter_groups(MODEL, [{}]),
        lambda: fxcollab.parameter_groups(MODEL, torch.tensor(2)),
        lambda: fxcollab.ONELoss(-1, 2),
        lambda: fxcollab.ONELoss(3, 0),
        lambda: fxcollab.ONELoss(None, 2),  # type: ignore[arg-type]
        lambda: fxcollab.KDCLLoss(ensemble=()),  # type: ignore[arg-type]
        lambda: fxcollab.KDCLLoss(ensemble=[]),  # type: ignore[arg-type]
        lambda: fxcollab.CollaborativeLoss(temperature=10**400),
        lambda: fxcollab.CollaborativeLoss(detach=torch.zeros(2)),  # type: ignore[arg-type]
        lambda: fxcollab.CollaborativeLoss(class_weights=torch.zeros(2)),  # type: ignore[arg-type]
    ],
)
def test_values_that_functions_can_not_use_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(FxCollabError):
        call()


def test_large_whole_numbers_count_as_floats() -> None:
    assert torch.isfinite(fxcollab.MutualLoss(weight=10**30)(MODEL(PAIR[0]), PAIR[1]))
    with pytest.raises(FxCollabError, match="its square overflows"):
        fxcollab.CollaborativeLoss(temperature=10**30)(MODEL(PAIR[0]), PAIR[1])


def test_numbers_are_not_booleans_and_texts_are_not_lists() -> None:
    assert fits(1, float) and fits(1, int) and not fits(True, float) and not fits(1, bool)
    assert not fits("ab", list[str]) and not fits(1.0, int)


@pytest.mark.slow
def test_public_functions_compile_as_they_are() -> None:
    train_model = fxcollab.transform(Net, splits=["a"], seed=0)

    def step(x: torch.Tensor) -> torch.Tensor:
        first, second = fxcollab.all_heads(train_model)(x)
        return first + second

    x = torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x), step(x))
