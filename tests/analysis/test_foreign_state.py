"""State that modules reach without registering it: it is the branch's own, or refused."""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab import SplitError
from tests.speeds import slow_but
from tests.untouched import Untouched


def called(held: Any, x: Tensor) -> Tensor:
    """Computes with a module, or with a function."""
    result: Tensor = held(x)
    return result


def weighed(held: Any, x: Tensor) -> Tensor:
    """Computes with a weight."""
    return F.linear(x, held)


def unused(held: Any, x: Tensor) -> Tensor:
    return x


class Holder(nn.Module):
    """Kept whole; its forward computes with what it holds, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.held: Any = None
        self.read: Callable[[Any, Tensor], Tensor] = unused

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x)) + self.read(self.held, x)


class Holding(nn.Module):
    """``holder`` holds what it is given; ``spare`` is never used, and ``pair`` is opened where it holds a split."""

    def __init__(self, hold: Callable[[Any], Any] = lambda model: None, read: Any = unused) -> None:
        super().__init__()
        self.a, self.holder = nn.Linear(4, 4), Holder()
        self.pair, self.spare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.holder.read = read
        self.holder.__dict__["held"] = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.holder(self.a(x * self.table)))


class Slot:
    def __init__(self, value: Any) -> None:
        self.value = value

    def call(self, x: Tensor) -> Tensor:
        result: Tensor = self.value(x)
        return result


def default_of(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


def only_by_keyword(weight: Tensor) -> Callable[..., Tensor]:
    def function(x: Tensor, *, weight: Tensor = weight) -> Tensor:
        return F.linear(x, weight)

    return function


def closing_over(value: Any) -> Callable[..., Tensor]:
    return lambda x: value(x) if callable(value) and not isinstance(value, Tensor) else F.linear(x, value)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def proven(model: nn.Module, *splits: str, pattern: Any = "hierarchical") -> fxcollab.CollabGraphModule:
    """The training model, which is accepted and passes the whole proof; no branch holds a parameter of another."""
    train_model = fxcollab.transform(model, pattern, splits, init="copy-anyway", seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    names = [name for name, _ in train_model.named_parameters(remove_duplicate=False) if name.startswith("peers.b1.")]
    assert names
    for name in names:
        assert train_model.get_parameter(name) is not model.get_parameter(name.removeprefix("peers.b1.")), name
    return train_model


def unregistered(model: nn.Module, *splits: str, how: str = "without registering it") -> SplitError:
    """The refusal, after which the model is as it was."""
    before = Untouched(model)
    with pytest.raises(SplitError, match=how) as caught:
        fxcollab.transform(model, splits=splits, init="copy-anyway")
    assert before.differences() == []
    return caught.value


SHARED = "the branches would share {!r}, and its gradient could not be rescaled to their mean"
OF_HEAD_0 = "globals, weak references and opened modules aren't copied: every head would use head 0's {!r}"
OF_EACH = "each branch behind has a {!r} of its own, of which it would reach head 0's"


@pytest.mark.parametrize(
    ("hold", "read"),
    [
        (lambda model: model.a.weight, weighed),
        pytest.param(lambda model: (model.a.weight,), lambda held, x: F.linear(x, held[0]), marks=pytest.mark.slow),
        (lambda model: [1, [model.a.weight]], lambda held, x: F.linear(x, held[1][0])),
        pytest.param(
            lambda model: {"key": model.a.weight}, lambda held, x: F.linear(x, held["key"]), marks=pytest.mark.slow
        ),
        (lambda model: {model.a.weight: 1}, lambda held, x: F.linear(x, *held)),
        pytest.param(lambda model: {model.a.weight}, lambda held, x: F.linear(x, *held), marks=pytest.mark.slow),
        pytest.param(
            lambda model: deque([model.a.weight]), lambda held, x: F.linear(x, *held), marks=pytest.mark.slow
        ),
        (lambda model: Slot([model.a.weight]), lambda held, x: F.linear(x, held.value[0])),
        (lambda model: partial(F.linear, weight=model.a.weight), called),
        pytest.param(
            lambda model: partial(torch.matmul, model.a.weight),
            lambda held, x: held(x.t()).t(),
            marks=pytest.mark.slow,
        ),
        (lambda model: closing_over(model.a.weight), called),
        pytest.param(lambda model: default_of(model.a.weight), called, marks=pytest.mark.slow),
        (lambda model: only_by_keyword(model.a.weight), called),
        (lambda model: model.a.weight.matmul, lambda held, x: held(x.t()).t()),
        (lambda model: weakref.ref(model.a.weight), lambda held, x: F.linear(x, held())),
        pytest.param(
            lambda model: nn.ParameterList([model.a.weight]),
            lambda held, x: F.linear(x, held[0]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_parameter_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, read: Any) -> None:
    error = unregistered(Holding(hold, read), "a")
    assert error.what == "'holder' reads 'a.weight' without registering it."
    assert str(error.where).startswith("node 'holder' (call_module holder)")
    assert error.why == SHARED.format("a.weight")
    assert "on it, as in self.w = w (ties are kept)" in str(error.hint)
    assert "or put the splits behind both" in str(error.hint)


def test_what_the_hint_says_makes_it_right() -> None:
    model = Holding(read=lambda held, x: x)
    model.holder.w = model.a.weight
    model.holder.read = types.MethodType(lambda self, held, x: F.linear(x, self.w), model.holder)
    train_model = fxcollab.transform(model, splits=["a"], init="copy-anyway")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    proven(Holding(lambda model: [model.a.weight], lambda held, x: F.linear(x, held[0])), "holder")


@pytest.mark.parametrize(
    ("hold", "read"),
    [
        (lambda model: model.a, called),
        pytest.param(lambda model: [model.a], lambda held, x: held[0](x), marks=pytest.mark.slow),
        pytest.param(lambda model: partial(model.a), called, marks=pytest.mark.slow),
        (lambda model: model.a.forward, called),
        (lambda model: Slot(model.a).call, called),
        (lambda model: closing_over(model.a), called),
        pytest.param(lambda model: weakref.ref(model.a), lambda held, x: held()(x), marks=pytest.mark.slow),
    ],
)
def test_a_module_of_the_trunk_that_a_head_reaches_unregistered_is_refused(hold: Any, read: Any) -> None:
    error = unregistered(Holding(hold, read), "a")
    assert error.what == "'holder' reads 'a.bias' without registering it."
    assert error.why == SHARED.format("a.bias")


def test_what_a_module_inside_a_kept_one_reads_is_named_by_the_call() -> None:
    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.held[0]

    model = Holding()
    model.holder.inner = Inner(4, 4)
    model.holder.inner.held = [model.a.bias]
    error = unregistered(model, "a")
    assert error.what == "'holder' reads 'a.bias' without registering it."


def test_frozen_parameters_count_they_may_be_thawed() -> None:
    model = Holding(lambda model: (model.a.weight,), lambda held, x: F.linear(x, held[0]))
    model.a.requires_grad_(False)
    unregistered(model, "a")


def test_registered_state_that_only_a_head_reaches_is_refused_where_it_doesnt_register_it() -> None:
    model = Holding(lambda model: [model.spare], lambda held, x: held[0](x))
    assert "'spare.bias'" in str(unregistered(model, "a").why)


@pytest.mark.parametrize("split", ["a", "pair.0"])
def test_through_the_model_around_a_module_reaches_what_it_has_once(split: str) -> None:
    """The model isn't copied for peers; a trunk may reach the trunk through it."""
    error = unregistered(Holding(lambda model: [model], lambda held, x: held[0].pair[1](x)), split)
    assert error.what == "'holder' reads 'pair.1.bias' without registering it."
    assert error.why == (OF_HEAD_0 if split == "a" else OF_EACH).format("pair.1.bias")
    trunks = Holding(lambda model: [model], lambda held, x: held[0].a(x))
    if split == "a":
        assert unregistered(trunks, split).why == SHARED.format("a.bias")
    else:
        proven(trunks, split)


