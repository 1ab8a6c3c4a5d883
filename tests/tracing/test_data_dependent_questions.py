"""Questions that only data can answer: example inputs decide, and other inputs are checked at every call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab._torch import FakeTensor
from tests.speeds import slow_but
from tests.tracing.question_helpers import MORE, Net, X, agrees, line_at, made, proven, refused
from tests.untouched import Untouched


class AsksTheSum(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if x.sum() > 0:  # asks
            h = h * 2
        return self.tail(h)


class AsksForAnInteger(Net):
    def forward(self, x: Tensor) -> Any:
        count = int(x.round().max())  # asks
        return self.tail(self.a(x) * count)


class AsksForARange(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        for _ in range(x.round().max().long().item()):  # asks
            h = h * 2
        return self.tail(h)


class AsksForAFloat(Net):
    def forward(self, x: Tensor) -> Any:
        return self.tail(self.a(x) / float(x.round().max()))  # asks


def test_a_float_that_data_decide_is_refused_for_every_input_has_another() -> None:
    error = refused(lambda: made(AsksForAFloat(), (ONES,)))
    assert line_at(error.where, __name__).endswith("# asks")
    assert "depends on the data" in str(error.why)


class AsksForAList(Net):
    def forward(self, x: Tensor) -> Any:
        rows = x[:, 0].tolist()
        return self.tail(self.a(x) * len(rows))  # asks


class AsksForACount(Net):
    def forward(self, x: Tensor) -> Any:
        found = x.round().nonzero()
        return self.tail(self.a(x) + len(found))  # asks


class AsksWhatIsTrue(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        h = h * 2 if x.max() > 0 and not (x < 0).any() else h  # asks
        return self.tail(h)


def nothing_is_masked(mask: Tensor, size: int) -> bool:
    if mask.shape[-1] > size:  # asks, and always hears the same
        mask = mask[:, :size]
    if isinstance(mask, fx.Proxy | FakeTensor):  # as transformers does: who traces gets the general code
        return False
    return bool(mask.all())


class SkipsAMaskOfOnes(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        h = self.a(x)
        return self.tail(h if nothing_is_masked(mask, x.shape[1]) else h * mask)


def test_a_helper_that_asks_is_no_node_where_its_result_is_asked_for_too() -> None:
    model, ones = SkipsAMaskOfOnes(), torch.ones(2, 8)
    train_model = fxcollab.transform(model, splits="a", example_inputs=(ONES[:2], ones), seed=0)
    for mask in (ones, torch.eye(8)[:2]):
        assert torch.equal(train_model(X[:2], mask)[0], model(X[:2], mask))


ONES = torch.ones(4, 8)
QUESTIONS = [
    # the model, the question, an input that answers as the example ONES does, and one that doesn't
    pytest.param(AsksTheSum, "bool(...) is True; here it is False", MORE, -ONES, id="bool"),
    pytest.param(AsksForAnInteger, "int(...) is 1; here it is 3", torch.full((7, 8), 1.2), 3 * ONES, id="int"),
    pytest.param(AsksForARange, "index(...) is 1; here it is 3", torch.full((7, 8), 1.2), 3 * ONES, id="range"),
    pytest.param(AsksForAList, "len(...) is 4; here it is 7", MORE[:4], MORE, id="len of tolist"),
    pytest.param(AsksWhatIsTrue, "bool(...) is False; here it is True", MORE, MORE - 0.5, id="and not any"),
]


@pytest.mark.parametrize(("make", "question", "same", "other"), slow_but(["bool", "int", "len of tolist"], QUESTIONS))
def test_where_data_decide_the_examples_do_and_other_inputs_are_refused(
    make: type[Net], question: str, same: Tensor, other: Tensor
) -> None:
    model = make()
    warning = r"^limitation: what .*test_data_dependent_questions.py:\d+ depends on was taken from .* raise an error"
    with pytest.warns(UserWarning, match=warning):
        train_model = fxcollab.transform(model, "simple", ["b"], example_inputs=(ONES,), seed=0)
    for inputs in (ONES, same):
        fxcollab.verify(model, train_model, (inputs,)).raise_if_failed()
        assert agrees(train_model, model, inputs)
    for graph in (train_model, fxcollab.prune(train_model), copy.deepcopy(train_model)):
        error = refused(lambda graph=graph: graph(other))
        assert question in error.what
        assert line_at(error.where, __name__).endswith("# asks")
        assert torch.equal(graph.eval()(other), model.eval()(other))  # as the original
        model.train()


@pytest.mark.parametrize(
    "make",
    slow_but(
        [AsksTheSum, AsksForARange], [AsksTheSum, AsksForAnInteger, AsksForARange, AsksForAFloat, AsksForACount]
    ),
)
def test_where_data_decide_guessed_inputs_dont(make: type[Net]) -> None:
    error = refused(lambda: made(make()))
    assert error.what == f"The forward of {make.__name__} can't be captured."
    assert line_at(error.where, __name__).endswith("# asks")
    assert "example_inputs" in str(error.hint)


def test_where_data_decide_a_model_without_data_is_refused() -> None:
    error = refused(lambda: made(AsksTheSum().to("meta"), (ONES.to("meta"),)))
    assert line_at(error.where, __name__).endswith("# asks")


class AsksInTraining(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.tail(h * 2 if self.training and x.sum() > 0 else h)


def test_a_question_of_one_mode_is_asked_in_that_mode_alone() -> None:
    model = AsksInTraining()
    train_model = proven(model, (ONES,))
    refused(lambda: train_model(-ONES))
    assert agrees(train_model.eval(), model.eval(), -ONES)


class AsksAndIsAsked(Net):
    """Sizes are asked for where data are, too."""

    def forward(self, x: Tensor) -> Any:
        batch, width = x.shape
        h = self.a(x) if x.sum() > 0 else x
        if width != 8 or batch < 2:
            raise ValueError(f"not {tuple(x.shape)}")
        return self.tail(h.view(batch, width))


def test_sizes_stay_symbolic_where_data_decide_something_else() -> None:
    model = AsksAndIsAsked()
    train_model = proven(model)
    assert agrees(train_model, model, MORE)
    refused(lambda: train_model(MORE[:1]))


class AsksItsOwnState(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.c(self.b(self.a(x)))
        if self.c.bias.sum() > 0:
            h = h * 2
        return self.d(h)


def test_a_head_whose_own_state_answers_otherwise_is_refused() -> None:
    model = AsksItsOwnState()
    nn.init.ones_(model.c.bias)
    train_model = made(model, (X,), init="copy-anyway")
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    nn.init.constant_(train_model.peers.b1.c.bias, -1.0)
    refused(lambda: train_model(X))
    assert torch.equal(fxcollab.prune(train_model)(X), model(X))


class Busy(Net):
    """Asks for data behind statistics, random numbers and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        x.mul_(2)
        h = self.drop(self.norm(self.a(x)))
        if x.sum() > 0:
            h = h * 2
        return self.tail(h)


