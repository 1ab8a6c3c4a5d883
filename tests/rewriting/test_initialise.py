"""How peers start: fresh, from a factory, as copies, or by a function."""

from __future__ import annotations

import copy
import random
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import PatternError, StateError
from fxcollab.rewriting.initialise import isolated_randomness
from tests.references import SkipNet, SmallConvNet
from tests.rewriting.state_helpers import CHAIN, Mlp, assert_equal_states, chain, images, mlp, snapshot
from tests.speeds import slow_but


def peers_of(train_model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in snapshot(train_model).items() if name.startswith("peers.")}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("factory", [None, SmallConvNet], ids=["instance", "factory"])
def test_initialisation_depends_on_the_seed_alone(factory: Callable[[], nn.Module] | None) -> None:
    found = []
    for global_seed, seed in ((0, 7), (1, 7), (0, 8)):
        torch.manual_seed(0)
        model = SmallConvNet()
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        found.append(peers_of(fxcollab.transform(model, **CHAIN, seed=seed, factory=factory)))
    assert_equal_states(found[0], found[1])
    assert differ(found[0], found[2])


@pytest.mark.slow
def test_without_a_seed_it_is_that_of_torch() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = SmallConvNet()
        torch.manual_seed(seed)
        found.append(peers_of(fxcollab.transform(model, **CHAIN)))
    assert_equal_states(found[0], found[1])
    assert differ(found[0], found[2])


def _noisy_init(module: nn.Module, path: str) -> None:
    import numpy

    for parameter in module.parameters():
        parameter.fill_(random.random() + numpy.random.rand()).add_(torch.rand(()))


@pytest.mark.parametrize(
    "init",
    slow_but(["fresh", _noisy_init], ["fresh", "copy-anyway", _noisy_init]),
    ids=["fresh", "copy-anyway", "function"],
)
@pytest.mark.parametrize("factory", [None, SmallConvNet], ids=["instance", "factory"])
def test_global_random_states_are_left_alone(init: Any, factory: Callable[[], nn.Module] | None) -> None:
    numpy = pytest.importorskip("numpy")
    model = SmallConvNet()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    fxcollab.transform(model, **CHAIN, init=init, factory=factory, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert torch.initial_seed() == 5


def test_a_failing_init_leaves_random_state_and_model_alone() -> None:
    def fails(module: nn.Module, path: str) -> None:
        torch.rand(3)
        raise ValueError("no luck")

    model = SmallConvNet()
    state, random_state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="no luck"):
        fxcollab.transform(model, **CHAIN, init=fails)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal_states(model.state_dict(), state)
    assert not hasattr(model, "peers")


def test_all_heads_start_apart() -> None:
    _, train_model = chain(fanouts=(2, 3))
    outputs = fxcollab.all_heads(train_model.eval())(images())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


class OddlyInitialised(nn.Module):
    """Its constructor does what no reset_parameters would do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 64)
        self.body = nn.Linear(64, 64)
        self.token = nn.Parameter(torch.randn(64) * 1e-3)
        nn.init.normal_(self.body.weight, std=1e-4)
        nn.init.constant_(self.body.bias, 7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x)) + self.token


def test_fresh_peers_of_a_factory_are_what_it_would_make() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model = fxcollab.transform(OddlyInitialised, "simple", ["stem"], heads=3, seed=3)
    for branch in ("b1", "b2"):
        with isolated_randomness(3, branch):
            made = OddlyInitialised()
        peers = train_model.peers.get_submodule(branch)
        assert torch.equal(peers.body.weight, made.body.weight)
        assert torch.equal(peers.token, made.token)
        assert peers.body.bias.eq(7).all() and peers.body.weight.std() < 2e-4


def test_each_head_of_a_tree_is_one_model_of_the_factory() -> None:
    """Level 1 and level 2 of a head are born together, as a constructor that ties scales together expects."""
    made: list[float] = []

    def factory() -> SmallConvNet:
        model = SmallConvNet()
        made.append(float(torch.rand(())))
        for parameter in model.parameters():
            nn.init.constant_(parameter, made[-1])
        return model

    train_model = fxcollab.transform(factory, **CHAIN, seed=3)
    values = {name: float(p.detach().flatten()[0]) for name, p in train_model.named_parameters()}
    assert values["peers.b1.layer2.0.weight"] == values["peers.b1_0.fc.bias"] != values["fc.bias"]
    heads = {values[f"{prefix}fc.bias"] for prefix in ("", "peers.b0_1.", "peers.b1_0.", "peers.b1_1.")}
    assert len(heads) == 4 and heads <= set(made)


def test_one_model_of_the_factory_is_held_at_a_time() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def factory() -> SmallConvNet:
        alive.append(sum(tensor() is not None for tensor in made))
        model = SmallConvNet()
        made.append(weakref.ref(model.fc.weight))
        return model

    fxcollab.transform(SmallConvNet(), **CHAIN, factory=factory)
    assert alive == [0, 0, 0]


def test_what_branches_around_hold_is_asked_for_and_not_copied() -> None:
    class Shared(SmallConvNet):
        """The classifier's module knows the one before it, unregistered."""

        def __init__(self) -> None:
            super().__init__()
            self.fc.__dict__["before"] = self.layer3

    train_model = fxcollab.transform(Shared(), splits=["layer1", "layer2"])
    for branch in ("b0_1", "b1_0", "b1_1"):
        peers = train_model.get_submodule(f"peers.{branch}")
        assert peers.get_submodule("fc").__dict__["before"] is peers.get_submodule("layer3")


