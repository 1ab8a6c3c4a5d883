"""The sample networks against the literature, and the hand-wired references against separate originals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import samples.model
from samples.networks import densenet40_12, densenet_cifar, resnet20, resnet32, resnet110, resnet_cifar
from samples.networks.resnet_cifar import Shortcut
from tests.references import (
    HandHierarchical,
    HandInstances,
    HandNetwork,
    HandSimple,
    HandSkipTree,
    HandTree,
    SkipNet,
    SmallConvNet,
)

# ------------------------------------------------------------------------------------------ sample networks

NETWORKS = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet110": resnet110,
    "densenet40_12": densenet40_12,
    "model.py": samples.model.build_model,
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


@pytest.mark.parametrize(
    ("build", "layers", "parameters", "millions"),
    [
        (resnet20, 20, 269_722, "0.27"),  # He et al. 2015, table 6
        (resnet32, 32, 464_154, "0.46"),
        (lambda: resnet_cifar(44), 44, 658_586, "0.66"),
        (lambda: resnet_cifar(56), 56, 853_018, "0.85"),
        (resnet110, 110, 1_727_962, "1.7"),
        (densenet40_12, 40, 1_019_722, "1.0"),  # Huang et al. 2017, table 2
    ],
)
def test_size_is_the_published_one(
    build: Callable[[], nn.Module], layers: int, parameters: int, millions: str
) -> None:
    network = build()
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == layers
    assert sum(p.numel() for p in network.parameters()) == parameters
    decimals = len(millions.split(".")[1])
    assert f"{parameters / 1e6:.{decimals}f}" == millions


def test_children_are_the_split_points() -> None:
    def children(net: nn.Module) -> list[str]:
        return [name for name, _ in net.named_children()]

    assert children(resnet20()) == ["conv1", "bn1", "stage1", "stage2", "stage3", "pool", "fc"]
    dense = ["block1", "transition1", "block2", "transition2", "block3"]
    assert children(densenet40_12()) == ["conv", *dense, "norm", "pool", "fc"]
    layers = ["layer1", "layer2", "layer3", "layer4"]
    assert children(samples.model.build_model()) == ["conv1", "bn1", "relu", *layers, "fc"]


def test_model_file_has_no_instance() -> None:
    assert not any(isinstance(value, nn.Module) for value in vars(samples.model).values())


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_any_image_size(network: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert network(torch.randn(1, 3, *size)).shape == (1, 10)


def test_number_of_classes() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert resnet32(num_classes=100)(images).shape == (2, 100)
    assert densenet40_12(num_classes=100)(images).shape == (2, 100)


@pytest.mark.parametrize("size", [32, 33])
def test_stages_of_a_resnet_have_the_published_shapes(size: int) -> None:
    shapes = {}
    network = resnet20().eval()
    for name, child in network.named_children():
        child.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    network(torch.randn(1, 3, size, size))
    half = (size + 1) // 2
    quarter = (half + 1) // 2
    assert shapes["stage1"] == (16, size, size)
    assert shapes["stage2"] == (32, half, half)
    assert shapes["stage3"] == (64, quarter, quarter)


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    x = torch.randn(2, 3, 5, 5)
    out = Shortcut(3, 8, stride=2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert not out[:, 3:].any()
    assert not list(Shortcut(3, 8, stride=2).parameters())


def test_dense_layer_keeps_what_it_was_given() -> None:
    block = densenet_cifar(10, 4).block1
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x)[:, :16], x)
    assert block(x).shape == (2, 16 + 2 * 4, 4, 4)


@pytest.mark.parametrize("build", [lambda: resnet_cifar(2), lambda: resnet_cifar(33), lambda: densenet_cifar(41, 12)])
def test_depths_that_do_not_exist_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="depth must be"):
        build()


class RootTracer(fx.Tracer):
    """Opens the root only: each child is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize("tracer", [fx.Tracer, RootTracer])
def test_traced_by_plain_fx(network: nn.Module, tracer: type[fx.Tracer]) -> None:
    traced = fx.GraphModule(network, tracer().trace(network))
    images = torch.randn(1, 3, 17, 17)
    with torch.no_grad():
        assert torch.equal(traced(images), network(images))


# ------------------------------------------------------------------------------------- hand-wired references

REFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], HandNetwork]]] = {
    "instances-3": (SmallConvNet, lambda rescale: HandInstances(SmallConvNet, 3, rescale=rescale)),
    "instances-skip": (SkipNet, lambda rescale: HandInstances(SkipNet, 2, rescale=rescale)),
    "simple-2": (SmallConvNet, lambda rescale: HandSimple(SmallConvNet, 2, rescale=rescale)),
    "simple-5": (SmallConvNet, lambda rescale: HandSimple(SmallConvNet, 5, rescale=rescale)),
    "hierarchical": (SmallConvNet, lambda rescale: HandHierarchical(SmallConvNet, rescale=rescale)),
    "tree-2x3": (SmallConvNet, lambda rescale: HandTree(SmallConvNet, (2, 3), rescale=rescale)),
    "tree-3x1": (SmallConvNet, lambda rescale: HandTree(SmallConvNet, (3, 1), rescale=rescale)),
    "skip-2x2": (SkipNet, lambda rescale: HandSkipTree(SkipNet, (2, 2), rescale=rescale)),
    "skip-3x2": (SkipNet, lambda rescale: HandSkipTree(SkipNet, (3, 2), rescale=rescale)),
}


@pytest.fixture(params=REFERENCES)
def reference(
    request: pytest.FixtureRequest,
) -> tuple[Callable[[], nn.Module], Callable[[bool], HandNetwork]]:
    torch.manual_seed(0)
    return REFERENCES[request.param]


