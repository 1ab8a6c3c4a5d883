"""Random networks: programs of a few lines with everything that makes duplication hard.

A network is the text of a module, so that a failure shrinks to a class that can be read, and pasted into a test.
Values are float tensors of shape (N, 4), masks and complex tensors of that shape, and indices of shape (N,).
"""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from itertools import count
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4
_NUMBERS = count()

# Expressions by the kind of value they make; {a}, {b} are floats, {m} a mask, {i} indices, {c} complex.
EXPRESSIONS = {
    "float": (
        "torch.relu({a})", "torch.tanh({a})", "{a} + {b}", "{a} * {b}", "{b} - 0.5 * {a}", "torch.maximum({a}, {b})",
        "{a}.detach() + {b}", "{a}.clone()", "{a}.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)", "asks({a})",
        "torch.cat([{a}, {b}], 1)[:, ::2]", "{a}.chunk(2, 1)[0].repeat(1, 2)", "torch.where({m}, {a}, {b})",
        "{a}.masked_fill({m}, 0.0)", "{a} * self.scale", "{a} + self.mean", "F.linear({a}, self.table, self.scale)",
        "F.dropout({a}, 0.3, self.training)", "{a} + torch.rand_like({a})", "{a} * (1 + torch.randn(4))",
        "self.table[{i}] + {a}", "F.one_hot({i}, 4).to({a}.dtype)", "{c}.real", "{c}.abs()", "{a}.unbind(0)[0] + {b}",
        "{a}[:, [1, 0, 3, 2]]", "{a}.expand_as({b})", "{a}.contiguous()", "{a}.sum(1, keepdim=True) * {b}",
        "torch.stack([{a}, {b}]).mean(0)", "Doubled.apply({a})", "swapped({a}, {b})[0]", "dict(h={a})['h'] * 2.0",
        "{a} / (1 + sum(p.pow(2).sum() for p in self.parameters()))", "{a} * self._parameters['scale']",
        "{a} - sum(p.detach().norm() for p in self.parameters()) * 0.1", "{a} + self.state_dict()['mean']",
        "{a} @ dict(self.named_parameters())['table'].data", "1 - list(self.parameters())[0].mean() * {a}",
        "{a}.to(next(self.parameters()).dtype)", "{a} + dict(self.named_buffers())['mean']",
        "{a} + torch.ones(4, dtype=next(self.parameters()).dtype, device=next(self.parameters()).device)",
        "{a} * next(self.parameters()).numel() * 0.1", "{a} + self.held[0] * self.held[1].sum()",
    ),
    "mask": ("{a} > 0", "{a} > {b}", "{m} & ({a} < 1)", "~{m}"),
    "index": ("{a}.argmax(1)", "({i} + 1) % 4"),
    "complex": ("torch.complex({a}, {b})", "{c} * {c}", "{c} * {a}", "{c}.conj()"),
}  # fmt: skip
STATEMENTS = (
    "{a} += {b}", "{a}.mul_(0.5)", "{a}.view(-1).add_(1.0)", "{a}[:, 0] = 0.5", "{a}[:, :2] += {b}[:, 2:]",
    "F.relu({a}, inplace=True)", "F.leaky_relu_({a}, 0.1)", "{a}.masked_fill_({m}, 0.0)", "{i}.add_(1).remainder_(4)",
    "self.calls += 1", "self.mean.mul_(0.9).add_({a}.detach().mean(0))", "torch.add({a}, {b}, out={a}.detach())",
    "with torch.no_grad(): {a}.clamp_(-1, 1)", "with torch.no_grad(): {a}[:, 0] = {b}[:, 1]",
)  # fmt: skip
MODULES = (
    "nn.Linear(4, 4)",
    "nn.BatchNorm1d(4)",
    "nn.LayerNorm(4)",
    "nn.ReLU(inplace=True)",
    "nn.Dropout(0.3)",
    "nn.LeakyReLU(0.1, inplace=True)",
    "nn.Identity()",
    "nn.Linear(4, 4).requires_grad_(False)",
    "nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))",
    "nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))",
    "Residual(4)",
    "ScalesInPlace(4)",
    "parametrizations.weight_norm(nn.Linear(4, 4))",
    "nn.Hardtanh(inplace=True)",
    "spectral_norm(nn.Linear(4, 4))",
    "Forked(4)",
    "FoldsInEval(4)",
    "Chain(nn.Linear(4, 4), nn.Tanh())",
    "Applies()",
    "nn.TransformerEncoder(AddsInPlace(4, 1, 8), 1, enable_nested_tensor=False)",
    "Refers()",
)
CLASHES = ("graph", "code", "meta", "root", "modes", "constants", "recompute", "heads", "plan", "recompile")
RETURNS = (
    "{a}",
    "({a}, {b})",
    "dict(out={a}, aux={b})",
    "[{a}, ({b}, {m})]",
    "dict(logits={a}, mask={m}, index={i})",
)


