"""Objects that are neither tensors nor containers: as arguments of modules, and as values that cross splits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import has_torch_function, has_torch_function_unary
from torch.utils import _pytree as pytree

import fxcollab

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def proved(model: nn.Module, *splits: str, **options: Any) -> fxcollab.CollabGraphModule:
    train_model = fxcollab.transform(model, splits=splits, example_inputs=(X,), seed=0, **options)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    return train_model


class Settings:
    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale


@dataclass
class Frozen:
    scale: float = 2.0
    kind: type = float


class Pair(metaclass=fx.ProxyableClassMeta):
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Scaled(nn.Module):
    """Kept whole; computes with an object that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, settings: Any) -> Tensor:
        y: Tensor = self.linear(x)
        return y * settings.scale


class Configured(nn.Module):
    of_class = Settings(3.0)

    def __init__(self, settings: Any = None) -> None:
        super().__init__()
        self.a, self.block, self.b = nn.Linear(4, 4), Scaled(), nn.Linear(4, 2)
        self.settings = settings

    def forward(self, x: Tensor) -> Any:
        return self.b(self.block(self.a(x), self.settings or self.of_class))


@pytest.mark.parametrize("settings", [Settings(), Frozen(), Pair(0.5), None])
@pytest.mark.parametrize("split", ["a", "block"])
def test_an_object_that_the_model_holds_may_be_handed_to_a_module(settings: Any, split: str) -> None:
    train_model = proved(Configured(settings), split)
    assert f"self.{'of_class' if settings is None else 'settings'}" in train_model.code


def test_an_object_of_an_opened_module_may_be_handed_on() -> None:
    proved(nn.Sequential(Configured(Settings()), nn.Linear(2, 2)), "0.a")


class Changed(Configured):
    def forward(self, x: Tensor) -> Any:
        self.settings.scale = x.shape[1] / 2
        return super().forward(x)


def test_an_object_that_the_forward_changes_before_it_hands_it_on_is_refused() -> None:
    with pytest.raises(fxcollab.CaptureError) as error:
        fxcollab.transform(Changed(Settings()), splits=["a"], example_inputs=(X,))
    assert "changes settings" in str(error.value.why)


def test_an_object_that_holds_a_parameter_of_the_model_is_refused() -> None:
    model = Configured(Settings())
    model.settings.scale = model.a.bias
    with pytest.raises(fxcollab.CaptureError, match=r"'settings', which the forward hands on, holds"):
        fxcollab.transform(model, splits=["a"], example_inputs=(X,))


class CountsInIt(Scaled):
    def forward(self, x: Tensor, settings: Any) -> Tensor:
        settings.scale += 1
        return super().forward(x, settings)


def test_an_object_that_every_head_would_change_is_refused() -> None:
    model = Configured(Settings())
    model.block = CountsInIt()
    with pytest.raises(fxcollab.SplitError, match="'block' changes 'settings'"):
        fxcollab.transform(model, splits=["a"], example_inputs=(X,))


class InSlots:
    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Unflattened(nn.Module):
    def forward(self, x: Tensor, spec: pytree.TreeSpec) -> Tensor:
        return x * pytree.tree_unflatten([2.0], spec)[0]


def test_a_structure_may_be_handed_on() -> None:
    model = Configured(pytree.tree_structure([1]))
    model.block = Unflattened()
    proved(model, "a")


ELSEWHERE = Settings(0.5)


class OfAGlobal(Configured):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.block(self.a(x), ELSEWHERE))


def test_an_object_that_the_model_does_not_hold_is_made_where_its_class_is_called() -> None:
    with pytest.raises(fxcollab.CaptureError, match="can't be captured") as caught:
        fxcollab.transform(OfAGlobal(), splits=["a"])
    assert "Settings can't be an argument of a node" in (caught.value.why or "")


class Memory:
    """As caches of keys and values are: modules put into it what others read."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        memory.kept.append(self.linear(x))
        return sum(memory.kept, x)


class WithMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Remembers(), Remembers(), Remembers()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        memory = Memory()
        return self.out(self.c(self.b(self.a(x, memory), memory), memory))


@pytest.mark.parametrize("splits", [["a"], ["b"], ["a", "b"]])
def test_an_object_that_is_made_in_the_forward_is_made_at_every_call(splits: list[str]) -> None:
    proved(WithMemory(), *splits)


class Makes(nn.Module):
    """Returns an object that holds tensors."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        memory = self.kind()
        memory.kept.append(self.linear(x))
        return memory


