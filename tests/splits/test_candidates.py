"""Where a model can be cut at one value, and what lies before and behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxcollab
from fxcollab import CaptureError
from fxcollab.splits.candidates import Candidate, find_splits
from fxcollab.splits.opening import own_names
from tests.speeds import slow_but
from tests.untouched import Untouched

X = torch.rand(2, 8)


def resnet50() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet50()


def resnet18() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet18()


def names(found: tuple[Candidate, ...]) -> list[str]:
    return [candidate.name for candidate in found]


def test_a_resnet_can_be_cut_behind_every_block_and_its_stages_stand_out() -> None:
    found = find_splits(resnet18())
    assert {"layer1.0", "layer2", "layer3.1", "layer4"} - set(names(found)) == {"layer3.1"}  # which is layer3's value
    stages = [c.name for c in found if c.ends_stage]
    assert stages == ["relu", "layer1", "layer2", "layer3", "layer4"]
    third = next(c for c in found if c.name == "layer3")
    assert (third.shape, third.run) == ((2, 256, 14, 14), (2, 2))


def test_what_lies_before_and_behind_adds_up_to_the_model() -> None:
    model = resnet18()
    found = find_splits(model)
    assert {sum(c.parameters) for c in found} == {sum(p.numel() for p in model.parameters())}
    assert len({sum(c.flops) for c in found}) == len({sum(c.activations) for c in found}) == 1
    before = [(c.flops[0], c.parameters[0], c.activations[0]) for c in found]
    assert before == sorted(before)
    layer2 = next(c for c in found if c.name == "layer2")
    behind = [*model.layer3.parameters(), *model.layer4.parameters(), *model.fc.parameters()]
    assert layer2.parameters[1] == sum(p.numel() for p in behind)


@pytest.mark.slow
def test_depth_decides_what_is_opened() -> None:
    model = resnet50()
    assert "layer1.0" not in names(find_splits(model, depth=0))
    assert "layer1.0.relu@3" not in names(find_splits(model))
    assert "layer1.0.conv1" not in names(find_splits(model, depth=2))  # a skip goes round it


class RootAdds(nn.Module):
    """The sums are made by the root itself; its blocks, which are opened, make sums of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Sum(), nn.ReLU()) for _ in range(3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = x.flatten(1)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x)


class Layers(nn.Module):
    """Residual blocks whose sums are made around them, the commonest transformer written by hand."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Sum(), nn.Linear(8, 8)]) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        for first, second in self.layers:
            x = first(x) + x
            x = second(torch.tanh(x)) + x
        return x


class InnerAdds(nn.Module):
    """The sums are made by a module inside, which computes nearly everything."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.start, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)
        self.inner = nn.Sequential(Layers(), nn.Sequential(Layers(1), nn.ReLU())) if nested else Layers()

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.inner(self.start(x) + x))


class CalledTwice(InnerAdds):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.inner(torch.sin(self.inner(self.start(x)))))


