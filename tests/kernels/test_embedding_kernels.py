"""The embedding's kernels: runs of ids, ids out of range, sizes, and what PyTorch sees of them."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

FWD = torch.ops.gpt2fast.embedding_fwd.default
BWD = torch.ops.gpt2fast.embedding_bwd.default


def _tables(width: int, dtype: torch.dtype = torch.float32, rows: int = 11) -> list[Tensor]:
    return [torch.randn(rows, width).to(dtype), torch.randn(13, width).to(dtype)]


def _affine(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


# The ids of 4 rows of 12, and their types: runs within, across, and as long as chunks of 16.
TOKENS = {
    "one id": torch.full((4, 12), 5),
    "both ends": torch.tensor([0, 10]).repeat(24).view(4, 12),
    "all but one the first": torch.tensor([0] * 47 + [10]).view(4, 12),
    "all but one the last": torch.tensor([10] * 47 + [0]).view(4, 12),
    "runs of a chunk": torch.tensor([3] * 16 + [7] * 16 + [9] * 16).view(4, 12),
    "runs beside chunks": torch.tensor([3] * 15 + [7] * 18 + [9] * 15).view(4, 12),
    "a run across three": torch.tensor([1] * 2 + [4] * 45 + [6]).view(4, 12),
}


@triton_only
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("with_types", [False, True])
def test_runs_of_one_id(backend: str, tokens: str, with_types: bool) -> None:
    ids = TOKENS[tokens].to(DEVICE)
    types = ids if with_types else None
    compare(
        "embedding",
        lambda *tables: kernels.embedding(ids, ids, types, *tables),
        lambda *tables: oracles.embedding(ids, ids, types, *tables),
        _tables(24),
    )


@triton_only
@pytest.mark.parametrize(
    ("count", "most_chunks", "dtype"),
    [
        (600, 2048, torch.float32),  # more chunks than a step of the join
        (100, 3, torch.float16),  # chunks that have grown
        (100, 1, torch.float32),  # nothing to join
        pytest.param(2**20, 2048, torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_a_long_run(
    backend: str,
    count: int,
    most_chunks: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs = importlib.import_module("gpt2fast.kernels._triton.configs")
    config = dataclasses.replace(configs.EMBEDDING_BWD, most_chunks=most_chunks)
    monkeypatch.setattr(configs, "EMBEDDING_BWD", config)
    ids = torch.full((count,), 7)
    ids[::100] = torch.randint(20, ids[::100].shape)
    dhidden = torch.randn(count, 32).to(dtype)
    got = BWD(dhidden, ids, 20, dtype)
    want = torch.zeros(20, 32, dtype=torch.float64).index_add(0, ids, dhidden.double())
    assert_close("embedding", "backward", got, want, want.to(dtype))
    assert torch.equal(got, BWD(dhidden, ids, 20, dtype))


@triton_only
def test_a_row_that_is_not_finite_reaches_its_own_id_only(backend: str) -> None:
    ids = torch.tensor([[3, 4, 3, 5, 6, 4] * 7])
    dhidden = torch.randn(1, 42, 8)
    dhidden[0, 3] = float("inf")
    dhidden[0, 4] = float("nan")
    got = BWD(dhidden, ids, 9, torch.float32)
    assert got[5].isinf().all()
    assert got[6].isnan().all()
    assert got[[0, 1, 2, 3, 4, 7, 8]].isfinite().all()


@triton_only
@pytest.mark.parametrize(
    ("id_dtype", "dtype"), [(torch.int32, torch.float16), (torch.int64, torch.float32)], ids=str
)
@pytest.mark.parametrize(("position_rows", "width"), [(1, 24), (3, 769)])
def test_ids_out_of_range_make_their_rows_nan(
    backend: str,
    position_rows: int,
    width: int,
    id_dtype: torch.dtype,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "empty", torch.zeros)  # the poison is NaN as well
    far = 2**31 - 1 if id_dtype == torch.int32 else 2**40
    wte, wpe = torch.randn(19, width).to(dtype)[4:15], torch.randn(21, width).to(dtype)[4:17]
    affine = _affine(width, dtype)
    ids, types = torch.randint(11, (2, 3, 7), dtype=id_dtype)
    positions = torch.randint(13, (position_rows, 7), dtype=id_dtype)
    ids[0, 0], types[0, 0], positions[0, 0] = 10, 0, 12

    def call(*looked_up: Tensor | None) -> tuple[Tensor, ...]:
        hidden, normed, statistics = FWD(*looked_up, wte, wpe, *affine, 1e-5, torch.float32, True)
        return hidden, normed, statistics.view(2, 3, 7).permute(1, 2, 0)

    def check(with_types: bool, nan_rows: int) -> None:
        known = torch.ones(3, 7, dtype=torch.bool)
        looked_up: list[Tensor | None] = [ids, positions, types if with_types else None]
        valid: list[Tensor | None] = []
        for t, rows in zip(looked_up, (11, 13, 11), strict=True):
            within = None if t is None else (t >= 0) & (t < rows)
            known = known if within is None else known & within
            valid.append(None if t is None else t.where(within, 0))
        assert (~known).sum() == nan_rows
        for got, want in zip(call(*looked_up), call(*valid), strict=True):
            assert want.isfinite().all()
            assert torch.equal(got[known], want[known])
            assert got[~known].isnan().all()

    check(with_types=True, nan_rows=0)
    ids[0, 1:5] = torch.tensor([-1, 11, far, -far], dtype=id_dtype)
    check(with_types=False, nan_rows=4)
    types[1, 1:5] = ids[0, 1:5]
    check(with_types=True, nan_rows=8)
    positions[-1, 3:] = torch.tensor([-1, 13, far, -far], dtype=id_dtype)
    check(with_types=False, nan_rows=14 if position_rows == 1 else 8)


# 100 ids of a table of 11 rows, in chunks of 16; those out of range are sorted to both ends.
OUT_OF_RANGE = {
    "all kinds": torch.tensor([5, -1, 3, 11, 2**32 + 5, 0, -(2**32) + 3, 10, 2**40, 7] * 10),
    "runs across chunks": torch.tensor([-1] * 35 + [0] * 10 + [10] * 20 + [11] * 35),
    "a run up to a border": torch.tensor([-7] * 16 + [0] * 64 + [12] * 20),
    "all below": torch.full((100,), -1),
    "all above": torch.full((100,), 11),
}


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_ids_out_of_range_add_nothing(
    backend: str, case: str, lookups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = OUT_OF_RANGE[case].to(DEVICE)
    ids = ids[torch.randperm(100)]
    dhidden = torch.randn(100 // lookups, 24).to(dtype)
    known = (ids >= 0) & (ids < 11)
    if lookups == 1:
        dhidden[~known] = float("nan")
    summands = dhidden.double().repeat(lookups, 1)[known]
    want = torch.zeros(11, 24, dtype=torch.float64).index_add(0, ids[known], summands)
    buffer = torch.full((19, 24), 3.5, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_, **__: buffer[4:15].zero_())
        got = BWD(dhidden, ids, 11, dtype)
    assert got.data_ptr() == buffer[4].data_ptr()
    assert_close("embedding", "backward", got, want, want.to(dtype))
    assert (buffer[:4] == 3.5).all()
    assert (buffer[15:] == 3.5).all()


@triton_only
def test_an_id_out_of_range_leaves_the_other_table_its_gradient(backend: str) -> None:
    ids = torch.tensor([[3, -1, 4, 3], [11, 3, 10, 0]])
    positions = torch.tensor([[0, 1, 13, 12], [2, 0, 12, -1]])
    upstream, (wte, wpe) = torch.randn(2, 4, 8), [t.requires_grad_() for t in _tables(8)]
    hidden = kernels.embedding(ids, positions, None, wte, wpe)
    grads = torch.autograd.grad(hidden, (wte, wpe), upstream)
    for got, i, rows in zip(grads, (ids, positions), (11, 13), strict=True):
        known = (i >= 0) & (i < rows)
        want = torch.zeros(rows, 8).double().index_add(0, i[known], upstream[known].double())
        assert_close("embedding", "backward", got, want)


@triton_only
@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (1, 3)], ids=str)
def test_the_backward_pass_computes_no_more_than_is_needed(
    backend: str, needed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = importlib.import_module("gpt2fast.kernels.embedding")
    asked, kernel = [], op.layer_norm_bwd

    def record(*args: Any) -> Any:
        asked.append(args[5:])
        return kernel(*args)

    monkeypatch.setattr(op, "layer_norm_bwd", record)
    ids = torch.randint(11, (2, 5))
    tensors = [t.requires_grad_(i in needed) for i, t in enumerate([*_tables(8), *_affine(8)])]
    normed, _ = kernels.embedding_layer_norm(ids, ids, None, *tensors)
    normed.sum().backward()
    assert [t.grad is not None for t in tensors] == [i in needed for i in range(4)]
    assert asked == [(min(needed) < 2, None, max(needed) > 1)]


@triton_only
def test_what_the_kernels_leave_to_pytorch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module("gpt2fast.kernels.embedding")
    monkeypatch.setattr(op, "_embedding_fwd", None)
    ids, (wte, wpe), affine = torch.randint(11, (2, 5)), _tables(64), _affine(64)
    assert kernels.embedding(ids, ids, None, wte.half(), wpe).dtype == torch.float32
    assert kernels.embedding(ids, ids, None, *_tables(8193)).shape == (2, 5, 8193)
    assert kernels.embedding(ids, ids, None, *_tables(0)).shape == (2, 5, 0)
    if DEVICE == "cpu":  # on a GPU PyTorch refuses
        half = kernels.embedding_layer_norm(ids, ids, None, wte.half(), wpe.half(), *affine)
        assert half[0].dtype == torch.float16
    with pytest.raises(RuntimeError, match=r"[Ee]xpected tensor for argument #1 'indices'"):
        kernels.embedding(ids.short(), ids, None, wte, wpe)


@triton_only
def test_compiles_as_one_graph(backend: str) -> None:
    ids = torch.randint(11, (2, 5))
    graphs: list[str] = []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        normed, hidden = kernels.embedding_layer_norm(ids, ids[:1], ids, *tensors)
        return normed, hidden, kernels.embedding(ids, ids, None, *tensors[:2])

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    tensors = [*_tables(64), *_affine(64)]
    upstream = [torch.randn(2, 5, 64) for _ in range(3)]
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
    assert forward.count("gpt2fast.embedding_fwd") == 2
    assert backward.count("gpt2fast.embedding_bwd") == 4


@triton_only
def test_kernels_as_pytorch_sees_them(backend: str) -> None:
    ids, tables, affine = torch.randint(11, (2, 5)), _tables(16), _affine(16)
    check = torch.library.opcheck
    check(FWD, (ids, ids[:1], ids, *tables, *affine, 1e-5, torch.float16, True))
    check(FWD, (ids, ids, None, *tables, None, None, 0.0, torch.float32, False))
    check(FWD, (ids[:0], ids[:0], None, *tables, *affine, 1e-5, torch.float32, True))
    check(BWD, (torch.randn(2, 5, 16), torch.cat((ids, ids)), 11, torch.float16))
    check(BWD, (torch.randn(0, 16), ids[:0], 11, torch.float32))


@triton_only
def test_launchers_show_what_they_refuse(backend: str) -> None:
    ids, (wte, wpe), (weight, bias) = torch.randint(11, (2, 5)), _tables(8), _affine(8)

    def fwd(ids: Tensor = ids, wpe: Tensor = wpe, weight: Tensor = weight) -> None:
        FWD(ids, ids, None, wte, wpe, weight, bias, 1e-5, torch.float32, False)

    with pytest.raises(ValueError, match=r"input_ids must be contiguous.*strides \(1, 5\)"):
        fwd(torch.randint(11, (2, 5)).t())
    with pytest.raises(ValueError, match=r"int32 or int64 \(2, 5\) on .*; got torch.int16"):
        fwd(ids.short())
    with pytest.raises(ValueError, match=r"wpe must be \[P, 8\] in torch.float32.*got \[13, 7\]"):
        fwd(wpe=wpe[:, :7])
    with pytest.raises(ValueError, match=r"in torch.float32 on .*; got \[13, 8\] in torch.float16"):
        fwd(wpe=wpe.half())
    with pytest.raises(ValueError, match=r"weight must be a contiguous \[8\].*got \[7\]"):
        fwd(weight=weight[:7])
    with pytest.raises(ValueError, match=r"expected 3 or 6 ids on .*; got 10 on"):
        BWD(torch.randn(3, 8), ids, 11, torch.float32)


@triton_only
@pytest.mark.parametrize(
    ("batch", "length", "width", "dtype"),
    [
        (4, 10, 48, torch.float16),
        pytest.param(1312, 1024, 1600, torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_more_elements_than_32_bits_count(
    backend: str, batch: int, length: int, width: int, dtype: torch.dtype
) -> None:
    """The last rows, whose offsets pass 2**31, looked up and added up."""
    ids = torch.randint(10, (batch, length))
    ids[-1, -7:] = 10  # nowhere else
    wte, wpe = torch.randn(11, width, dtype=dtype), torch.randn(1024, width, dtype=dtype)
    positions = torch.arange(length)[None]
    hidden = kernels.embedding(ids, positions, None, wte, wpe)
    want = wte[10].double() + wpe[length - 7 : length].double()
    assert_close("embedding", "forward", hidden[-1, -7:], want, want.to(dtype))
    dwte = BWD(hidden, ids, 11, dtype)
    total = hidden[-1, -7:].double().sum(0)
    assert_close("embedding", "backward", dwte[10], total, total.to(dtype))