def test_a_reference_to_the_model_around_is_no_reason_to_refuse() -> None:
    train_model = proven(Holding(lambda model: [model]), "a")
    assert train_model.get_submodule("peers.b1.holder").held[0] is train_model.holder.held[0]


def test_a_trunk_that_reaches_a_heads_own_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair], lambda held, x: held[0](x)), "holder")
    assert error.what == "'holder' reads 'pair.0.bias' without registering it."
    assert error.why == OF_EACH.format("pair.0.bias")


def test_a_branch_that_reaches_what_lies_behind_the_next_split_is_refused() -> None:
    error = unregistered(Holding(lambda model: [model.pair], lambda held, x: held[0](x)), "a", "holder")
    assert error.why == OF_EACH.format("pair.0.bias")


def test_a_module_that_is_opened_isnt_copied_with_what_refers_to_it() -> None:
    error = unregistered(Holding(lambda model: [model.pair], lambda held, x: held[0][0](x)), "a", "pair.0")
    assert error.what == "'holder' reads 'pair.0.bias' without registering it."
    assert error.why == OF_HEAD_0.format("pair.0.bias")


def in_a_function(model: nn.Module) -> None:
    model.holder.forward = lambda x: model.holder.inner(x)


def in_a_global(model: nn.Module) -> None:
    scope: dict[str, Any] = {"holder": model.holder}
    exec("holder.forward = lambda x: holder.inner(x)", scope)


