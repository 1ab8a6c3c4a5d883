"""One small real use of each private name of torch: a new version that breaks one says which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fxcollab import _torch

ROOT = Path(__file__).parents[1]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"value": x * 2}


def test_pytree() -> None:
    leaves, spec = _torch.pytree.tree_flatten({"a": (1, 2)})
    assert leaves == [1, 2] and spec.num_leaves == 2
    assert _torch.pytree.tree_unflatten([3, 4], spec) == {"a": (3, 4)}
    assert _torch.pytree.tree_map(str, [1, (2,)]) == ["1", ("2",)]
    assert _torch.pytree.tree_leaves([1, [2]]) == [1, 2]


def test_operators() -> None:
    assert isinstance(torch.ops.aten.add.Tensor, _torch.OpOverload)
    written = [argument.alias_info for argument in _torch.schema_of(torch.ops.aten.add_.Tensor).arguments]
    assert written[0].is_write and written[1] is None


def test_conversions() -> None:
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).double()
        assert _torch.CONVERSION in seen
        seen.clear()
        torch.ones(2).float()
        assert _torch.CONVERSION not in seen


def test_fake_tensors_tell_their_device_where_a_mode_does_not() -> None:
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return NotImplemented if func is _torch.DEVICE_OF else func(*args, **(kwargs or {}))

    with _torch.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2))
    with Mode():
        assert torch.nn.functional.linear(fake, fake).device == torch.device("cpu")
    assert _torch.DEVICE_OF in seen


def test_parameters_of_other_classes() -> None:
    with _torch.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2))
    assert not isinstance(fake, nn.Parameter)
    assert isinstance(_torch.as_parameter(fake), nn.Parameter)


def test_type_refinement() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, _torch.JIT_ISINSTANCE, lambda value, types: (value, types))
        assert torch.jit.isinstance(1, int) == (1, int)


def test_dispatch_mode() -> None:
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


def test_fake_tensors() -> None:
    with _torch.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(2, 3))
        assert isinstance(fake, _torch.FakeTensor) and (fake @ fake.T).shape == (2, 2)
        for question in (lambda: fake.sum().item(), lambda: fake.nonzero()):
            with pytest.raises(_torch.DATA_DEPENDENT_ERRORS):
                question()


def test_generated_code() -> None:
    model = fx.symbolic_trace(Doubled())
    held = set(vars(model))
    for name in _torch.GENERATED - {"_graph"}:
        vars(model).pop(name, None)
    model.recompile()
    assert set(vars(model)) == held
    assert type(_torch.codegen_of(model.graph)) is fx.graph.CodeGen
    assert _torch.format_target("self", "a.0.b") == 'getattr(self.a, "0").b'


def test_code_of_structures() -> None:
    exported = torch.export.export(Named(), (torch.ones(2),)).module()
    codegen = _torch.codegen_of(exported.graph)
    assert isinstance(codegen, _torch.PyTreeCodeGen)
    assert codegen.pytree_info.out_spec.num_leaves == 1
    again = _torch.PyTreeCodeGen(codegen.pytree_info._replace(out_spec=codegen.pytree_info.out_spec))
    graph = fx.Graph()
    graph.set_codegen(again)
    assert _torch.codegen_of(graph) is again


def test_versions_and_storages() -> None:
    tensor = torch.zeros(4)
    before = _torch.version_of(tensor)
    tensor.add_(1)
    assert _torch.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert _torch.version_of(torch.zeros(4).add_(1)) == 0
    with pytest.raises(RuntimeError, match="no"):
        _torch.runtime_check(False, lambda: "no")
    assert _torch.storage_id(tensor) == _torch.storage_id(tensor[1:]) != _torch.storage_id(tensor.clone())
    meta = torch.empty(2, device="meta")
    assert _torch.storage_id(meta) == _torch.storage_id(meta[1:]) != _torch.storage_id(torch.empty_like(meta))


def test_hooks_of_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    for register in (parameter.register_hook, parameter.register_post_accumulate_grad_hook):
        assert not _torch.has_hooks(parameter)
        handle = register(lambda value: None)
        assert _torch.has_hooks(parameter)
        handle.remove()


def test_gradient_types() -> None:
    loss = torch.ones(2, requires_grad=True).half().sum()
    assert list(_torch.gradient_types(loss.grad_fn.next_functions[0][0])) == [torch.float16]


def test_transforms() -> None:
    assert not _torch.is_transformed() and not _torch.is_batched(torch.ones(2))

    def look(x: Tensor) -> Tensor:
        assert _torch.is_transformed() and _torch.is_batched(x)
        return x

    torch.vmap(look)(torch.ones(2, 3))


def test_recording() -> None:
    answers = []

    def look(x: Tensor) -> Tensor:
        answers.append(_torch.is_traced())
        return x + 1

    look(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    make_fx(look)(torch.ones(2))
    assert answers == [False, True, True]


def test_forward_derivatives() -> None:
    assert not _torch.computes_forward_derivatives()
    with forward_ad.dual_level():
        assert _torch.computes_forward_derivatives()


COMPILED = """
import torch
from fxcollab import _torch

assert not _torch.dynamo_is_loaded()
assert not _torch.is_compiled(torch.nn.ReLU())

def left_alone(x):
    assert not torch.compiler.is_compiling()
    return x + 1

_torch.never_compile(left_alone.__code__)
assert _torch.dynamo_is_loaded()

graphs = []

def note(graph, inputs):
    graphs.append(graph)
    return graph

def broken(x):
    y = x * 2
    _torch.graph_break()
    return y * 3

assert torch.equal(torch.compile(broken, backend=note)(torch.ones(2)), torch.full((2,), 6.0))
assert len(graphs) == 2
assert torch.equal(torch.compile(left_alone, backend=note)(torch.ones(2)), torch.full((2,), 2.0))
assert len(graphs) == 2

assert _torch.is_compiled(torch.compile(torch.nn.ReLU(), backend="eager"))
module = torch.nn.ReLU()
module.compile(backend="eager")
assert _torch.is_compiled(module) and not _torch.is_compiled(torch.nn.ReLU())
"""


def test_each_name_has_a_test() -> None:
    tree = ast.parse(Path(_torch.__file__).read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    defined += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    tested = Path(__file__).read_text()
    assert not [name for name in defined if f"_torch.{name}" not in tested]


def test_compilers() -> None:
    """In a process of its own: here another test may have loaded ``torch._dynamo``."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=ROOT, timeout=120)


def test_modules_save_and_load_their_own_state_by_methods() -> None:
    assert callable(getattr(nn.Module, _torch.SAVE_OWN_STATE)) and callable(getattr(nn.Module, _torch.LOAD_OWN_STATE))
