"""Verify: it finds what is broken, leaves everything as it was, and knows what to run on."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcollab
from fxcollab import CaptureError, CollabGraphModule, Report, StateError, VerificationError
from fxcollab.plan import plan_of
from fxcollab.proof.runs import Trial, run, run_train_model
from tests.speeds import slow_but
from tests.untouched import Untouched

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two levels, with an in-place first consumer, a skip, statistics, and something random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Linear(4, 4), nn.ELU(inplace=True)
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.layer(self.act(x)))
        return self.head(self.drop(y) + x)


@pytest.fixture
def model() -> nn.Module:
    return Net()


@pytest.fixture
def train_model(model: nn.Module) -> CollabGraphModule:
    return fxcollab.transform(model, splits=["stem", "layer"], seed=0)


def failed(report: Report) -> list[str]:
    return [check.name for check in report if not check.ok]


def node(train_model: CollabGraphModule, name: str) -> fx.Node:
    return next(n for n in train_model.graph.nodes if n.name == name)


def inserted(train_model: CollabGraphModule, function: Any) -> list[fx.Node]:
    return [n for n in train_model.graph.nodes if n.target is function]


def remove(train_model: CollabGraphModule, which: fx.Node) -> None:
    which.replace_all_uses_with(which.args[0])  # type: ignore[arg-type]
    train_model.graph.erase_node(which)
    train_model.recompile()


# ----------------------------------------------------------------------------------------------- the report


def test_a_sound_training_model_passes(model: nn.Module, train_model: CollabGraphModule) -> None:
    report = fxcollab.verify(model, train_model, (X,))
    assert report and report.ok
    assert report.raise_if_failed() is report
    lines = str(report).splitlines()
    assert len(lines) == len(list(report)) and all(line.startswith("ok ") for line in lines)
    shown = [check.name for check in report]
    assert [name for name in shown if name.startswith("graph of head")] == [
        f"graph of head {head} equals the original's" for head in range(4)
    ]
    for mode in ("train", "eval"):
        assert f"head 0 in {mode} mode equals the original" in shown
        assert f"head 3 in {mode} mode equals the original with head 3's weights" in shown
    assert "gradients are the mean over separate originals" in shown
    assert "float64" in report.checks[-1].detail


def test_what_was_given_up_is_listed(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, inputs, output: output)
    train_model = fxcollab.transform(model, splits=["stem"])
    report = fxcollab.verify(model, train_model, (X,))
    assert any("forward hooks of the root don't run" in note for note in report.limitations)
    assert "note   forward hooks" in str(report)


def test_a_failed_report_is_false_and_raises(model: nn.Module, train_model: CollabGraphModule) -> None:
    remove(train_model, inserted(train_model, fxcollab.rescale)[0])
    report = fxcollab.verify(model, train_model, (X,))
    assert not report
    assert "FAILED gradients are the mean over separate originals" in str(report)
    with pytest.raises(VerificationError, match=r"1 of \d+ checks failed") as caught:
        report.raise_if_failed()
    assert "at stem." in str(caught.value.why)


# ------------------------------------------------------------------------------------------- broken gradients


@pytest.mark.parametrize("index", slow_but([1], range(3)))
def test_a_missing_rescale_is_found(model: nn.Module, train_model: CollabGraphModule, index: int) -> None:
    remove(train_model, inserted(train_model, fxcollab.rescale)[index])
    assert failed(fxcollab.verify(model, train_model, (X,))) == ["gradients are the mean over separate originals"]


@pytest.mark.parametrize("index", slow_but([1], range(3)))
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: 2 * f, marks=pytest.mark.slow),
        pytest.param(lambda f: f / 2, marks=pytest.mark.slow),
        lambda f: f * 1.0001,
    ],
)
def test_a_wrong_factor_is_found(
    model: nn.Module, train_model: CollabGraphModule, index: int, change: Callable[[float], float]
) -> None:
    rescale = inserted(train_model, fxcollab.rescale)[index]
    rescale.args = (rescale.args[0], change(rescale.args[1]))  # type: ignore[arg-type]
    train_model.recompile()
    assert failed(fxcollab.verify(model, train_model, (X,))) == ["gradients are the mean over separate originals"]


@pytest.mark.slow
def test_the_trunk_factor_of_two_heads_in_a_tree_of_four_is_found(model: nn.Module) -> None:
    """The mistake of a public implementation: 1/2 for the trunk whatever the number of heads."""
    train_model = fxcollab.transform(model, splits=["stem"], fanouts=(4,))
    for rescale in inserted(train_model, fxcollab.rescale):
        rescale.args = (rescale.args[0], 0.5)
    train_model.recompile()
    assert failed(fxcollab.verify(model, train_model, (X,)))


@pytest.mark.slow
def test_an_unscaled_tree_is_no_scaled_one(model: nn.Module) -> None:
    train_model = fxcollab.transform(model, splits=["stem"], rescale=False)
    report = fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert report.checks[-1].name == "gradients are the sum over separate originals"
    for value in inserted(train_model, operator.add):
        with train_model.graph.inserting_after(value):
            half = train_model.graph.call_function(fxcollab.rescale, (value, 0.5))
        half.meta = {"fxcollab": fxcollab.provenance.Provenance("rescale", "add", (), fxcollab.rescale)}
        value.replace_all_uses_with(half, lambda user, half=half: user is not half)
    train_model.recompile()
    assert failed(fxcollab.verify(model, train_model, (X,))) == ["gradients are the sum over separate originals"]


def test_a_detached_branch_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    train_model.peers.b1.layer.weight.requires_grad_(False)
    assert fxcollab.verify(model, train_model, (X,)).ok  # freezing is the user's right
    train_model.peers.b1.layer.weight.requires_grad_(True)
    train_model.peers.b1.layer.forward = lambda x: torch.nn.functional.linear(
        x, train_model.peers.b1.layer.weight.detach(), train_model.peers.b1.layer.bias
    )
    assert "gradients are the mean over separate originals" in failed(fxcollab.verify(model, train_model, (X,)))


# ----------------------------------------------------------------------------------------------- broken values


def test_a_missing_copy_is_found_in_both_modes(model: nn.Module, train_model: CollabGraphModule) -> None:
    for which in inserted(train_model, fxcollab.private_copy):
        remove(train_model, which)
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "head 3 in train mode equals the original with head 3's weights" in names
    assert "head 3 in eval mode equals the original with head 3's weights" in names


def test_swapped_heads_are_found(model: nn.Module) -> None:
    train_model = fxcollab.transform(model, splits=["stem", "layer"], seed=0, eval_output="all")
    output = node(train_model, "output")
    first, second, *others = output.args[0]  # type: ignore[misc, union-attr]
    output.args = ((second, first, *others),)
    train_model.recompile()
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "graph of head 0 equals the original's" in names
    assert "head 0 in eval mode equals the original" in names
    assert "head 1 in eval mode equals the original with head 1's weights" in names
    assert "head 2 in eval mode equals the original with head 2's weights" not in names


@pytest.mark.slow
def test_crossed_branches_are_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    head = node(train_model, "head_b1_1")
    head.args = (node(train_model, "head_b1_0").args[0],)
    train_model.graph.lint()
    train_model.recompile()
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "graph of head 3 equals the original's" in names


@pytest.mark.slow
def test_a_branch_that_calls_anothers_module_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    node(train_model, "head_b1_0").target = "peers.b1_1.head"
    train_model.recompile()
    assert "head 2 in eval mode equals the original with head 2's weights" in failed(
        fxcollab.verify(model, train_model, (X,))
    )


@pytest.mark.parametrize("attribute", slow_but(["negative"], ["eps", "negative"]))
def test_a_peer_that_computes_something_else_is_found(
    model: nn.Module, train_model: CollabGraphModule, attribute: str
) -> None:
    if attribute == "eps":
        train_model.peers.b1_0.norm.eps = 0.5
    else:
        train_model.peers.b1.act.alpha = 3.0
    assert "head 2 in train mode equals the original with head 2's weights" in failed(
        fxcollab.verify(model, train_model, (X,))
    )


def test_a_forward_other_than_the_graphs_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    node(train_model, "add").args = (node(train_model, "drop"), node(train_model, "drop"))
    assert "the generated forward runs the graph in eval mode" in failed(fxcollab.verify(model, train_model, (X,)))


def test_a_changed_original_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    class Changed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model.__class__ = Changed
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "graph of head 0 equals the original's" in names
    assert "head 0 in eval mode equals the original" in names


# ------------------------------------------------------------------------------------------------ broken state


def share_module(train_model: CollabGraphModule) -> None:
    train_model.peers.b1.layer = train_model.layer


def share_weight(train_model: CollabGraphModule) -> None:
    train_model.peers.b0_1.head.weight = train_model.head.weight


def share_storage(train_model: CollabGraphModule) -> None:
    train_model.peers.b1_0.head.weight = nn.Parameter(train_model.peers.b1_1.head.weight.data)


def share_statistics(train_model: CollabGraphModule) -> None:
    train_model.peers.b1_1.norm.running_mean = train_model.norm.running_mean


@pytest.mark.parametrize(
    "share", slow_but([share_statistics], [share_module, share_weight, share_storage, share_statistics])
)
def test_state_shared_between_branches_is_found(share: Callable[[CollabGraphModule], None]) -> None:
    model = Net()
    train_model = fxcollab.transform(model, splits=["stem", "layer"], seed=0)
    share(train_model)
    report = fxcollab.verify(model, train_model, (X,))
    assert "every branch has state of its own" in failed(report)


def test_another_object_of_the_same_class_is_found(train_model: CollabGraphModule) -> None:
    report = fxcollab.verify(Net(), train_model, (X,))
    assert "pruned tensors are the original's own" in failed(report)


@pytest.mark.slow
def test_a_deepcopy_proves_its_own_root_only(model: nn.Module, train_model: CollabGraphModule) -> None:
    copied = copy.deepcopy(train_model)
    assert "pruned tensors are the original's own" in failed(fxcollab.verify(model, copied, (X,)))
    fxcollab.verify(copied.root, copied, (X,)).raise_if_failed()


def test_renamed_state_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    model.register_buffer("extra", torch.zeros(1))
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()  # one registry: the training model has it too
    model.add_module("late", nn.Linear(1, 1))
    names = failed(fxcollab.verify(model, train_model, (X,)))
    assert "state dict begins with the original's" in names


# ---------------------------------------------------------------------------------------------- refusals


def test_a_node_that_joins_heads_belongs_to_none(model: nn.Module) -> None:
    train_model = fxcollab.transform(model, splits=["stem", "layer"], seed=0, eval_output="all")
    heads = node(train_model, "head_b0_1"), node(train_model, "head_b1_0")
    with train_model.graph.inserting_after(heads[1]):
        train_model.graph.call_function(torch.add, heads)
    train_model.recompile()
    with pytest.raises(StateError, match=r"(?s)Node 'add\w*' belongs to no head.*branches b0_1 and b1_0"):
        fxcollab.prune(train_model)
    report = fxcollab.verify(model, train_model, (X,))
    assert [check.name for check in report if not check.ok] == ["every node belongs to a head"]


def test_a_model_that_was_not_transformed_is_refused(model: nn.Module) -> None:
    with pytest.raises(StateError, match="Net is not a training model"):
        fxcollab.verify(model, model, (X,))
    with pytest.raises(StateError, match="is not a training model"):
        fxcollab.verify(model, fxcollab.capture(model, ["stem"]), (X,))


def test_a_wrapped_training_model_is_unwrapped(model: nn.Module, train_model: CollabGraphModule) -> None:
    fxcollab.verify(model, torch.compile(train_model), (X,)).raise_if_failed()
    fxcollab.verify(model, nn.DataParallel(train_model), (X,)).raise_if_failed()


# --------------------------------------------------------------------------------------------- leaves all be


class Untidy(Net):
    """Its forward counts, remembers and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.last, self.history = 0, None, []
        self.remember = Remember()
        self.head = torch.nn.utils.spectral_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.last = x
        self.history.append(x)
        x.mul_(1.5)
        return super().forward(self.remember(x))


