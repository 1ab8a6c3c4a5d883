"""What goes wrong when a graph is duplicated by hand, one small network each, with the whole proof."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxcollab
from fxcollab import CollabGraphModule

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
SEQUENCE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
TOKENS = torch.tensor([[0, 3, 1], [6, 2, 3]])


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Threads cost more than they give on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def proven(
    model: nn.Module, splits: Sequence[str], inputs: Any = (X,), pattern: Any = "hierarchical", **options: Any
) -> CollabGraphModule:
    """The training model, after every line of the proof was seen to hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no module initialises")
        train_model = fxcollab.transform(model, pattern, splits, example_inputs=inputs, seed=0, **options)
    fxcollab.verify(model, train_model, inputs).raise_if_failed()
    return train_model


def copies(train_model: CollabGraphModule) -> int:
    return sum(node.target is fxcollab.private_copy for node in train_model.graph.nodes)


def rescales(train_model: CollabGraphModule) -> list[float]:
    return [node.args[1] for node in train_model.graph.nodes if node.target is fxcollab.rescale]


# ------------------------------------------------------------------------------------- in-place first consumer


class Stem(nn.Module):
    """A stem, something behind it, a classifier."""

    def __init__(self, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.behind, self.head = nn.Linear(4, 4), behind or nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.stem(x)))


class WritesIntoView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.view(-1)[::2].mul_(3)
        return x * 2


class WritesHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WritesUntraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and float(x.detach().sum()) > 1e9:
            return x
        return x.add_(1).mul_(x.sign())