class ParametersAlone(InnerAdds):
    """Values that are computed from parameters alone, at every depth, hide no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        x = self.inner(self.start(x * torch.exp(self.scale)) * torch.exp(self.scale))
        return nn.functional.linear(x, self.fc.weight, torch.cat([self.shift[:1], self.fc.bias[1:]]))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("granularity", slow_but(["auto"], ["auto", "op"]))
def test_every_candidate_is_a_split_under_its_name(granularity: Any) -> None:
    found = find_splits(RootAdds(), (X,), granularity=granularity)
    assert {"add", "add_1", "add_2"} <= set(names(found)) or granularity == "op"
    for candidate in found:
        train_model = fxcollab.transform(RootAdds(), "simple", candidate.name, granularity=granularity)
        behind = fxcollab.summarise(train_model).levels[1].parameters
        assert behind == candidate.parameters[1]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (InnerAdds, {"add", "inner.add", "inner.add_6", "inner"}),
        (
            lambda: InnerAdds(nested=True),
            {"add", "inner.0.add", "inner.0.add_6", "inner.0", "inner.1.0.add", "inner"},
        ),
        (CalledTwice, {"start", "inner.add", "sin", "inner.add_8", "inner.add_14"}),
        (ParametersAlone, {"start", "inner.add", "inner.add_6", "inner"}),
    ],
    ids=["inner", "nested", "called twice", "parameters alone"],
)
def test_values_of_opened_modules_are_candidates_under_names_that_transform_finds(
    make: Any, expected: set[str]
) -> None:
    model = make()
    found = {candidate.name: candidate for candidate in find_splits(model, (X,))}
    assert expected <= found.keys()
    for name in sorted(expected):
        train_model = fxcollab.transform(model, "simple", name, example_inputs=(X,), init="copy-anyway")
        assert fxcollab.summarise(train_model).levels[1].parameters == found[name].parameters[1]
    fxcollab.verify(model, train_model).raise_if_failed()


@pytest.mark.slow
def test_an_auxiliary_output_is_no_end() -> None:
    with torch.device("meta"):
        found = find_splits(torchvision.models.googlenet(init_weights=False))
    assert "inception5a" in names(found)


class Skips(nn.Module):
    """Two values that carry gradients go side by side from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        left, right = self.a(x), self.b(x)
        return self.d(left) + self.c(right)


def test_values_that_go_side_by_side_are_one_candidate() -> None:
    found = {candidate.name: candidate for candidate in find_splits(Skips(), (X,))}
    assert found["a+b"].flops[0] == found["a+b"].flops[1] > 0
    assert found["a+b"].crossing == (2, 2 * X.nbytes)
    assert not found["a+b"].is_narrow


class Masked(Skips):
    def forward(self, x: Tensor) -> Any:
        mask = x > 0
        for layer in (self.a, self.b, self.c):
            x = layer(x) * mask
        return self.d(x)


def test_a_mask_that_goes_along_is_no_second_value() -> None:
    assert names(find_splits(Masked(), (X,)))[:2] == ["a", "mul"]


@pytest.mark.parametrize("granularity", slow_but(["op"], ["auto", "op"]))
def test_looking_for_splits_leaves_the_model_as_it_is(granularity: Any) -> None:
    model = torchvision.models.squeezenet1_1().eval()
    untouched = Untouched(model)
    assert find_splits(model, granularity=granularity)
    assert untouched.differences() == []


class Resists(nn.Module):
    """Can't be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.b(self.a(x))


class AsksForANumber(Resists):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x) * x.sum().item())


def test_a_module_that_cannot_be_opened_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Resists(), nn.Linear(8, 8))
    assert names(find_splits(model, (X,))) == ["0", "1"]


class Graph(nn.Module):
    """Messages along those edges that have a weight: how many there are depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Messages() for _ in range(4))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        for layer in self.layers:
            x = torch.relu(layer(x, edges))
        return self.fc(x.mean(0))


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        source, target = edges.nonzero().unbind(1)
        return torch.zeros_like(x).index_add(0, target, self.linear(x[source])) + x


class ByMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.b(torch.relu(self.a(x)))
        return self.c(x[x.detach().sum(1) > -100])


def test_work_that_depends_on_values_is_counted_on_the_example_inputs() -> None:
    x, edges = torch.randn(6, 8), torch.ones(6, 6).triu()
    found = {each.name: each for each in find_splits(Graph(), (x, edges))}
    assert {"layers.0", "layers.1", "layers.2"} <= found.keys()
    assert found["layers.1"].flops[0] == 2 * 2 * 21 * 8 * 8  # 21 edges, two layers
    choice = fxcollab.choose_splits(Graph(), (x, edges))
    assert choice.reason.endswith("counted on the example inputs, on whose values the work depends")
    model = Graph()
    train_model = fxcollab.transform(model, splits="auto", example_inputs=(x, edges))
    fxcollab.verify(model, train_model, (x, edges)).raise_if_failed()
    assert names(find_splits(ByMask(), (X,)))[:2] == ["a", "relu"]


def test_work_that_depends_on_values_is_not_known_where_there_are_none() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), AsksForANumber())
    with pytest.raises(CaptureError, match="can't be computed") as caught:
        find_splits(model, (X.to("meta"),))
    assert "depends on the values of tensors" in str(caught.value.why)
    assert "give example_inputs" in str(caught.value.hint)