class Remember(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x * 1


def everything(*models: nn.Module) -> Iterator[Any]:
    for model in models:
        for path, module in model.named_modules():
            yield path, module.training, {k: id(v) for k, v in module.__dict__.items() if k != "training"}
            yield [len(v) for v in module.__dict__.values() if isinstance(v, list | dict)]
        for name, tensor in model.state_dict(keep_vars=True).items():
            yield name, id(tensor), tensor.requires_grad, id(tensor.grad), tensor.tolist()


@pytest.mark.filterwarnings("ignore:no module initialises")
@pytest.mark.parametrize("training", slow_but([True], [True, False]))
def test_verifying_leaves_state_flags_gradients_and_randomness(training: bool) -> None:
    model = Untidy()
    train_model = fxcollab.transform(model, splits=["stem"], seed=0).train(training)
    model.norm.eval()
    train_model.peers.b1.drop.train(not training)
    train_model(X.clone())[1].sum().backward()
    x = X.clone()
    before, state = list(everything(model, train_model)), torch.get_rng_state()
    fxcollab.verify(model, train_model, (x,)).raise_if_failed()
    assert list(everything(model, train_model)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, X) and not x.requires_grad


@pytest.mark.slow
def test_verifying_under_autocast_and_no_grad_is_the_same(model: nn.Module, train_model: CollabGraphModule) -> None:
    expected = str(fxcollab.verify(model, train_model, (X,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert str(fxcollab.verify(model, train_model, (X,))) == expected
    with torch.no_grad():
        assert str(fxcollab.verify(model, train_model, (X,))) == expected


# ------------------------------------------------------------------------------------------------------ inputs


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


GUESSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "images": (
        lambda: chain(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
        "0",
    ),
    "images of 32": (
        lambda: chain(nn.Conv2d(1, 1, 3, 2, 1), nn.Flatten(), nn.Linear(256, 2)),
        "0",
    ),
    "features": (lambda: chain(nn.Linear(5, 3), nn.Linear(3, 2)), "0"),
    "tokens": (lambda: chain(nn.Embedding(9, 3), nn.Linear(3, 2)), "0"),
    "sound": (lambda: chain(nn.Conv1d(2, 2, 3), nn.Flatten(1), nn.LazyLinear(2)), "0"),
}


@pytest.mark.parametrize("kind", slow_but(["images", "tokens"], GUESSED))
def test_inputs_are_guessed(kind: str) -> None:
    build, split = GUESSED[kind]
    model = build()
    if isinstance(model[-1], nn.LazyLinear):
        model(torch.randn(2, 2, 128))
    fxcollab.verify(model, fxcollab.transform(model, splits=[split])).raise_if_failed()


def test_the_shapes_given_to_transform_are_remembered() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(self.a(x) * y)

    model = Two()
    train_model = fxcollab.transform(model, splits=["a"], example_inputs=(torch.randn(7, 5), torch.ones(7, 4)))
    fxcollab.verify(model, train_model).raise_if_failed()
    with pytest.raises(CaptureError, match=r"No input that \S*Two accepts could be guessed") as caught:
        fxcollab.verify(model, fxcollab.transform(model, splits=["a"]))
    assert caught.value.why == "its inputs are x, y"
    assert "example_inputs=" in str(caught.value.hint)


def test_inputs_that_cant_be_guessed_are_asked_for() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor) and not isinstance(x, fx.Proxy) and x.shape[0] != 13:
                raise ValueError("a batch of 13")
            return super().forward(x)

    model = Odd()
    train_model = fxcollab.transform(model, splits=["stem"])
    with pytest.raises(CaptureError, match=r"No input that \S*Odd accepts could be guessed") as caught:
        fxcollab.verify(model, train_model)
    assert caught.value.why == "none of the usual shapes fits"
    fxcollab.verify(model, train_model, (torch.randn(13, 4),)).raise_if_failed()


@pytest.mark.slow
def test_examples_may_be_named(model: nn.Module, train_model: CollabGraphModule) -> None:
    fxcollab.verify(model, train_model, {"x": X}).raise_if_failed()
    with pytest.raises(CaptureError, match="The example inputs don't fit the model"):
        fxcollab.verify(model, train_model, {"y": X})


@pytest.mark.slow
def test_a_peer_that_counts_otherwise_is_found(model: nn.Module, train_model: CollabGraphModule) -> None:
    train_model.peers.b1_0.norm.momentum = 0.5
    assert failed(fxcollab.verify(model, train_model, (X,)))


# ------------------------------------------------------------------------------------- what models also do


class Twice(nn.Module):
    """One module is registered on both sides of the split."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.a, self.b = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.slow
def test_a_module_with_two_parents_around_the_split_is_proven_and_left_alone() -> None:
    model = Twice()
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    before = Untouched(model), Untouched(train_model)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    assert [one.differences() for one in before] == [[], []]


def test_a_run_leaves_every_tensor_of_a_module_with_two_parents() -> None:
    model = Twice()
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    before = Untouched(train_model)
    trial = Trial(model, train_model, plan_of(train_model).interface, (X,))
    run_train_model(trial, True)
    assert before.differences() == []
    run(trial, trial.original(1, True))
    assert before.differences() == []


class Behind(nn.Module):
    """Does ``last`` to two values behind the split ``a``."""

    def __init__(self, last: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = last

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.last(self.b(x), self.c(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "last",
    [
        lambda x, y: torch.complex(x, y).conj(),
        pytest.param(lambda x, y: torch.complex(x, y).conj().imag, marks=pytest.mark.slow),
    ],
    ids=["conjugate", "negative"],
)
def test_outputs_that_torch_conjugates_or_negates_lazily_are_compared(last: Callable[[Tensor, Tensor], Any]) -> None:
    model = Behind(last)
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    train_model.peers.b1.c.register_forward_hook(lambda module, args, output: output + 1)
    assert "head 1 in eval mode equals the original with head 1's weights" in failed(
        fxcollab.verify(model, train_model, (X,))
    )


def test_a_model_that_computes_something_else_without_gradients_is_found() -> None:
    model = Behind(lambda x, y: x if torch.is_grad_enabled() else y)
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    for enabled in (True, False):  # the caller's own mode decides nothing
        with torch.set_grad_enabled(enabled):
            assert failed(fxcollab.verify(model, train_model, (X,))) == [
                "head 0 in eval mode equals the original",
                "head 1 in eval mode equals the original with head 1's weights",
                "eval mode returns the output of the original",
            ]


@pytest.mark.slow
def test_boolean_outputs_that_differ_are_found() -> None:
    model = Behind(lambda x, y: (x, y > 0))
    train_model = fxcollab.transform(model, splits=["a"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    train_model.peers.b1.c.register_forward_hook(lambda module, args, output: -output)
    assert "head 1 in eval mode equals the original with head 1's weights" in failed(
        fxcollab.verify(model, train_model, (X,))
    )


def test_checks_are_told_as_they_are_made() -> None:
    model, told = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), list[str]()
    train_model = fxcollab.transform(model, "simple", ["0"], seed=0)
    report = fxcollab.verify(model, train_model, (torch.randn(4, 3),), on_check=lambda check: told.append(check.name))
    assert told == [check.name for check in report] and len(told) > 10
