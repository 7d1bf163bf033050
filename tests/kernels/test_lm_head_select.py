"""lm_head_argmax and lm_head_topk against logits in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

import gpt2fast.kernels.lm_head as lm_head
from gpt2fast import kernels
from gpt2fast.kernels import lm_head_select
from gpt2fast.kernels._triton import target
from tests.kernels.devices import DEVICE, TRITON_DTYPES, backends, backends_and_dtypes, triton_only
from tests.tolerances import assert_close

HALF = pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))


def _inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).to(dtype), torch.randn(vocab, width).to(dtype)


def _assert_selected(hidden: Tensor, weight: Tensor, values: Tensor, indices: Tensor) -> None:
    """The values are the k largest logits, the indices theirs, no index twice."""
    logits = hidden.double() @ weight.double().t()
    k = values.shape[1]
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (len(hidden), k)
    assert_close("lm_head_topk", "forward", values, logits.topk(k).values)
    assert_close("lm_head_topk", "forward", values, logits.gather(1, indices))
    assert (values[:, 1:] <= values[:, :-1]).all()
    for row in indices.tolist():
        assert len(set(row)) == k


def _assert_largest(hidden: Tensor, weight: Tensor, indices: Tensor) -> None:
    logits = hidden.double() @ weight.double().t()
    assert indices.dtype == torch.int64
    assert indices.shape == hidden.shape[:1]
    chosen = logits.gather(1, indices[:, None])[:, 0].float()
    assert_close("lm_head_topk", "forward", chosen, logits.amax(1))


SHAPES = [(1, 1, 1), (1, 64, 300), (16, 63, 131), (17, 40, 129), (67, 64, 520)]


@backends_and_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_argmax(shape: tuple[int, int, int], backend: str, dtype: torch.dtype) -> None:
    hidden, weight = _inputs(*shape, dtype)
    _assert_largest(hidden, weight, kernels.lm_head_argmax(hidden, weight))


@backends_and_dtypes
@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1, 1), 1), ((3, 8, 11), 11), ((17, 63, 131), 2), ((1, 64, 120), 50), ((2, 8, 128), 128)],
    ids=str,
)
def test_topk(shape: tuple[int, int, int], k: int, backend: str, dtype: torch.dtype) -> None:
    hidden, weight = _inputs(*shape, dtype)
    _assert_selected(hidden, weight, *kernels.lm_head_topk(hidden, weight, k))


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 50, 130])
@pytest.mark.parametrize("chip", [80, 90])
def test_every_tile(chip: int, rows: int, backend: str, dtype: torch.dtype) -> None:
    """By pointers and by descriptors, several tiles a program; float32, left to PyTorch else."""
    hidden, weight = _inputs(rows, 24, 600, dtype)
    with target.assume(dataclasses.replace(target.CHIPS[chip], multiprocessors=1)):
        indices = torch.ops.gpt2fast.lm_head_argmax_fwd(hidden, weight)
    _assert_largest(hidden, weight, indices)


@triton_only
def test_topk_with_several_tiles_a_program(backend: str) -> None:
    hidden, weight = _inputs(17, 24, 140)
    with target.assume(dataclasses.replace(target.CHIPS[90], multiprocessors=1)):
        selected = torch.ops.gpt2fast.lm_head_topk_fwd(hidden, weight, 3)
    _assert_selected(hidden, weight, *selected)


@backends
def test_logits_are_not_rounded_before_they_are_compared(backend: str) -> None:
    """2048 and 2049 are one number in float16."""
    hidden = torch.tensor([[1.0, 1.0]]).half()
    weight = torch.tensor([[2048.0, 0.0], [2048.0, 1.0], [2048.0, 0.5]]).half()
    assert kernels.lm_head_argmax(hidden, weight).tolist() == [1]
    values, indices = kernels.lm_head_topk(hidden, weight, 3)
    assert values.tolist() == [[2049.0, 2048.5, 2048.0]]
    assert indices.tolist() == [[1, 2, 0]]


@backends
@pytest.mark.parametrize("rows", [2, 66])
@pytest.mark.parametrize("first", [0, 100, 140])
def test_the_first_of_equal_logits(first: int, rows: int, backend: str) -> None:
    """Within a tile of 128 columns and across two; zeros of either sign are equal."""
    weight = torch.full((300, 8), -1.0).half()
    weight[[first, 150, 250]] = 1.0
    hidden = torch.ones(rows, 8).half()
    assert kernels.lm_head_argmax(hidden, weight).tolist() == [first] * rows
    weight[[first, 150, 250]] = torch.tensor([[-0.0], [0.0], [0.0]]).half()
    assert kernels.lm_head_argmax(hidden, weight).tolist() == [first] * rows


@triton_only
def test_argmax_over_many_tiles(backend: str) -> None:
    """More than are combined at a time: 64 of 128 columns."""
    hidden, weight = _inputs(3, 8, 8400, torch.float16)
    _assert_largest(hidden, weight, kernels.lm_head_argmax(hidden, weight))


@backends
def test_nan_and_infinities(backend: str) -> None:
    """NaN is larger than any number, as in torch.argmax; infinities are ordinary logits."""
    weight = torch.randn(300, 1).half()
    weight[[7, 200, 201]] = torch.tensor([[float("inf")], [float("nan")], [-float("nan")]]).half()
    hidden = torch.ones(1, 1).half()
    assert kernels.lm_head_argmax(hidden, weight).tolist() == [200]
    values, indices = kernels.lm_head_topk(hidden, weight, 4)
    assert values[0, :2].isnan().all()
    assert sorted(indices[0, :2].tolist()) == [200, 201]
    assert values[0, 2] == float("inf")
    assert indices[0, 2] == 7
    weight[[200, 201]] = float("-inf")
    assert kernels.lm_head_argmax(hidden, weight).tolist() == [7]
    assert kernels.lm_head_argmax(hidden * float("nan"), weight).tolist() == [0]


@backends
def test_no_rows(backend: str) -> None:
    hidden, weight = _inputs(0, 8, 11, torch.float16)
    assert kernels.lm_head_argmax(hidden, weight).shape == (0,)
    values, indices = kernels.lm_head_topk(hidden, weight, 3)
    assert values.shape == indices.shape == (0, 3)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_in_chunks_and_strided(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "_CHUNK_ELEMENTS", 1)  # 16 rows
    monkeypatch.setattr(lm_head_select, "_UPCAST_ENTRIES", 16)
    hidden = torch.randn(24, 35).to(dtype).t()
    weight = torch.randn(50, 48).to(dtype)[:, ::2]
    _assert_largest(hidden, weight, kernels.lm_head_argmax(hidden, weight))
    _assert_selected(hidden, weight, *kernels.lm_head_topk(hidden, weight, 3))
    weight = torch.randn(50, 48).to(dtype)[:, 5:29]  # rows at odd addresses
    _assert_largest(hidden, weight, kernels.lm_head_argmax(hidden, weight))


@backends
def test_autocast(backend: str) -> None:
    """The product is that of the rounded inputs; the logits stay float32."""
    hidden, weight = _inputs(5, 16, 40)
    with torch.autocast(DEVICE, torch.float16):
        values, indices = kernels.lm_head_topk(hidden, weight, 4)
        largest = kernels.lm_head_argmax(hidden, weight)
    assert values.dtype == torch.float32
    _assert_selected(hidden.half(), weight.half(), values, indices)
    assert torch.equal(largest, indices[:, 0])


@backends
def test_gradients(backend: str) -> None:
    """Indices never have one; values would, so asking for one is an error."""
    hidden, weight = _inputs(2, 8, 11, torch.float16)
    weight.requires_grad_()
    assert not kernels.lm_head_argmax(hidden, weight).requires_grad
    with pytest.raises(RuntimeError, match="have no gradient"):
        kernels.lm_head_topk(hidden, weight, 2)
    with torch.no_grad():
        kernels.lm_head_topk(hidden, weight, 2)


@backends
def test_compiles_as_one_graph(backend: str) -> None:
    hidden, weight = _inputs(3, 16, 40, torch.float16)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return kernels.lm_head_argmax(hidden, weight), *kernels.lm_head_topk(hidden, weight, 3)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(hidden, weight), call(hidden, weight), strict=True):
        assert torch.equal(got, expected)


@triton_only
@pytest.mark.parametrize("op", ["lm_head_argmax", "lm_head_topk"])
@pytest.mark.parametrize("suffix", ["", "_fwd"])
def test_opcheck(suffix: str, op: str, backend: str) -> None:
    args = (*_inputs(3, 16, 40, torch.float16), 3)[: 2 + (op == "lm_head_topk")]
    torch.library.opcheck(getattr(torch.ops.gpt2fast, op + suffix).default, args)


def test_meta_tensors() -> None:
    hidden, weight = torch.empty(3, 8, device="meta"), torch.empty(11, 8, device="meta")
    assert kernels.lm_head_argmax(hidden, weight).shape == (3,)
    values, indices = kernels.lm_head_topk(hidden, weight, 2)
    assert (values.shape, values.dtype) == ((3, 2), torch.float32)
    assert (indices.shape, indices.dtype) == ((3, 2), torch.int64)


def test_wrong_arguments() -> None:
    hidden, weight = _inputs(2, 8, 11)
    message = r"^expected hidden \[N, C\] and weight \[V, C\], V at least 1; got "
    with pytest.raises(ValueError, match=message + r"\[2, 8\] and \[8, 11\]$"):
        kernels.lm_head_argmax(hidden, weight.t())
    with pytest.raises(ValueError, match=message + r"\[2, 8\] and \[0, 8\]$"):
        kernels.lm_head_topk(hidden, weight[:0], 1)
    for k in (0, 12):
        with pytest.raises(ValueError, match=rf"^k must be in \[1, 11\]; got {k}$"):
            kernels.lm_head_topk(hidden, weight, k)


def _model_size(
    vocab: int, width: int, rows: int, dtype: torch.dtype, ks: tuple[int, ...] = (1, 50, 100)
) -> None:
    hidden, weight = _inputs(rows, width, vocab, dtype)
    _assert_largest(hidden, weight, kernels.lm_head_argmax(hidden, weight))
    for k in ks:
        selected = kernels.lm_head_topk(hidden, weight, k)
        _assert_selected(hidden, weight, *selected)
        for once, again in zip(selected, kernels.lm_head_topk(hidden, weight, k), strict=True):
            assert torch.equal(once, again)


@triton_only
@HALF
def test_the_test_of_model_sizes(backend: str, dtype: torch.dtype) -> None:
    _model_size(120, 16, 5, dtype, (1, 3))


@pytest.mark.gpu
@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
def test_model_sizes(width: int, rows: int, backend: str, dtype: torch.dtype) -> None:
    _model_size(50257, width, rows, dtype)
