"""embedding and embedding_layer_norm against indexing in float64, on both backends."""

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
from tests.kernels.devices import DEVICE, TRITON_DTYPES, backends, backends_and_dtypes, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

FWD = torch.ops.gpt2fast.embedding_fwd.default
BWD = torch.ops.gpt2fast.embedding_bwd.default


def _layer_norm_oracle(*args: Any) -> tuple[Tensor, Tensor]:
    *embedding, weight, bias = args
    hidden = oracles.embedding(*embedding)
    return oracles.layer_norm(hidden, weight, bias), hidden


def _tables(width: int, dtype: torch.dtype = torch.float32, rows: int = 11) -> list[Tensor]:
    return [torch.randn(rows, width).to(dtype), torch.randn(13, width).to(dtype)]


def _affine(width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


@backends_and_dtypes
@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize(
    ("shape", "position_rows", "width"),
    [((1, 1), 1, 1), ((1, 7), 1, 769), ((3, 7), 1, 63), ((2, 5), 2, 64), ((5, 1), 5, 16)],
    ids=str,
)
def test_embedding(
    backend: str,
    shape: tuple[int, int],
    position_rows: int,
    width: int,
    with_types: bool,
    dtype: torch.dtype,
) -> None:
    ids = torch.randint(11, shape)  # small: ids repeat, so their gradients add up
    positions = torch.randint(13, (position_rows, shape[1]))
    types = torch.randint(11, shape) if with_types else None
    tables = _tables(width, dtype)
    compare(
        "embedding",
        lambda *tables: kernels.embedding(ids, positions, types, *tables),
        lambda *tables: oracles.embedding(ids, positions, types, *tables),
        tables,
    )
    if width > 1:  # of one element, the variance is nothing but rounding
        compare(
            "layer_norm",
            lambda *t: kernels.embedding_layer_norm(ids, positions, types, *t),
            lambda *t: _layer_norm_oracle(ids, positions, types, *t),
            [*tables, *_affine(width, dtype)],
        )


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


@backends
def test_int32_and_non_contiguous(backend: str) -> None:
    ids, wte, wpe = torch.randint(11, (5, 3)).t(), *_tables(8)
    positions = torch.arange(5)[None]
    expected = oracles.embedding(ids, positions, None, wte, wpe)
    assert not ids.is_contiguous()
    assert torch.equal(kernels.embedding(ids, positions, None, wte, wpe), expected)
    assert torch.equal(kernels.embedding(ids.int(), positions, None, wte, wpe), expected)
    tables = [wte.t().contiguous().t(), torch.cat((wpe, wpe), 1)[:, :8]]
    types = torch.randint(11, (3, 5)).int()
    assert not any(t.is_contiguous() for t in tables)
    compare(
        "embedding",
        lambda *tables: kernels.embedding(ids, positions, types, *tables),
        lambda *tables: oracles.embedding(ids, positions, types, *tables),
        tables,
    )


@backends
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_no_tokens(backend: str, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    leaves = [t.requires_grad_() for t in (*_tables(8), *_affine(8))]
    positions = torch.zeros(1, shape[1], dtype=torch.long)
    normed, hidden = kernels.embedding_layer_norm(ids, positions, None, *leaves)
    plain = kernels.embedding(ids, positions, None, *leaves[:2])
    assert normed.shape == hidden.shape == plain.shape == (*shape, 8)
    for grad in torch.autograd.grad([normed.sum() + plain.sum()], leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


@backends
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_only_what_is_needed(backend: str, used: tuple[int, ...], needed: tuple[int, ...]) -> None:
    """Some outputs are used, some inputs take gradients."""
    if used == (1,) and min(needed) > 1:
        pytest.skip("the embedding does not depend on weight and bias")
    ids, types = torch.randint(11, (2, 5)), torch.randint(11, (2, 5))
    tensors = [*_tables(63), *_affine(63)]
    upstream = [torch.randn(2, 5, 63) for _ in used]
    results = []
    for function, dtype in (
        (kernels.embedding_layer_norm, torch.float32),
        (_layer_norm_oracle, torch.float64),
    ):
        args = [t.detach().to(dtype).requires_grad_(i in needed) for i, t in enumerate(tensors)]
        outputs = function(ids, ids[:1], types, *args)
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


@backends
def test_upstream_gradients_that_are_expanded(backend: str) -> None:
    ids = torch.randint(11, (2, 5))
    for function in (
        lambda *t: kernels.embedding(ids, ids, None, *t[:2]).sum(),
        lambda *t: kernels.embedding_layer_norm(ids, ids, None, *t)[1].sum(),
    ):
        leaves = [t.requires_grad_() for t in (*_tables(8), *_affine(8))]
        grads = torch.autograd.grad(function(*leaves), leaves[:2])
        counts = torch.bincount(ids.flatten(), minlength=13).float()
        for grad in grads:
            assert torch.equal(grad, counts[: len(grad), None].expand(-1, 8))


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES[1:], ids=str)
def test_autocast_gives_float32_as_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    ids, tensors = torch.randint(11, (2, 5)), [*_tables(64), *_affine(64)]
    with torch.autocast(DEVICE, dtype):
        normed, hidden = kernels.embedding_layer_norm(ids, ids, None, *tensors)
        assert normed.dtype == hidden.dtype == torch.float32
        tensors[:2] = [t.to(dtype) for t in tensors[:2]]
        leaves = [t.requires_grad_() for t in tensors]
        normed, hidden = kernels.embedding_layer_norm(ids, ids, None, *leaves)
    assert (normed.dtype, hidden.dtype) == (torch.float32, dtype)
    want = oracles.layer_norm(hidden.double(), *(t.double() for t in tensors[2:]))
    assert_close("layer_norm", "forward", normed, want)
    grads = torch.autograd.grad([normed.sum(), hidden.sum()], leaves)
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]


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
def test_a_second_derivative_says_that_there_is_none(backend: str) -> None:
    ids, (wte, wpe), affine = torch.randint(11, (2, 5)), _tables(64), _affine(64)
    wte.requires_grad_()
    for out in (
        kernels.embedding(ids, ids, None, wte, wpe),
        kernels.embedding_layer_norm(ids, ids, None, wte, wpe, *affine)[0],
    ):
        with pytest.raises(RuntimeError, match="differentiable once on the triton backend"):
            torch.autograd.grad(out.sum(), wte, create_graph=True)


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
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "vocabulary", "width"),
    [
        (2, 3, 11, 24),
        *(
            pytest.param(16, 1024, 50257, width, marks=pytest.mark.gpu)
            for width in (768, 1024, 1280, 1600)
        ),
    ],
)
def test_model_sizes(
    backend: str, batch: int, length: int, vocabulary: int, width: int, dtype: torch.dtype
) -> None:
    """Ids as frequent as words of a text: the first of them fills a sixth of the batch."""
    draw = torch.rand(batch, length)
    ids = (vocabulary**draw - 1).long().clamp_(0, vocabulary - 1)
    positions, types = torch.arange(length)[None], (draw > 0.5).long()
    tables = [torch.randn(vocabulary, width).to(dtype), torch.randn(1024, width).to(dtype)]
    compare(
        "layer_norm",
        lambda *t: kernels.embedding_layer_norm(ids, positions, types, *t),
        lambda *t: _layer_norm_oracle(ids, positions, types, *t),
        [*tables, *_affine(width, dtype)],
    )


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


