"""linear and gelu_mlp against plain PyTorch in float64."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.kernels._triton import configs, target
from tests.kernels import oracles
from tests.kernels.devices import (
    DEVICE,
    TRITON_DTYPES,
    backends,
    backends_and_dtypes,
    triton_only,
)
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

OPS = torch.ops.gpt2fast
# Where the GELU's sigmoid is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel in every role, also where the table prefers cuBLAS."""
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: "triton")


@pytest.fixture
def chip(request: pytest.FixtureRequest) -> Iterator[int]:
    """Pointers, and tile copies where they are possible; with few programs for many tiles."""
    with target.assume(dataclasses.replace(target.CHIPS[request.param], multiprocessors=4)):
        yield request.param


def _layer(inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        (torch.randn(inputs, outputs) / inputs**0.5).to(dtype),
        torch.randn(outputs).to(dtype),
    ]


def _mlp(
    lead: tuple[int, ...], width: int, inner: int, dtype: torch.dtype, with_residual: bool = True
) -> list[Tensor]:
    """Everything that gelu_mlp takes."""
    tensors = [torch.randn(*lead, width).to(dtype)]
    tensors += [*_layer(width, inner, dtype), *_layer(inner, width, dtype)]
    return [*tensors, torch.randn(*lead, width).to(dtype)] if with_residual else tensors


def _compare_forward(
    op: str, ours: Callable[..., Tensor], oracle: Callable[..., Tensor], tensors: list[Tensor]
) -> Tensor:
    """Like `compare`, without gradients."""
    with torch.no_grad():
        got = ours(*tensors)
        assert_close(op, "forward", got, oracle(*(t.double() for t in tensors)), oracle(*tensors))
    return got


@backends_and_dtypes
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs"),
    [((), 64, 32), ((1,), 1, 1), ((3,), 63, 769), ((2, 5), 64, 192), ((2, 1, 3), 17, 5)],
    ids=str,
)
def test_linear(
    backend: str, lead: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, ours: None
) -> None:
    tensors = [torch.randn(*lead, inputs).to(dtype), *_layer(inputs, outputs, dtype)]
    compare("linear", kernels.linear, oracles.linear, tensors)
    _compare_forward("linear", kernels.linear, oracles.linear, tensors)


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
    tensors = _mlp(lead, width, inner, dtype, with_residual)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


# Rows, width, inner: on 4 multiprocessors with tile copies, 16-bit tiles of 16 x 32 (unsplit,
# split), 64 x 64 (unsplit, split), 128 x 128, 128 x 256 with several a program.
SIZES = [(5, 72, 160), (16, 600, 40), (40, 64, 136), (40, 304, 56), (70, 40, 200), (140, 24, 520)]


@triton_only
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [(80, torch.float32), *itertools.product((80, 90), TRITON_DTYPES[1:])],
    indirect=["chip"],
    ids=str,
)
@pytest.mark.parametrize(("rows", "width", "inner"), SIZES, ids=str)
def test_tiles(
    backend: str, rows: int, width: int, inner: int, dtype: torch.dtype, chip: int, ours: None
) -> None:
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, _mlp((rows,), width, inner, dtype))
    linear = [torch.randn(rows, width).to(dtype), *_layer(width, inner, dtype)]
    _compare_forward("linear", kernels.linear, oracles.linear, linear)


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_cublas_in_every_role(
    backend: str, dtype: torch.dtype, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: "cublas")
    tensors = _mlp((9,), 24, 96, dtype, with_residual)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    compare("linear", kernels.linear, oracles.linear, tensors[:3])


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
    tensors = [x, weight, bias, *_layer(32, 64, torch.float32), residual]
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_apart_and_weights_with_gaps(backend: str, dtype: torch.dtype, ours: None) -> None:
    """Read in place: rows of a wider tensor, aligned or not; copied: a weight with gaps, and one
    row expanded to many."""
    weight, bias = _layer(64, 48, dtype)
    gaps = torch.randn(64, 96).to(dtype)[:, ::2]
    inputs = (
        torch.randn(20, 80).to(dtype)[:, 8:72],
        torch.randn(20, 65).to(dtype)[:, 1:],
        torch.randn(1, 64).to(dtype).expand(20, 64),
    )
    for x, w in itertools.product(inputs, (weight, weight.t().contiguous().t(), gaps)):
        _compare_forward("linear", kernels.linear, oracles.linear, [x, w, bias])


@backends
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "gapped"])
def test_upstream_gradients_of_any_layout(backend: str, upstream: str, ours: None) -> None:
    tensors = _mlp((6,), 24, 40, torch.float32)
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
    fc, proj = _layer(8, 32, torch.float32), _layer(32, 8, torch.float32)
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
    leaves = [t.requires_grad_() for t in _mlp((6,), 24, 40, torch.float32)]
    dout = torch.randn(6, 24)
    everything = torch.autograd.grad(kernels.gelu_mlp(*leaves), leaves, dout)
    some = [leaf if i in trained else leaf.detach() for i, leaf in enumerate(leaves)]
    grads = torch.autograd.grad(kernels.gelu_mlp(*some), [some[i] for i in trained], dout)
    for i, grad in zip(trained, grads, strict=True):
        torch.testing.assert_close(grad, everything[i], rtol=1e-6, atol=1e-6)


