"""Every private name of torch that is used, under a public one: only these may break with a new version of torch.

Each has a line that says what it is for where torch has no public name, and a test in ``test_torch_names.py``.
``torch._dynamo`` takes seconds to import; the functions here that need it import it when they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.fx import graph as fx_graph
from torch.fx.experimental.proxy_tensor import get_proxy_mode

pytree = torch.utils._pytree
"""Structures of tensors; torch 2.14 has no public ``torch.utils.pytree`` yet."""

OpOverload = torch._ops.OpOverload
"""The type of operators such as ``torch.ops.aten.add.Tensor``, which graphs of ``torch.export`` call."""

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Sees every operator that runs; the public ``TorchFunctionMode`` sees only what Python calls."""

FakeTensor = fake_tensor.FakeTensor
"""A tensor with a shape, a type and a device, and no values; one on the meta device has lost its own device."""

FakeTensorMode = fake_tensor.FakeTensorMode
"""Makes fake tensors, and computes with them."""

DATA_DEPENDENT_ERRORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)
"""What fake tensors raise where a model depends on values."""

CONVERSION = torch.ops.aten._to_copy.default
"""What a conversion to another type or device does; to the same one there is none, and the result is the tensor."""

DEVICE_OF = torch.ops.prim.device.default
"""The operator that asks a fake tensor for its device, more often than all others run together."""

PyTreeCodeGen = fx_graph._PyTreeCodeGen
"""Generates the code of graphs whose inputs and outputs are structures."""


class EvalOutputCodeGen(PyTreeCodeGen):
    """Reads the output's structure from ``_eval_out_spec``, as all forwards of a module have one ``_out_spec``."""

    def generate_output(self, *args: Any, **kwargs: Any) -> str:
        """The last line of the code."""
        return super().generate_output(*args, **kwargs).replace("self._out_spec", "self._eval_out_spec")


format_target = fx_graph._format_target
"""The expression by which generated code reads an attribute of the module."""

JIT_ISINSTANCE = "_isinstance"
"""The name in ``torch.jit`` of what ``torch.jit.isinstance`` calls, however that was imported."""

GENERATED = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start"})
"""Attributes that a ``GraphModule`` and each copy of it make from the graph."""

SAVE_OWN_STATE = "_save_to_state_dict"
"""The method by which a module adds its own entries to a state dict, without those of the modules in it."""

LOAD_OWN_STATE = "_load_from_state_dict"
"""The method by which a module reads its own entries of a state dict."""


def codegen_of(graph: fx.Graph) -> fx_graph.CodeGen:
    """What generates the graph's code; ``Graph.set_codegen`` is public, but there is no getter."""
    return graph._codegen


def schema_of(overload: OpOverload) -> Any:
    """The schema of an operator: which arguments it writes, and which its results alias."""
    return overload._schema


def as_parameter(tensor: Tensor) -> Tensor:
    """A tensor of another class as one that passes for an ``nn.Parameter``; as `nn.Parameter` itself marks them."""
    tensor._is_param = True
    return tensor


runtime_check = torch._check
"""Raises unless a condition holds, of numbers that are symbols in compiled code, too."""


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into, as autograd counts it; 0 for an inference tensor, where it doesn't."""
    try:  # compiled code can't ask is_inference()
        return tensor._version
    except RuntimeError:
        return 0


def storage_id(tensor: Tensor) -> int:
    """The identity of a tensor's storage; ``data_ptr()`` is 0 where there are no values, and for no elements.

    Of a tensor without storage, such as a sparse one, it is that of the tensor.
    """
    try:
        identity: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        identity = id(tensor)
    return identity


def has_hooks(tensor: Tensor) -> bool:
    """Whether ``register_hook`` or ``register_post_accumulate_grad_hook`` was called on a parameter."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def gradient_types(node: Any) -> Iterator[torch.dtype]:
    """The types of the gradients that a node of autograd's graph takes."""
    return (meta.dtype for meta in node._input_metadata)


def is_traced() -> bool:
    """Whether ``jit.trace`` or ``make_fx`` records what runs here."""
    return bool(torch.jit.is_tracing()) or get_proxy_mode() is not None  # type: ignore[attr-defined, no-untyped-call]


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms what runs here: ``grad``, ``vmap``, ``jvp``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor stands for a batch under ``vmap``: its memory has a dimension that can't be seen."""
    return torch._C._functorch.is_batchedtensor(tensor)


def computes_forward_derivatives() -> bool:
    """Whether what runs here is inside ``forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def dynamo_is_loaded() -> bool:
    """Whether anything was compiled so far; to import it takes seconds."""
    return "torch._dynamo" in sys.modules


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` made this module."""
    compiled = dynamo_is_loaded() and isinstance(module, torch._dynamo.OptimizedModule)
    return compiled or module._compiled_call_impl is not None


def graph_break() -> None:
    """End the graph here if the caller is being compiled."""
    torch._dynamo.graph_break()


def never_compile(code: CodeType) -> None:
    """Never compile a function's code, only what it calls; ``torch.compiler.disable`` excludes both."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(code)
