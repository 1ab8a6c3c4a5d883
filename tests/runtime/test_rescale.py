"""The rescale operator: the identity forward, a factor times the gradient backward, whoever runs or traces it."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fxcollab import rescale
from tests.runtime.rescale_helpers import DIFFERENTIABLE, DTYPES, FACTORS, RUNNERS, bits, finite_values, rescaled_by
from tests.speeds import slow_but

pytestmark = pytest.mark.usefixtures("no_compiled_leftovers")


# ---------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
def test_forward_is_exact_for_every_finite_value(dtype: torch.dtype, factor: float, requires_grad: bool) -> None:
    value = finite_values(dtype).requires_grad_(requires_grad)
    result = rescale(value, factor)
    assert result.dtype == dtype and torch.equal(bits(result), bits(value))


@pytest.mark.parametrize("runner", slow_but(RUNNERS.keys() - {"export strict"}, RUNNERS))
@pytest.mark.parametrize("requires_grad", slow_but([True], [True, False]), ids=["grad", "no grad"])
def test_forward_is_exact_however_it_is_run(runner: str, requires_grad: bool) -> None:
    for dtype in DTYPES if runner != "compile" else [torch.float64, torch.bfloat16]:
        value = finite_values(dtype).requires_grad_(requires_grad)
        factors = FACTORS if dtype is torch.float64 else FACTORS[1:2]
        for factor in factors:
            run = RUNNERS[runner](rescaled_by(factor), value)
            assert torch.equal(bits(run(value)), bits(value)), (dtype, factor)


@pytest.mark.parametrize("runner", slow_but(RUNNERS.keys() - {"compile", "export", "export strict"}, RUNNERS))
def test_infinities_stay_infinities(runner: str) -> None:
    value = torch.tensor([math.inf, -math.inf, -0.0, 1.0], requires_grad=True)
    run = RUNNERS[runner](lambda x: rescale(x, 1 / 3), value)
    assert torch.equal(bits(run(value)), bits(value))


@pytest.mark.parametrize("factor", [0.9, 1.0, 0.25])
@pytest.mark.parametrize("runner", ["eager", "export", "jit.trace"])
def test_factors_of_any_size_keep_the_sign_of_zero(runner: str, factor: float) -> None:
    value = torch.tensor([-0.0, 0.0, 3.0], requires_grad=True)
    run = RUNNERS[runner](lambda x: rescale(x, factor), value)
    assert torch.equal(bits(run(value)), bits(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
def test_nothing_is_copied_in_eager(dtype: torch.dtype, requires_grad: bool) -> None:
    value = torch.ones(4, 3, dtype=dtype).t().requires_grad_(requires_grad)
    result = rescale(value, 0.5)
    assert result.data_ptr() == value.data_ptr() and result.stride() == value.stride()


def test_empty_and_scalar_tensors_pass() -> None:
    for shape in [(), (0,), (2, 0, 3)]:
        value = torch.randn(shape, requires_grad=True)
        result = rescale(value, 0.5)
        assert torch.equal(result, value)
        result.sum().backward()
        assert torch.equal(value.grad, torch.full(shape, 0.5))


# --------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_gradient_is_exactly_the_factor_times_what_arrives(dtype: torch.dtype, factor: float) -> None:
    value = finite_values(dtype).requires_grad_()
    arriving = torch.randn(value.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    rescale(value, factor).backward(arriving)
    assert torch.equal(bits(value.grad), bits(arriving * factor))


@pytest.mark.parametrize("factor", slow_but([1 / 3], FACTORS))
@pytest.mark.parametrize(
    "runner", slow_but([name for name in DIFFERENTIABLE if name != "export strict"], DIFFERENTIABLE)
)
def test_gradient_is_scaled_however_it_is_run(runner: str, factor: float) -> None:
    value = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value.requires_grad_()
    weights = torch.linspace(-1, 2, 20, dtype=torch.float64).view(5, 4)
    run = RUNNERS[runner](lambda x: rescale(x * 2, factor), value)
    run(value).backward(weights)
    assert_close(value.grad, 2 * factor * weights, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "runner", slow_but([name for name in DIFFERENTIABLE if name != "export strict"], DIFFERENTIABLE)
)
def test_gradient_is_scaled_where_tracing_saw_no_gradient(runner: str) -> None:
    """What is frozen, or run without gradients, while it is traced may be trained later on."""
    value = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        run = RUNNERS[runner](lambda x: rescale(x * 2, 1 / 3), value)
    value.requires_grad_()
    run(value).sum().backward()
    assert_close(value.grad, torch.full_like(value, 2 / 3), rtol=1e-15, atol=0)


def test_heads_receive_the_mean_where_each_has_its_own_factor() -> None:
    value = torch.ones(2, dtype=torch.float64, requires_grad=True)
    shared = rescale(value, 1 / 3)
    (1 * shared + 4 * shared + 7 * shared).sum().backward()
    assert_close(value.grad, torch.full_like(value, 4.0))


def test_nested_rescales_multiply() -> None:
    value = torch.ones(2, dtype=torch.float64, requires_grad=True)
    rescale(rescale(value, 1 / 2), 1 / 3).sum().backward()
    assert_close(value.grad, torch.full_like(value, 1 / 6))


def test_double_backward_is_linear_in_the_first() -> None:
    value = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss = (rescale(value, 1 / 3) ** 3).sum()
    (first,) = torch.autograd.grad(loss, value, create_graph=True)
    assert_close(first, value.detach() ** 2)
    (second,) = torch.autograd.grad(first.sum(), value)  # the chain crosses the rescale twice
    assert_close(second, 2 * value.detach() / 3)


def test_gradcheck_of_the_double_backward() -> None:
    """The first gradient is that of another function, but it must be differentiated rightly itself."""
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def gradient(weight: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((rescale(value, 1 / 5) * weight).sum(), value, create_graph=True)
        return found

    assert torch.autograd.gradcheck(gradient, (weight,))


# -------------------------------------------------------------------------------------- functions of functions


def scaled_square(x: Tensor) -> Tensor:
    return (rescale(x, 1 / 3) ** 2).sum()


def test_func_grad() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert_close(grad(scaled_square)(x), 2 * x / 3)


def test_func_grad_of_grad() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert_close(grad(lambda y: grad(scaled_square)(y).sum())(x), torch.full_like(x, 2 / 9))


def test_vmap_of_grad_gives_every_samples_gradient() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    assert_close(vmap(grad(scaled_square))(x), 2 * x / 3)


def test_grad_of_vmap() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    assert_close(grad(lambda y: vmap(scaled_square)(y).sum())(x), 2 * x / 3)


def test_backward_through_vmap_reaches_a_shared_weight() -> None:
    """Under vmap a value doesn't tell that it requires a gradient."""
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 2, dtype=torch.float64)
    vmap(lambda sample: rescale(weight * sample, 1 / 3).sum())(x).sum().backward()
    assert_close(weight.grad, x.sum(0) / 3)


