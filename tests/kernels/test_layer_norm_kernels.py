"""The LayerNorm kernels: what serves which call, tiles, views, and what PyTorch sees of them."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

FWD = torch.ops.gpt2fast.layer_norm_fwd.default
BWD = torch.ops.gpt2fast.layer_norm_bwd.default


class Calls(TorchDispatchMode):
    """Records the calls of our kernels, by name and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gpt2fast":
            self.made.append((func._schema.name.removeprefix("gpt2fast::"), args))
        return func(*args, **(kwargs or {}))


def _affine(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


@triton_only
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (rows, width, dtype)
        for rows, width in [(700, 16), (300, 129), (50, 769), (19, 1600), (9, 3000), (6, 4100)]
        for dtype in TRITON_DTYPES
        if DEVICE == "cuda" or dtype == torch.float32 or width == 769  # the interpreter is slow
    ],
    ids=str,
)
def test_every_tile(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    """More rows than one pass of the programs, and not a multiple of a tile."""
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    tensors = [x, residual, *_affine(width, dtype)]
    compare("layer_norm", kernels.add_layer_norm, oracles.add_layer_norm, tensors)


# Views of [3, 5, 192], and whether their rows are read where they lie.
VIEWS = {
    "last token": (lambda t: t[:, -1:, :64], True),
    "part of a row": (lambda t: t[..., 64:128], True),
    "every other token": (lambda t: t[0, ::2], True),
    "one row, repeated": (lambda t: t[0, :1, :64].expand(4, 64), True),
    "the first tokens": (lambda t: t[:, :3], False),
    "one batch row, repeated": (lambda t: t[:1].expand(2, 5, 192), False),
    "every other element": (lambda t: t[..., ::2], False),
    "one element, repeated": (lambda t: t[:1, :1, :1].expand(2, 3, 64), False),
}


@triton_only
@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    take, as_it_is = VIEWS[view]
    x = take(torch.randn(3, 5, 192)).detach()
    width = x.shape[-1]
    weight, bias = _affine(width)
    residual = torch.randn(x.shape)
    # As x, as the residual, and as the gradients that arrive.
    leaf = x.double().contiguous().requires_grad_()
    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    ours = kernels.add_layer_norm(*leaves, weight, bias)
    want = oracles.add_layer_norm(leaf, residual.double(), weight.double(), bias.double())
    for got, expected in zip(ours, want, strict=True):
        assert_close("layer_norm", "forward", got, expected)
    with Calls() as calls:
        swapped = kernels.add_layer_norm(residual, x, weight, bias)
        grads = torch.autograd.grad(ours, leaves, [x, x])
    for got, expected in zip(swapped, want, strict=True):
        assert_close("layer_norm", "forward", got, expected)
    (expected,) = torch.autograd.grad(want, leaf, [x.double(), x.double()])
    for got in grads:
        assert_close("layer_norm", "backward", got, expected)
    (_, args), (_, backward_args) = calls.made
    read = (args[1], backward_args[0], backward_args[1])
    assert all((t.data_ptr() == x.data_ptr()) == as_it_is for t in read)


@triton_only
def test_the_backward_pass_computes_no_more_than_is_needed(backend: str) -> None:
    x, weight, bias = torch.randn(5, 64), *_affine(64)
    for need_x, need_weight in ((True, False), (False, True), (True, True)):
        leaf, parameter = x.clone().requires_grad_(need_x), weight.clone()
        y = kernels.layer_norm(leaf, parameter.requires_grad_(need_weight), bias)
        with Calls() as calls:
            y.sum().backward()
        ((name, args),) = calls.made
        assert (name, args[5:]) == ("layer_norm_bwd", (need_x, None, need_weight))


@triton_only
def test_statistics_are_saved_for_a_gradient_only(backend: str) -> None:
    x, weight, bias = torch.randn(5, 64), *_affine(64)
    expected = kernels.layer_norm(x, weight, bias)
    for x.requires_grad in (False, True):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled), Calls() as calls:
                y = kernels.layer_norm(x, weight, bias)
                assert torch.equal(y, expected)
            ((_, args),) = calls.made
            assert args[-1] == (enabled and x.requires_grad)
            assert y.requires_grad == args[-1]


@triton_only
def test_what_the_kernels_leave_to_pytorch(backend: str) -> None:
    wide, narrow = torch.randn(2, 8193), torch.randn(2, 64)
    half = torch.float16
    with Calls() as calls:
        y = kernels.layer_norm(wide, *_affine(8193))
        assert y.shape == wide.shape
        kernels.add_layer_norm(narrow.double(), narrow, *_affine(64, torch.float64))
        kernels.add_layer_norm(narrow.to(half), narrow.bfloat16(), *_affine(64))
        kernels.layer_norm(torch.randn(2, 0), torch.randn(0), torch.randn(0))
        if DEVICE == "cpu":  # on a GPU PyTorch refuses
            kernels.layer_norm(narrow.to(half), *_affine(64))
    assert not calls.made