class WritesItems(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = x[:, 1] * 2
        return x


class WritesUnderHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0].add_(1),))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("fanout", [2, 3])
@pytest.mark.parametrize(
    "behind",
    [
        nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True), nn.ELU(inplace=True), nn.Dropout(0.5, inplace=True),
        nn.Sequential(nn.Identity(), nn.Hardtanh(inplace=True)),
        WritesIntoView(), WritesHidden(), WritesUntraceable(), WritesItems(), WritesUnderHook(),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_module_that_writes_gets_a_copy_in_each_branch(behind: nn.Module, fanout: int) -> None:
    train_model = proven(Stem(behind), ["stem"], fanouts=(fanout,))
    assert copies(train_model) == fanout


@pytest.mark.parametrize(
    "behind",
    [
        nn.ReLU(), nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 2)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(True)), nn.Sequential(nn.LayerNorm(4), nn.Hardtanh(0, 1, True)),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_a_module_that_writes_nothing_shared_gets_none(behind: nn.Module) -> None:
    model = Stem(nn.Sequential(behind, nn.Flatten()))
    assert copies(proven(model, ["stem"])) == 0


def test_a_write_before_the_split_needs_no_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    assert copies(proven(model, ["1"])) == 0


FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {}


def forward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    FORWARDS[function.__name__] = function
    return function


@forward
def plus_equals(x: Tensor) -> Tensor:
    x += 1
    return x


@forward
def times_equals_of_an_alias(x: Tensor) -> Tensor:
    alias = x
    x *= 3
    return alias + x


@forward
def functional_relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


@forward
def functional_relu_by_position(x: Tensor) -> Tensor:
    F.leaky_relu(x, 0.1, True)
    return x


@forward
def method_with_underscore(x: Tensor) -> Tensor:
    x.mul_(2).clamp_(-1, 1)
    return x


@forward
def through_a_view(x: Tensor) -> Tensor:
    x.view(-1).add_(1)
    return x


@forward
def through_a_slice(x: Tensor) -> Tensor:
    x[:, :2].add_(x[:, 2:].detach())
    return x


@forward
def setitem(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


@forward
def out_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.add(x, 1, out=x)
    return x


@pytest.mark.parametrize("pattern", ["hierarchical", "multi-instance"])
@pytest.mark.parametrize("function", FORWARDS.values(), ids=FORWARDS.keys())
def test_a_function_that_writes_gets_a_copy_in_each_branch(
    function: Callable[[Tensor], Tensor], pattern: str
) -> None:
    class Writes(Stem):
        def forward(self, x: Tensor) -> Tensor:
            if pattern == "hierarchical":
                x = self.stem(x)
            return self.head(self.behind(function(x)))

    train_model = proven(Writes(), ["stem"] if pattern == "hierarchical" else [], pattern=pattern)
    assert copies(train_model) == 2


@pytest.mark.parametrize("heads", [2, 3])
def test_independent_instances_dont_write_into_each_others_input(heads: int) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    train_model = proven(model, [], pattern="multi-instance", heads=heads)
    assert copies(train_model) == heads


def test_each_level_that_writes_gets_copies_of_its_own() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x * 2)
            x += y.detach().sum()
            z = y + x
            x -= 1
            return self.c(z * x)

    assert copies(proven(Writes(), ["a", "b"])) == 4


def test_a_trunk_write_between_two_reads_of_a_crossing_value() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shift, self.b = nn.Linear(4, 4), Shift(), nn.Linear(4, 4)
            self.late = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            y = self.b(self.shift(a)) + a
            a.add_(self.late)
            return y + a

    train_model = proven(Late(), ["shift"])
    assert len(rescales(train_model)) == 3


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_trunk_that_writes_into_the_input() -> None:
    class Writes(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return super().forward(x)

    assert copies(proven(Writes(), ["stem"])) == 0


def test_a_split_whose_value_reaches_the_output_by_being_written() -> None:
    class Fills(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out = torch.zeros_like(x)
            out[:, :2] = self.behind(x)[:, 2:]
            return self.head(out)

    proven(Fills(nn.Linear(4, 4)), ["behind"])


# ------------------------------------------------------------------------------------ what crosses, and where


class Skips(nn.Module):
    """``a`` is used at every level, ``b`` at two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a) + x
        c = self.c(b).tanh() + a
        return self.d(c + b) * a


@pytest.mark.parametrize(
    ("splits", "fanouts", "factors"),
    [
        (["a"], (3,), {1 / 3}),
        (["a", "b"], (2, 2), {1 / 2, 1 / 4}),
        (["a", "b"], (2, 3), {1 / 2, 1 / 3, 1 / 6}),
        (["a", "b"], (4, 2), {1 / 4, 1 / 2, 1 / 8}),
        (["a", "b", "c"], (2, 2, 2), {1 / 2, 1 / 4, 1 / 8}),
    ],
)
def test_skips_over_one_and_more_splits(splits: list[str], fanouts: tuple[int, ...], factors: set[float]) -> None:
    assert set(rescales(proven(Skips(), splits, fanouts=fanouts))) == factors


def test_without_rescaling_gradients_are_the_plain_sum() -> None:
    assert rescales(proven(Skips(), ["a", "b"], rescale=False)) == []


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.d(self.c(a) + b * a)


@pytest.mark.parametrize("splits", [["a+b"], ["a + b", "c"], ["b"], ["c"], ["a", "c"]])
def test_several_values_cross_at_once(splits: list[str]) -> None:
    proven(TwoPaths(), splits)


class Mixed(nn.Module):
    """Returns what no one would expect to cross a split."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.inner(x)
        return y, y > 0, y.argmax(1), None, (y * 2, 3), {"key": y.sin()}, "text", torch.float32


class MixedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.head = Mixed(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, mask, index, _, (twice, three), named, _, dtype = self.mixed(x)
        z = self.head(torch.where(mask, y, twice) * three + named["key"])
        return z.gather(1, index[:, None]).to(dtype)


def test_integers_masks_numbers_and_none_cross() -> None:
    proven(MixedNet(), ["mixed"])


def test_sizes_cross_without_a_rescale() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            batch, width = x.shape
            y = self.stem(x)
            mask = (x.detach() > 0).to(torch.int64)
            return self.head(y.reshape(batch, width) * mask)

    train_model = proven(Sizes(), ["stem"])
    rescaled = {node.args[0].name for node in train_model.graph.nodes if node.target is fxcollab.rescale}
    assert "stem" in rescaled
    assert not {"getitem", "getitem_1"} & rescaled
    assert len(train_model(torch.randn(7, 4))) == 2


# ------------------------------------------------------------------------------- parameters on both sides


class Tied(nn.Module):
    """The classic language model: the output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x)))


@pytest.mark.parametrize("fanout", [2, 3])
def test_a_weight_tied_over_the_split_stays_one(fanout: int) -> None:
    model = Tied()
    train_model = proven(model, ["embed"], (TOKENS,), fanouts=(fanout,))
    assert train_model.peers.b1.body.weight is not model.body.weight
    for _, parameter in train_model.peers.named_parameters():
        assert parameter.shape != (7, 4) or parameter is model.embed.weight
    train_model = pickle_free_copy(train_model)
    assert train_model.out.weight is train_model.embed.weight


def pickle_free_copy(module: CollabGraphModule) -> CollabGraphModule:
    new = copy.deepcopy(module)
    assert torch.equal(new(TOKENS)[1], module(TOKENS)[1])
    return new


class TiedTwice(nn.Module):
    """Two layers of one module kept whole share one weight, and share it with the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.pair = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.pair[0].weight = self.pair[2].weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.mid(self.stem(x))))


@pytest.mark.parametrize("splits", [["stem"], ["stem", "mid"], ["mid"]])
def test_a_weight_tied_twice_inside_a_module_and_over_the_split(splits: list[str]) -> None:
    proven(TiedTwice(), splits)


class Called(nn.Module):
    """One module called at the beginning, in the middle and at the end."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.mix, self.head = cell, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.cell(x)).tanh()
        return self.head(self.cell(self.cell(x).tanh()))


@pytest.mark.parametrize("cell", [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(True))])
@pytest.mark.parametrize("splits", [["cell"], ["mix"], ["cell@2"], ["cell", "mix"], ["cell", "cell@3"]])
def test_a_module_called_in_trunk_and_head(cell: nn.Module, splits: list[str]) -> None:
    proven(Called(copy.deepcopy(cell)), splits, fanouts=(2, 3)[: len(splits)])


class TiedLevels(nn.Module):
    """One weight at levels 1 and 2, another at 0 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.c.weight, self.d.weight = self.b.weight, self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).tanh()))


