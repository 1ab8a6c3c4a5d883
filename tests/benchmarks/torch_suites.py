"""The whole proof on the modules of PyTorch's own tests: ``python -m tests.benchmarks.torch_suites --checkout DIR``.

``modules`` are the samples of torch's `module_db` (needs expecttest), ``pipelining`` the models of its registry, and
``fx_tests`` the modules that the tests of ``test/test_fx.py`` and ``test/fx/`` call while they run: the last two are
read from a checkout of PyTorch's tests. Each module is put between others and split in front of it and behind it
(branches have clones of it), behind it alone (it stays in the trunk), in front of it and opened, or alone and inside.
"""

import argparse
import copy
import importlib
import inspect
import re
import signal
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

import fxcollab
from fxcollab.errors import one_line
from tests.benchmarks.rows import measured

Calls = Iterator[tuple[str, Any]]  # a name, and a module with its args and kwargs
RESULTS = Path(__file__).parent / "results/torch_suites.jsonl"
SECONDS, LARGEST = 60, 1_000_000
LEFT_OUT = "fx.test_", "torchvision", "TestOperatorSignatures", "test_script"  # imported; networks; no modules; crash
WAYS: dict[str, dict[str, Any]] = {
    "cloned": {"pattern": "hierarchical", "splits": ["before", "body"]},
    "trunk": {"pattern": "simple", "splits": ["body"], "heads": 3},
    "opened": {"pattern": "simple", "splits": ["before"], "granularity": "op"},
    "inside": {"pattern": "simple", "granularity": "op"},
}


class Gate(nn.PReLU):
    """Values of any shape, scaled so that what lies between 0 and 1 stays there; integers as they are.

    Of several weights, so that heads differ also where the gate is opened and these are drawn by their deviation.
    """

    def __init__(self) -> None:
        super().__init__(4)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, 0.8, 0.9)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean() if x.is_floating_point() else x


