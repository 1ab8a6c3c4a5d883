"""Training graphs wired by hand as in figures 1 and 2 of the paper: what fxcollab's are measured against.

Nothing here uses fxcollab. The originals are ``SmallConvNet`` and ``SkipNet``; the hand networks are their
training graphs, and each forward spells out its wiring. What they share with fxcollab is names only: a hand
network reads its weights from an fxcollab state dict and reports its gradients under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NetFactory = Callable[[], nn.Module]

# ---------------------------------------------------------------------------------------------- originals


class SmallConvNet(nn.Module):
    """Stem, three layers, pool, classifier: the chain of equation 1, cut behind layer1 and layer2."""

    def __init__(self, num_classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width)
        self.layer2 = _layer(width, 2 * width, stride=2)
        self.layer3 = _layer(2 * width, 2 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class SkipNet(nn.Module):
    """A net whose trunk values reach over both splits, which lie behind layer1 and layer2.

    The stem's output goes to level 1 (added to layer1's) and to level 2 (added to layer3's); layer1's output
    goes to level 1 and to level 2 (concatenated with layer2's).
    """

    def __init__(self, num_classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width)
        self.layer2 = _layer(width, width)
        self.layer3 = _layer(2 * width, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.relu(self.bn1(self.conv1(x)))
        low = self.layer1(stem)
        middle = self.layer2(low + stem)
        high = self.layer3(torch.cat([middle, low], dim=1))
        return self.fc(torch.flatten(self.pool(high + stem), 1))


def _layer(in_maps: int, out_maps: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_maps, out_maps, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_maps),
        nn.ReLU(inplace=True),
    )


# ------------------------------------------------------------------------------------------- what they share


class Rescale(torch.autograd.Function):
    """Equation 5: identity forward, 1/f times the gradient backward."""

    @staticmethod
    def forward(ctx, x: Tensor, fan_out: int) -> Tensor:
        ctx.fan_out = fan_out
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * (1 / ctx.fan_out), None


class HandNetwork(nn.Module):
    """Base of the hand networks: their state, and its names in fxcollab. The wiring is the subclasses' own.

    ``trunk`` holds the original's modules of level 0, ``branches[label]`` those of one branch: ``b0``, ``b1``
    and so on at level 1, ``b0_0``, ``b0_1`` and so on at level 2. So ``branches.b0_1.fc.weight`` here is
    ``peers.b0_1.fc.weight`` in fxcollab; trunk and branches of zeros have the original's names there.
    """

    splits: ClassVar[tuple[str, ...]]
    """The split names that give this wiring in fxcollab."""

    def __init__(self, fanouts: Sequence[int], rescale: bool) -> None:
        super().__init__()
        self.fanouts = tuple(fanouts)
        self.rescale = rescale
        self.trunk = nn.ModuleDict()
        self.branches = nn.ModuleDict()

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The path of every head, in head order."""
        return tuple(product(*(range(fan_out) for fan_out in self.fanouts)))

    def share(self, x: Tensor, fan_out: int) -> Tensor:
        """``x`` as the ``fan_out`` branches behind it see it: rescaled, or bare without rescaling."""
        return Rescale.apply(x, fan_out) if self.rescale else x

    def load_from(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies all state from an fxcollab state dict; the keys must be exactly the expected."""
        own = self.state_dict()
        expected = {fxcollab_name(name): name for name in own}
        if missing := sorted(expected.keys() - state_dict.keys()):
            raise KeyError(f"the state dict lacks {missing}")
        if unexpected := sorted(state_dict.keys() - expected.keys()):
            raise KeyError(f"the state dict has unknown keys {unexpected}")
        for name, own_name in expected.items():
            if torch.promote_types(state_dict[name].dtype, own[own_name].dtype) != own[own_name].dtype:
                raise TypeError(f"{name} is {state_dict[name].dtype}: convert the hand network first, .double()")
        self.load_state_dict({own_name: state_dict[name] for name, own_name in expected.items()})

    def fxcollab_state_dict(self) -> dict[str, Tensor]:
        """The state dict under fxcollab's names (not in fxcollab's order)."""
        return {fxcollab_name(name): value for name, value in self.state_dict().items()}

    def named_gradients(self) -> dict[str, Tensor]:
        """The gradients under fxcollab's names; a parameter that got none is left out."""
        return {fxcollab_name(name): p.grad for name, p in self.named_parameters() if p.grad is not None}

    def heads_behind(self) -> dict[str, list[int]]:
        """For each parameter, by its fxcollab name, the heads that descend from it."""
        return {
            fxcollab_name(name): [head for head, path in enumerate(self.paths) if _leads_to(name, path)]
            for name, _ in self.named_parameters()
        }

    def head_state_dict(self, head: int) -> dict[str, Tensor]:
        """The state of one head, under the original's names: what an original of its own would have."""
        path = self.paths[head]
        return {_original_name(name): value for name, value in self.state_dict().items() if _leads_to(name, path)}


def branch(*path: int) -> str:
    """The label of a branch: ``b1`` for (1,), ``b0_1`` for (0, 1)."""
    return "b" + "_".join(map(str, path))


def fxcollab_name(own_name: str) -> str:
    """``peers.b0_1.fc.weight`` for ``branches.b0_1.fc.weight``; for trunk and zeros, the original's name."""
    path = _branch_of(own_name)
    original = _original_name(own_name)
    return f"peers.{branch(*path)}.{original}" if any(path) else original


def _branch_of(own_name: str) -> tuple[int, ...]:
    """The path of the branch that holds a hand network's parameter; empty for the trunk."""
    group, label, _ = own_name.split(".", 2)
    return () if group == "trunk" else tuple(map(int, label.removeprefix("b").split("_")))


def _original_name(own_name: str) -> str:
    group, rest = own_name.split(".", 1)
    return rest if group == "trunk" else rest.split(".", 1)[1]


def _leads_to(own_name: str, head: tuple[int, ...]) -> bool:
    path = _branch_of(own_name)
    return head[: len(path)] == path


def _take(net: nn.Module, *names: str) -> nn.ModuleDict:
    """Some of a net's children; the rest of the net is dropped."""
    return nn.ModuleDict({name: getattr(net, name) for name in names})


def _stem(part: nn.ModuleDict, x: Tensor) -> Tensor:
    return F.relu(part["bn1"](part["conv1"](x)))


def _classify(part: nn.ModuleDict, x: Tensor) -> Tensor:
    return part["fc"](torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# ------------------------------------------------------------------------------------------- hand networks


class HandInstances(HandNetwork):
    """Figure 1 (b): every head is an instance of the whole net; they share nothing but the input.

    The input is a value like any other, so the gradient that reaches it is the mean over the heads.
    Works for every net of one floating-point input.
    """

    splits = ()

    def __init__(self, net_factory: NetFactory, heads: int = 2, *, rescale: bool = True) -> None:
        super().__init__((heads,), rescale)
        for head in range(heads):
            self.branches[branch(head)] = net_factory()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.share(x, len(self.branches))
        return tuple(instance(x) for instance in self.branches.values())


class HandSimple(HandNetwork):
    """Figure 1 (c) and figure 2 (b): a ``SmallConvNet`` whose heads share everything up to layer1."""

    splits = ("layer1",)

    def __init__(self, net_factory: NetFactory, heads: int = 2, *, rescale: bool = True) -> None:
        super().__init__((heads,), rescale)
        self.trunk = _take(net_factory(), "conv1", "bn1", "layer1")
        for head in range(heads):
            self.branches[branch(head)] = _take(net_factory(), "layer2", "layer3", "fc")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.trunk["layer1"](_stem(self.trunk, x))
        x = self.share(x, len(self.branches))
        return tuple(_classify(part, part["layer3"](part["layer2"](x))) for part in self.branches.values())


class HandHierarchical(HandNetwork):
    """Figure 1 (d): a ``SmallConvNet`` as a binary tree of four heads, cut behind layer1 and layer2."""

    splits = ("layer1", "layer2")

    def __init__(self, net_factory: NetFactory, *, rescale: bool = True) -> None:
        super().__init__((2, 2), rescale)
        self.trunk = _take(net_factory(), "conv1", "bn1", "layer1")
        self.branches["b0"] = _take(net_factory(), "layer2")
        self.branches["b1"] = _take(net_factory(), "layer2")
        self.branches["b0_0"] = _take(net_factory(), "layer3", "fc")
        self.branches["b0_1"] = _take(net_factory(), "layer3", "fc")
        self.branches["b1_0"] = _take(net_factory(), "layer3", "fc")
        self.branches["b1_1"] = _take(net_factory(), "layer3", "fc")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        low = self.share(self.trunk["layer1"](_stem(self.trunk, x)), 2)
        middle_0 = self.share(self.branches["b0"]["layer2"](low), 2)
        middle_1 = self.share(self.branches["b1"]["layer2"](low), 2)
        return (
            _classify(self.branches["b0_0"], self.branches["b0_0"]["layer3"](middle_0)),
            _classify(self.branches["b0_1"], self.branches["b0_1"]["layer3"](middle_0)),
            _classify(self.branches["b1_0"], self.branches["b1_0"]["layer3"](middle_1)),
            _classify(self.branches["b1_1"], self.branches["b1_1"]["layer3"](middle_1)),
        )


class HandTree(HandNetwork):
    """``HandHierarchical`` for any two fan-outs: f1 branches behind layer1, f2 behind each layer2."""

    splits = ("layer1", "layer2")

    def __init__(self, net_factory: NetFactory, fanouts: Sequence[int] = (2, 2), *, rescale: bool = True) -> None:
        super().__init__(fanouts, rescale)
        first, second = self.fanouts
        self.trunk = _take(net_factory(), "conv1", "bn1", "layer1")
        for i in range(first):
            self.branches[branch(i)] = _take(net_factory(), "layer2")
            for j in range(second):
                self.branches[branch(i, j)] = _take(net_factory(), "layer3", "fc")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = self.fanouts
        outputs = []
        low = self.share(self.trunk["layer1"](_stem(self.trunk, x)), first)
        for i in range(first):
            middle = self.share(self.branches[branch(i)]["layer2"](low), second)
            for j in range(second):
                part = self.branches[branch(i, j)]
                outputs.append(_classify(part, part["layer3"](middle)))
        return tuple(outputs)


class HandSkipTree(HandNetwork):
    """The tree of a ``SkipNet``: what skips from level 0 to level 2 is rescaled by 1/(f1 f2)."""

    splits = ("layer1", "layer2")

    def __init__(
        self, net_factory: NetFactory = SkipNet, fanouts: Sequence[int] = (2, 2), *, rescale: bool = True
    ) -> None:
        super().__init__(fanouts, rescale)
        first, second = self.fanouts
        self.trunk = _take(net_factory(), "conv1", "bn1", "layer1")
        for i in range(first):
            self.branches[branch(i)] = _take(net_factory(), "layer2")
            for j in range(second):
                self.branches[branch(i, j)] = _take(net_factory(), "layer3", "fc")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = self.fanouts
        outputs = []
        stem = _stem(self.trunk, x)
        low = self.trunk["layer1"](stem)
        stem_to_1, stem_to_2 = self.share(stem, first), self.share(stem, first * second)
        low_to_1, low_to_2 = self.share(low, first), self.share(low, first * second)
        for i in range(first):
            middle = self.share(self.branches[branch(i)]["layer2"](low_to_1 + stem_to_1), second)
            for j in range(second):
                part = self.branches[branch(i, j)]
                high = part["layer3"](torch.cat([middle, low_to_2], dim=1))
                outputs.append(_classify(part, high + stem_to_2))
        return tuple(outputs)