def test_computing_the_answers_leaves_model_and_examples_as_they_are() -> None:
    model, x = Busy(), X.clone()
    untouched = Untouched(model)
    fxcollab.capture(model, ["b"], (x,))
    assert untouched.differences() == []
    assert torch.equal(x, X) and x._version == 0
    proven(model, (x,))
    assert untouched.differences() == []
    assert torch.equal(x, X)


def test_a_graph_with_an_assumption_is_pickled() -> None:
    train_model = made(AsksTheSum(), (X,))
    loaded = pickle.loads(pickle.dumps(train_model))
    assert torch.equal(loaded(MORE)[1], train_model(MORE)[1])
    refused(lambda: loaded(-X))


def pooled(h: Tensor, graphs: Tensor) -> Tensor:
    count = int(graphs.max()) + 1
    return h.new_zeros(count, h.shape[1]).index_add(0, graphs, h)


class PoolsInAFunction(Net):
    """Like a network on a batch of graphs, whose number the indices tell."""

    def forward(self, x: Tensor, graphs: Tensor) -> Any:
        return self.d(self.pool(self.c(self.b(self.a(x))).relu(), graphs))

    def pool(self, h: Tensor, graphs: Tensor) -> Tensor:
        return pooled(h, graphs)


class PoolsByItem(PoolsInAFunction):
    def pool(self, h: Tensor, graphs: Tensor) -> Tensor:
        return torch.zeros(graphs.max().item() + 1, h.shape[1]).index_add(0, graphs, h)


class Pool(nn.Module):
    def forward(self, h: Tensor, graphs: Tensor) -> Tensor:
        return torch.stack([h[graphs == index].mean(0) for index in range(int(graphs.max()) + 1)])


class PoolsInAModule(PoolsInAFunction):
    def __init__(self) -> None:
        super().__init__()
        self.whole = Pool()

    def pool(self, h: Tensor, graphs: Tensor) -> Tensor:
        return self.whole(h, graphs)


class PoolsByInt(PoolsInAFunction):
    def pool(self, h: Tensor, graphs: Tensor) -> Tensor:
        count = int(graphs.max()) + 1  # asks
        return h.new_zeros(count, h.shape[1]).index_add(0, graphs, h)


class PoolsInALoop(PoolsInAFunction):
    def pool(self, h: Tensor, graphs: Tensor) -> Tensor:
        count = graphs.max().item() + 1
        return torch.stack([h[graphs == index].mean(0) for index in range(count)])  # asks


BATCH, SMALLER = (torch.randn(12, 8), torch.arange(12) // 3), (torch.randn(8, 8), torch.arange(8) // 4)


@pytest.mark.parametrize("make", slow_but([PoolsByItem], [PoolsInAFunction, PoolsByItem, PoolsInAModule]))
def test_a_size_that_data_decide_is_that_of_the_input_at_hand(make: type[Net]) -> None:
    model = make()
    assert agrees(proven(model, BATCH), model, *SMALLER)


@pytest.mark.parametrize(
    ("make", "way_out"), [(PoolsByInt, "x.item() stays the number"), (PoolsInALoop, "in a module of its own")]
)
def test_one_that_the_forward_fixes_is_refused_with_what_would_not_fix_it(make: type[Net], way_out: str) -> None:
    train_model = made(make(), BATCH)
    error = refused(lambda: train_model(*SMALLER))
    assert way_out in str(error.hint) and line_at(error.where, __name__).endswith("# asks")
