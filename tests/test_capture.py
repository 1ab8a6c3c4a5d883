"""Capture: what is opened and what is kept whole, both modes, and a model that stays as it was."""

from __future__ import annotations

import copy
import operator
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError, CollabGraphModule, SplitError, StateError
from fxcollab.fx_utils import describe_node, first_difference


def operations(graph: fx.Graph) -> list[tuple[str, str]]:
    """Op and target of every node that is neither input nor output."""
    return [(n.op, str(n.target)) for n in graph.nodes if n.op not in ("placeholder", "output")]


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x))) + x


class Net(nn.Module):
    """Three stages; the middle one is nested twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Threads cost more than they give on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- lazy opening


def test_only_the_root_is_opened_for_a_split_at_its_child() -> None:
    captured = fxcollab.capture(Net(), ["stem"])
    assert operations(captured.graph) == [
        ("call_module", "stem"),
        ("call_module", "body"),
        ("call_module", "head"),
    ]


def test_every_module_around_a_split_is_opened_and_no_other() -> None:
    captured = fxcollab.capture(Net(), ["body.0.first"])
    assert operations(captured.graph) == [
        ("call_module", "stem"),
        ("call_module", "body.0.first"),
        ("call_module", "body.0.act"),
        ("call_module", "body.0.second"),
        ("call_function", str(operator.add)),
        ("call_module", "body.1"),
        ("call_module", "head"),
    ]


def test_op_granularity_opens_down_to_torchs_layers() -> None:
    captured = fxcollab.capture(Net(), granularity="op")
    called = [target for op, target in operations(captured.graph) if op == "call_module"]
    assert called == [
        "stem", "body.0.first", "body.0.act", "body.0.second", "body.1.first", "body.1.act", "body.1.second",
        "head",
    ]  # fmt: skip


def test_modules_and_tensors_are_the_callers_own() -> None:
    model = Net()
    captured = fxcollab.capture(model, ["body.0"])
    assert captured.root is model
    assert all(captured.get_submodule(path) is module for path, module in model.named_modules() if path)
    own, found = model.state_dict(keep_vars=True), captured.state_dict(keep_vars=True)
    assert list(own) == list(found)
    assert all(found[key] is own[key] for key in own)


def test_kept_modules_keep_class_and_hooks() -> None:
    model, calls = Net(), []
    model.body.register_forward_hook(lambda *_: calls.append("body"))
    captured = fxcollab.capture(model, ["stem"])
    assert not calls
    assert torch.equal(captured(X), model(X))
    assert calls == ["body", "body"]
    assert type(captured.body) is nn.Sequential


def test_unused_state_and_aliases_are_kept() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.alias = self.stem
            self.register_buffer("hidden", torch.ones(2), persistent=False)
            self.register_buffer("shown", torch.ones(2))

    model = Unused()
    captured = fxcollab.capture(model, ["stem"])
    assert list(captured.state_dict()) == list(model.state_dict())
    assert captured.alias is captured.stem
    assert dict(captured.named_buffers()).keys() == {"hidden", "shown"}


def test_a_graph_captured_at_one_batch_size_runs_at_another() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x.reshape(x.shape[0], -1))

    model = Flat()
    captured = fxcollab.capture(model, ["stem"], (torch.randn(2, 2, 4),))
    x = torch.randn(7, 2, 4)
    assert torch.equal(captured(x), model(x))


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(CaptureError, match="There is no granularity 'layer'"):
        fxcollab.capture(Net(), granularity="layer")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- both modes


class AuxNet(nn.Module):
    """Another structure, other state and another output in train mode, as with auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        if self.training:
            return self.head(F.dropout(x, 0.5, self.training)), self.aux(x)
        return self.head(x)


