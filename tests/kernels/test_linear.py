"""linear and gelu_mlp against plain PyTorch in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2fast import kernels
from gpt2fast.kernels import torch_ops
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, backends, backends_and_dtypes, triton_only
from tests.kernels.oracles import compare
from tests.kernels.perceptrons import compare_forward, layer, mlp
from tests.tolerances import assert_close

# Where the GELU's sigmoid is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@backends_and_dtypes
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs"),
    [((), 64, 32), ((1,), 1, 1), ((3,), 63, 769), ((2, 5), 64, 192), ((2, 1, 3), 17, 5)],
    ids=str,
)
def test_linear(
    backend: str, lead: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, ours: None
) -> None:
    tensors = [torch.randn(*lead, inputs).to(dtype), *layer(inputs, outputs, dtype)]
    compare("linear", kernels.linear, oracles.linear, tensors)
    compare_forward("linear", kernels.linear, oracles.linear, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_16_bits_on_any_cpu(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "multiplies_fast", lambda dtype, device: fast)
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((3, 5, 64), (64, 33), (33,)))
    with kernels.backend("torch"):
        compare("linear", kernels.linear, oracles.linear, [x, weight, bias])
        product = kernels.linear(x, weight, bias)
        with torch.autocast("cpu", dtype):
            assert kernels.linear(x.float(), weight.float(), bias.float()).dtype == dtype
    wide = torch.addmm(bias.float(), x.float().view(15, 64), weight.float())
    assert fast or torch.equal(product, wide.to(dtype).view(3, 5, 33))


@backends_and_dtypes
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("lead", "width", "inner"), [((7,), 63, 129), ((2, 3), 64, 256)], ids=str)
def test_gelu_mlp(
    backend: str,
    lead: tuple[int, ...],
    width: int,
    inner: int,
    with_residual: bool,
    dtype: torch.dtype,
    ours: None,
) -> None:
    tensors = mlp(lead, width, inner, dtype, with_residual)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


@backends
def test_gelu_is_the_tanh_form(backend: str, ours: None) -> None:
    # At 1.5 the tanh form differs from the erf form by 3e-4: a hundred times the tolerance.
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y = kernels.gelu_mlp(torch.tensor([[1.5]]), one, zero, one, zero)
    assert y.item() == pytest.approx(1.3995715, abs=3e-6)


@backends_and_dtypes
def test_wide_inputs_saturate(backend: str, dtype: torch.dtype, ours: None) -> None:
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    x = torch.tensor([[1e4], [50], [0], [-50], [-1e4]], dtype=dtype, requires_grad=True)
    y = kernels.gelu_mlp(x, one, zero, one, zero)
    y.backward(torch.ones(5, 1, dtype=dtype))
    assert torch.equal(y, x.clamp_min(0))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 1, 0.5, 0, 0]


@backends
def test_non_contiguous(backend: str, ours: None) -> None:
    x = torch.randn(64, 6).t()
    weight, bias = torch.randn(32, 64).t(), torch.randn(64)[::2]
    assert not any(t.is_contiguous() for t in (x, weight, bias))
    compare("linear", kernels.linear, oracles.linear, [x, weight, bias])
    residual = torch.randn(6, 2, 64)[:, 1]
    tensors = [x, weight, bias, *layer(32, 64, torch.float32), residual]
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_apart_and_weights_with_gaps(backend: str, dtype: torch.dtype, ours: None) -> None:
    """Read in place: rows of a wider tensor, aligned or not; copied: a weight with gaps, and one
    row expanded to many."""
    weight, bias = layer(64, 48, dtype)
    gaps = torch.randn(64, 96).to(dtype)[:, ::2]
    inputs = (
        torch.randn(20, 80).to(dtype)[:, 8:72],
        torch.randn(20, 65).to(dtype)[:, 1:],
        torch.randn(1, 64).to(dtype).expand(20, 64),
    )
    for x, w in itertools.product(inputs, (weight, weight.t().contiguous().t(), gaps)):
        compare_forward("linear", kernels.linear, oracles.linear, [x, w, bias])


@backends
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "gapped"])
def test_upstream_gradients_of_any_layout(backend: str, upstream: str, ours: None) -> None:
    tensors = mlp((6,), 24, 40, torch.float32)
    dout = {
        "expanded": torch.randn(24).expand(6, 24),
        "transposed": torch.randn(24, 6).t(),
        "gapped": torch.randn(6, 48)[:, ::2],
    }[upstream]
    before = dout.clone()
    grads = []
    for function in (kernels.gelu_mlp, oracles.gelu_mlp):
        wide = torch.float32 if function is kernels.gelu_mlp else torch.float64
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        grads.append(torch.autograd.grad(function(*leaves), leaves, dout.to(wide)))
    for got, want in zip(*grads, strict=True):
        assert_close("gelu_mlp", "backward", got, want)
    assert torch.equal(dout, before)


@backends
def test_no_rows(backend: str) -> None:
    x = torch.randn(2, 0, 8, requires_grad=True)
    fc, proj = layer(8, 32, torch.float32), layer(32, 8, torch.float32)
    assert kernels.linear(x, *fc).shape == (2, 0, 32)
    fc[0].requires_grad_()
    kernels.gelu_mlp(x, *fc, *proj, x).sum().backward()
    assert torch.equal(fc[0].grad, torch.zeros(8, 32))  # type: ignore[arg-type]


@backends
def test_no_columns(backend: str, ours: None) -> None:
    assert kernels.linear(torch.randn(3, 4), torch.randn(4, 0), torch.randn(0)).shape == (3, 0)


@backends
@pytest.mark.parametrize("trained", [*range(6), (1, 3), (0, 2, 5)], ids=str)
def test_frozen_parameters(backend: str, trained: int | tuple[int, ...], ours: None) -> None:
    """A gradient is the same whatever else needs one."""
    trained = (trained,) if isinstance(trained, int) else trained
    leaves = [t.requires_grad_() for t in mlp((6,), 24, 40, torch.float32)]
    dout = torch.randn(6, 24)
    everything = torch.autograd.grad(kernels.gelu_mlp(*leaves), leaves, dout)
    some = [leaf if i in trained else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(kernels.gelu_mlp(*some), [some[i] for i in trained], dout)
    for i, grad in zip(trained, grads, strict=True):
        torch.testing.assert_close(grad, everything[i], rtol=1e-6, atol=1e-6)


@backends
def test_gradients_do_not_change_the_result(backend: str, ours: None) -> None:
    tensors = mlp((6,), 24, 40, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.testing.assert_close(
        kernels.gelu_mlp(*tensors), kernels.gelu_mlp(*leaves).detach(), rtol=1e-6, atol=1e-6
    )


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype not in TRITON_DTYPES:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    x = torch.randn(3, 16)
    layers = [*layer(16, 32, torch.float32), *layer(32, 16, torch.float32)]
    with torch.autocast(DEVICE, dtype):
        assert kernels.linear(x, *layers[:2]).dtype == dtype
        assert kernels.gelu_mlp(x, *layers).dtype == dtype
        assert kernels.gelu_mlp(x, *layers, x).dtype == torch.float32  # the residual stream's


@backends
@pytest.mark.parametrize("dtype", [t for t in TRITON_DTYPES if t != torch.float32], ids=str)
@pytest.mark.parametrize("rows", [6, 70])
def test_autocast_is_no_worse(backend: str, dtype: torch.dtype, rows: int, ours: None) -> None:
    """Under autocast the error is within the budget of PyTorch's; gradients are float32."""
    tensors = mlp((rows,), 40, 96, torch.float32)
    dout = torch.randn(rows, 40)

    def run(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in tensors]
        with torch.autocast(DEVICE, dtype, enabled=wide == torch.float32):
            out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(wide))]

    got, plain = run(kernels.gelu_mlp, torch.float32), run(oracles.gelu_mlp, torch.float32)
    want = run(oracles.gelu_mlp, torch.float64)
    for i, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        assert a.dtype == torch.float32
        assert_close("gelu_mlp", "backward" if i else "forward", a, b, c, dtype)


