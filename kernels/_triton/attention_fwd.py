"""Causal attention, forward: training, prompts, and chunks appended to a cache.

    out = softmax(scale * q k^T + mask) v        online, a tile of keys at a time

Scores are kept in base 2 (`exp2` is the chip's instruction; log2(e) is part of the scale), and so
is the logarithm of their sum that backward reads. Only the tiles on the diagonal and at the bounds
of a row's keys test which keys are visible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.attention_tiles import (
    MASKED_SCORE,
    UNSPECIALIZED,
    check_heads,
    check_rows,
    dropout_threshold,
    heads_descriptor,
    kept_keys,
    kept_weights,
    key_bounds,
    load_heads,
    load_tile,
    scheduled,
    section_heads,
    store_tile,
    tile_bounds,
)
from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.configs import attention_fwd_config
from gpt2fast.kernels._triton.launch import cdiv, launch, next_power_of_2
from gpt2fast.kernels._triton.target import current_target


@triton.jit
def _attend(
    state,
    q,  # [BLOCK_M, BLOCK_D]
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
    """Attend to tiles of one segment's keys; state is (acc, sum of weights, largest score).

    keys and values are sources of `load_heads`; tiles is what `tile_bounds` returns, then the
    diagonal's first and the one after its last; bounds as `kept_keys` wants them, dropout as
    `kept_weights`. MASKED takes the tiles that are seen in part, otherwise the others.
    """
    acc, total, top = state  # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]
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
        k = load_heads(keys, desc, key, rows, HEAD_SIZE, BLOCK_N, BLOCK_D, MASKED, PAST and MASKED)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = kept_keys(bounds, key, BLOCK_N)[None, :]
            if not PAST:
                offs_m = query + tl.arange(0, BLOCK_M)[:, None]
                offs_n = key + tl.arange(0, BLOCK_N)[None, :]
                # A query always sees itself, so that padding stays finite.
                visible = (visible & (offs_n <= offs_m)) | (offs_n == offs_m)
            scores = tl.where(visible, scores * scale, MASKED_SCORE)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        if dropout[0] is not None:
            kept = kept_weights(dropout, 1 if PAST else 0, query, key, BLOCK_M, BLOCK_N, False)
            weights = tl.where(kept, weights, 0.0)
        v = load_heads(
            values, desc, key, rows, HEAD_SIZE, BLOCK_N, BLOCK_D, MASKED, PAST and MASKED
        )
        acc = tl.dot(
            weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee"
        )
    return acc, total, top


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd_kernel(
    qkv_ptr,
    qkv_desc,
    past_ptr,
    past_desc,
    out_ptr,
    lse_ptr,
    key_mask_ptr,
    first_keys_ptr,
    lengths_ptr,
    starts_ptr,
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
    WRITE_CACHE: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head; grid: tiles * batch * heads, as `scheduled`.

    qkv ``[B, T, 3C]`` and past ``[2, B, H, capacity, D]`` with contiguous heads; the descriptors
    show them as ``[B, 3H, T, D]`` and ``[2B, H, capacity, D]``, in boxes of BLOCK_N rows. out
    ``[B, T, C]`` and lse ``[B, H, T]`` float32 are contiguous. key_mask ``[B, S]`` boolean,
    first_keys, lengths and starts ``[B]`` int32, seed ``[1]`` int64. All but qkv and out may be
    None. scale carries log2(e).

    With WRITE_CACHE the program also copies the keys and values of its own queries behind the first
    ``past_length`` (or ``starts[b]``) rows of the past, which are all that any program reads of it.
    """
    query_tiles = tl.cdiv(length, BLOCK_M)
    tile, batch_head = scheduled(tl.program_id(0), query_tiles, batch_heads, section)
    query = (query_tiles - 1 - tile) * BLOCK_M  # the last queries see the most keys
    batch, head = batch_head // heads, batch_head % heads
    batches = batch_heads // heads
    if starts_ptr is not None:
        past_length = tl.load(starts_ptr + batch)
    low, high = key_bounds(first_keys_ptr, lengths_ptr, batch, past_length + length)
    mask_offset = batch.to(tl.int64) * stride_mask_batch
    dropout = (seed_ptr, batch_head, threshold)

    query_ptr = qkv_ptr + batch.to(tl.int64) * stride_qkv_batch + head * HEAD_SIZE
    key_ptr = query_ptr + heads * HEAD_SIZE
    value_ptr = key_ptr + heads * HEAD_SIZE
    q = load_tile(query_ptr, query, length, stride_qkv_row, HEAD_SIZE, BLOCK_M, BLOCK_D, True)
    state = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )

    if past_ptr is not None:
        past_key_ptr = (
            past_ptr + batch.to(tl.int64) * stride_past_batch + head.to(tl.int64) * stride_past_head
        )
        past_value_ptr = past_key_ptr + stride_past_part
        if WRITE_CACHE:
            offset = past_length.to(tl.int64) * stride_past_row
            k = load_tile(key_ptr, query, length, stride_qkv_row, HEAD_SIZE, BLOCK_M, BLOCK_D, True)
            store_tile(
                past_key_ptr + offset,
                query,
                length,
                stride_past_row,
                k,
                HEAD_SIZE,
                BLOCK_M,
                BLOCK_D,
            )
            v = load_tile(
                value_ptr, query, length, stride_qkv_row, HEAD_SIZE, BLOCK_M, BLOCK_D, True
            )
            store_tile(
                past_value_ptr + offset,
                query, length, stride_past_row, v, HEAD_SIZE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        keys = (past_key_ptr, stride_past_row, batch, head)
        values = (past_value_ptr, stride_past_row, batches + batch, head)
        past_high = min(high, past_length)
        bounds = (key_mask_ptr, mask_offset, low, past_high)
        first, first_full, end_full, last = tile_bounds(
            low, past_high, tl.cdiv(past_length, BLOCK_N), key_mask_ptr is not None, BLOCK_N
        )
        tiles = (first, first_full, end_full, last, last, last)
        if key_mask_ptr is None:
            state = _attend(
                state, q, query, keys, values, past_desc, tiles, past_length, bounds, scale,
                dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, True, False,
            )  # fmt: skip
        state = _attend(
            state, q, query, keys, values, past_desc, tiles, past_length, bounds, scale,
            dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, True, True,
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
        state = _attend(
            state, q, query, keys, values, qkv_desc, tiles, length, bounds, scale,
            dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, False, False,
        )  # fmt: skip
    acc, total, top = _attend(
        state, q, query, keys, values, qkv_desc, tiles, length, bounds, scale,
        dropout, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, False, True,
    )  # fmt: skip

    width = heads * HEAD_SIZE
    acc *= (kept_factor / total)[:, None]
    target_ptr = out_ptr + batch.to(tl.int64) * length * width + head * HEAD_SIZE
    store_tile(target_ptr, query, length, width, acc, HEAD_SIZE, BLOCK_M, BLOCK_D)
    if lse_ptr is not None:
        offs_m = query + tl.arange(0, BLOCK_M)
        row_ptr = lse_ptr + batch_head.to(tl.int64) * length
        tl.store(row_ptr + offs_m, top + tl.log2(total), mask=offs_m < length)


def launch_attention_fwd(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float,
    past: Tensor | None = None,
    start: int | Tensor = 0,
    key_mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    lengths: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    save_lse: bool = False,
    write_cache: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of qkv's queries over ``past[:, :, :, :start]`` and qkv's keys.

    Args:
        qkv: ``[B, T, 3C]``, last dimension contiguous.
        num_heads: H.
        scale: factor of the scores, positive.
        past: ``[2, B, H, capacity, D]``, last dimension contiguous; its dtype may differ.
        start: how many rows of the past are in use: an int, or ``[B]`` int32 on the device, which
            the caller knows to be within the capacity.
        key_mask: ``[B, S]`` boolean with contiguous rows, S = start + T (or more): keys that may be
            attended.
        first_keys, lengths: ``[B]`` int32; keys before, and from there on, are not attended.
        seed: ``[1]`` int64; drops weights with probability ``dropout_p`` where given.
        save_lse: also return the logarithm to base 2 of each row's sum of exponentials.
        write_cache: write the new keys and values to ``past[:, :, :, start : start + T]``.

    Returns:
        ``[B, T, C]`` contiguous, and ``[B, H, T]`` float32 or None.
    """
    batch, length, width = qkv.shape
    head_size = width // (3 * num_heads)
    check_heads("qkv", qkv, (batch, length, 3 * num_heads * head_size), qkv.device)
    capacity = 0
    if past is not None:
        capacity = past.shape[3]
        check_heads("the past", past, (2, batch, num_heads, capacity, head_size), qkv.device)
    check_rows(batch, qkv.device, first_keys=first_keys, lengths=lengths)
    starts = None
    if isinstance(start, Tensor):
        check_rows(batch, qkv.device, start=start)
        starts, start = start, capacity
    elif start + (length if write_cache else 0) > capacity:
        new = f" and {length} new" if write_cache else ""
        raise ValueError(f"{start}{new} rows in a past of {capacity}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.stride(-1) != 1):
        raise ValueError(
            f"key_mask must be boolean with contiguous rows; got {key_mask.dtype} with strides "
            f"{list(key_mask.stride())}"
        )
    out = torch.empty(batch, length, width // 3, dtype=qkv.dtype, device=qkv.device)
    lse = None
    if save_lse:
        lse = torch.empty(batch, num_heads, length, dtype=torch.float32, device=qkv.device)
    if not out.numel():
        return out, lse

    block_d = max(16, next_power_of_2(head_size))
    config = attention_fwd_config(
        current_target(qkv.device),
        qkv.element_size(),
        block_d,
        length,
        crowded=seed is not None and past is not None,
    )
    past_strides: tuple[int, ...] = (0, 0, 0, 0)
    if past is None or capacity == 0:
        past, past_desc = None, None
    else:
        past_strides = past.stride()[:4]
        past_desc = heads_descriptor(past, head_size, config.block_n, block_d)
    batch_heads = batch * num_heads
    section = section_heads(start + length, head_size * qkv.element_size())
    pointers = (
        qkv,
        heads_descriptor(qkv, head_size, config.block_n, block_d),
        past,
        past_desc,
        out,
        lse,
        key_mask,
        first_keys,
        lengths,
        starts,
        seed,
    )
    numbers = (
        qkv.stride(0),
        qkv.stride(1),
        *past_strides,
        0 if key_mask is None else key_mask.stride(0),
        start,
        length,
        num_heads,
        batch_heads,
        section,
        scale * LOG2_E.value,
        *dropout_threshold(dropout_p),
    )
    launch(
        _attention_fwd_kernel,
        (cdiv(length, config.block_m) * batch_heads,),
        pointers,
        numbers,
        HEAD_SIZE=head_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        WRITE_CACHE=write_cache,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out, lse


def attention_fwd(
    qkv: Tensor,
    num_heads: int,
    past: Tensor | None,
    key_mask: Tensor | None,
    first_keys: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The op: `launch_attention_fwd` over the whole past; an empty lse where it is not wanted."""
    out, lse = launch_attention_fwd(
        qkv,
        num_heads,
        scale=scale,
        past=past,
        start=0 if past is None else past.shape[3],
        key_mask=key_mask,
        first_keys=first_keys,
        lengths=lengths,
        seed=seed,
        dropout_p=dropout_p,
        save_lse=save_lse,
    )
    return out, qkv.new_empty(0, dtype=torch.float32) if lse is None else lse