class NamedAlike(nn.Module):
    """The node of the first activation is called like the module of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.c = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.relu(self.b(torch.relu(self.a(x)))))


class Numbered(nn.Module):
    """Nodes of the root, whose numbers depend on what is opened beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = Block(), Block()
        self.c = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.relu(self.q(torch.relu(self.p(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.m = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.m(torch.relu(self.l(x)))


@pytest.mark.parametrize("make", slow_but([NamedAlike], [NamedAlike, Numbered]))
def test_a_name_means_one_value(make: Any) -> None:
    found = names(find_splits(make(), (X,)))
    assert len(set(found)) == len(found)
    for objective in (lambda option: option.shares[0], lambda option: option.shares[-1], fxcollab.evenness):
        choice = fxcollab.choose_splits(make(), (X,), objective=objective)
        costs = fxcollab.training_costs(make(), splits=choice.splits, example_inputs=(X,))
        assert costs.flops == pytest.approx(choice.option.time)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.classes = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.boxes = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x)
        return self.classes(x), self.boxes(x)


def test_a_cut_lies_before_all_outputs() -> None:
    assert names(find_splits(TwoOutputs(), (X,))) == ["trunk.0", "trunk"]


class Frozen(Masked):
    """Nothing of the first layer learns."""

    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)


def test_frozen_parameters_are_cut_like_others() -> None:
    assert names(find_splits(Frozen(), (X,))) == names(find_splits(Masked(), (X,)))


class OnlyInTrainMode(Masked):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            x = torch.relu(self.b(x))
        return self.d(x)


def test_values_of_train_mode_alone_are_no_candidates() -> None:
    assert names(find_splits(OnlyInTrainMode(), (X,))) == ["a"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Resists(), Block()])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.slow
def test_healthy_neighbours_of_a_block_that_resists_are_opened() -> None:
    found = names(find_splits(nn.Sequential(Encoder(), nn.Linear(8, 8)), (X,)))
    assert {"0.blocks.0.l", "0.blocks.1", "0.blocks.2.l"} <= set(found) and "0.blocks.1.a" not in found


class Spectrum(Masked):
    def forward(self, x: Tensor) -> Any:
        return torch.fft.rfft(self.b(self.a(x)))


def test_complex_outputs_are_counted() -> None:
    assert names(find_splits(Spectrum(), (X,)))[0] == "a"


def test_an_input_is_tried_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    with pytest.raises(CaptureError, match="fails on input 1x8") as caught:
        find_splits(model, (X[:1],))
    assert "train mode" in str(caught.value.where) and "more than 1 value" in str(caught.value.why)


def test_a_factory_is_a_model_too() -> None:
    assert names(find_splits(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (X,))) == ["0"]


def test_names_of_what_the_root_computes_are_those_of_the_model_unopened() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.layers = nn.ModuleList(Inner() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.add(x + 1) + 1)
            for layer in self.layers:
                x = layer(x) + x
            return torch.relu(x + self.add(x))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + 1)

    unopened = [n.name for n in fxcollab.capture(Twice()).graph.nodes if n.op == "call_function"]
    opened = fxcollab.capture(Twice(), ["add.0", "layers.0.layer", "layers.1.layer"]).graph
    assert list(own_names(opened).values()) == unopened
    assert list(own_names(opened)) != unopened


CACHE: dict[Any, Tensor] = {}


class Caches(nn.Module):
    """Puts a tensor for each width into a dictionary of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        width = x.shape[-1]
        if width not in CACHE:
            CACHE[width] = torch.ones(width)
        return self.c(self.b(self.a(x) * CACHE[width]))


@pytest.mark.parametrize("granularity", ["auto", "op"])
def test_a_search_leaves_nothing_in_the_users_caches(granularity: Any) -> None:
    CACHE.clear()
    x = torch.ones(2, 4)
    assert find_splits(Caches(), (x,), granularity=granularity)
    assert not CACHE
    assert type(Caches()(x)) is Tensor