@triton_only
def test_a_second_derivative_says_that_there_is_none(backend: str) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    for y in (
        kernels.layer_norm(x, *_affine(64)),
        kernels.add_layer_norm(x, x, *_affine(64))[0],
    ):
        with pytest.raises(RuntimeError, match="differentiable once on the triton backend"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@triton_only
def test_compiles_as_one_graph(backend: str) -> None:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, summed = kernels.add_layer_norm(*tensors)
        return kernels.layer_norm(y, *tensors[2:]), summed

    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    tensors = [torch.randn(2, 3, 64), torch.randn(2, 3, 64), *_affine(64)]
    upstream = [torch.randn(2, 3, 64), torch.randn(2, 3, 64)]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    results = []
    for function in (call, compiled):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    forward, backward = graphs
    assert forward.count("gpt2fast.layer_norm_fwd") == 2
    assert backward.count("gpt2fast.layer_norm_bwd") == 2


@triton_only
@pytest.mark.parametrize("mixed", [False, True])
def test_kernels_as_pytorch_sees_them(backend: str, mixed: bool) -> None:
    half = torch.float16
    x, residual = torch.randn(2, 3, 64).to(half), torch.randn(2, 3, 64)
    weight, bias = _affine(64)
    check = torch.library.opcheck
    check(FWD, (x, residual if mixed else None, weight, bias, 1e-5, torch.float32, not mixed))
    _, summed, statistics = FWD(x, residual, weight, bias, 1e-5, torch.float32, True)
    extra = residual if mixed else None
    check(BWD, (residual, extra, summed, weight, statistics, True, half if mixed else None, mixed))
    check(BWD, (residual, extra, summed, weight, statistics, False, None, True))
    empty = x[:0], residual[:0]
    check(FWD, (*empty, weight, bias, 1e-5, half, True))


@triton_only
def test_launchers_show_what_they_refuse(backend: str) -> None:
    x, weight, bias = torch.randn(3, 64), *_affine(64)
    statistics = torch.randn(2, 3)

    def fwd(x: Tensor = x, residual: Tensor | None = None, weight: Tensor = weight) -> None:
        FWD(x, residual, weight, bias, 1e-5, torch.float32, False)

    with pytest.raises(ValueError, match=r"x must have contiguous rows.*strides \[1, 3\]"):
        fwd(torch.randn(64, 3).t())
    with pytest.raises(ValueError, match=r"one distance; got shape \[3, 2, 64\] with strides"):
        fwd(torch.randn(3, 5, 64)[:, :2])
    with pytest.raises(ValueError, match=r"residual must be \[3, 64\] on .*; got \[2, 64\]"):
        fwd(residual=x[:2])
    with pytest.raises(ValueError, match=r"weight must be a contiguous \[64\].*got \[63\]"):
        fwd(weight=weight[:63])
    with pytest.raises(ValueError, match=r"got \[64\] with strides \[2\]"):
        fwd(weight=torch.randn(128)[::2])
    with pytest.raises(ValueError, match=r"statistics must be \[2, 3\]; got \[2, 2\]"):
        BWD(x, None, x, weight, statistics[:, :2], True, None, True)
    with pytest.raises(ValueError, match=r"dy must be \[3, 64\] on .*; got \[3, 63\]"):
        BWD(x[:, :63], None, x, weight, statistics, True, None, True)


@triton_only
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (40, 48, torch.float16),
        pytest.param(2**31 // 1600 + 99, 1600, torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_more_elements_than_32_bits_count(
    backend: str, rows: int, width: int, dtype: torch.dtype
) -> None:
    """The last rows, whose offsets pass 2**31, in every tensor of both passes."""
    x = torch.randn(rows, width, dtype=dtype)
    weight, bias = _affine(width, dtype)
    y, summed, statistics = FWD(x, x, weight, bias, 1e-5, dtype, True)
    dx, _, dweight, _ = BWD(x, x, summed, weight, statistics, True, None, True)
    last = x[-7:].double().requires_grad_()
    want = oracles.layer_norm(2 * last, weight.double(), bias.double())
    (want_dx,) = torch.autograd.grad(want, last, last.detach())
    plain = oracles.layer_norm(2 * x[-7:], weight, bias)
    assert_close("layer_norm", "forward", y[-7:], want, plain)
    assert torch.equal(summed[-7:], 2 * x[-7:])
    want_dx = want_dx / 2 + last.detach()  # of the sum, whose own gradient is x
    assert_close("layer_norm", "backward", dx[-7:], want_dx, want_dx.to(dtype))
    assert torch.isfinite(dweight).all()


@triton_only
def test_width_one_is_left_to_pytorch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes a constant of the argument 1, with which the kernels do not compile."""
    from gpt2fast.kernels._triton import layer_norm

    monkeypatch.setattr(layer_norm, "layer_norm_fwd", None)
    bias = torch.randn(1)
    assert torch.equal(
        kernels.layer_norm(torch.randn(3, 1), torch.ones(1), bias), bias.expand(3, 1)
    )
