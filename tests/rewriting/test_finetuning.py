"""Peers of a trained model: what is frozen is copied, last layers start anew on request, and no training is lost."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab.errors import PatternError
from fxcollab.plan import plan_of
from tests.references import SmallConvNet
from tests.speeds import slow_but

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def trained(make: type[nn.Module] = SmallConvNet) -> nn.Module:
    """A model after three steps."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    return model


def differing(train_model: nn.Module) -> set[str]:
    """The original names of tensors in which a peer differs from head 0."""
    state = train_model.state_dict()
    peers = {key: key.split(".", 2)[2] for key in state if key.startswith("peers.")}
    assert peers
    return {name for key, name in peers.items() if not torch.equal(state[key], state[name])}


def made(model: nn.Module, **options: Any) -> tuple[fxcollab.CollabGraphModule, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_model = fxcollab.transform(model, splits=["layer1", "layer2"], seed=0, **options)
    return train_model, [str(warning.message) for warning in caught]


def nothing_new(module: nn.Module, path: str) -> None:
    pass


@pytest.mark.parametrize("factory", [None, SmallConvNet])
def test_a_model_that_looks_trained_warns_where_peers_start_anew(factory: Any) -> None:
    train_model, said = made(trained(), factory=factory)
    assert len(said) == 1 and "looks trained" in said[0] and "init='finetune'" in said[0]
    assert "layer2.0.weight" in differing(train_model) or len(differing(train_model)) > 4
    assert made(SmallConvNet(), factory=factory)[1] == []


@pytest.mark.parametrize("init", ["finetune", {"fc": "fresh", "*": "copy"}, "fc=fresh,*=copy", "copy-anyway"])
def test_nothing_is_said_where_training_is_kept(init: Any) -> None:
    assert made(trained(), init=init)[1] == []


@pytest.mark.parametrize("factory", [None, SmallConvNet])
def test_finetuning_redraws_the_last_layer_alone(factory: Any) -> None:
    model = trained()
    train_model, _ = made(model, init="finetune", factory=factory)
    assert differing(train_model) == {"fc.weight", "fc.bias"}
    state = train_model.state_dict()
    last = [state[key] for key in ("fc.weight", *(f"peers.{b}.fc.weight" for b in ("b0_1", "b1_0", "b1_1")))]
    assert not any(torch.equal(a, b) for i, a in enumerate(last) for b in last[:i])
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()
    again, _ = made(trained(), init="finetune", factory=factory)
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


class LastIsFrozen(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc.requires_grad_(False)


class NormLast(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x))
        return out


def test_the_last_layer_is_the_last_that_learns() -> None:
    train_model, _ = made(trained(LastIsFrozen), init="finetune")
    assert differing(train_model) and not any(name.startswith("fc") for name in differing(train_model))


@pytest.mark.parametrize("init", ["fresh", "finetune", {"*": "fresh"}, lambda module, path: module.apply(_scramble)])
@pytest.mark.parametrize("factory", slow_but([None], [None, SmallConvNet]))
def test_what_is_frozen_is_copied_with_its_buffers(init: Any, factory: Any) -> None:
    model = trained()
    model.layer2.requires_grad_(False)
    train_model, _ = made(model, init=init, factory=factory)
    changed = differing(train_model)
    assert changed and not any(name.startswith("layer2") for name in changed)
    assert not train_model.get_parameter("peers.b1.layer2.0.weight").requires_grad
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def _scramble(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor))