@pytest.mark.parametrize("fanouts", [(2, 2), (2, 3), (3, 2)])
def test_a_weight_tied_over_two_levels(fanouts: tuple[int, ...]) -> None:
    train_model = proven(TiedLevels(), ["a", "b"], fanouts=fanouts)
    assert train_model.peers.b1_0.c.weight is train_model.peers.b1.b.weight
    assert train_model.peers.b1_1.c.weight is train_model.peers.b1.b.weight
    assert train_model.peers.b0_1.c.weight is train_model.b.weight


def test_a_functional_use_of_a_trunk_weight_behind_the_split() -> None:
    class Functional(Stem):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.stem(x), self.stem.weight.t()))

    proven(Functional(), ["stem"])


class Reaches(nn.Module):
    """Computes with what it reaches; ``reach`` sets how."""

    def __init__(self, reach: Callable[[Any], Any] = lambda own: own.inner) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.__dict__["reached"] = reach(self)

    def forward(self, x: Tensor) -> Tensor:
        [reached] = self.reached if isinstance(self.reached, list) else [self.reached]
        return self.inner(x) + reached(x)


HELD: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda own: own.inner,
    "list": lambda own: [own.inner],
    "partial": lambda own: functools.partial(own.inner),
    "bound method": lambda own: own.inner.forward,
    "method of its own": lambda own: types.MethodType(lambda self, x: self.inner(x), own),
}


@pytest.mark.parametrize("reach", HELD.values(), ids=HELD.keys())
def test_what_a_module_reaches_of_its_own_unregistered_goes_along_with_its_peer(reach: Callable[[Any], Any]) -> None:
    train_model = proven(Stem(Reaches(reach)), ["stem"])
    assert train_model.peers.b1.behind.inner is not train_model.behind.inner
    proven(Called(Reaches(reach)), ["mix"])


def test_what_a_module_reaches_of_its_branch_unregistered_is_its_branchs() -> None:
    model = Skips()
    model.d = Reaches(lambda own: [model.c])
    train_model = proven(model, ["a"])
    assert train_model.peers.b1.d.reached[0] is train_model.peers.b1.c
    with pytest.raises(fxcollab.SplitError, match="'d' reaches 'c' without registering it"):
        fxcollab.transform(model, splits=["a", "c"])


class Trunks(Stem):
    """Its ``behind`` computes with the weight of ``stem`` too, which ``reach`` sets."""

    def __init__(self, reach: Callable[[Any, Any], Any]) -> None:
        super().__init__(Reaches())
        self.top = nn.Linear(3, 3)
        reach(self.behind, self.stem)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(super().forward(x))


def as_a_parameter(behind: Any, stem: Any) -> None:
    behind.weight = stem.weight
    behind.reached = types.MethodType(lambda self, x: F.linear(x, self.weight), behind)


