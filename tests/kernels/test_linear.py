"""linear and gelu_mlp against plain PyTorch in float64."""

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.oracles import DTYPES, compare


def _layer(inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        (torch.randn(inputs, outputs) / inputs**0.5).to(dtype),
        torch.randn(outputs).to(dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs"),
    [((), 64, 32), ((1,), 1, 1), ((3,), 63, 769), ((2, 5), 64, 192), ((2, 1, 3), 17, 5)],
    ids=str,
)
def test_linear(lead: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = torch.randn(*lead, inputs).to(dtype)
    compare("linear", kernels.linear, oracles.linear, [x, *_layer(inputs, outputs, dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("lead", "width", "inner"), [((7,), 63, 129), ((2, 3), 64, 256)], ids=str)
def test_gelu_mlp(
    lead: tuple[int, ...], width: int, inner: int, with_residual: bool, dtype: torch.dtype
) -> None:
    tensors = [
        torch.randn(*lead, width).to(dtype),
        *_layer(width, inner, dtype),
        *_layer(inner, width, dtype),
    ]
    if with_residual:
        tensors.append(torch.randn(*lead, width).to(dtype))
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


def test_gelu_is_the_tanh_form() -> None:
    # At 1.5 the tanh form differs from the erf form by 3e-4: a hundred times the tolerance.
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y = kernels.gelu_mlp(torch.tensor([[1.5]]), one, zero, one, zero)
    assert y.item() == pytest.approx(1.3995715, abs=3e-6)


def test_wide_inputs_saturate() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y = kernels.gelu_mlp(torch.tensor([[1e4], [-1e4]]), one, zero, one, zero)
    assert y.flatten().tolist() == [1e4, 0.0]


def test_non_contiguous() -> None:
    x = torch.randn(64, 6).t()
    weight, bias = torch.randn(32, 64).t(), torch.randn(64)[::2]
    assert not any(t.is_contiguous() for t in (x, weight, bias))
    compare("linear", kernels.linear, oracles.linear, [x, weight, bias])
    residual = torch.randn(6, 2, 64)[:, 1]
    tensors = [x, weight, bias, *_layer(32, 64, torch.float32), residual]
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


def test_no_rows() -> None:
    x = torch.randn(2, 0, 8, requires_grad=True)
    fc, proj = _layer(8, 32, torch.float32), _layer(32, 8, torch.float32)
    assert kernels.linear(x, *fc).shape == (2, 0, 32)
    fc[0].requires_grad_()
    kernels.gelu_mlp(x, *fc, *proj, x).sum().backward()
    assert torch.equal(fc[0].grad, torch.zeros(8, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16)
    layers = [*_layer(16, 32, torch.float32), *_layer(32, 16, torch.float32)]
    with torch.autocast("cpu", dtype):
        assert kernels.linear(x, *layers[:2]).dtype == dtype
        assert kernels.gelu_mlp(x, *layers).dtype == dtype
        assert kernels.gelu_mlp(x, *layers, x).dtype == torch.float32  # the residual stream's


def test_wrong_shapes() -> None:
    x, (weight, bias) = torch.randn(3, 8), _layer(8, 32, torch.float32)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kernels.linear(x, weight.t(), bias)
    assert str(error.value) == (
        "linear: expected weight [8, out] and bias [out]; got [32, 8] and [32]"
    )
    with pytest.raises(ValueError, match=r"bias \[out\]; got \[8, 32\] and \[1\]$"):
        kernels.linear(x, weight, bias[:1])
    proj = _layer(32, 8, torch.float32)
    with pytest.raises(ValueError, match=r"^fc: expected weight \[8, out\].*got \[7, 32\]"):
        kernels.gelu_mlp(x, weight[:7], bias, *proj)
    with pytest.raises(ValueError, match=r"^proj: expected weight \[32, out\].*got \[31, 8\]"):
        kernels.gelu_mlp(x, weight, bias, proj[0][:31], proj[1])
    with pytest.raises(ValueError, match=r"^residual must have shape \(3, 8\); got \(1, 8\)$"):
        kernels.gelu_mlp(x, weight, bias, *proj, x[:1])