def in_a_class(model: nn.Module) -> None:
    class Closes(Holder):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = model.holder.inner(x)
            return result

    model.holder.__class__ = Closes


@pytest.mark.parametrize("patch", [in_a_function, in_a_global, in_a_class])
def test_what_isnt_copied_is_refused_where_the_very_module_is_reached_through_it(patch: Any) -> None:
    model = Holding()
    patch(model)
    error = unregistered(model, "a", how="elsewhere than where it is registered")
    assert error.what.startswith("'holder' reads 'holder.")
    assert str(error.why).startswith("globals, weak references and opened modules aren't copied")


def of_its_closure(model: nn.Module) -> None:
    holder = model.holder
    holder.forward = lambda x: holder.norm(holder.inner(x))


def of_the_forward_it_had(model: nn.Module) -> None:
    model.holder.forward = torch.no_grad()(model.holder.forward)


def of_a_method_around_the_forward_it_had(model: nn.Module) -> None:
    forward = model.holder.forward
    model.holder.forward = types.MethodType(lambda self, x: forward(x) * 2, model.holder)


def of_a_hook(model: nn.Module) -> None:
    inner = model.holder.inner
    model.holder.register_forward_hook(lambda module, inputs, output: output + inner(output))


def of_a_hook_that_is_a_method(model: nn.Module) -> None:
    layers = [model.holder.inner]
    hook = types.MethodType(lambda self, module, inputs, output: output + layers[0](output) * self.size, Sized())
    model.holder.register_forward_hook(hook)


class Sized:
    size = 2


@pytest.mark.parametrize(
    "patch",
    slow_but(
        [of_its_closure, of_a_method_around_the_forward_it_had, of_a_hook],
        [
            of_its_closure, of_the_forward_it_had, of_a_method_around_the_forward_it_had, of_a_hook,
            of_a_hook_that_is_a_method,
        ],
    ),
)  # fmt: skip
def test_functions_that_refer_to_the_very_module_refer_to_the_peer_in_a_peer(patch: Any) -> None:
    model = Holding()
    patch(model)
    train_model = proven(model, "a")
    peer = train_model.get_submodule("peers.b1.holder")
    with torch.no_grad():
        before = train_model(X)
        for parameter in peer.parameters():
            parameter.add_(1)
        after = train_model(X)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_quantization_aware_modules_are_copied_with_their_closures() -> None:
    model = Holding().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model.a.qconfig = None
    proven(torch.ao.quantization.prepare_qat(model), "a")