def as_a_module(behind: Any, stem: Any) -> None:
    behind.reached = stem


def as_a_parameter_of_another_module(behind: Any, stem: Any) -> None:
    behind.inner.weight = stem.weight


@pytest.mark.parametrize("reach", [as_a_parameter, as_a_module, as_a_parameter_of_another_module])
def test_what_a_head_registers_of_the_trunk_is_rescaled(reach: Callable[[Any, Any], Any]) -> None:
    train_model = proven(Trunks(reach), ["stem"])
    assert any(parameter is train_model.stem.weight for parameter in train_model.peers.b1.behind.parameters())


def in_a_tuple(behind: Any, stem: Any) -> None:
    weights = (stem.weight,)
    behind.reached = functools.partial(lambda weights, x: F.linear(x, weights[0]), weights)


def in_a_dictionary(behind: Any, stem: Any) -> None:
    behind.__dict__["reached"] = stem


def in_a_function(behind: Any, stem: Any) -> None:
    behind.reached = lambda x: stem(x)


@pytest.mark.parametrize("reach", [in_a_tuple, in_a_dictionary, in_a_function])
def test_what_a_head_reaches_of_the_trunk_unregistered_is_refused_unless_both_lie_on_one_side(
    reach: Callable[[Any, Any], Any],
) -> None:
    with pytest.raises(fxcollab.SplitError, match=r"'behind' reaches 'stem(.weight)?' without registering it"):
        fxcollab.transform(Trunks(reach), splits=["stem"])
    proven(Trunks(reach), ["behind"])


def test_a_forward_that_was_replaced_is_the_peers_own_as_a_method_and_refused_as_a_function() -> None:
    model = Stem(Reaches())
    model.behind.forward = lambda x: model.behind.inner(x) * 2  # type: ignore[method-assign]
    with pytest.raises(fxcollab.SplitError, match="'behind' reaches the model around it") as caught:
        fxcollab.transform(model, splits=["stem"])
    assert "types.MethodType(function, module)" in str(caught.value.hint)
    model.behind.forward = types.MethodType(lambda self, x: self.inner(x) * 2, model.behind)  # type: ignore[method-assign]
    proven(model, ["stem"])


def test_a_module_called_twice_inside_a_head_is_one_peer() -> None:
    class Inside(Called):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(self.cell(self.mix(x)).tanh()))

    train_model = proven(Inside(nn.Linear(4, 4)), ["mix"])
    calls = [node.target for node in train_model.graph.nodes if "cell" in str(node.target)]
    assert calls == ["cell", "peers.b1.cell"] * 2


# --------------------------------------------------------------------------------------------------- outputs

Named = namedtuple("Named", ["trunk", "middle", "top"])


@dataclass
class Record:
    trunk: Tensor
    top: Tensor
    note: str = "note"


torch.utils._pytree.register_dataclass(Record)


STRUCTURES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "tuple": lambda a, b, c: (a, b, c),
    "dict": lambda a, b, c: {"trunk": a, "middle": b, "top": c, "none": None, "three": 3},
    "list": lambda a, b, c: [a, (b, [c])],
    "namedtuple": lambda a, b, c: Named(a, b, c),
    "dataclass": lambda a, b, c: Record(a, c),
    "nested": lambda a, b, c: {"all": [Named(a, {"b": b}, c)], "again": (a, a)},
}