@backends
def test_residual_of_another_dtype(backend: str, ours: None) -> None:
    """As PyTorch promotes: the result has the wider dtype, each gradient its tensor's."""
    *tensors, residual = mlp((6,), 24, 40, torch.float32)
    leaf = residual.half().requires_grad_()
    out = kernels.gelu_mlp(*tensors, leaf)
    assert out.dtype == torch.float32
    assert_close(
        "gelu_mlp", "forward", out, oracles.gelu_mlp(*(t.double() for t in (*tensors, leaf)))
    )
    dout = torch.randn(6, 24)
    (grad,) = torch.autograd.grad(out, leaf, dout)
    assert torch.equal(grad, dout.half())


@backends
def test_mixed_dtypes_are_pytorchs_error(backend: str) -> None:
    x, (weight, bias) = torch.randn(3, 8), layer(8, 32, torch.float16)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.linear(x, weight, bias)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.gelu_mlp(x, weight, bias, *layer(32, 8, torch.float16))


@backends
def test_float64_is_pytorchs(backend: str) -> None:
    tensors = [t.double() for t in mlp((3,), 8, 16, torch.float32)]
    torch.testing.assert_close(kernels.gelu_mlp(*tensors), oracles.gelu_mlp(*tensors))


@backends
def test_an_undefined_upstream_gradient(backend: str) -> None:
    """What follows may have no gradient to give; autograd then brings None."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> None:
            return None

    tensors = [t.requires_grad_() for t in mlp((3,), 8, 32, torch.float32)]
    out = kernels.gelu_mlp(*tensors)
    grads = torch.autograd.grad(Nothing.apply(out).sum(), tensors, allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in grads)


@triton_only
def test_autocast_casts_a_parameter_once_a_region(backend: str) -> None:
    """As PyTorch does: decoding must not read the float32 weights for every token."""
    x, *parameters = mlp((1,), 8, 32, torch.float32)
    parameters = [torch.nn.Parameter(p) for p in parameters]
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].numel() > 100:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.float16), Casts():
        for _ in range(3):
            kernels.gelu_mlp(x, *parameters)
            kernels.linear(x, *parameters[:2])
    assert len(casts) == 2
