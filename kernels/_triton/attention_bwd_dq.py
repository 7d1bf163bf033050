"""Causal attention, backward: dQ, and delta on the way; see ``attention_bwd.py``."""

import triton
import triton.language as tl

from gpt2fast.kernels._triton.attention_tiles import (
    UNSPECIALIZED,
    kept_keys,
    kept_weights,
    key_bounds,
    load_heads,
    load_tile,
    scheduled,
    store_tile,
    tile_bounds,
)
from gpt2fast.kernels._triton.common import LOG2_E


@triton.jit
def _add_to_dq(
    acc,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    dout,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    query,
    keys,
    values,
    desc,
    tiles,
    rows,
    bounds,
    scale,
    dropout,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS K over tiles of one segment's keys; arguments as in ``attention_fwd._attend``."""
    first, first_full, end_full, last, diagonal, end = tiles
    begin, stop = first_full, end_full
    if MASKED:
        begin, stop = first, end - (end_full - first_full) - (diagonal - last)
    for i in tl.range(begin, stop):
        tile = i
        if MASKED:  # three ranges of tiles in one loop
            tile += tl.where(tile >= first_full, end_full - first_full, 0)
            tile += tl.where(tile >= last, diagonal - last, 0)
        key = tile * BLOCK_N
        k = load_heads(
            keys, desc, key, rows, HEAD_SIZE, BLOCK_N, BLOCK_D, MASKED, PAST and MASKED
        ).to(q.dtype)
        v = load_heads(
            values, desc, key, rows, HEAD_SIZE, BLOCK_N, BLOCK_D, MASKED, PAST and MASKED
        ).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            visible = kept_keys(bounds, key, BLOCK_N)[None, :]
            if not PAST:
                offs_m = query + tl.arange(0, BLOCK_M)[:, None]
                offs_n = key + tl.arange(0, BLOCK_N)[None, :]
                visible = (visible & (offs_n <= offs_m)) | (offs_n == offs_m)
            weights = tl.where(visible, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if dropout[0] is not None:
            kept = kept_weights(dropout, 1 if PAST else 0, query, key, BLOCK_M, BLOCK_N, False)
            dweights = tl.where(kept, dweights, 0.0)
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(q.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    qkv_ptr,
    qkv_desc,
    past_ptr,
    past_desc,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    key_mask_ptr,
    first_keys_ptr,
    lengths_ptr,
    seed_ptr,
    stride_qkv_batch,
    stride_qkv_row,
    stride_past_part,
    stride_past_batch,
    stride_past_head,
    stride_past_row,
    stride_mask_batch,
    past_length,
    length,
    heads,
    batch_heads,
    section,
    scale,
    threshold,
    kept_factor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dQ and delta of one tile of BLOCK_M queries of one head; grid as in forward.

    out and dout ``[B, T, C]``, dqkv ``[B, T, 3C]``, lse and delta ``[B, H, T]`` float32 are
    contiguous; the others as in `attention_fwd`. delta is stored without dropout's factor, which
    multiplies the result instead. Queries past T are loaded as zero and not stored.
    """
    query_tiles = tl.cdiv(length, BLOCK_M)
    tile, batch_head = scheduled(tl.program_id(0), query_tiles, batch_heads, section)
    query = (query_tiles - 1 - tile) * BLOCK_M  # the last queries see the most keys
    batch, head = batch_head // heads, batch_head % heads
    batches = batch_heads // heads
    low, high = key_bounds(first_keys_ptr, lengths_ptr, batch, past_length + length)
    mask_offset = batch.to(tl.int64) * stride_mask_batch
    dropout = (seed_ptr, batch_head, threshold)

    width = heads * HEAD_SIZE
    offset = batch.to(tl.int64) * length * width + head * HEAD_SIZE
    dout = load_tile(
        dout_ptr + offset, query, length, width, HEAD_SIZE, BLOCK_M, BLOCK_D, True
    )  # [BLOCK_M, BLOCK_D]
    out = load_tile(out_ptr + offset, query, length, width, HEAD_SIZE, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / kept_factor  # [BLOCK_M]
    offs_m = query + tl.arange(0, BLOCK_M)
    row_offset = batch_head.to(tl.int64) * length
    tl.store(delta_ptr + row_offset + offs_m, delta, mask=offs_m < length)
    lse = tl.load(lse_ptr + row_offset + offs_m, mask=offs_m < length, other=0.0)

    query_ptr = qkv_ptr + batch.to(tl.int64) * stride_qkv_batch + head * HEAD_SIZE
    key_ptr = query_ptr + width
    value_ptr = key_ptr + width
    q = load_tile(query_ptr, query, length, stride_qkv_row, HEAD_SIZE, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if past_ptr is not None:
        past_key_ptr = (
            past_ptr + batch.to(tl.int64) * stride_past_batch + head.to(tl.int64) * stride_past_head
        )
        keys = (past_key_ptr, stride_past_row, batch, head)
        values = (past_key_ptr + stride_past_part, stride_past_row, batches + batch, head)
        past_high = min(high, past_length)
        bounds = (key_mask_ptr, mask_offset, low, past_high)
        first, first_full, end_full, last = tile_bounds(
            low, past_high, tl.cdiv(past_length, BLOCK_N), key_mask_ptr is not None, BLOCK_N
        )
        tiles = (first, first_full, end_full, last, last, last)
        if key_mask_ptr is None:
            acc = _add_to_dq(
                acc, q, dout, lse, delta, query, keys, values, past_desc, tiles, past_length,
                bounds, scale, dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, True, False,
            )  # fmt: skip
        acc = _add_to_dq(
            acc, q, dout, lse, delta, query, keys, values, past_desc, tiles, past_length,
            bounds, scale, dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, True, True,
        )  # fmt: skip

    keys = (key_ptr, stride_qkv_row, batch, heads + head)
    values = (value_ptr, stride_qkv_row, batch, 2 * heads + head)
    low, high = max(low - past_length, 0), max(high - past_length, 0)
    bounds = (key_mask_ptr, mask_offset + past_length, low, high)
    diagonal = query // BLOCK_N
    first, first_full, end_full, last = tile_bounds(
        low, high, diagonal, key_mask_ptr is not None, BLOCK_N
    )
    end = tl.cdiv(min(query + BLOCK_M, length), BLOCK_N)
    tiles = (first, first_full, end_full, last, diagonal, end)
    if key_mask_ptr is None:
        acc = _add_to_dq(
            acc, q, dout, lse, delta, query, keys, values, qkv_desc, tiles, length,
            bounds, scale, dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, False, False,
        )  # fmt: skip
    acc = _add_to_dq(
        acc, q, dout, lse, delta, query, keys, values, qkv_desc, tiles, length,
        bounds, scale, dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, False, True,
    )  # fmt: skip
    acc *= scale * kept_factor / LOG2_E
    target_ptr = dqkv_ptr + batch.to(tl.int64) * length * 3 * width + head * HEAD_SIZE
    store_tile(target_ptr, query, length, 3 * width, acc, HEAD_SIZE, BLOCK_M, BLOCK_D)