def test_vmap_over_another_dimension() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    result = vmap(lambda column: rescale(column, 1 / 3), in_dims=1, out_dims=1)(x)
    assert torch.equal(result, x)
    result.sum().backward()
    assert_close(x.grad, torch.full_like(x, 1 / 3))


def test_jacobians_agree_in_reverse_and_forward_mode() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = torch.diag(2 * x / 3)
    assert_close(jacrev(lambda y: rescale(y, 1 / 3) ** 2)(x), expected)
    assert_close(jacfwd(lambda y: rescale(y, 1 / 3) ** 2)(x), expected)


def test_forward_mode_scales_the_tangent() -> None:
    x = torch.tensor([1.0, -0.0, math.inf], dtype=torch.float64)
    value, tangent = jvp(lambda y: rescale(y, 1 / 3), (x,), (torch.ones_like(x),))
    assert torch.equal(bits(value), bits(x))
    assert_close(tangent[:2], torch.full_like(x[:2], 1 / 3))
    with forward_ad.dual_level():
        dual = rescale(forward_ad.make_dual(x[:2], torch.ones_like(x[:2])), 1 / 3)
        assert_close(forward_ad.unpack_dual(dual).tangent, torch.full_like(x[:2], 1 / 3))


def test_hessian_forward_over_reverse_equals_reverse_over_reverse() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    cubed = lambda y: (rescale(y, 1 / 3) ** 3).sum()  # noqa: E731
    assert_close(hessian(cubed)(x), jacrev(jacrev(cubed))(x))
    assert_close(hessian(cubed)(x), torch.diag(6 * x / 9))