@triton_only
@pytest.mark.parametrize("role", ["triton", "cublas"])
def test_what_is_saved(backend: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pre-activations alone, of tensors that forward makes; no x for a frozen weight."""
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: role)
    leaves = [t.requires_grad_() for t in _mlp((6,), 24, 40, torch.float32)]
    given = {t.data_ptr() for t in leaves}

    def saved(*tensors: Tensor) -> list[tuple[tuple[int, ...], bool]]:
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):  # type: ignore[arg-type]
            kernels.gelu_mlp(*tensors)
        return [(tuple(t.shape), t.data_ptr() in given) for t in packed]

    weights = [((24, 40), True), ((40, 24), True)]
    assert saved(*leaves) == [((6, 24), True), ((6, 40), False), *weights]
    frozen = [leaves[0], *(t.detach() for t in leaves[1:])]
    assert saved(*frozen) == [((6, 40), False), *weights]
    bias_alone = [t.detach() if i != 4 else t for i, t in enumerate(leaves)]
    assert ((6, 40), False) not in saved(*bias_alone)


@backends
def test_gradients_do_not_change_the_result(backend: str, ours: None) -> None:
    tensors = _mlp((6,), 24, 40, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.equal(kernels.gelu_mlp(*tensors), kernels.gelu_mlp(*leaves))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype not in TRITON_DTYPES:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    x = torch.randn(3, 16)
    layers = [*_layer(16, 32, torch.float32), *_layer(32, 16, torch.float32)]
    with torch.autocast(DEVICE, dtype):
        assert kernels.linear(x, *layers[:2]).dtype == dtype
        assert kernels.gelu_mlp(x, *layers).dtype == dtype
        assert kernels.gelu_mlp(x, *layers, x).dtype == torch.float32  # the residual stream's


@backends
@pytest.mark.parametrize("dtype", [t for t in TRITON_DTYPES if t != torch.float32], ids=str)
@pytest.mark.parametrize("rows", [6, 70])
def test_autocast_is_no_worse(backend: str, dtype: torch.dtype, rows: int, ours: None) -> None:
    """Under autocast the error is within the budget of PyTorch's; gradients are float32."""
    tensors = _mlp((rows,), 40, 96, torch.float32)
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
    *tensors, residual = _mlp((6,), 24, 40, torch.float32)
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
    x, (weight, bias) = torch.randn(3, 8), _layer(8, 32, torch.float16)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.linear(x, weight, bias)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.gelu_mlp(x, weight, bias, *_layer(32, 8, torch.float16))


@backends
def test_float64_is_pytorchs(backend: str) -> None:
    tensors = [t.double() for t in _mlp((3,), 8, 16, torch.float32)]
    torch.testing.assert_close(kernels.gelu_mlp(*tensors), oracles.gelu_mlp(*tensors))


@triton_only
def test_second_derivative_is_refused(backend: str) -> None:
    x, *parameters = _mlp((3,), 8, 16, torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"gelu_mlp is differentiable once.*create_graph=True"):
        torch.autograd.grad(kernels.gelu_mlp(x, *parameters).sum(), x, create_graph=True)


@triton_only
def test_compiles_as_one_graph(backend: str, ours: None) -> None:
    def call(*tensors: Tensor) -> Tensor:
        return kernels.gelu_mlp(*tensors).sin() + kernels.linear(tensors[0], *tensors[1:3]).sum()

    tensors = [t.requires_grad_() for t in _mlp((2, 3), 16, 32, torch.float32)]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call):
        out = function(*tensors)
        with torch.no_grad():
            plain = function(*tensors)
        results.append([out, plain, *torch.autograd.grad(out.sum(), tensors)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@triton_only
@pytest.mark.parametrize("needed", [(True,) * 5, (True, False, False, True, False)], ids=str)
def test_kernels_as_pytorch_sees_them(backend: str, needed: tuple[bool, ...], ours: None) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias, residual = _mlp((6,), 24, 40, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    save = needed[1]

    def check(op: Any, *args: Any) -> None:
        torch.library.opcheck(op.default, args, test_utils=checks)

    check(OPS.linear_fwd, x, fc_weight, fc_bias)
    for rest in (residual, residual.double(), None):
        check(OPS.gelu_mlp_fwd, x, fc_weight, fc_bias, proj_weight, proj_bias, rest, save)
    pre = torch.randn(6, 40)
    check(OPS.gelu_mlp_bwd, residual, x if save else None, pre, fc_weight, proj_weight, *needed)


@triton_only
def test_launchers_say_what_is_wrong(backend: str) -> None:
    from gpt2fast.kernels._triton.matmul import matmul, matmul_gelu_grad

    a, b = torch.randn(3, 8), torch.randn(8, 5)
    with pytest.raises(ValueError, match=r"cannot multiply shapes \[3, 8\] and \[5, 8\]"):
        matmul(a, b.t())
    with pytest.raises(ValueError, match=r"cannot multiply shapes \[0, 8\]"):
        matmul(a[:0], b)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu|cuda.*torch.float16"):
        matmul(a, b.half())
    with pytest.raises(ValueError, match=r"unit stride; got strides \(16, 2\) and \(5, 1\)"):
        matmul(torch.randn(3, 16)[:, ::2], b)
    with pytest.raises(ValueError, match=r"expected bias \[5\].*got \[4\]"):
        matmul(a, b, torch.randn(4))
    with pytest.raises(ValueError, match=r"expected residual \[3, 5\].*strides \(1, 3\)"):
        matmul(a, b, residual=torch.randn(5, 3).t())
    with pytest.raises(ValueError, match=r"expected pre \[3, 5\].*got \[3, 4\]"):
        matmul_gelu_grad(a, b, torch.randn(3, 4), save_gelu=True, sum_rows=True)


def test_tile_table() -> None:
    """What the cases above and offline_cases.py count on."""
    h200, a100 = target.CHIPS[90], target.CHIPS[80]

    def block(rows: int, columns: int, chip: target.Target, can_copy: bool = True) -> list[int]:
        tile = configs.matmul_tile(rows, columns, 2, can_copy and chip.has_tma, chip)
        return [tile.block_m, tile.block_n, tile.use_tma]

    assert block(16384, 3072, h200) == [128, 256, True]
    assert block(512, 3072, h200) == [128, 128, True]
    assert block(64, 768, h200) == [64, 64, True]
    assert block(1, 768, h200) == block(16, 768, a100) == [16, 32, False]
    assert block(16384, 3072, h200, can_copy=False) == [128, 128, False]
    assert block(16384, 3072, a100) == [128, 128, False]
    few = configs.matmul_tile(1, 768, 2, False, h200)
    assert configs.matmul_splits(1, 768, 3072, few, h200) == 5
    assert configs.matmul_splits(1, 768, 64, few, h200) == 1
    assert configs.matmul_splits(1, 6400, 1600, few, h200) == 1


def test_provider_table() -> None:
    choose = configs.matmul_provider
    assert {choose(role, 1, 2) for role in ("linear", "fc", "proj", "gelu_grad")} == {"triton"}
    assert {choose(role, 1, 4) for role in ("linear", "fc", "proj", "gelu_grad")} == {"cublas"}
    assert choose("linear", 1024, 2) == choose("proj", 16384, 2) == "cublas"
    assert choose("fc", 16384, 2) == choose("gelu_grad", 16384, 2) == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 64, 1024, 16384])
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
@triton_only
def test_model_sizes(backend: str, width: int, rows: int, dtype: torch.dtype) -> None:
    """With the providers of the table."""
    tensors = _mlp((rows,), width, 4 * width, dtype)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    _compare_forward("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    for outputs in (width, 3 * width):
        linear = [tensors[0], *_layer(width, outputs, dtype)]
        _compare_forward("linear", kernels.linear, oracles.linear, linear)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 300, 4096])