class LoRA(nn.Module):
    """A frozen layer with a correction of low rank, which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def test_with_low_rank_adapters_all_heads_start_at_the_trained_outputs() -> None:
    model = trained()
    x = model(X).detach()
    model.requires_grad_(False)
    model.fc = LoRA(model.fc)
    train_model, said = made(model.eval())
    for output in fxcollab.all_heads(train_model)(X):
        assert torch.equal(output, model(X))
    assert differing(train_model) == {"fc.a.weight"} and not said
    assert torch.isfinite(x).all()


def test_a_frozen_parameter_of_a_modules_own_does_not_freeze_the_adapters_inside() -> None:
    """As in a vision transformer, whose root has the position embedding."""
    model = trained()
    model.requires_grad_(False)
    model.fc = LoRA(model.fc)
    model.register_parameter("embedding", nn.Parameter(torch.zeros(3), requires_grad=False))
    train_model, _ = made(model.eval())
    assert differing(train_model) == {"fc.a.weight"}


@pytest.mark.parametrize(
    ("init", "start"),
    [
        ("fresh", "only head 0 has the given weights behind the splits, the others start anew"),
        ("finetune", "all heads have the given weights, except for the last layers of all but head 0"),
        ("copy-anyway", "all heads have the given weights"),
        ({"fc": "fresh", "*": "copy"}, "heads other than 0 start by fc=fresh,*=copy"),
        (nothing_new, "heads other than 0 start as nothing_new makes them"),
    ],
    ids=["fresh", "finetune", "copies", "rules", "function"],
)
def test_the_summary_says_how_heads_start(init: Any, start: str) -> None:
    net = SmallConvNet()
    assert fxcollab.summarise(made(net, init=init)[0]).start == start
    net.layer2.requires_grad_(False)
    frozen = len(list(net.layer2.parameters()))
    said = fxcollab.summarise(made(net, init=init)[0]).start
    assert said == f"{start}; {frozen} frozen parameters are copies"


@pytest.mark.parametrize(
    ("rules", "fresh"),
    [
        ({"fc": "fresh", "*": "copy"}, {"fc.weight", "fc.bias"}),
        ({"fc.bias": "fresh", "*": "copy"}, {"fc.bias"}),
        ({"f*": "fresh", "*": "copy"}, {"fc.weight", "fc.bias"}),
        ({"fc.weight": "copy", "fc": "fresh", "*": "copy"}, {"fc.bias"}),
    ],
)
def test_rules_by_name_module_or_glob(rules: Any, fresh: set[str]) -> None:
    train_model, _ = made(trained(), init=rules)
    assert differing(train_model) == fresh
    assert plan_of(train_model).options.init == ",".join(f"{key}={value}" for key, value in rules.items())


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"fx": "fresh", "*": "copy"}, "(?s)matches 'fx'.*did you mean fc"),
        ({"conv1": "fresh", "*": "copy"}, "matches 'conv1'"),  # of the trunk
        ({"fc": "fresh"}, "No rule of init says how layer"),
        ({"fc": "new", "*": "copy"}, "There is no init 'new'"),
        ("finetuned", "There is no init 'finetuned'"),
        ({"*": "copy"}, "(?s)would never differ.*init='finetune'"),
        ("copy", "(?s)would never differ.*init='finetune'"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(init: Any, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        made(SmallConvNet(), init=init)


def test_tied_tensors_start_alike_under_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.first(x)))

    train_model = fxcollab.transform(Tied(), splits=["first"], seed=0, init={"a": "fresh", "*": "copy"})
    peers = train_model.get_submodule("peers.b1")
    assert peers.a.weight is peers.b.weight
    assert differing(train_model) == {"a.weight", "a.bias", "b.weight"}


@pytest.mark.slow
def test_a_new_last_layer_on_a_trained_resnet() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model(torch.randn(4, 3, 64, 64))
    model.fc = nn.Linear(512, 10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    train_model = fxcollab.transform(model, splits=["layer2", "layer3"], seed=0, init="finetune")
    assert differing(train_model) == {"fc.weight", "fc.bias"}


class EndsIn(SmallConvNet):
    """Its last layer with parameters starts as constants."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(super().forward(x))
        return out


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale


@pytest.mark.parametrize("last", [nn.BatchNorm1d(5), nn.LayerNorm(5), Scale()])
def test_scales_and_shifts_are_no_last_layer(last: nn.Module) -> None:
    train_model, _ = made(EndsIn(last), init="finetune")
    assert {"fc.weight", "fc.bias"} == differing(train_model)


@pytest.mark.parametrize("init", ["finetune", {"fc": "fresh", "*": "copy"}])
def test_a_last_layer_of_zeros_is_redrawn_where_it_is_meant(init: Any) -> None:
    model = SmallConvNet()
    model.fc = nn.Linear(8, 5, bias=False)
    nn.init.zeros_(model.fc.weight)
    assert differing(made(model, init=init)[0]) == {"fc.weight"}


def test_heads_that_would_start_equal_all_the_same_are_refused() -> None:
    with pytest.raises(PatternError, match=r"(?s)would never differ.*init='finetune'"):
        made(EndsIn(nn.LayerNorm(5)), init={"last": "fresh", "*": "copy"})
    frozen = SmallConvNet().requires_grad_(False)
    frozen.conv1.requires_grad_(True)
    with pytest.raises(PatternError, match=r"(?s)would never differ.*name layers that start anew"):
        made(frozen, init="finetune")


class Auxiliary(SmallConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))).mean((2, 3))
        return self.fc(h), self.aux(h)


def test_every_output_has_a_last_layer() -> None:
    assert differing(made(Auxiliary(), init="finetune")[0]) == {"fc.weight", "fc.bias", "aux.weight", "aux.bias"}


