"""Tensors made inside a forward, the limits of types, and numpy's numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

import fxcollab
from tests.speeds import slow_but
from tests.tracing.question_helpers import (
    GIVEN_OR_GUESSED,
    MORE,
    NOTES,
    THE_REAL_FINFO,
    THE_REAL_ONES,
    THE_REAL_TORCH,
    Net,
    X,
    agrees,
    line_at,
    made,
    proven,
    refused,
    targets,
)

# ------------------------------------------------------------------------------ factories, finfo and the like


class LowestNumbers(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x) + torch.finfo(x.dtype).eps * 1000
        return self.tail(torch.softmax(h.masked_fill(x > 0.5, torch.finfo(h.dtype).min), -1))


class LowestNumbersOfAHead(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.c(self.b(self.a(x)))
        limits = torch.finfo(h.dtype)
        return self.d(h.clamp(limits.min, limits.max).masked_fill(x > 0.5, limits.min).softmax(-1) + limits.eps)


@pytest.mark.parametrize("make", [LowestNumbers, LowestNumbersOfAHead])
def test_the_limits_of_a_type_are_those_of_the_input_at_hand(make: type[Net]) -> None:
    model = make()
    train_model = proven(model)
    assert torch.finfo in targets(train_model)
    assert train_model.meta[NOTES] == ()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        train_model.to(dtype)
        assert agrees(train_model, model, MORE.to(dtype))


def test_what_asks_nothing_is_loaded(tmp_path: Any) -> None:
    train_model = made(LowestNumbers, (X,))  # type: ignore[arg-type]
    fxcollab.save(train_model, tmp_path / "saved")
    assert torch.equal(fxcollab.load(tmp_path / "saved")(MORE)[1], train_model(MORE)[1])


FACTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones of sizes": lambda x: torch.ones(x.shape[0], x.shape[1], device=x.device),
    "ones of unpacked sizes": lambda x: torch.ones(*x.shape, dtype=x.dtype),
    "ones of a tuple": lambda x: torch.ones((x.shape[0], 8), dtype=x.dtype, device=x.device),
    "ones of a size": lambda x: torch.ones(x.size()),
    "zeros": lambda x: torch.zeros(x.shape[0], 4).repeat(1, 2),
    "full": lambda x: torch.full((x.shape[0], 1), 2.5),
    "empty": lambda x: torch.empty(x.shape[0], 1, dtype=x.dtype).fill_(3),
    "arange": lambda x: torch.arange(x.shape[0], device=x.device)[:, None],
    "linspace": lambda x: torch.linspace(0, 1, x.shape[0])[:, None],
    "tensor": lambda x: torch.tensor([x.shape[0]], device=x.device),
    "iinfo": lambda x: torch.tensor(torch.iinfo(x.long().dtype).bits),
}


class Makes(Net):
    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = FACTORIES[make]

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.a(x) + self.make(x))


@pytest.mark.parametrize("inputs", GIVEN_OR_GUESSED)
@pytest.mark.parametrize(
    "make", slow_but(["ones of unpacked sizes", "zeros", "arange", "tensor", "iinfo"], FACTORIES)
)
def test_a_tensor_that_is_made_has_the_size_of_the_input_at_hand(make: str, inputs: Any) -> None:
    model = Makes(make)
    train_model = made(model, inputs)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert agrees(train_model, model, MORE)
    assert train_model.meta[NOTES] == ()


@pytest.mark.parametrize("name", ["rand", "randn", "randint"])
@pytest.mark.parametrize("split", slow_but(["b"], ["a", "b", "c"]))
def test_random_tensors_are_drawn_at_every_call(name: str, split: str) -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Any:
            bounds = (0, 9) if name == "randint" else ()
            sizes = (x.shape[0], 1)
            noise = getattr(torch, name)(*bounds, sizes) if bounds else getattr(torch, name)(*sizes, device=x.device)
            return self.d(self.c(self.b(self.a(x)) + noise))

    train_model = proven(Draws(), splits=[split])
    first, second = train_model(MORE)[0], train_model(MORE)[0]
    assert first.shape == (7, 4) and not torch.equal(first, second)


class AsksTheLimits(Net):
    """Asks about what is recorded."""

    def forward(self, x: Tensor) -> Any:
        x = x * 2 if torch.finfo(x.dtype).bits == 32 else x * 3
        return super().forward(x * 2 if len(torch.zeros(x.shape[0], 3)[0]) == 3 else x)


def test_questions_about_what_is_recorded_are_answered() -> None:
    model = AsksTheLimits()
    assert agrees(made(model, (X,)), model, X)
    assert agrees(made(model), model, MORE)


SEEN: list[bool] = []
"""Of no module or class, whose containers hold again what they held before a capture."""


class LooksAround(Net):
    """What others see of torch while the trace lasts."""

    def forward(self, x: Tensor) -> Any:
        import imported_in_a_forward as lazy  # type: ignore[import-not-found]

        real = sys.modules["torch"]
        SEEN.append(real is THE_REAL_TORCH and real.finfo is THE_REAL_FINFO and real.ones is THE_REAL_ONES)
        SEEN.append(lazy.found == (THE_REAL_FINFO, THE_REAL_ONES))
        assert lazy.torch.finfo(torch.float32).bits == 32
        return super().forward(x + torch.finfo(x.dtype).eps + torch.ones(x.shape[0], 1))


@pytest.fixture
def lazily(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes a module that is imported nowhere yet."""

    def write(source: str) -> None:
        (tmp_path / "imported_in_a_forward.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    sys.modules.pop("imported_in_a_forward", None)


def test_torch_itself_is_never_changed(lazily: Callable[[str], None]) -> None:
    lazily("import torch\nfound = (torch.finfo, torch.ones)\n")
    SEEN.clear()
    train_model = proven(LooksAround())
    assert SEEN and all(SEEN)
    assert torch.finfo is THE_REAL_FINFO and torch.ones is THE_REAL_ONES
    assert torch.finfo in targets(train_model) and torch.ones in targets(train_model)


class ImportsEverything(Net):
    def forward(self, x: Tensor) -> Any:
        import imported_in_a_forward  # noqa: F401

        return super().forward(x)


def test_a_module_that_takes_over_the_names_gets_the_real_ones(lazily: Callable[[str], None]) -> None:
    lazily(f"from {__name__} import *\n")
    fxcollab.capture(ImportsEverything(), ["b"])
    lazy = vars(sys.modules["imported_in_a_forward"])
    assert lazy["torch"] is THE_REAL_TORCH and "isinstance" not in lazy


# ------------------------------------------------------------------------------------------ numpy's numbers


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x * np.sqrt(8),
    "times from the left": lambda x: np.sqrt(8) * x,
    "minus from the left": lambda x: np.float64(1) - x,
    "single": lambda x: x / np.float32(0.3),
    "index": lambda x: x + x[:, np.int64(0)][:, None],
    "slice": lambda x: x + x[:, np.int64(0) : np.int64(1)],
    "list": lambda x: x + x[..., [np.int64(0)]],
    "view": lambda x: x.view(-1, np.int64(2), np.int32(4)).flatten(1),
    "view of a list": lambda x: x.reshape([-1, np.int64(2), np.int64(4)]).flatten(1),
    "keyword": lambda x: torch.clamp(x, min=np.float64(-0.5)),
    "comparison": lambda x: x * (x > np.float64(0.5)),
    "in place": lambda x: x.add_(np.float64(1.5)),
    "a constant": lambda x: x * torch.from_numpy(np.arange(8, dtype=np.float32)),
}