def test_make_fx_of_a_gradient() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for function in (grad(scaled_square), lambda y: torch.autograd.grad(scaled_square(y), y)[0]):
        traced = make_fx(function)(x.clone().requires_grad_())
        assert_close(traced(x), 2 * x / 3)


@pytest.mark.slow
def test_compiled_functional_transforms() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    compiled = torch.compile(grad(scaled_square), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), 2 * x / 3)
    compiled = torch.compile(vmap(lambda y: rescale(y, 1 / 3)), fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    compiled(x).sum().backward()
    assert_close(x.grad, torch.full_like(x, 1 / 3))


@pytest.mark.slow
def test_compiled_backward_through_vmap_reaches_a_shared_weight() -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 2, dtype=torch.float64)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return vmap(lambda sample: rescale(weight * sample, 1 / 3).sum())(x).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(weight, x).backward()
    assert_close(weight.grad, x.sum(0) / 3)
    compiled = torch.compile(lambda w, x: grad(loss)(w, x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(weight.detach(), x), x.sum(0) / 3)


def test_compiled_vmap_of_grad_is_refused_rather_than_wrong() -> None:
    """torch.compile can't batch any autograd.Function yet; vmap(grad(...)) holds without it."""
    compiled = torch.compile(vmap(grad(scaled_square)), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, dtype=torch.float64)
    try:
        found = compiled(x)
    except Exception as error:
        assert "does not have vmap support" in str(error)
    else:
        assert_close(found, 2 * x / 3)


def test_compiled_once_for_gradients_and_without() -> None:
    compiled = torch.compile(lambda x: rescale(x * 2, 1 / 3), fullgraph=True, backend="aot_eager")
    x = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(compiled(x), 2 * x)
    with torch.inference_mode():
        assert torch.equal(compiled(x), 2 * x)
    x.requires_grad_()
    compiled(x).sum().backward()
    assert_close(x.grad, torch.full_like(x, 2 / 3))


# ------------------------------------------------------------------------------------- what else may be handed in


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, 1j, "text", b"bytes", slice(1, 2), ..., torch.float32, torch.device("cpu"), torch.strided],
    ids=repr,
)  # fmt: skip
def test_what_is_no_tensor_passes_bare(value: Any) -> None:
    assert rescale(value, 0.5) is value


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integer_and_boolean_tensors_pass_bare(dtype: torch.dtype) -> None:
    value = torch.ones(3, dtype=dtype)
    assert rescale(value, 0.5) is value


Pair = namedtuple("Pair", "left right")


def test_structures_are_rescaled_leaf_by_leaf() -> None:
    x, y, z = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    indices = torch.arange(2)
    result = rescale({"a": [x, (y, None)], "b": Pair(z, 3), "c": indices, "d": "text"}, 1 / 3)
    assert list(result) == ["a", "b", "c", "d"] and isinstance(result["b"], Pair)
    assert result["a"][1][1] is None and result["b"].right == 3
    assert result["c"] is indices and result["d"] == "text"
    (result["a"][0] + result["a"][1][0] + result["b"].left).sum().backward()
    for leaf in (x, y, z):
        assert_close(leaf.grad, torch.full_like(leaf, 1 / 3))


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = [value]