class Counts(nn.Linear):
    """Its reset changes an attribute, and takes an argument if it is asked to."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.resets = getattr(self, "resets", 0) + 1


def test_modules_that_start_as_copies_are_not_reset() -> None:
    model = EndsIn(Counts(5, 5))
    train_model, _ = made(model, init={"fc": "fresh", "*": "copy"})
    assert train_model.get_submodule("peers.b0_1.last").resets == 1
    assert made(EndsIn(Counts(5, 5)))[0].get_submodule("peers.b0_1.last").resets == 2


class WantsAnArgument(nn.Linear):
    def reset_parameters(self, scale: float | None = None, *rest: Any) -> None:
        super().reset_parameters()


class NeedsAnArgument(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.reset_parameters = self.reset  # type: ignore[method-assign]

    def reset(self, scale: float) -> None:
        raise AssertionError


def test_a_reset_that_needs_arguments_is_not_called() -> None:
    train_model, said = made(EndsIn(NeedsAnArgument(5, 5)))
    assert "last.weight" in differing(train_model) and any("no module initialises" in text for text in said)
    assert "last.weight" in differing(made(EndsIn(WantsAnArgument(5, 5)))[0])


@pytest.mark.parametrize("factory", [False, True])
def test_a_norm_without_parameters_goes_with_what_is_frozen_around_it(factory: bool) -> None:
    def make() -> nn.Module:
        model = SmallConvNet()
        model.layer2[1] = nn.BatchNorm2d(8, affine=False)
        return model

    model = make()
    model(X)
    model.layer2.requires_grad_(False)
    train_model, _ = made(model, factory=make if factory else None)
    assert not any(name.startswith("layer2") for name in differing(train_model))


def test_rules_may_name_what_looks_like_a_glob() -> None:
    class Keyed(SmallConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.ends = nn.ModuleDict({"[z]": nn.Linear(5, 5)})

        def forward(self, x: Tensor) -> Any:
            return self.ends["[z]"](super().forward(x))

    assert differing(made(Keyed(), init={"ends.[z]": "fresh", "*": "copy"})[0]) == {
        "ends.[z].weight",
        "ends.[z].bias",
    }


def test_siblings_that_share_all_that_starts_fresh_are_refused() -> None:
    with pytest.raises(PatternError, match="would never differ"):  # heads 0 and 1 share layer2
        made(SmallConvNet(), init={"layer2": "fresh", "*": "copy"})


def test_randomness_that_siblings_share_makes_no_copies_differ() -> None:
    def net(*last: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), *last)

    with pytest.raises(PatternError, match="would never differ"):
        fxcollab.transform(net(), splits=["0", "2"], init="copy", seed=0)
    train_model = fxcollab.transform(net(nn.Dropout(0.5)), splits=["0", "2"], init="copy", seed=0)
    outputs = train_model(torch.ones(3, 4))
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


class Adapter(nn.Module):
    """A frozen layer with a low-rank update that starts as zero, or with a scale that starts as one."""

    def __init__(self, layer: nn.Linear, *, low_rank: bool) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        if low_rank:
            self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return h + self.up(self.down(x)) if hasattr(self, "up") else h * self.scale


def adapted(*, low_rank: bool) -> nn.Module:
    """A pretrained network, of which only adapters are trained."""
    torch.manual_seed(0)
    frozen = [nn.Linear(12, 12).requires_grad_(False) for _ in range(2)]
    adapters = [Adapter(nn.Linear(12, 12), low_rank=low_rank) for _ in range(2)]
    return nn.Sequential(frozen[0], nn.ReLU(), adapters[0], nn.ReLU(), adapters[1], frozen[1])


@pytest.mark.parametrize("init", slow_but(["fresh"], ["fresh", {"*.down": "fresh", "*": "copy"}]))
def test_with_low_rank_adapters_all_heads_start_as_the_given_network(init: Any) -> None:
    model = adapted(low_rank=True)
    train_model = fxcollab.transform(model, "simple", ["0"], seed=0, init=init)
    expected = model(X)
    assert all(torch.equal(output, expected) for output in train_model(X))
    assert {name.split(".")[1] for name in differing(train_model)} == {"down"}


@pytest.mark.parametrize(("init", "way_out"), [("fresh", "init=callable"), ("copy", "init='finetune'")])
def test_adapters_that_all_start_alike_would_stay_so_and_are_refused(init: Any, way_out: str) -> None:
    with pytest.raises(PatternError, match="would never differ") as caught:
        fxcollab.transform(adapted(low_rank=init == "copy"), "simple", ["0"], seed=0, init=init)
    assert way_out in str(caught.value.hint)


def test_a_frozen_head_behind_adapters_is_fine() -> None:
    model = adapted(low_rank=True)
    assert not model[-1].weight.requires_grad
    train_model = fxcollab.transform(model, splits=["0", "4"], seed=0)
    fxcollab.verify(model, train_model, (X,)).raise_if_failed()


def test_the_way_out_for_adapters_that_start_alike_works() -> None:
    def noise(module: nn.Module, path: str) -> None:
        for name, parameter in module.named_parameters():
            if name.endswith("scale"):
                nn.init.normal_(parameter, 1, 0.01)

    train_model = fxcollab.transform(adapted(low_rank=False), "simple", ["0"], seed=0, init=noise)
    assert {name.split(".")[1] for name in differing(train_model)} == {"scale"}