class Both(nn.Module):
    """Calls ``cell`` in front of ``mix`` and behind."""

    def __init__(self, hold: Callable[[Any], Any], read: Any) -> None:
        super().__init__()
        self.cell, self.mix, self.last = Holder(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.cell.norm = nn.Identity()
        self.cell.read = read
        self.cell.__dict__["held"] = hold(self.cell)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(self.mix(self.cell(x))))


@pytest.mark.parametrize(
    ("hold", "read"),
    [
        (lambda cell: [cell.inner.weight], lambda held, x: F.linear(x, held[0])),
        (lambda cell: closing_over(cell.inner.weight), called),
        pytest.param(lambda cell: weakref.ref(cell.inner.weight), lambda held, x: F.linear(x, held())),
    ],
)
def test_a_module_called_on_both_sides_is_refused_where_it_holds_its_own_weight_unregistered(
    hold: Any, read: Any
) -> None:
    """A call replaces what is registered by the rescaled parameters."""
    error = unregistered(Both(hold, read), "mix", how="elsewhere than where it is registered")
    assert error.what == "'cell' reads 'cell.inner.weight' elsewhere than where it is registered."
    assert error.why == SHARED.format("cell.inner.weight")


@pytest.mark.parametrize("hold", [lambda cell: cell.inner, lambda cell: closing_over(cell.inner)])
def test_a_module_called_on_both_sides_may_hold_its_own_modules(hold: Any) -> None:
    train_model = fxcollab.transform(Both(hold, called), splits=["mix"], init="copy-anyway")
    fxcollab.verify(Both(hold, called), train_model, (X,))
    assert "peers.b1.cell.inner.weight" not in train_model.state_dict()  # the trunk uses it, so that all branches do


def test_a_weight_tied_to_the_trunks_is_refused_where_a_head_doesnt_read_the_registered_one() -> None:
    model = Holding(lambda model: [model.holder.inner.weight], lambda held, x: F.linear(x, held[0]))
    model.a.weight = model.holder.inner.weight
    unregistered(model, "a", how="'holder' reads '.*weight'")


class Decoder(nn.Module):
    """Its query is read from outside, and handed to it: a view of a parameter that it registers."""

    def __init__(self, view: Callable[[Tensor, int], Tensor], reads_it_too: bool = False) -> None:
        super().__init__()
        self.position, self.linear = nn.Parameter(torch.randn(1, 8)), nn.Linear(8, 3)
        self.view, self.reads_it_too = view, reads_it_too

    def query(self, count: int) -> Tensor:
        return self.view(self.position, count)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        return self.linear(query * x + (self.position if self.reads_it_too else 0))


class Queried(nn.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.a, self.b, self.decoder = nn.Linear(8, 8), nn.Linear(8, 8), Decoder(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.decoder.query(x.shape[0]), self.b(self.a(x)))


@pytest.mark.parametrize("reads_it_too", [False, True])
@pytest.mark.parametrize(
    "view",
    [lambda p, n: p.expand(n, -1), lambda p, n: p.T.T.detach().expand(n, -1), lambda p, n: p[:, : n + 8].flatten()],
    ids=["expand", "detached", "slice"],
)
def test_a_module_may_be_handed_views_of_what_it_registers(view: Any, reads_it_too: bool) -> None:
    x = torch.randn(3, 8)
    model = Queried(view, reads_it_too)
    train_model = fxcollab.transform(model, splits=["a"], example_inputs=(x,), seed=0)
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()


class WritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x += 0.1
        return self.linear(x)


def test_a_module_called_twice_may_write_what_it_is_handed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), WritesItsInput()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x * 2) + self.b(torch.tanh(x))

    model = Net()
    train_model = fxcollab.transform(model, splits=["a"], example_inputs=(torch.randn(3, 8),), seed=0)
    fxcollab.verify(model, train_model, (torch.randn(3, 8),)).raise_if_failed()


