"""embedding and embedding_layer_norm against indexing in float64, on both backends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, backends, backends_and_dtypes, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close


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


@pytest.mark.skipif(DEVICE == "cuda", reason="ends every later call of the process on the GPU")
@pytest.mark.parametrize("unknown", [-1, 11])
def test_ids_out_of_range_are_an_error_of_pytorch(unknown: int) -> None:
    ids, tables, affine = torch.zeros(1, 2, dtype=torch.long), _tables(8), _affine(8)
    with kernels.backend("torch"), pytest.raises(IndexError, match="out of range"):
        kernels.embedding(ids + unknown, ids, None, *tables)
    with kernels.backend("torch"), pytest.raises(IndexError, match="out of range"):
        kernels.embedding_layer_norm(ids, ids, ids + unknown, *tables, *affine)