@triton_only
def test_model_sizes_on_our_kernel(backend: str, rows: int, dtype: torch.dtype, ours: None) -> None:
    tensors = _mlp((rows,), 768, 3072, dtype)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    again = [t.requires_grad_() for t in tensors]
    dout = torch.randn(rows, 768).to(dtype)
    runs = [torch.autograd.grad(kernels.gelu_mlp(*again), again, dout) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@triton_only
@pytest.mark.parametrize(
    "rows", [300, pytest.param((1 << 31) // 3072 + 100, marks=pytest.mark.gpu)]
)
def test_offsets_past_int32(backend: str, rows: int) -> None:
    """The last rows of a product with more than 2^31 elements, and of its backward pass."""
    from gpt2fast.kernels._triton.matmul import matmul, matmul_gelu_grad

    columns = 3072 if rows > 300 else 130
    a, (b, bias) = torch.randn(rows, 64).half(), _layer(64, columns, torch.float16)
    last = slice(rows - 70, rows)
    out, pre = matmul(a, b, bias, activate=True, save_pre=True)
    wide = a[last].double() @ b.double() + bias.double()
    plain = torch.addmm(bias, a[last], b)
    assert_close("gelu_mlp", "forward", pre[last], wide, plain)
    assert_close(
        "gelu_mlp",
        "forward",
        out[last],
        F.gelu(wide, approximate="tanh"),
        F.gelu(plain, approximate="tanh"),
    )
    del out
    dpre, value, sums = matmul_gelu_grad(a, b, pre, save_gelu=True, sum_rows=True)
    upstream = a[last] @ b
    grads = []
    for given, at in ((upstream, pre[last]), (a[last].double() @ b.double(), pre[last].double())):
        leaf = at.clone().requires_grad_()
        grads.append(torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, given)[0])
    assert_close("gelu_mlp", "backward", dpre[last], grads[1], grads[0])
    exact = F.gelu(pre[last].double(), approximate="tanh")
    assert_close("gelu_mlp", "forward", value[last], exact, exact.half())
    assert bool(torch.isfinite(sums).all())