class Around(nn.Module):
    """``body`` between other modules; its tensors are the inputs, whatever else it was called with is fixed."""

    def __init__(self, body: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.before, self.gate, self.body, self.after = Gate(), Gate(), body, Gate()
        leaves, self.spec = tree_flatten((args, kwargs))
        floats = [leaf.is_floating_point() for leaf in leaves if isinstance(leaf, Tensor)]
        self.leaves, self.first = (
            tree_map_only(Tensor, lambda _: ..., leaves),
            (*floats, True).index(True) % len(floats),
        )
        output, _ = tree_flatten_with_path(copy.deepcopy(body)(*args, **kwargs))
        self.path = next((path for path, leaf in output if isinstance(leaf, Tensor)), None)

    def forward(self, a, b=None, c=None, d=None, e=None, f=None, g=None, h=None):  # type: ignore[no-untyped-def]
        values = [a, b, c, d, e, f, g, h]
        values[self.first] = self.gate(self.before(values[self.first]))
        args, kwargs = tree_unflatten([values.pop(0) if leaf is ... else leaf for leaf in self.leaves], self.spec)
        first = output = self.body(*args, **kwargs)
        for key in self.path or ():
            first = key.get(first)
        return output if self.path is None else (output, self.after(first)) if self.path else self.after(first)


def modules(_: Path) -> Calls:
    """Of every module of torch, the first of its samples and up to four more."""
    for info in importlib.import_module("torch.testing._internal.common_modules").module_db:
        torch.set_default_dtype(torch.float32)  # that import has changed it
        samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
        samples = [sample for sample in samples if sample.forward_input is not None]
        for number in range(0, len(samples), -(-len(samples) // 5)):
            made, given = samples[number].constructor_input, samples[number].forward_input
            yield f"{info.name}-{number}", (info.module_cls(*made.args, **made.kwargs), given.args, given.kwargs)


def pipelining(_: Path) -> Calls:
    """The models that the tests of pipelining share."""
    for name, made in vars(importlib.import_module("distributed.pipelining.model_registry")).items():
        if isinstance(made, type) and issubclass(made, nn.Module):
            inputs = [torch.randn(256, 64) for _ in list(inspect.signature(made.forward).parameters)[1:]]
            yield name, (made(64), tuple(inputs), {})


def fx_tests(tests: Path) -> Calls:
    """The outermost modules that the tests call with tensors: one of each class (and code) a test."""
    vars(torch.export).setdefault("export_for_training", torch.export.export)  # which tests of older versions import
    found: list[Any] = [
        unittest.TestLoader().discover(str(d), f) for d, f in ((tests, "test_fx.py"), (tests / "fx", "test_*.py"))
    ]
    while found:
        if isinstance(test := found.pop(0), unittest.TestSuite):
            found[:0] = test
        elif "_FailedTest" in test.id():
            print(f"{test.id()} can't be imported: {one_line(test._exception)}")
        elif not any(part in test.id() for part in LEFT_OUT):
            yield from ((f"{test.id()}-{n} {type(call[0]).__name__}", call) for n, call in enumerate(_calls(test)))


def _calls(test: unittest.TestCase) -> list[Any]:
    found, original = {}, nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        key = (type(module).__qualname__, module.code if isinstance(module, fx.GraphModule) else "")
        small = sum(tensor.numel() for tensor in (*tensors, *module.parameters())) < LARGEST
        crashes = any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())  # when it is copied
        if small and key not in found and not crashes and {type(t) for t in tensors if not t.is_meta} == {Tensor}:
            with suppress(Exception):
                found[key] = copy.deepcopy((module, *tree_map_only(Tensor, Tensor.detach, (args, kwargs))))
        with mock.patch.object(nn.Module, "__call__", original):
            return original(module, *args, **kwargs)

    torch.manual_seed(0)
    libraries = mock.patch.object(torch.ops, "load_library")  # those of tests aren't in the wheel
    with libraries, mock.patch.object(nn.Module, "__call__", call), suppress(Exception):
        test.run(unittest.TestResult())
    return list(found.values())


def tried(call: Any, way: str) -> dict[str, str]:
    """What came of one module, split one way."""
    result, said, plan = "skipped", "", dict(WAYS[way])  # skipped is what fails without fxcollab
    signal.alarm(SECONDS)
    try:
        body, args, kwargs = copy.deepcopy(call)
        if any(map(nn.parameter.is_lazy, body.state_dict().values())):
            body(*args, **kwargs)
        model, inputs = body, args
        if way != "inside":
            model = Around(body, args, kwargs)
            inputs = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        _ = _run(copy.deepcopy(model).train(), inputs), _run(copy.deepcopy(model).eval(), inputs)
        result = "raw"
        if way == "inside":
            names = [node.name for node in fxcollab.capture(model, (), inputs, "op").graph.nodes if "call" in node.op]
            plan["splits"] = names[len(names) // 2 - 1 :][:1]
        train_model = fxcollab.transform(model, example_inputs=inputs, seed=0, **plan)
        report = fxcollab.verify(model, train_model, inputs)
        theirs, ours = (tree_leaves(_run(each.eval(), inputs)) for each in (model, train_model))
        pairs = [(a, b) for a, b in zip(theirs, ours, strict=False) if isinstance(a, Tensor)]
        said = "; ".join(f"{check.name}: {check.detail}" for check in report if not check.ok)
        said += "" if all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs) else "; eval outputs differ"
        result, said = ("wrong", said) if said else ("proved", f"{len(report.not_checked)} not checked")
    except fxcollab.FxCollabError as error:
        result, said = "refused", " | ".join(str(error).split("\n"))
    except KeyboardInterrupt:  # raised by the alarm: no Exception, so that nothing on the way takes it for an answer
        result = "too slow"
    except Exception as error:
        said = one_line(error)
    signal.alarm(0)
    return {"result": result, "said": re.sub(r"/\S*/", "", said)[:600]}  # no paths of the machine


def _run(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(0)
    output = model(*copy.deepcopy(inputs))
    if losses := [leaf.sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]:
        torch.stack(losses).sum().backward()
    model.zero_grad()
    return output


def main() -> None:
    """Run all cases that are not in the output yet, then print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path(), help="of PyTorch's tests")
    parser.add_argument("--suites", nargs="*", default=["modules", "pipelining", "fx_tests"])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout / "test"))
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    call: list[Any] = [None]
    for suite in arguments.suites:
        ways = list(WAYS)[: 2 if suite == "modules" else 4]  # torch's own modules are not opened
        cases = ((name, way) for name, call[0] in globals()[suite](arguments.checkout / "test") for way in ways)
        rows = measured(RESULTS, suite, cases, lambda _, way: tried(call[0], way))
        print(suite, Counter(row["result"] for row in rows))


if __name__ == "__main__":
    main()
