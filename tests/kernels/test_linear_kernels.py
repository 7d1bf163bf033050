"""The kernels behind linear and gelu_mlp: tiles, what is saved, tables, sizes for a GPU."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.kernels._triton import configs, target
from tests.kernels import oracles
from tests.kernels.devices import TRITON_DTYPES, triton_only
from tests.kernels.oracles import compare
from tests.kernels.perceptrons import compare_forward, layer, mlp
from tests.tolerances import assert_close

OPS = torch.ops.gpt2fast
# Rows, width, inner: on 4 multiprocessors with tile copies, 16-bit tiles of 16 x 32 (unsplit,
# split), 64 x 64 (unsplit, split), 128 x 128, 128 x 256 with several a program.
SIZES = [(5, 72, 160), (16, 600, 40), (40, 64, 136), (40, 304, 56), (70, 40, 400), (140, 24, 520)]


@pytest.fixture
def chip(request: pytest.FixtureRequest) -> Iterator[int]:
    """Pointers, and tile copies where they are possible; with few programs for many tiles."""
    with target.assume(dataclasses.replace(target.CHIPS[request.param], multiprocessors=4)):
        yield request.param


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
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, mlp((rows,), width, inner, dtype))
    linear = [torch.randn(rows, width).to(dtype), *layer(width, inner, dtype)]
    compare_forward("linear", kernels.linear, oracles.linear, linear)


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_cublas_in_every_role(
    backend: str, dtype: torch.dtype, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: "cublas")
    tensors = mlp((9,), 24, 96, dtype, with_residual)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    compare("linear", kernels.linear, oracles.linear, tensors[:3])


@triton_only
@pytest.mark.parametrize("role", ["triton", "cublas"])
def test_what_is_saved(backend: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pre-activations alone, of tensors that forward makes; no x for a frozen weight."""
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: role)
    leaves = [t.requires_grad_() for t in mlp((6,), 24, 40, torch.float32)]
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


@triton_only
def test_second_derivative_is_refused(backend: str) -> None:
    x, *parameters = mlp((3,), 8, 16, torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"gelu_mlp is differentiable once.*create_graph=True"):
        torch.autograd.grad(kernels.gelu_mlp(x, *parameters).sum(), x, create_graph=True)


@triton_only
def test_compiles_as_one_graph(backend: str, ours: None) -> None:
    def call(*tensors: Tensor) -> Tensor:
        return kernels.gelu_mlp(*tensors).sin() + kernels.linear(tensors[0], *tensors[1:3]).sum()

    tensors = [t.requires_grad_() for t in mlp((2, 3), 16, 32, torch.float32)]
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
    x, fc_weight, fc_bias, proj_weight, proj_bias, residual = mlp((6,), 24, 40, torch.float32)
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
    tensors = mlp((rows,), width, 4 * width, dtype)
    compare("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    compare_forward("gelu_mlp", kernels.gelu_mlp, oracles.gelu_mlp, tensors)
    for outputs in (width, 3 * width):
        linear = [tensors[0], *layer(width, outputs, dtype)]
        compare_forward("linear", kernels.linear, oracles.linear, linear)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 300, 4096])
@triton_only
def test_model_sizes_on_our_kernel(backend: str, rows: int, dtype: torch.dtype, ours: None) -> None:
    tensors = mlp((rows,), 768, 3072, dtype)
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
    a, (b, bias) = torch.randn(rows, 64).half(), layer(64, columns, torch.float16)
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