class Returned(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.make, self.a, self.b, self.c = Makes(kind), nn.Linear(4, 4), Remembers(), Remembers()

    def forward(self, x: Tensor) -> Any:
        memory = self.make(x)
        return self.c(self.b(self.a(x), memory), memory)


@pytest.mark.parametrize("kind", [Memory, InSlots])
@pytest.mark.parametrize("splits", [["a"], ["a", "b"]])
def test_gradients_of_an_object_that_crosses_are_rescaled_and_heads_do_not_share_what_they_add(
    splits: list[str], kind: Any
) -> None:
    proved(Returned(kind), *splits)


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Cyclic(Output):
    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self.me = self


@dataclass(eq=True)
class Fields:
    logits: Tensor


class Ends(nn.Linear):
    make: Callable[[Tensor], Any] = Output

    def forward(self, x: Tensor) -> Any:
        return type(self).make(super().forward(x))


@pytest.mark.parametrize("make", [Output, Slotted, Cyclic, Fields])
def test_outputs_of_plain_classes_are_compared_by_what_they_hold(make: Any) -> None:
    last = type("Last", (Ends,), {"make": make})(4, 2)
    model = nn.Sequential(nn.Linear(4, 4), last)
    report = fxcollab.verify(model, fxcollab.transform(model, splits=["0"], seed=0), (X,))
    report.raise_if_failed()
    gradients = next(check for check in report if check.name.startswith("gradients"))
    assert not gradients.detail.startswith("0 tensors")


class Numbers(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return x, x.detach().numpy(), float("nan")


def test_arrays_and_nan_among_outputs_are_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Numbers(4, 2))
    fxcollab.verify(model, fxcollab.transform(model, splits=["0"], seed=0), (X,)).raise_if_failed()


def test_an_output_of_a_plain_class_with_another_value_is_a_difference() -> None:
    last = type("Last", (Ends,), {"make": Output})(4, 2)
    model = nn.Sequential(nn.Linear(4, 4), last)
    train_model = fxcollab.transform(model, splits=["0"], seed=0)
    rescale = next(node for node in train_model.graph.nodes if node.name == "rescale")
    rescale.target = lambda value, factor: value * 2
    train_model.recompile()
    report = fxcollab.verify(model, train_model, (X,))
    assert any("differs by up to" in check.detail for check in report if not check.ok)


# ----------------------------------------------------------------------------------- tensors of other classes


class Marked(Tensor):
    pass


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x if x.layout is torch.strided else x.to_dense()))


@pytest.mark.parametrize("example", [X.as_subclass(Marked), X.relu().to_sparse()])
def test_examples_may_be_of_a_subclass_or_sparse(example: Tensor) -> None:
    model = Dense()
    train_model = fxcollab.transform(model, splits=["a"], example_inputs=(example,), seed=0)
    fxcollab.verify(model, train_model, (example,)).raise_if_failed()


class AsksForOverrides(Dense):
    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(x * 2 if self.ask(x) else x)


@pytest.mark.parametrize("ask", [lambda x: has_torch_function((x,)), lambda x: has_torch_function_unary(x)])
def test_proxies_override_no_more_than_tensors_do(ask: Callable[[Tensor], bool]) -> None:
    proved(AsksForOverrides(ask), "a")


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def forward(self, x: Tensor) -> Any:
        features = self.layers[:2](x)
        return self.layers[2:](features), features


@pytest.mark.parametrize("splits", [["layers.1", "layers.2"], ["layers.0", "layers.2"]])
def test_a_slice_of_modules_only_has_what_the_model_has(splits: list[str]) -> None:
    proved(Sliced(), *splits)


class CachesAMethod(Dense):
    @functools.lru_cache(None)  # noqa: B019  # as it is written
    def doubled(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Any:
        return self.b(self.doubled(self.a(x)))


def test_a_cached_method_of_tensors_keeps_no_proxies() -> None:
    proved(CachesAMethod(), "a")


class UnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.chain = nn.Sequential(self.blocks[0], nn.Sequential(*self.blocks[1:]))

    def forward(self, x: Tensor) -> Any:
        return self.chain(x)


@pytest.mark.parametrize("splits", [["blocks.0", "blocks.1"], ["chain.0", "chain.1.0"]])
def test_a_module_may_be_named_by_each_of_its_names(splits: list[str], recwarn: pytest.WarningsRecorder) -> None:
    proved(UnderTwoNames(), *splits)
    assert not [warning for warning in recwarn if "no module initialises" in str(warning.message)]