def test_a_pretrained_factory_is_noticed_and_peers_reset_themselves() -> None:
    def factory() -> Mlp:
        model = Mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        return model

    with pytest.warns(UserWarning, match="same weights at every call"):
        train_model = fxcollab.transform(factory, "simple", ["first"], heads=3, seed=0)
    assert len({float(p.detach().std()) for p in train_model.peers.parameters()}) > 3


def test_a_factory_of_another_model_is_refused() -> None:
    for factory in (lambda: SmallConvNet(num_classes=9), SkipNet, nn.Identity):
        with pytest.raises(StateError, match="other than the one that is transformed"):
            fxcollab.transform(SmallConvNet(), **CHAIN, factory=factory)


def test_fresh_peers_without_a_factory_use_reset_parameters() -> None:
    class Hundred(nn.Linear):
        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.weight.copy_(torch.randn_like(self.weight) + 100)
                self.bias.fill_(3.0)

    model = Mlp()
    model.third = Hundred(6, 3)
    with torch.no_grad():
        model.third.weight.fill_(7)
        model.third.bias.zero_()
        model.second.weight.fill_(1e6)
    with pytest.warns(UserWarning, match=r"reset_parameters, from which the model's second\.weight differs"):
        train_model = fxcollab.transform(model, "simple", ["first"], seed=0)
    peers = train_model.peers.b1
    assert 90 < peers.third.weight.mean() < 110 and peers.third.bias.eq(3).all()
    assert peers.second.weight.abs().max() <= 6**-0.5
    assert model.third.weight.eq(7).all() and model.second.weight.eq(1e6).all()


@pytest.mark.parametrize("kind", ["spread", "constant", "zeros", None])
def test_an_initialisation_of_the_models_own_is_told_where_peers_do_not_have_it(kind: str | None) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 40), nn.Linear(40, 2))
        if kind == "spread":
            nn.init.orthogonal_(model[1].weight)
        elif kind == "constant":
            nn.init.zeros_(model[1].bias)
        elif kind == "zeros":
            nn.init.zeros_(model[1].weight)
        return model

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fxcollab.transform(build(), "simple", ["0"], seed=0)
    name = {"spread": "1.weight", "constant": "1.bias"}.get(kind or "")  # weights of zeros are kept
    assert [f"the model's {name} differs" in str(one.message) for one in told] == [True] * (name is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model = fxcollab.transform(build, "simple", ["0"], seed=0)
    if kind == "spread":
        weight = train_model.peers.b1.get_submodule("1").weight
        torch.testing.assert_close(weight @ weight.T, torch.eye(40), atol=1e-5, rtol=0)


def test_fresh_peers_have_fresh_statistics() -> None:
    torch.manual_seed(0)
    model = SmallConvNet()
    model(images())
    with torch.no_grad():
        model.layer2[1].weight.fill_(5)
    train_model = fxcollab.transform(model, **CHAIN, seed=0)
    norm = train_model.peers.b1.layer2[1]
    assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0 and norm.weight.eq(1).all()
    assert model.layer2[1].num_batches_tracked == 1 and model.layer2[1].weight.eq(5).all()


def test_bare_parameters_are_redrawn_with_their_moments_and_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 400)
            self.position = nn.Parameter(torch.randn(400) * 0.3 + 5)
            self.token = nn.Parameter(torch.zeros(400))
            self.temperature = nn.Parameter(torch.tensor(0.07))
            self.head = nn.Linear(400, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.stem(x) + self.position + self.token) * self.temperature)

    torch.manual_seed(0)
    model = Bare()
    with pytest.warns(UserWarning, match=r"position, token, temperature|temperature.*position") as caught:
        train_model = fxcollab.transform(model, "simple", ["stem"], seed=0)
    assert "head" not in str(caught[0].message)
    assert caught[0].filename == __file__
    peers = train_model.peers.b1
    assert not torch.equal(peers.position, model.position)
    assert abs(peers.position.mean() - 5) < 0.1 and 0.25 < peers.position.std() < 0.35
    assert peers.token.eq(0).all() and torch.equal(peers.temperature, model.temperature)


class Dropping(Mlp):
    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.dropout(F.relu(self.second(F.relu(self.first(x))))))


