"""layer_norm and add_layer_norm against the formula in float64, on both backends."""

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, backends, backends_and_dtypes, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close


def _affine(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


@backends_and_dtypes
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 64), (7, 769), (64,), (1, 1, 1600)], ids=str)
def test_layer_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 0.5).to(dtype)
    compare(
        "layer_norm",
        kernels.layer_norm,
        oracles.layer_norm,
        [x, *_affine(shape[-1], dtype)],
    )


@backends_and_dtypes
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 768), (1, 1, 769)], ids=str)
def test_add_layer_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), (torch.randn(shape) * 3).to(dtype)
    compare(
        "layer_norm",
        kernels.add_layer_norm,
        oracles.add_layer_norm,
        [x, residual, *_affine(shape[-1], dtype)],
    )


@backends
def test_width_one_gives_the_bias(backend: str) -> None:
    x, weight, bias = torch.randn(4, 1), torch.randn(1), torch.randn(1)
    assert torch.equal(kernels.layer_norm(x, weight, bias), bias.expand(4, 1))


@backends
@pytest.mark.parametrize("mean", [1000.0, -1000.0])
@pytest.mark.parametrize("width", [63, 769])
def test_rows_with_a_large_mean(backend: str, width: int, mean: float) -> None:
    x = torch.randn(5, width) + mean
    tensors = [x, *_affine(width)]
    compare("layer_norm_large_mean", kernels.layer_norm, oracles.layer_norm, tensors)


@backends
def test_eps_is_used(backend: str) -> None:
    x, weight, bias = torch.randn(4, 64) * 1e-3, torch.randn(64), torch.randn(64)
    compare(
        "layer_norm",
        lambda *t: kernels.layer_norm(*t, 1e-2),
        lambda *t: oracles.layer_norm(*t, 1e-2),
        [x, weight, bias],
    )
    default = kernels.layer_norm(x, weight, bias)
    assert torch.equal(default, kernels.layer_norm(x, weight, bias, 1e-5))


@backends
def test_constant_rows_are_finite_and_equal_the_bias(backend: str) -> None:
    weight, bias = torch.randn(64), torch.randn(64)
    y = kernels.layer_norm(torch.full((2, 64), 7.0), weight, bias)
    assert torch.equal(y, bias.expand(2, 64))


@backends
def test_non_contiguous(backend: str) -> None:
    x, residual = torch.randn(64, 6).t(), torch.randn(6, 2, 64)[:, 1]
    weight, bias = torch.randn(64, 2)[:, 0], torch.randn(128)[::2]
    assert not any(t.is_contiguous() for t in (x, residual, weight, bias))
    compare("layer_norm", kernels.layer_norm, oracles.layer_norm, [x, weight, bias])
    tensors = [x, residual, weight, bias]
    compare("layer_norm", kernels.add_layer_norm, oracles.add_layer_norm, tensors)


@backends
def test_no_rows(backend: str) -> None:
    x = torch.randn(0, 64, requires_grad=True)
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))
    y, summed = kernels.add_layer_norm(x, x, weight, bias)
    assert y.shape == summed.shape == (0, 64)
    y.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(64))
    assert torch.equal(bias.grad, torch.zeros(64))  # type: ignore[arg-type]


@backends
def test_nothing_given_is_changed(backend: str) -> None:
    """Neither inputs nor what is saved of them nor gradients that arrive."""
    tensors = [torch.randn(3, 64), torch.randn(3, 64), *_affine(64)]
    leaves = [t.requires_grad_() for t in tensors]
    outputs = kernels.add_layer_norm(*leaves)
    upstream = [torch.randn(3, 64), torch.randn(3, 64)]
    given = [*leaves, *outputs, *upstream]
    before = [t.detach().clone() for t in given]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


NEEDED = [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (1, 3)]