class Doubled(torch.autograd.Function):
    """Twice its input; its gradient is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Residual(nn.Module):
    """Adds in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y += x
        return y


class ScalesInPlace(nn.Module):
    """Writes into its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(0.5))


class Forked(nn.Module):
    """Follows the mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y + self.other(x) if self.training else y


class FoldsInEval(nn.Module):
    """Its ``train()`` writes weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)
        self.folded = False

    def train(self, mode: bool = True) -> FoldsInEval:
        if mode == self.folded:
            sign = -1 if mode else 1
            self.one.weight.data += sign * self.other.weight.data
            self.one.bias.data += sign * self.other.bias.data
            self.folded = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if self.folded else self.one(x) + self.other(x)


class Chain(nn.Sequential):
    """A container of torch's with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x += 0.1
        return super().forward(x)


class AddsInPlace(nn.TransformerEncoderLayer):
    """A part of a container of torch's that writes into its input."""

    def forward(self, src: Tensor, *_: Any, **__: Any) -> Tensor:
        src += self.linear2(torch.relu(self.linear1(src)))
        return self.norm1(src)


class Applies(nn.Module):
    """Calls a module that it is handed."""

    def forward(self, x: Tensor, module: nn.Module) -> Tensor:
        return module(x).tanh()


class Refers(nn.Module):
    """A hook with a closure over the module writes an attribute, which the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 4), []
        self.inner.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return torch.relu(self.seen.pop())


def swapped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b, a


def asks(x: Tensor) -> Tensor:
    """Can't be traced."""
    return x * 0.9 if float(x.detach().sum()) > 0 else x - 0.1


@dataclass(frozen=True)
class Program:
    """The text of a module's forward, and of what it needs.

    Attributes:
        name: of its class.
        members: right-hand sides of ``self.m0 = ...``.
        ties: pairs of members that share their weight.
        lines: the forward's.
        inputs: how many it takes.
        clash: the name of the first member, one of the library's own; None for ``m0``.
    """

    name: str
    members: tuple[str, ...]
    ties: tuple[tuple[int, int], ...]
    lines: tuple[str, ...]
    inputs: int
    clash: str | None = None

    @property
    def code(self) -> str:
        """The class."""
        made = [
            "self.scale = nn.Parameter(torch.rand(4) + 0.5)",
            "self.table = nn.Parameter(torch.randn(4, 4))",
            "self.register_buffer('mean', torch.zeros(4))",
            "self.register_buffer('calls', torch.zeros((), dtype=torch.long), persistent=False)",
            *(f"self.m{i} = {member}" for i, member in enumerate(self.members)),
            *(f"self.m{i}.weight = self.m{j}.weight" for i, j in self.ties),
            "self.held = [torch.full((4,), 0.5), self.scale]",
        ]
        arguments = ", ".join(f"x{i}" for i in range(self.inputs))
        text = "\n".join(
            [
                f"class {self.name}(nn.Module):",
                "    def __init__(self):",
                *(f"        {line}" for line in ["super().__init__()", *made]),
                f"    def forward(self, {arguments}):",
                *(f"        {line}" for line in self.lines),
            ]
        )
        return text if self.clash is None else text.replace("self.m0", f"self.{self.clash}")


@dataclass(frozen=True)
class Network:
    """A module of modules; the last program is the root."""

    programs: tuple[Program, ...]

    @property
    def code(self) -> str:
        """All classes."""
        return "\n\n".join(program.code for program in self.programs)

    @property
    def inputs(self) -> int:
        """How many the root takes."""
        return self.programs[-1].inputs

    def build(self) -> nn.Module:
        """The module, with weights that are a function of the network alone."""
        module = sys.modules[_MODULE] = ModuleType(_MODULE)
        vars(module).update(_SCOPE)
        file = f"<random network {next(_NUMBERS)}>"
        linecache.cache[file] = (len(self.code), None, self.code.splitlines(keepends=True), file)
        exec(compile(self.code, file, "exec"), vars(module))
        torch.manual_seed(0)
        model: nn.Module = getattr(module, self.programs[-1].name)()
        return model

    def __repr__(self) -> str:
        return f"Network:\n{self.code}\n"


