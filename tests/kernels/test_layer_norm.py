"""layer_norm and add_layer_norm against the formula in float64."""

import pytest
import torch

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.oracles import DTYPES, compare


def _affine(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 64), (7, 769), (64,), (1, 1, 1600)], ids=str)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 0.5).to(dtype)
    compare(
        "layer_norm",
        kernels.layer_norm,
        oracles.layer_norm,
        [x, *_affine(shape[-1], dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 768), (1, 1, 769)], ids=str)
def test_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), (torch.randn(shape) * 3).to(dtype)
    compare(
        "layer_norm",
        kernels.add_layer_norm,
        oracles.add_layer_norm,
        [x, residual, *_affine(shape[-1], dtype)],
    )


def test_width_one_gives_the_bias() -> None:
    x, weight, bias = torch.randn(4, 1), torch.randn(1), torch.randn(1)
    assert torch.equal(kernels.layer_norm(x, weight, bias), bias.expand(4, 1))


@pytest.mark.parametrize("mean", [1000.0, -1000.0])
@pytest.mark.parametrize("width", [63, 769])
def test_rows_with_a_large_mean(width: int, mean: float) -> None:
    x = torch.randn(5, width) + mean
    tensors = [x, *_affine(width, torch.float32)]
    compare("layer_norm_large_mean", kernels.layer_norm, oracles.layer_norm, tensors)


def test_eps_is_used() -> None:
    x, weight, bias = torch.randn(4, 64) * 1e-3, torch.randn(64), torch.randn(64)
    compare(
        "layer_norm",
        lambda *t: kernels.layer_norm(*t, 1e-2),
        lambda *t: oracles.layer_norm(*t, 1e-2),
        [x, weight, bias],
    )
    default = kernels.layer_norm(x, weight, bias)
    assert torch.equal(default, kernels.layer_norm(x, weight, bias, 1e-5))


def test_constant_rows_are_finite_and_equal_the_bias() -> None:
    weight, bias = torch.randn(64), torch.randn(64)
    y = kernels.layer_norm(torch.full((2, 64), 7.0), weight, bias)
    assert torch.equal(y, bias.expand(2, 64))


def test_non_contiguous() -> None:
    x, residual = torch.randn(64, 6).t(), torch.randn(6, 2, 64)[:, 1]
    weight, bias = torch.randn(64, 2)[:, 0], torch.randn(128)[::2]
    assert not any(t.is_contiguous() for t in (x, residual, weight, bias))
    compare("layer_norm", kernels.layer_norm, oracles.layer_norm, [x, weight, bias])
    tensors = [x, residual, weight, bias]
    compare("layer_norm", kernels.add_layer_norm, oracles.add_layer_norm, tensors)


def test_no_rows() -> None:
    x = torch.randn(0, 64, requires_grad=True)
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))
    y, summed = kernels.add_layer_norm(x, x, weight, bias)
    assert y.shape == summed.shape == (0, 64)
    y.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(64))


def test_inputs_are_not_changed() -> None:
    tensors = [torch.randn(3, 64), torch.randn(3, 64), *_affine(64, torch.float32)]
    before = [t.clone() for t in tensors]
    kernels.add_layer_norm(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


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