def test_copies_are_refused_where_nothing_is_random() -> None:
    for model in (Mlp(), Dropping(0.0), SmallConvNet()):
        split = "layer1" if isinstance(model, SmallConvNet) else "first"
        with pytest.raises(PatternError, match=r"never differ[\s\S]*copy-anyway"):
            fxcollab.transform(model, "simple", [split], init="copy")
    with pytest.raises(PatternError, match="never differ"):  # what is random lies before the split
        fxcollab.transform(Dropping(), "simple", ["dropout"], init="copy")


def test_copies_are_accepted_where_dropout_parts_them() -> None:
    torch.manual_seed(0)
    model = Dropping()
    train_model = fxcollab.transform(model, "simple", ["first"], init="copy", heads=3)
    state = train_model.state_dict()
    for branch in ("b1", "b2"):
        assert torch.equal(state[f"peers.{branch}.second.weight"], state["second.weight"])
        assert state[f"peers.{branch}.second.weight"].data_ptr() != state["second.weight"].data_ptr()
    x = torch.randn(8, 4)
    outputs = train_model(x)
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    outputs = fxcollab.all_heads(train_model.eval())(x)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


def test_functional_dropout_counts_as_random() -> None:
    class Functional(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.first(x)), 0.5, training=self.training)
            return self.third(F.dropout(self.second(x), p=0.3, training=self.training))

    train_model = fxcollab.transform(Functional(), "simple", ["second"], init="copy")
    outputs = train_model(torch.ones(8, 4))
    assert not torch.equal(*outputs)


def test_copies_can_be_insisted_on() -> None:
    model, train_model = mlp(init="copy-anyway")
    outputs = train_model(torch.ones(2, 4))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    for name, value in peers_of(train_model).items():
        assert torch.equal(value, model.state_dict()[name.split(".", 2)[2]])


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(PatternError, match=r"no init 'warm'[\s\S]*fresh, copy"):
        fxcollab.transform(Mlp(), "simple", ["first"], init="warm")  # type: ignore[arg-type]


def test_a_callable_gets_every_branch_with_its_name_and_copies_of_the_weights() -> None:
    torch.manual_seed(0)
    model = SmallConvNet()
    seen: dict[str, list[str]] = {}

    def init(module: nn.Module, path: str) -> None:
        seen[path] = [name for name, _ in module.named_parameters()]
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name))
            parameter.add_(len(seen))

    train_model = fxcollab.transform(model, **CHAIN, init=init)
    assert list(seen) == ["b1", "b0_1", "b1_0", "b1_1"]
    assert seen["b1"] == [name for name, _ in model.named_parameters() if name.startswith("layer2.")]
    for count, (path, names) in enumerate(seen.items(), start=1):
        for name in names:
            expected = model.get_parameter(name).detach() + count
            assert torch.equal(train_model.get_parameter(f"peers.{path}.{name}"), expected)


@pytest.mark.parametrize("factory", [None, SmallConvNet], ids=["instance", "factory"])
def test_threads_at_once_start_heads_by_their_seeds(factory: Callable[[], nn.Module] | None) -> None:
    models = [SmallConvNet() for _ in range(12)]
    expected = peers_of(fxcollab.transform(SmallConvNet(), **CHAIN, seed=7, factory=factory))
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda model: fxcollab.transform(model, **CHAIN, seed=7, factory=factory), models))
    for train_model in made:
        assert_equal_states(peers_of(train_model), expected)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state


class Shuffled(nn.Module):
    """An order that is drawn when it is made, and is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("order", torch.randperm(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu()[:, self.order])


class Mixing(nn.Module):
    """The same in a module of its own, drawn anew by ``reset_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 6))
        self.register_buffer("signs", torch.empty(6), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        self.signs.copy_(torch.randint(0, 2, (6,)) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.signs


def _all_anew(module: nn.Module, path: str) -> None:
    for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())):
        tensor.normal_()


@pytest.mark.parametrize("make", [Shuffled, lambda: nn.Sequential(nn.Linear(6, 6), Mixing())])
@pytest.mark.parametrize("way", ["instance", "factory", "function"])
def test_what_no_state_dict_has_is_the_same_in_all_heads(make: Callable[[], nn.Module], way: str) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 6)
    split = next(name for name, _ in model.named_children())
    init: Any = _all_anew if way == "function" else "fresh"
    train_model = fxcollab.transform(
        model, "simple", [split], init=init, seed=0, factory=make if way == "factory" else None
    )
    given = copy.deepcopy(model)
    expected = fxcollab.all_heads(train_model)(x)
    state = {name: tensor.clone() for name, tensor in train_model.state_dict().items()}
    assert not torch.equal(*expected)
    for head, output in enumerate(expected):
        given.load_state_dict(fxcollab.prune_state_dict(state, head))
        assert torch.equal(given(x), output)