@backends
@pytest.mark.parametrize(
    ("used", "needed"),
    [(used, needed) for used in [(0,), (0, 1)] for needed in NEEDED]
    + [((1,), needed) for needed in NEEDED if min(needed) < 2],  # the sum has no weight and bias
    ids=str,
)
def test_only_what_is_needed(backend: str, used: tuple[int, ...], needed: tuple[int, ...]) -> None:
    """Some outputs are used, some inputs take gradients."""
    tensors = [torch.randn(9, 63), torch.randn(9, 63), *_affine(63)]
    upstream = [torch.randn(9, 63) for _ in used]
    results = []
    for function, dtype in (
        (kernels.add_layer_norm, torch.float32),
        (oracles.add_layer_norm, torch.float64),
    ):
        args = [t.detach().to(dtype).requires_grad_(i in needed) for i, t in enumerate(tensors)]
        outputs = function(*args)
        # The sum alone is a constant where only weight or bias takes a gradient.
        pairs = [
            (outputs[i], u.to(dtype))
            for i, u in zip(used, upstream, strict=True)
            if i == 0 or min(needed) < 2
        ]
        results.append(
            torch.autograd.grad(
                [output for output, _ in pairs],
                [args[i] for i in needed],
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
        )
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_close("layer_norm", "backward", got, want)


def _in_two_dtypes(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: torch.dtype
) -> None:
    """add_layer_norm of a sum in the wider dtype, outputs and gradients, against float64."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    y, summed = kernels.add_layer_norm(*leaves)
    assert summed.dtype == torch.promote_types(x.dtype, residual.dtype)
    assert y.dtype == out
    exact = [t.detach().double().requires_grad_() for t in leaves]
    # The statistics are those of the sum as it is stored.
    want_sum = (x + residual).double() - (x.double() + residual.double()) + exact[0] + exact[1]
    want = oracles.layer_norm(want_sum, *exact[2:]), want_sum
    upstream = [torch.randn(x.shape, dtype=o.dtype) for o in (y, summed)]
    grads = torch.autograd.grad([y, summed], leaves, upstream)
    want_grads = torch.autograd.grad(want, exact, [u.double() for u in upstream])
    for got, expected in zip((y, summed), want, strict=True):
        assert_close("layer_norm", "forward", got, expected, expected.to(got.dtype))
    for got, expected, leaf in zip(grads, want_grads, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert_close("layer_norm", "backward", got, expected, expected.to(got.dtype))


@backends
@pytest.mark.parametrize("dtype", TRITON_DTYPES[1:], ids=str)
@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_a_sum_of_two_dtypes(backend: str, dtype: torch.dtype, narrow: str) -> None:
    x, residual = torch.randn(6, 769), torch.randn(6, 769)
    if narrow == "x":
        x = x.to(dtype)
    else:
        residual = residual.to(dtype)
    _in_two_dtypes(x, residual, *_affine(769), torch.float32)


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES[1:], ids=str)
def test_autocast_gives_float32_as_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    x, residual, affine = torch.randn(6, 129), torch.randn(6, 129), _affine(129)
    with torch.autocast(DEVICE, dtype):
        _in_two_dtypes(x.to(dtype), residual, *affine, torch.float32)
        _in_two_dtypes(x.to(dtype), residual.to(dtype), *affine, torch.float32)
        _in_two_dtypes(x, residual, *(t.to(dtype) for t in affine), torch.float32)
        y = kernels.layer_norm(x.to(dtype), *affine)
        want = oracles.layer_norm(x.to(dtype).double(), *(t.double() for t in affine))
        assert y.dtype == torch.float32
        assert_close("layer_norm", "forward", y, want)


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(3, 24), *(pytest.param(16384, w, marks=pytest.mark.gpu) for w in (768, 1024, 1280, 1600))],
)
def test_model_sizes(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(rows, width).to(dtype), (torch.randn(rows, width) * 3).to(dtype)
    affine = _affine(width, dtype)
    compare("layer_norm", kernels.layer_norm, oracles.layer_norm, [x, *affine])
    tensors = [x, residual, *affine]
    compare("layer_norm", kernels.add_layer_norm, oracles.add_layer_norm, tensors)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [((63,), (63,)), ((64,), (63,)), ((1, 64), (64,)), ((1,), (1,))],
    ids=str,
)
def test_affine_of_another_shape(weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    message = (
        "weight and bias must have shape (64,), the last dimension of x; "
        f"got {tuple(weight)} and {tuple(bias)}"
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        kernels.layer_norm(torch.randn(3, 64), torch.randn(weight), torch.randn(bias))
    assert str(error.value) == message


def test_residual_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"^x and residual must have one shape; got \(3, 64\) and"):
        kernels.add_layer_norm(
            torch.randn(3, 64), torch.randn(1, 64), torch.randn(64), torch.randn(64)
        )