def original_name(name: str) -> str:
    return re.sub(r"^peers\.b[0-9_]+\.", "", name)


def head_loss(head: int, output: Tensor) -> Tensor:
    """A loss that differs from head to head, in target and in scale."""
    target = (torch.arange(len(output)) + head) % output.shape[1]
    return (head + 1) * F.cross_entropy(output, target)


def separate_gradients(
    original: Callable[[], nn.Module], hand: HandNetwork, images: Tensor
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """What each head alone would send: to its parameters and to the input, from one original per head."""
    parameters, inputs = [], []
    for head in range(len(hand.paths)):
        net = original().double()
        net.load_state_dict(hand.head_state_dict(head))
        x = images.clone().requires_grad_()
        head_loss(head, net(x)).backward()
        parameters.append({name: p.grad for name, p in net.named_parameters()})
        inputs.append(x.grad)
    return parameters, inputs


@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_are_the_mean_over_heads_or_the_sum(reference, rescale: bool) -> None:
    original, build = reference
    hand = build(rescale).double()
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    parameters, inputs = separate_gradients(original, hand, images)

    x = images.clone().requires_grad_()
    sum(head_loss(head, output) for head, output in enumerate(hand(x))).backward()

    def combine(gradients: list[Tensor]) -> Tensor:
        return torch.stack(gradients).mean(0) if rescale else torch.stack(gradients).sum(0)

    gradients = hand.named_gradients()
    assert gradients.keys() == hand.heads_behind().keys()
    for name, heads in hand.heads_behind().items():
        expected = combine([parameters[head][original_name(name)] for head in heads])
        torch.testing.assert_close(gradients[name], expected, rtol=1e-12, atol=1e-12, msg=name)
        assert expected.abs().max() > 1e-6, f"{name}: too small to tell a mean from a sum"
    torch.testing.assert_close(x.grad, combine(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_head_is_the_original(reference, mode: str) -> None:
    original, build = reference
    hand = build(True).train(mode == "train")
    images = torch.randn(4, 3, 12, 12)
    nets = [original().train(mode == "train") for _ in hand.paths]
    for head, net in enumerate(nets):
        net.load_state_dict(hand.head_state_dict(head))
    outputs = hand(images)
    assert len(outputs) == len(nets)
    for head, (output, net) in enumerate(zip(outputs, nets, strict=True)):
        assert torch.equal(output, net(images))
        state = hand.head_state_dict(head)  # after the step: the batch statistics, too, are the original's
        assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


def test_hierarchical_is_the_binary_tree() -> None:
    torch.manual_seed(0)
    by_hand, tree = HandHierarchical(SmallConvNet), HandTree(SmallConvNet, (2, 2))
    tree.load_from(by_hand.fxcollab_state_dict())
    images = torch.randn(4, 3, 12, 12)
    for hand in (by_hand, tree):
        sum(head_loss(head, output) for head, output in enumerate(hand(images))).backward()
    expected = by_hand.named_gradients()
    assert tree.named_gradients().keys() == expected.keys()
    for name, gradient in tree.named_gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_heads_behind_a_parameter() -> None:
    heads = HandTree(SmallConvNet, (2, 3)).heads_behind()
    assert heads["conv1.weight"] == heads["layer1.0.weight"] == [0, 1, 2, 3, 4, 5]
    assert heads["layer2.0.weight"] == [0, 1, 2]
    assert heads["peers.b1.layer2.0.weight"] == [3, 4, 5]
    assert heads["fc.weight"] == [0]
    assert heads["peers.b0_2.fc.weight"] == [2]
    assert heads["peers.b1_0.fc.weight"] == [3]


@pytest.mark.parametrize(
    ("hand", "peers"),
    [
        (HandInstances(SmallConvNet, 3), {"b1", "b2"}),
        (HandSimple(SmallConvNet, 3), {"b1", "b2"}),
        (HandHierarchical(SmallConvNet), {"b1", "b0_1", "b1_0", "b1_1"}),
        (HandTree(SmallConvNet, (3, 2)), {"b1", "b2", "b0_1", "b1_0", "b1_1", "b2_0", "b2_1"}),
        (HandSkipTree(), {"b1", "b0_1", "b1_0", "b1_1"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_has_fxcollab_names(hand: HandNetwork, peers: set[str]) -> None:
    keys = hand.fxcollab_state_dict().keys()
    original = (SkipNet if isinstance(hand, HandSkipTree) else SmallConvNet)().state_dict().keys()
    assert len(keys) == len(hand.state_dict())
    assert {key for key in keys if not key.startswith("peers.")} == original
    assert {key.split(".")[1] for key in keys if key.startswith("peers.")} == peers
    assert hand.head_state_dict(len(hand.paths) - 1).keys() == original


def test_loading_takes_exactly_the_expected_state(reference) -> None:
    _, build = reference
    source, hand = build(True), build(False)
    state = source.fxcollab_state_dict()
    hand.load_from(state)
    for key, value in hand.fxcollab_state_dict().items():
        assert torch.equal(value, state[key])
        assert value.data_ptr() != state[key].data_ptr()

    with pytest.raises(KeyError, match="lacks"):
        hand.load_from({key: value for key, value in state.items() if key != "fc.weight"})
    with pytest.raises(KeyError, match="unknown"):
        hand.load_from({**state, "peers.b9.fc.weight": state["fc.weight"]})
    with pytest.raises(TypeError, match="float64"):
        hand.load_from(source.double().fxcollab_state_dict())


def test_a_parameter_without_gradient_is_left_out() -> None:
    hand = HandSimple(SmallConvNet, 2)
    hand(torch.randn(2, 3, 12, 12))[0].sum().backward()
    gradients = hand.named_gradients()
    assert "fc.weight" in gradients
    assert "peers.b1.fc.weight" not in gradients