def test_independent_instances_have_what_they_reach() -> None:
    for hold in (lambda model: [model.a], lambda model: [closing_over(model.a)]):
        proven(Holding(hold, lambda held, x: held[0](x)), pattern="multi-instance")
    model = Holding(lambda model: weakref.ref(model.a), lambda held, x: held()(x))
    with pytest.raises(SplitError, match=r"'holder' reads 'a\.bias' without registering it") as caught:
        fxcollab.transform(model, "multi-instance", init="copy-anyway")
    assert caught.value.why == OF_HEAD_0.format("a.bias")


class Averages(nn.Module):
    """A moving average that is updated in the forward, by ``write`` or, where there is none, by ``behind``."""

    def __init__(self, write: Callable[[Any, Tensor], None] | None) -> None:
        super().__init__()
        self.first, self.before, self.behind = nn.Linear(4, 4), nn.Linear(4, 4), Slow()
        self.last, self.write = nn.Linear(4, 4), write
        self.behind.held = [self.before] if write is None else []

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind(self.before(self.first(x)))
        if self.write is not None:
            self.write(self, x)
        return self.last(x)


class Slow(nn.Linear):
    """Kept whole; moves what it holds or is given towards its own weight."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.held: list[nn.Linear] = []

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        for target in (*given, *(one.weight for one in self.held)):
            target.data.mul_(0.9).add_(0.1 * self.weight.data)
        return super().forward(x)


def by_operations(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model.before.weight.data.mul_(0.9).add_(0.1 * model.behind.weight.data)


def by_assignment(model: Any, x: Tensor) -> None:
    model.before.weight.data = model.before.weight.data * 0.9 + model.behind.weight.data * 0.1


def from_values(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model.before.bias.add_(0.1 * x.mean(0))


def by_a_module_that_is_given_it(model: Any, x: Tensor) -> None:
    model.behind(x.detach(), model.before.weight)


@pytest.mark.parametrize("write", [by_operations, by_assignment, from_values, by_a_module_that_is_given_it, None])
def test_a_branch_that_writes_into_a_parameter_of_the_trunk_is_refused(write: Any) -> None:
    error = unregistered(Averages(write), "before", how="which the heads behind it share")
    assert " writes into 'before." in error.what
    assert "where the model writes once" in str(error.why) and "put the splits behind the write" in str(error.hint)


@pytest.mark.parametrize(
    ("write", "split"),
    [(by_operations, "behind"), (by_operations, "first"), (by_a_module_that_is_given_it, "first"), (None, "first")],
)
def test_a_parameter_may_be_written_at_its_own_level(write: Any, split: str) -> None:
    """As the hint says."""
    proven(Averages(write), split)


def test_a_buffer_of_the_trunk_that_a_module_behind_writes_is_given_up_aloud() -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.held.add_(1)
            return super().forward(x)

    model = Holding()
    model.holder.inner = Counts(4, 4)
    model.holder.inner.held = model.table
    with pytest.warns(UserWarning, match="limitation: buffers table are used before and behind a split"):
        fxcollab.transform(model, splits=["a"], init="copy-anyway")


def ringed(model: nn.Module) -> list[Any]:
    ring: list[Any] = [model.holder.inner]
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("hold", "read"),
    [
        pytest.param(lambda model: None, unused, marks=pytest.mark.slow),
        (
            lambda model: [model.holder.inner, {"key": (model.holder.norm,)}],
            lambda held, x: held[1]["key"][0](held[0](x)),
        ),
        (
            lambda model: (model.holder.inner.weight, model.holder.norm.running_mean),
            lambda held, x: F.linear(x, held[0]) - held[1],
        ),
        pytest.param(lambda model: [model.holder], lambda held, x: held[0].inner(x), marks=pytest.mark.slow),
        (lambda model: model.holder.forward, unused),
        pytest.param(lambda model: partial(model.holder.inner), called, marks=pytest.mark.slow),
        pytest.param(lambda model: Slot(model.holder.inner).call, called, marks=pytest.mark.slow),
        (lambda model: [model.pair, model.pair[0].weight], lambda held, x: F.linear(held[0](x), held[1])),
        pytest.param(lambda model: nn.Linear(4, 4), unused, marks=pytest.mark.slow),
        (lambda model: [model.table, Slot(model.table)], lambda held, x: x * held[0] + held[1].value),
        (lambda model: (lambda table: lambda x: x * table)(model.table), called),
        (lambda model: closing_over(model.holder.inner.weight), called),
        (lambda model: default_of(model.pair[1].weight), called),
        pytest.param(lambda model: only_by_keyword(model.pair[1].weight), called, marks=pytest.mark.slow),
        (lambda model: (lambda mean: lambda x: x - mean)(model.holder.norm.running_mean), called),
        pytest.param(
            lambda model: (F.relu, torch.relu, nn.Linear, print, lambda x: F.relu(x)),
            lambda held, x: held[4](x),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda model: nn.Linear, unused, marks=pytest.mark.slow),
        (ringed, lambda held, x: held[1][1][0](x)),
    ],
)
def test_what_is_copied_with_the_module_or_constant_may_be_held_anywhere(hold: Any, read: Any) -> None:
    train_model = proven(Holding(hold, read), "a")
    assert "peers.b1.holder.inner.weight" in train_model.state_dict()


def test_state_may_be_held_anyhow_where_module_and_state_lie_in_the_trunk() -> None:
    for hold, read in (
        (lambda a: [a.weight], lambda held, x: F.linear(x, held[0])),
        (lambda a: lambda x: F.linear(x, a.weight), called),
        (weakref.ref, lambda held, x: held()(x)),
    ):
        model = Holding(lambda model, hold=hold: hold(model.a), read)
        proven(model, "holder")
    proven(Holding(lambda model: model.a, called), "holder")


def test_attributes_of_a_name_that_also_is_a_global_reach_nothing() -> None:
    model = Holding()
    scope: dict[str, Any] = {"inner": model}
    exec("function = lambda x, self: self.inner(x)", scope)
    model.holder.held = scope["function"]
    train_model = proven(model, "a")
    assert train_model.get_submodule("peers.b1.holder").held is scope["function"]


def test_hooks_may_watch_what_they_like() -> None:
    """A function that holds nothing of its branch stays the same in all of them."""
    model, seen = Holding(), []
    hook = model.holder.register_forward_hook(lambda module, inputs, output: seen.append((module, model.a)))
    train_model = proven(model, "a")
    seen.clear()
    train_model(X)
    peer = train_model.get_submodule("peers.b1.holder")
    assert seen == [(model.holder, model.a), (peer, model.a)]
    assert peer._forward_hooks[hook.id] is model.holder._forward_hooks[hook.id]


def test_what_hooks_keep_of_a_branch_is_kept_for_each() -> None:
    model = Holding()
    seen: list[Any] = [model.holder]
    model.holder.register_forward_hook(lambda module, inputs, output: seen.append(module))
    train_model = proven(model, "a")
    seen.clear()
    train_model(X)
    assert seen == [model.holder]


@pytest.mark.parametrize("split", ["first", "mix"])
def test_what_torchs_own_modules_hold_is_no_reason_to_refuse(split: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.mix = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4)
            self.last = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"))
            self.last[0].compile(backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.mix(self.lstm(self.first(x))[0]))[0])

    proven(Sequence(), split)