def test_wrong_shapes() -> None:
    ids, wte, wpe = torch.zeros(2, 3, dtype=torch.long), torch.randn(11, 8), torch.randn(13, 8)
    row = ids[:1]
    with pytest.raises(ValueError, match=r"^input_ids must be \[batch, time\]; got \[3\]$"):
        kernels.embedding(ids[0], row, None, wte, wpe)
    with pytest.raises(ValueError, match=r"^position_ids must be \[2, 3\] or \[1, 3\]; got \[3\]$"):
        kernels.embedding(ids, row[0], None, wte, wpe)
    with pytest.raises(ValueError, match=r"^token_type_ids must be \[2, 3\]; got \[1, 3\]$"):
        kernels.embedding(ids, row, row, wte, wpe)
    with pytest.raises(ValueError, match=r"^expected wte \[V, C\] and wpe \[P, C\]; got \[11, 8\]"):
        kernels.embedding(ids, row, None, wte, wpe[:, :1])
    with pytest.raises(ValueError, match=r"^position_ids must be \[2, 3\] or \[1, 3\]; got \[3\]$"):
        kernels.embedding_layer_norm(ids, row[0], None, wte, wpe, wte[0], wte[0])
    with pytest.raises(ValueError, match=r"^weight and bias must have shape \(8,\), the last dim"):
        kernels.embedding_layer_norm(ids, row, None, wte, wpe, wte[0, :7], wte[0])