def test_gradients_of_what_an_object_holds_are_scaled_in_a_copy() -> None:
    tensor = torch.ones(2, requires_grad=True)
    for value in (Holds(tensor), [Holds(tensor)]):
        result = rescale(value, 0.5)
        held = (result[0] if isinstance(result, list) else result).value[0]
        (gradient,) = torch.autograd.grad(held.sum(), tensor)
        assert torch.equal(held, tensor) and gradient.tolist() == [0.5, 0.5]


def test_objects_with_modules_are_refused_with_a_way_out() -> None:
    for value in (Holds(nn.Linear(2, 2)), [Holds(nn.Linear(2, 2))]):
        with pytest.raises(TypeError, match=r"(?s)type .*Holds.*hint: register the type"):
            rescale(value, 0.5)


def test_tensor_subclasses_keep_their_class() -> None:
    class Marked(Tensor):
        pass

    value = torch.ones(2, dtype=torch.float64).as_subclass(Marked).requires_grad_()
    result = rescale(value, 0.5)
    assert type(result) is Marked
    result.sum().backward()
    assert_close(value.grad.as_subclass(Tensor), torch.full((2,), 0.5, dtype=torch.float64))


def test_parameters_are_rescaled_without_becoming_parameters() -> None:
    parameter = nn.Parameter(torch.ones(2))
    result = rescale(parameter, 0.5)
    assert not isinstance(result, nn.Parameter)
    result.sum().backward()
    assert torch.equal(parameter.grad, torch.full((2,), 0.5))


def test_sparse_tensors_pass() -> None:
    constant = torch.eye(3).to_sparse()
    assert rescale(constant, 0.5) is constant
    trained = torch.eye(3).to_sparse().requires_grad_()
    rescale(trained, 0.5).to_dense().sum().backward()
    assert torch.equal(trained.grad.to_dense(), torch.eye(3) * 0 + 0.5 * trained.grad.to_dense().ne(0))


def test_jagged_tensors_are_rescaled() -> None:
    rows = [torch.ones(length, 2, dtype=torch.float64, requires_grad=True) for length in (2, 3)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    rescale(nested, 1 / 3).values().sum().backward()
    for row in rows:
        assert_close(row.grad, torch.full_like(row, 1 / 3))


def test_meta_and_fake_tensors_pass() -> None:
    assert rescale(torch.ones(2, 3, device="meta", requires_grad=True), 0.5).shape == (2, 3)
    with torch._subclasses.FakeTensorMode():
        value = torch.ones(2, 3, requires_grad=True)
        assert isinstance(rescale(value, 0.5), torch._subclasses.FakeTensor)


def test_writing_into_the_result_raises_instead_of_changing_the_other_heads() -> None:
    value = torch.tensor([-1.0, 2.0], requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="inplace"):
        F.leaky_relu(rescale(value, 0.5), inplace=True)
    assert value.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("runner", ["export", "jit.trace"])
def test_writing_into_the_result_is_safe_where_it_is_written_in_operators(runner: str) -> None:
    def two_heads(x: Tensor) -> Tensor:
        shared = x * 1
        first = F.leaky_relu(rescale(shared, 0.5), inplace=True)
        return torch.stack([first, shared])

    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    first, shared = RUNNERS[runner](two_heads, x)(x)
    assert shared.tolist() == [-1.0, 2.0]
    assert_close(first, torch.tensor([-0.01, 2.0]))


def test_autocast_leaves_the_type_alone() -> None:
    value = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rescale(value, 1 / 3)
        low = rescale(torch.mm(torch.ones(2, 3), value.view(3, 1)), 1 / 3)
    assert result.dtype == torch.float32 and low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert_close(value.grad, torch.full((3,), 2 / 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_and_around(reentrant: bool) -> None:
    value = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64)

    def segment(x: Tensor) -> Tensor:
        return rescale(x.sin(), 1 / 3) * weight

    checkpoint(segment, value, use_reentrant=reentrant).sum().backward()
    assert_close(value.grad, value.detach().cos() * weight / 3)