_MODULE = "a_random_network"
_SCOPE = {
    "torch": torch, "nn": nn, "F": F, "Doubled": Doubled, "Residual": Residual, "ScalesInPlace": ScalesInPlace,
    "Forked": Forked, "swapped": swapped, "parametrizations": nn.utils.parametrizations,
    "spectral_norm": nn.utils.spectral_norm, "asks": asks, "FoldsInEval": FoldsInEval, "Chain": Chain,
    "AddsInPlace": AddsInPlace, "Applies": Applies, "Refers": Refers,
}  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A root with or without a module of its own making inside."""
    programs = [draw(programs_of("Inner", 1, ()))] if draw(st.booleans()) else []
    root = programs_of("Net", draw(st.integers(1, 2)), tuple(f"{program.name}()" for program in programs))
    return Network((*programs, draw(root)))


@st.composite
def programs_of(draw: st.DrawFn, name: str, inputs: int, inner: tuple[str, ...]) -> Program:
    """A forward of a few lines over ``inputs``; a module of the ``inner`` classes is called somewhere."""
    writer = _Writer(draw, inputs)
    for _ in range(draw(st.integers(2, 7))):
        writer.line()
    for member in inner:
        writer.call(member)
    for _ in range(draw(st.integers(1 if inner else 0, 3))):
        writer.line()
    writer.finish("{a}" if name == "Inner" else draw(st.sampled_from(RETURNS)))
    clash = draw(st.sampled_from((None,) * 10 + CLASHES))
    return Program(name, tuple(writer.members), tuple(writer.ties), tuple(writer.lines), inputs, clash)


class _Writer:
    """Writes a forward line by line."""

    def __init__(self, draw: st.DrawFn, inputs: int) -> None:
        self._draw = draw
        self._values: dict[str, list[str]] = {"float": [f"x{i}" for i in range(inputs)]}
        self._count = 0
        self.members: list[str] = []
        self.ties: list[tuple[int, int]] = []
        self.lines: list[str] = []

    def line(self) -> None:
        """One more line: most often a module."""
        kind = self._draw(st.integers(0, 9))
        if kind < 4:
            self.call(self._draw(st.sampled_from(MODULES)))
        elif kind == 4 and self.members:
            self._call(self._draw(st.integers(0, len(self.members) - 1)))
        elif kind == 5:
            self.lines.append(self._filled(self._draw(st.sampled_from(STATEMENTS))))
        elif kind == 6:
            self._assign("float", self._draw(st.sampled_from(EXPRESSIONS["float"])), no_grad=True)
        else:
            made = self._draw(st.sampled_from(["float"] * 4 + list(EXPRESSIONS)))
            self._assign(made, self._draw(st.sampled_from(EXPRESSIONS[made])))

    def call(self, member: str) -> None:
        """A line that calls a new member, which may share an earlier one's weight."""
        if member == "Applies()" and "nn.Linear(4, 4)" not in self.members:
            member = "nn.Linear(4, 4)"  # to be handed to a later one
        linear = [i for i, other in enumerate(self.members) if other == member == "nn.Linear(4, 4)"]
        self.members.append(member)
        if linear and self._draw(st.booleans()):
            self.ties.append((len(self.members) - 1, linear[0]))
        self._call(len(self.members) - 1)

    def finish(self, returns: str) -> None:
        """The last line; what it returns is the latest."""
        latest = self._values["float"][-1]
        self.lines.append("return " + self._filled(returns.replace("{a}", latest)))

    def _call(self, index: int) -> None:
        more = ""
        if self.members[index] == "Applies()":
            handed = [i for i, member in enumerate(self.members) if member == "nn.Linear(4, 4)"]
            more = f", self.m{self._draw(st.sampled_from(handed))}"
        self._assign("float", f"self.m{index}({{a}}{more})")

    def _assign(self, kind: str, expression: str, *, no_grad: bool = False) -> None:
        text, name = self._filled(expression), f"v{self._count}"
        self._count += 1
        if no_grad:
            self.lines.append("with torch.no_grad():")
        self.lines.append(f"{'    ' * no_grad}{name} = {text}")
        self._values.setdefault(kind, []).append(name)

    def _filled(self, template: str) -> str:
        names = {"a": "float", "b": "float", "m": "mask", "i": "index", "c": "complex"}
        return template.format_map(
            {short: self._one(kind) for short, kind in names.items() if f"{{{short}}}" in template}
        )

    def _one(self, kind: str) -> str:
        """A value at hand, late ones preferred; one made on the spot where there is none."""
        if not self._values.get(kind):
            self._assign(kind, EXPRESSIONS[kind][0])
        values = self._values[kind]
        back = self._draw(st.sampled_from((1, 1, 1, 2, 2, 3, 4)))
        return values[-min(back, len(values))]