def run(module: Callable[[Tensor], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return module(X)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return isinstance(other, Tensor) and torch.equal(one, other)


def follows_the_mode(module: nn.Module, model: nn.Module) -> bool:
    """In either mode, twice each, ``module`` returns what ``model`` does."""
    for training in (True, False, True, False):
        module.train(training)
        model.train(training)
        if not same(run(model), run(module)):
            return False
    return True


def test_a_forward_that_reads_training_follows_train_and_eval() -> None:
    model = AuxNet()
    captured = fxcollab.capture(model, ["stem"])
    assert captured.modes.differ
    assert follows_the_mode(captured, model)


def test_a_forward_that_doesnt_is_held_once() -> None:
    captured = fxcollab.capture(Net(), ["stem"])
    assert captured.modes.train is captured.modes.eval
    assert "self.training" not in captured.code


@pytest.mark.parametrize("training", [True, False])
def test_capture_starts_in_the_models_mode_and_leaves_it(training: bool) -> None:
    model = AuxNet().train(training)
    captured = fxcollab.capture(model, ["stem"])
    assert captured.training is model.training is training
    assert captured.graph is captured.modes.of(training)


def test_code_shows_both_modes_and_graph_is_that_of_the_present() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    assert captured.code.count("def forward") == 1
    train_body, eval_body = captured.code.split("    else:")
    assert "if self.training:" in train_body
    assert "self.aux(" in train_body and "self.aux(" not in eval_body
    assert "aux" in names(captured.train().graph)
    assert "aux" not in names(captured.eval().graph)


def test_the_flag_decides_even_where_train_was_not_called() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    captured.training = False
    assert isinstance(run(captured), Tensor)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_follow_the_mode(clone: Callable[[nn.Module], CollabGraphModule], training: bool) -> None:
    model = AuxNet()
    captured = fxcollab.capture(model, ["stem"]).train(training)
    new = clone(captured)
    assert new.training is training
    assert new.code == captured.code
    assert first_difference(new.graph, captured.graph) is None
    assert follows_the_mode(new, model)
    assert new.stem is not captured.stem
    new.eval()
    captured.train()
    assert new.training is False


@pytest.mark.parametrize("training", [True, False])
def test_the_training_model_and_the_pruned_one_follow_the_mode(training: bool) -> None:
    model = AuxNet().train(training)
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    assert train_model.training is training
    outputs = run(train_model.train())
    assert [len(head) for head in outputs] == [2, 2]
    outputs = run(train_model.eval())
    assert all(isinstance(head, Tensor) for head in outputs)
    assert follows_the_mode(fxcollab.prune(train_model), model)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_compiled_two_mode_module_follows_the_mode() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x * 2 if self.training else x.sin())

    model = Modes()
    train_model = fxcollab.transform(model, splits=["stem"], seed=0)
    compiled = torch.compile(train_model, fullgraph=True, backend="eager")
    for training in (True, False, True):
        train_model.train(training)
        assert torch.equal(compiled(X)[0], model.train(training)(X))
    torch._dynamo.reset()


def test_what_one_mode_sets_is_not_seen_by_the_other() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.training:
                self.last = x
            elif self.last is not None:
                x = x + self.last
            return self.head(x)

    captured = fxcollab.capture(Cache(), ["stem"])
    assert names(captured.modes.eval) == ["x", "stem", "head", "output"]


# ----------------------------------------------------------------------------------------- no mutation


class Untidy(nn.Module):
    """Its forward sets, counts, fills and registers whatever it can."""

    calls_of_all = 0
    seen: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.inner = Net()
        self.calls, self.last, self.maps, self.cache = 0, None, [], {"kept": 1}
        self.constant = torch.ones(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.head.register_forward_hook(lambda module, inputs, output: output)
        self.head.bias.requires_grad_(False)
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls_of_all += 1
        self.calls += 1
        self.count.add_(1)
        self.steps += 1
        x = self.stem(x)
        self.last = x
        self.maps.append(x)
        self.cache["x"] = x
        self.new_attribute = x
        self.constant = self.constant + x
        self.stem.seen = x
        self.register_buffer("late", torch.zeros(2))
        x = self.inner.body(self.inner.stem(x))
        return self.head(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))


class Failing(Untidy):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if x.sum() > 0 else -x


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be told of a model: attributes, contents, identities, flags, hooks, classes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            found[f"{path}.{name}"] = (id(value), _content(value))
        for cls in type(module).__mro__[:-1]:
            found[f"class {cls.__qualname__}"] = {name: id(value) for name, value in vars(cls).items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.tolist())
    found["function"] = id(torch.autograd.Function.__dict__["apply"])
    return found


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    if isinstance(value, list | set):
        return [id(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value if isinstance(value, int) else None


@pytest.mark.parametrize("granularity", ["auto", "op"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", [["stem"], ["inner.body.0.first"]])
def test_capturing_changes_nothing(splits: list[str], training: bool, granularity: Any) -> None:
    model = Untidy().train(training)
    model.inner.eval()
    before = everything(model)
    fxcollab.capture(model, splits, granularity=granularity)
    assert everything(model) == before


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_capture_that_fails_changes_nothing(granularity: Any) -> None:
    model = Failing()
    before = everything(model)
    with pytest.raises(CaptureError):
        fxcollab.capture(model, ["stem"], granularity=granularity)
    assert everything(model) == before


def test_capturing_leaves_the_random_state_and_the_gradient_mode() -> None:
    class Draws(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                noise = torch.rand(4)
            return super().forward(x + noise)

    model, state = Draws(), torch.get_rng_state()
    with torch.no_grad():
        fxcollab.capture(model, ["stem"])
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


_CONSTANT = torch.tensor([4.0, 3.0, 2.0, 1.0])


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + _CONSTANT)


def test_constants_stay_off_the_model() -> None:
    model = Constant()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]
    assert list(captured.state_dict()) == list(model.state_dict())
    assert same(run(pickle.loads(pickle.dumps(captured))), run(model))


# ------------------------------------------------------------------------------- what stays an operation


def test_random_and_range_stay_operations() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + torch.rand(4) * torch.randn(x.shape) + torch.arange(x.shape[1])
            return self.head(x * torch.bernoulli(torch.full((4,), 0.5)))

    model = Draws()
    captured = fxcollab.capture(model, ["stem"])
    assert {"rand", "randn", "arange", "full", "bernoulli"} <= set(names(captured.graph))
    for seed in (1, 2):
        assert same(run(captured, seed), run(model, seed))
    assert not same(run(captured, 1), run(captured, 2))


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_buffers_are_counted_at_every_call(granularity: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("added", torch.zeros(()))
            self.register_buffer("plus", torch.zeros(()))
            self.register_buffer("item", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.added.add_(1)
            self.plus += 2
            self.item[0] = self.plus
            return self.head(self.stem(x))

    model = Counts()
    captured = fxcollab.capture(model, ["stem"], granularity=granularity)
    for _ in range(3):
        captured(X)
    assert (model.added.item(), model.plus.item(), model.item.tolist()) == (3, 6, [6, 0])


def test_an_alias_sees_what_is_written_in_place() -> None:
    class Alias(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            alias = x
            x += 1
            x[:, 0] = 5
            return self.head(alias)

    model = Alias()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))


def test_plain_numbers_are_not_rebound_by_inplace_operators() -> None:
    class Sizes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            size = x.shape[0]
            more = size
            more += 1
            return self.head(x) * more + size

    model = Sizes()
    captured = fxcollab.capture(model, ["stem"])
    assert torch.equal(captured(X), model(X))


def test_no_grad_is_kept() -> None:
    class NoGrad(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.stem(x)
                scale = self.body[0].first.weight.mean()
            return self.head(self.body(x) * scale)

    model = NoGrad()
    captured = fxcollab.capture(model, ["stem"])
    captured(X).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(X).sum().backward()
    for name, p in model.named_parameters():
        assert (found[name] is None) == (p.grad is None), name
        assert p.grad is None or torch.equal(found[name], p.grad)
    assert found["stem.weight"] is None


class Twice(torch.autograd.Function):
    """Its backward isn't that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class Custom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Twice.apply(self.stem(x)))


def test_a_custom_function_keeps_its_backward() -> None:
    model = Custom()
    captured = fxcollab.capture(model, ["stem"])
    (found,) = torch.autograd.grad(captured(X).sum(), [model.stem.weight])
    (expected,) = torch.autograd.grad(model(X).sum(), [model.stem.weight])
    assert torch.equal(found, expected)
    copied = pickle.loads(pickle.dumps(captured))
    (found,) = torch.autograd.grad(copied(X).sum(), [copied.stem.weight])
    assert torch.equal(found, expected)


def test_a_switched_autocast_is_refused() -> None:
    class Autocast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.stem(x)
            return self.head(x.float())

    with pytest.raises(CaptureError, match="autocast is switched inside the forward"):
        fxcollab.capture(Autocast(), ["stem"])


# -------------------------------------------------------------------------------------------- interface


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, shift: Tensor | None = None
    ) -> Tensor:
        x = self.stem(x) * scale
        if mask is not None:
            x = x * mask
        if shift is not None:
            x = x + shift
        return self.head(x)


def placeholders(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.find_nodes(op="placeholder")]


def test_optional_inputs_are_fixed_without_an_example() -> None:
    model = Optional()
    captured = fxcollab.capture(model, ["stem"])
    assert placeholders(captured) == ["x"]
    assert torch.equal(captured(X), model(X))
    train_model = fxcollab.transform(model, splits=["stem"])
    notes = fxcollab.verify(model, train_model, (X,)).limitations
    assert any("mask, scale, shift are fixed at their defaults" in note for note in notes)


@pytest.mark.parametrize(
    ("example", "inputs"),
    [
        ((X, X.sign()), ["x", "mask"]),
        ({"x": X, "mask": X.sign()}, ["x", "mask"]),
        ({"x": X, "shift": X}, ["x", "shift"]),
        ({"shift": X, "mask": X, "x": X}, ["x", "mask", "shift"]),
    ],
)
def test_optional_inputs_are_kept_with_an_example(example: Any, inputs: list[str]) -> None:
    model = Optional()
    captured = fxcollab.capture(model, ["stem"], example)
    assert placeholders(captured) == inputs
    keywords = example if isinstance(example, dict) else dict(zip(inputs, example, strict=True))
    assert torch.equal(captured(**keywords), model(**keywords))


def test_a_kept_optional_input_keeps_its_default() -> None:
    captured = fxcollab.capture(Optional(), ["stem"], (X, X))
    assert captured.graph.find_nodes(op="placeholder")[1].args == (None,)


@pytest.mark.parametrize(
    ("example", "why"), [((X, X, X, X, X), "too many positional"), ({"y": X}, "missing a required"), ((), "x")]
)
def test_examples_that_dont_fit_are_refused(example: Any, why: str) -> None:
    with pytest.raises(CaptureError, match="The example inputs don't fit the model") as caught:
        fxcollab.capture(Optional(), ["stem"], example)
    assert why in str(caught.value.why)
    assert str(caught.value.where).startswith("Optional.forward(x")


def test_unnamed_arguments_cant_become_inputs() -> None:
    class Star(Net):
        def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
            return super().forward(x)

    assert placeholders(fxcollab.capture(Star(), ["stem"])) == ["x"]
    with pytest.raises(CaptureError, match=r"arrive through \*args or \*\*kwargs") as caught:
        fxcollab.capture(Star(), ["stem"], (X, X))
    assert "wrap the model" in str(caught.value.hint)


# --------------------------------------------------------------------------------------------- refusals


def where_of(model: nn.Module, splits: list[str], granularity: Any = "auto") -> tuple[str, CaptureError]:
    with pytest.raises(CaptureError) as caught:
        fxcollab.capture(model, splits, granularity=granularity)
    place = re.fullmatch(r"(.*):(\d+), in (\S+)", str(caught.value.where))
    assert place, caught.value.where
    file, line = place[1], int(place[2])
    with open(file) as source:  # noqa: PTH123
        return source.readlines()[line - 1].strip(), caught.value


class Asks(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:  # asks
            return self.head(x)
        return self.head(-x)


class AsksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Asks(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_a_refusal_names_the_line_of_the_callers_code() -> None:
    line, error = where_of(Asks(), ["stem"])
    assert line == "if x.sum() > 0:  # asks"
    assert error.what == "The forward of Asks can't be captured."
    assert "bool(gt) can't be known while tracing" in str(error.why)
    assert "put the splits at modules further out" in str(error.hint)


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_refusal_inside_an_opened_child_names_the_line_there(granularity: Any) -> None:
    line, error = where_of(AsksInside(), ["net.stem"], granularity)
    assert line == "if x.sum() > 0:  # asks"
    assert "Asks.forward" in str(error.where)


def test_a_model_that_resists_is_captured_where_the_code_stays_inside() -> None:
    model = AsksInside()
    assert torch.equal(fxcollab.capture(model, ["net"])(X.abs()), model(X.abs()))


def _helper(x: Tensor) -> list[Tensor]:
    return list(x)  # iterates


class Iterates(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack(_helper(self.stem(x))))


def test_a_helper_that_resists_becomes_one_node_and_asks_at_every_call() -> None:
    model = Iterates()
    captured = fxcollab.capture(model, ["stem"])
    [node] = [node for node in captured.graph.nodes if node.target is _helper]
    assert node.op == "call_function"
    for batch in (1, 2, 5):
        assert torch.equal(captured(X[:1].expand(batch, -1)), model(X[:1].expand(batch, -1)))
    assert any("_helper can't be traced and is kept whole" in note for note in captured.meta["fxcollab_limitations"])
    assert fxcollab.verify(model, fxcollab.transform(model, splits=["stem"], pattern="simple"), (X,))


def _helper_of_a_module(module: nn.Module, x: Tensor) -> Tensor:
    return module(x) if x.sum() > 0 else x  # a module can't be the argument of a node


def test_a_refusal_in_a_helper_names_the_helpers_line() -> None:
    class Refuses(Net):
        def forward(self, x: Tensor) -> Tensor:
            return _helper_of_a_module(self.head, self.stem(x))

    line, _ = where_of(Refuses(), ["stem"])
    assert line.startswith("return module(x) if x.sum() > 0 else x")


class Resists(Net):
    """Asks about shapes in its own forward: only an example can answer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[1] != 4 or x.dim() != 2:
            raise ValueError(f"unexpected {x.shape}")
        parts = [x[:, i] for i in range(x.size(1))]
        batch, *rest = x.shape
        x = torch.stack(parts, dim=len(rest)).view(batch, *rest)
        return self.head(x)


@pytest.mark.parametrize("examples", [None, (torch.ones(2, 4),)], ids=["guessed", "given"])
def test_questions_about_shapes_are_answered_by_an_example_and_sizes_stay_symbolic(examples: Any) -> None:
    model = Resists()
    captured = fxcollab.capture(model, ["stem"], examples)
    for batch in (1, 2, 7):
        assert torch.equal(captured(torch.ones(batch, 4)), model(torch.ones(batch, 4)))
    notes = [note for note in captured.meta["fxcollab_limitations"] if "was decided for an example input" in note]
    assert len(notes) >= 2 and all("test_capture.py:" in note for note in notes)


class MaybeMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = Pair(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, flip: bool = False) -> Tensor:
        x, mask = self.embed(x)
        if mask is not None and mask.any():
            x = x * mask
        if x.shape[-1] == 4:
            x = self.body(x)
        if scale is not None:
            x = x * scale
        return self.head(-x if flip else x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x + 1, None


def test_what_is_none_for_the_example_is_none() -> None:
    model = MaybeMask()
    assert torch.equal(fxcollab.capture(model, ["body"], (X,))(X), model(X))


def test_given_tensors_are_inputs_and_other_given_values_are_fixed() -> None:
    model, examples = MaybeMask(), {"x": X, "scale": torch.tensor(2.0), "flip": True}
    train_model = fxcollab.transform(model, splits=["body"], pattern="simple", example_inputs=examples)
    assert [node.name for node in train_model.graph.find_nodes(op="placeholder")] == ["x", "scale"]
    assert torch.equal(train_model(X, torch.tensor(3.0))[0], model(X, torch.tensor(3.0), flip=True))
    assert fxcollab.verify(model, train_model)


def test_nodes_carry_the_line_of_the_callers_code() -> None:
    captured = fxcollab.capture(Net(), ["body.0"])
    node = next(n for n in captured.graph.nodes if n.name == "head")
    assert "self.head(self.body(self.stem(x)))" in str(node.stack_trace).splitlines()[-1]


def test_lazy_modules_are_refused_before_their_first_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(CaptureError, match="parameters without a shape") as caught:
        fxcollab.transform(model, splits=["0"])
    assert caught.value.where == "1.weight, 1.bias"
    model(X)
    fxcollab.verify(model, fxcollab.transform(model, splits=["0"]), (X,)).raise_if_failed()


@pytest.mark.parametrize(
    ("factory", "what"),
    [(lambda: 3, "The factory returned a int, not a module."), (7, "A int is no model.")],
)
def test_what_is_no_model_is_refused(factory: Any, what: str) -> None:
    with pytest.raises(CaptureError) as caught:
        fxcollab.transform(factory, splits=["a"])
    assert caught.value.what == what


def test_a_model_with_peers_of_its_own_is_refused_unless_renamed() -> None:
    model = Net()
    model.peers = nn.Linear(1, 1)
    with pytest.raises(StateError, match="has an attribute 'peers' of its own"):
        fxcollab.transform(model, splits=["stem"])
    train_model = fxcollab.transform(model, splits=["stem"], peers="others")
    assert any(key.startswith("others.b1.head") for key in train_model.state_dict())
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


# ------------------------------------------------------------------------------------------ graph modules


@pytest.fixture
def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Net())


def test_a_traced_graph_is_taken_as_it_is(traced: fx.GraphModule) -> None:
    before = list(map(describe_node, traced.graph.nodes))
    captured = fxcollab.capture(traced)
    assert list(map(describe_node, captured.graph.nodes)) == before
    assert captured.code == traced.code
    assert captured.graph is not traced.graph


def test_a_captured_module_is_taken_as_it_is() -> None:
    captured = fxcollab.capture(AuxNet(), ["stem"])
    again = fxcollab.capture(captured)
    assert again.code == captured.code
    assert follows_the_mode(again, captured)


@pytest.mark.parametrize(
    "splits", [["stem"], ["body.0"], ["body.0.act", "body.1.second"], ["add"], ["body_0_first", "add_1"]]
)
@pytest.mark.parametrize("fanouts", [None, 3])
def test_a_traced_graph_is_pruned_back_node_for_node(
    traced: fx.GraphModule, splits: list[str], fanouts: int | None
) -> None:
    before, code = list(map(describe_node, traced.graph.nodes)), traced.code
    train_model = fxcollab.transform(traced, splits=splits, fanouts=fanouts and (fanouts,) * len(splits))
    for head in range(len(train_model(X))):
        pruned = fxcollab.prune(train_model, head)
        assert list(map(describe_node, pruned.graph.nodes)) == before
        assert pruned.code == code
    assert list(map(describe_node, traced.graph.nodes)) == before
    fxcollab.verify(traced, train_model, (X,)).raise_if_failed()


def test_a_module_path_in_a_traced_graph_is_the_value_it_returns(traced: fx.GraphModule) -> None:
    by_path = fxcollab.transform(traced, splits=["body.0"], seed=0)
    by_node = fxcollab.transform(traced, splits=["add"], seed=0)
    assert by_path.code == by_node.code


@pytest.mark.parametrize("make", [Net, AuxNet, Block])
def test_retracing_the_pruned_graph_gives_what_tracing_the_model_gives(make: Callable[[], nn.Module]) -> None:
    model = make()
    splits = {Net: ["body.0"], AuxNet: ["stem"], Block: ["first"]}[make]
    expected = fx.symbolic_trace(model).code
    assert fx.symbolic_trace(fxcollab.prune(fxcollab.transform(model, splits=splits))).code == expected
    model.eval()
    expected = fx.symbolic_trace(model).code
    assert fx.symbolic_trace(fxcollab.prune(fxcollab.transform(model, splits=splits))).code == expected


def test_inplace_operators_retrace_as_plain_fx_traces_them() -> None:
    class Plus(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x += 1
            return self.head(self.body(x))

    model = Plus()
    pruned = fxcollab.prune(fxcollab.transform(model, splits=["stem"]))
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.norm = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.body(self.norm(self.act(self.stem(x))))), "in": x}


@pytest.fixture(params=["as exported", "able to train()"])
def exported(request: pytest.FixtureRequest) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Exported().train(), (X,), dynamic_shapes=({0: batch},))
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


@pytest.mark.parametrize("splits", [["stem"], ["act", "body.0"], ["linear", "batch_norm"]])
def test_an_exported_graph_is_pruned_back_node_for_node(exported: fx.GraphModule, splits: list[str]) -> None:
    before, code = list(map(describe_node, exported.graph.nodes)), exported.code
    train_model = fxcollab.transform(exported, splits=splits, init="copy-anyway")
    pruned = fxcollab.prune(train_model)
    assert list(map(describe_node, pruned.graph.nodes)) == before
    assert pruned.code == code
    for head in train_model(X):
        assert list(head) == ["out", "in"]
    fxcollab.verify(exported, train_model, (X,)).raise_if_failed()


# --------------------------------------------------------------------------------------- op granularity


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), Block()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = torch.sin(self.body(x)) * 2
        return self.head(x)


@pytest.mark.parametrize("splits", [["gelu"], ["sin"], ["gelu", "add"], ["gelu", "body"], ["body.act", "mul"]])
def test_a_split_inside_a_forward(splits: list[str]) -> None:
    model = Functional()
    train_model = fxcollab.transform(model, splits=splits, granularity="op", seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    pruned = fxcollab.prune(train_model)
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


def test_a_functional_value_of_the_opened_root_needs_no_op_granularity() -> None:
    model = Functional()
    train_model = fxcollab.transform(model, splits=["gelu"], seed=0)
    assert ("call_module", "body") in operations(fxcollab.prune(train_model).graph)
    with pytest.raises(SplitError):
        fxcollab.transform(model, splits=["add"])


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        torch._assert(x.dim() == 2, f"expected {{N, 3}}, got {x.shape} of {x.dim():03d} dimensions")
        return self.head(x)


def test_a_message_shows_the_values_of_the_call_and_not_the_proxies() -> None:
    train_model = fxcollab.transform(Asserting(), splits=["body"], pattern="simple")
    with pytest.raises(AssertionError, match=r"expected \{N, 3\}, got torch.Size\(\[3\]\) of 001 dimensions"):
        train_model(torch.ones(3))


class PlainlyAsserting(Asserting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        torch._assert(x.dim() == 2, f"got {x.shape}")  # without a format, which plain fx can't trace
        return self.head(x)


def test_a_message_traces_again_to_what_plain_fx_traces() -> None:
    model = PlainlyAsserting()
    pruned = fxcollab.prune(fxcollab.transform(model, splits=["body"], pattern="simple"))
    assert fx.symbolic_trace(pruned).code == fx.symbolic_trace(model).code


def test_a_message_compiles_into_the_full_graph() -> None:
    train_model = fxcollab.transform(Asserting(), splits=["body"], pattern="simple")
    compiled = torch.compile(train_model, fullgraph=True, backend="eager")
    for one, other in zip(compiled(torch.ones(2, 3)), train_model(torch.ones(2, 3)), strict=True):
        assert torch.equal(one, other)
