"""Caches and projections for the tests of attention_append, and the comparison with the oracle."""

import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.tolerances import assert_close

HEADS, HEAD_SIZE = 3, 8
NAN = float("nan")


def poisoned(
    batch: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    heads: int = HEADS,
    head_size: int = HEAD_SIZE,
) -> Tensor:
    return torch.full((2, batch, heads, capacity, head_size), NAN, dtype=dtype)


def projection(
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    width: int = HEADS * HEAD_SIZE,
) -> Tensor:
    return torch.randn(batch, length, 3 * width).to(dtype)


def keys_and_values(qkv: Tensor, cache: Tensor) -> Tensor:
    """Keys and values of a projection, ``[2, B, H, T, D]``, in the cache's dtype."""
    parts = [p.unflatten(-1, (cache.shape[2], -1)).transpose(1, 2) for p in qkv.chunk(3, -1)[1:]]
    return torch.stack(parts).to(cache.dtype)


def check_slots(cache: Tensor, qkv: Tensor) -> None:
    """The first slots hold qkv's keys and values bit by bit; the others are still poisoned."""
    assert torch.equal(cache[:, :, :, : qkv.shape[1]], keys_and_values(qkv, cache))
    assert cache[:, :, :, qkv.shape[1] :].isnan().all()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled_cache(
    starts: list[int], capacity: int, dtype: torch.dtype, heads: int = HEADS, size: int = HEAD_SIZE
) -> Tensor:
    """Row b holds random keys and values at its first ``starts[b]`` positions, NaN behind them."""
    cache = poisoned(len(starts), capacity, dtype, heads, size)
    for row, start in enumerate(starts):
        cache[:, row, :, :start] = torch.randn(2, heads, start, size).to(dtype)
    return cache


def check_append(
    qkv: Tensor,
    cache: Tensor,
    starts: list[int],
    *,
    on_device: bool = True,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    source_rows: Tensor | None = None,
) -> None:
    """Call the op, and compare with one row after the other over its keys, gathered explicitly.

    mask is ``[B, capacity]`` whatever ``start`` is.
    """
    heads, length = cache.shape[2], qkv.shape[1]
    before = cache.clone()
    given = mask
    if mask is not None and not on_device:
        given = mask[:, : starts[0] + length]
    out = kernels.attention_append(
        qkv,
        cache,
        int32(*starts) if on_device else starts[0],
        heads,
        mask=given,
        first_keys=first_keys,
        source_rows=source_rows,
    )
    assert out.shape == (*qkv.shape[:2], qkv.shape[2] // 3)
    after, truth, plain = before.clone(), [], []
    for row, start in enumerate(starts):
        end = start + length
        after[:, row, :, start:end] = keys_and_values(qkv[row : row + 1], cache)[:, 0]
        rows = torch.full((start,), row) if source_rows is None else source_rows[row, :start].long()
        past = before[:, rows, :, torch.arange(start)].permute(1, 2, 0, 3)[:, None]
        past = past.to(qkv.dtype)
        kept = torch.ones(1, end, dtype=torch.bool) if mask is None else mask[row : row + 1, :end]
        if first_keys is not None:
            kept = kept & (torch.arange(end) >= first_keys[row])
        for results, dtype in ((truth, torch.float64), (plain, qkv.dtype)):
            one = qkv[row : row + 1].to(dtype)
            results.append(oracles.attention(one, heads, past.to(dtype), mask=kept)[0])
    assert_close("attention", "forward", out, torch.cat(truth), torch.cat(plain))
    assert torch.equal(cache.nan_to_num(7), after.nan_to_num(7))