class Outputs(nn.Module):
    def __init__(self, structure: Callable[[Tensor, Tensor, Tensor], Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act, self.structure = act or nn.Identity(), structure

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = self.b(self.act(a))
        return self.structure(a, b, self.c(b))


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_every_head_returns_its_complete_output(structure: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    model = Outputs(structure)
    train_model = proven(model, ["a", "b"])
    outputs, expected = train_model(X), model(X)
    assert type(outputs) is tuple and len(outputs) == 4
    assert [type(head) for head in outputs] == [type(expected)] * 4
    assert copies(train_model) == 0


@pytest.mark.parametrize("splits", [["a"], ["b"], ["a", "b"]])
def test_a_splits_value_is_also_an_output(splits: list[str]) -> None:
    train_model = proven(Outputs(STRUCTURES["tuple"]), splits)
    first, *others = train_model(X)
    assert all(torch.equal(first[0], other[0]) for other in others)
    assert all(not torch.equal(first[2], other[2]) for other in others)


def test_an_output_that_is_written_behind_the_split() -> None:
    train_model = proven(Outputs(STRUCTURES["tuple"], nn.ReLU(inplace=True)), ["a"])
    assert copies(train_model) == 2
    assert float(train_model(X)[0][0].detach().min()) >= 0


def test_an_input_that_is_an_output() -> None:
    class Through(Stem):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    proven(Through(), ["stem"])
    proven(Through(), [], pattern="multi-instance")


# ------------------------------------------------------------------------------------- gradients that are not


class NoGrad(Stem):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
            x += self.head.weight.mean()
        return self.head(self.behind(x))


class NoGradMethod(Stem):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.behind(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("model", [NoGrad, NoGradMethod])
def test_a_trunk_without_gradient_gets_none(model: type[Stem]) -> None:
    net = model(nn.Linear(4, 4))
    train_model = proven(net, ["stem"])
    sum(head.sum() for head in train_model(X)).backward()
    assert net.stem.weight.grad is None
    assert net.head.weight.grad is not None


def test_frozen_parameters_stay_frozen_in_every_head() -> None:
    model = Stem(nn.BatchNorm1d(4))
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    train_model = proven(model, ["stem"])
    assert not train_model.peers.b1.head.bias.requires_grad
    assert train_model.peers.b1.head.weight.requires_grad


def test_a_detached_crossing_value() -> None:
    class Detached(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.behind(x.detach()) + x)

    proven(Detached(nn.Linear(4, 4)), ["stem"])


# --------------------------------------------------------------------------------------- random operations


class Random(Stem):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + torch.rand(4) + torch.rand_like(x)
        x = F.dropout(x, 0.5, self.training)
        x = self.behind(x)
        return self.head(x * torch.bernoulli(torch.full_like(x, 0.5)))


@pytest.mark.parametrize("splits", [["stem"], ["behind"], []])
def test_random_operations_draw_per_branch(splits: list[str]) -> None:
    pattern = "hierarchical" if splits else "multi-instance"
    train_model = proven(Random(nn.Dropout(0.3)), splits, pattern=pattern, init="copy")
    outputs = train_model.train()(X)
    assert not torch.equal(outputs[0], outputs[1])


def test_dropout_alone_makes_copies_differ() -> None:
    train_model = proven(Stem(nn.Dropout(0.5)), ["stem"], init="copy")
    outputs = train_model.train()(X)
    assert not torch.equal(outputs[0], outputs[1])
    outputs = train_model.eval()(X)
    assert torch.equal(outputs[0], outputs[1])


# ------------------------------------------------------------------------------------------ inputs and state


class ManyInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.a(x)
        h = h if mask is None else h * mask
        return self.c((h + self.b(y)).relu())[index]


INDEX = torch.tensor([2, 0])


@pytest.mark.parametrize("splits", [["a"], ["b"], ["a+b"], []])
@pytest.mark.parametrize(
    "inputs",
    [(X, X.flip(0), INDEX), (X, X.flip(0), INDEX, X > 0), {"y": X, "x": X.sin(), "index": INDEX, "mask": X}],
    ids=["three", "four", "keywords"],
)
def test_multiple_inputs(inputs: Any, splits: list[str]) -> None:
    proven(ManyInputs(), splits, inputs, pattern="hierarchical" if splits else "multi-instance")


class Bare(nn.Module):
    """Parameters, buffers and plain tensors at the root, used behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale, self.both = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.list = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.plain = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.both + self.plain
        weight = (self.scale - self.scale.mean()) / self.scale.std()
        x = x * weight + self.mean + self.hidden * self.both + self.list[0] * self.list[1]
        return self.head(x * self.plain)


@pytest.mark.parametrize("splits", [["stem"], ["add_1"], []])
def test_bare_parameters_and_buffers_at_the_root(splits: list[str]) -> None:
    train_model = proven(Bare(), splits, pattern="hierarchical" if splits else "multi-instance")
    assert train_model.peers.b1.scale is not train_model.scale
    assert "peers.b1.hidden" not in train_model.state_dict()
    assert "peers.b1.mean" in train_model.state_dict()


class StandardConv(nn.Conv2d):
    """Weight standardisation: the weight is computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ConvNet(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv, nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_weight_computed_behind_the_split(granularity: str) -> None:
    model = ConvNet(StandardConv(4, 4, 3, padding=1))
    proven(model, ["conv1"], (IMAGE,), granularity=granularity)


@pytest.mark.parametrize("splits", [["conv1"], ["bn1"], ["relu"], ["conv2"], ["relu@2"], ["bn1", "conv2"]])
def test_batch_norm_in_trunk_and_head(splits: list[str]) -> None:
    model = ConvNet(conv())
    train_model = proven(model, splits, (IMAGE,))
    before = {name: b.clone() for name, b in train_model.named_buffers()}
    train_model.train()(IMAGE)
    after = dict(train_model.named_buffers())
    for name in before:
        assert name.endswith("num_batches_tracked") or not torch.equal(before[name], after[name])
        assert not name.endswith("num_batches_tracked") or after[name] == before[name] + 1


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm of old": torch.nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm of old": torch.nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("splits", [["conv1"], ["conv2"]], ids=["in the head", "in the trunk"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_parametrized_weights(norm: Callable[[nn.Module], nn.Module], splits: list[str]) -> None:
    model = ConvNet(norm(conv()))
    train_model = proven(model, splits, (IMAGE,), init="copy-anyway" if norm is NORMS["orthogonal"] else "fresh")
    sum(head.sum() for head in train_model.train()(IMAGE)).backward()
    missing = [name for name, p in train_model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.stem(x))
        x, _ = self.attention(x, x, x)
        return self.head(self.layer(x))


@pytest.mark.parametrize("splits", [["stem"], ["lstm"], ["attention"], ["layer"], ["lstm", "attention"]])
def test_recurrent_and_attention_modules(splits: list[str]) -> None:
    proven(Sequences(), splits, (SEQUENCE,))


def test_hooks_of_kept_modules_run_in_every_head() -> None:
    model, seen = Stem(nn.Linear(4, 4)), []
    model.behind.register_forward_hook(lambda module, inputs, output: output * 2)
    model.behind.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    train_model = proven(model, ["stem"])
    seen.clear()
    train_model(X)
    assert seen == [model.behind, train_model.peers.b1.behind]


# --------------------------------------------------------------------------------- precision and own functions


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.fft(self.stem(x))
        return self.head(torch.fft.ifft(spectrum * self.weight).real), spectrum * self.weight


@pytest.mark.parametrize("splits", [["stem"], ["fft_fft"]])
def test_complex_values_cross(splits: list[str]) -> None:
    proven(Complex(), splits)


class Halves(nn.Module):
    """Computes in a lower precision between its layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem, self.head, self.dtype = nn.Linear(4, 4), nn.Linear(4, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        low = (y * 2).to(self.dtype)
        return self.head((low * low).to(y.dtype) + y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("splits", [["stem"], ["to"]])
def test_lower_precision_inside(dtype: torch.dtype, splits: list[str]) -> None:
    proven(Halves(dtype), splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions(dtype: torch.dtype) -> None:
    proven(Stem(nn.LayerNorm(4)).to(dtype), ["stem"], (X.to(dtype),))


def test_a_model_that_insists_on_its_own_precision() -> None:
    class Insists(Stem):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.behind(self.stem(x)).float())

    proven(Insists(nn.LayerNorm(4)), ["stem"])


class Steep(torch.autograd.Function):
    """Its backward isn't that of its forward, so that tracing through it would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


class Uses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Steep.apply(x)


class UsesInForward(Stem):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Steep.apply(self.behind(Steep.apply(self.stem(x)))))


@pytest.mark.parametrize(
    "model", [lambda: Stem(Uses()), lambda: UsesInForward(nn.Linear(4, 4))], ids=["kept whole", "opened"]
)
def test_custom_functions_keep_their_backward(model: Callable[[], nn.Module]) -> None:
    proven(model(), ["stem"])
    proven(model(), [], pattern="multi-instance")


def test_counters_are_private_to_a_branch() -> None:
    class Counts(Stem):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("in_trunk", torch.zeros(()))
            self.register_buffer("in_head", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.in_trunk += 1
            x = self.stem(x)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.in_head.add_(x.shape[0])
            return self.head(x - self.mean) * self.in_trunk

    model = Counts()
    train_model = proven(model, ["stem"])
    reference = copy.deepcopy(model)
    for _ in range(3):
        train_model(X)
        reference(X)
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert train_model.peers.b1.in_head == 9
    assert not train_model.mean.requires_grad