class Computes(Net):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.compute(self.a(x)))


@pytest.mark.parametrize(
    "compute", slow_but(["times", "minus from the left", "index", "view", "comparison", "in place"], NUMBERS)
)
def test_numpys_numbers_are_numbers(compute: str) -> None:
    model = Computes(NUMBERS[compute])
    train_model = proven(model)
    assert agrees(train_model, model, MORE)
    found: list[Any] = []
    for node in train_model.graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: found.append(type(leaf).__module__))
    assert "numpy" not in found and "np." not in train_model.code


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x / np.prod(x.shape),
        pytest.param(lambda x: x * np.sqrt(x.shape[-1]), marks=pytest.mark.slow),
        pytest.param(lambda x: x / np.sqrt(x.size(1)), marks=pytest.mark.slow),
        lambda x: np.float64(0.5) * x + np.array(x.shape).sum(),
        lambda x: x * np.maximum(x.shape[0], 3),
    ],
)
def test_what_numpy_computes_of_sizes_is_decided_for_the_example(compute: Callable[[Tensor], Tensor]) -> None:
    train_model = proven(Computes(compute))
    assert any("was taken from an example input" in note for note in train_model.meta[NOTES])


def test_what_numpy_computes_of_a_tensor_is_refused() -> None:
    class Uses(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x * np.linalg.norm(x))  # asks

    error = refused(lambda: made(Uses(), (X,)))
    assert "numpy computes with" in str(error.why)
    assert line_at(error.where, __name__).endswith("# asks")
