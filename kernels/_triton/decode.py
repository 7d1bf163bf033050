"""Attention of a few new positions over a key-value cache, and the cache's append.

One program takes one head of one row and a part (a split) of the row's cached keys; with several
splits a second kernel merges their results. One program a head would leave most of the chip idle
at small batches, where this is a stream of keys and values bound by memory alone.

- A split's keys are walked once, with a softmax computed online in float32.
- New keys and values are read from the projection, by the program of the last split, which also
  writes them to the cache: no program reads what another one writes in the same launch.
- One new position a row multiplies and adds on the plain units; each of a tile's key slots carries
  a softmax of its own, so that threads exchange only inner products until the end. Up to 16 are
  the rows of a tensor core tile.

A split without keys writes the neutral result. The grid depends on shapes alone, and how a row's
keys are divided is computed from its own length on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.attention_fwd import launch_attention_fwd
from gpt2fast.kernels._triton.attention_tiles import check_heads, check_rows
from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.configs import decode_config, decode_splits
from gpt2fast.kernels._triton.launch import launch, next_power_of_2
from gpt2fast.kernels._triton.target import current_target
from gpt2fast.kernels.attention_append import (
    ALIGNMENT,
    MAX_SPLIT_QUERIES,
    aligned,
    contiguous_rows,
)


@triton.jit
def shift_of(maximum):
    """What to subtract before exponentials; a maximum of nothing is -inf, which would give NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def attend_one(q, k, v, allowed, top, total, acc):
    """One query over a tile of keys, a softmax for each of the tile's key slots.

    q ``[1, BLOCK_D]`` float32 and scaled; k, v, acc ``[BLOCK_S, BLOCK_D]``; allowed, top, total
    ``[BLOCK_S]``.
    """
    scores = tl.sum(q * k.to(tl.float32), 1)
    scores = tl.where(allowed, scores, -float("inf"))
    new_top = tl.maximum(top, scores)
    shift = shift_of(new_top)
    decay = tl.exp2(top - shift)
    weights = tl.exp2(scores - shift)
    acc = acc * decay[:, None] + weights[:, None] * v.to(tl.float32)
    return new_top, total * decay + weights, acc


@triton.jit
def _attend_rows(q, k, v, allowed, scale, top, total, acc):
    """A tile of queries over a tile of keys.

    q, acc ``[BLOCK_T, BLOCK_D]``; k, v ``[BLOCK_S, BLOCK_D]``; allowed ``[1 or BLOCK_T, BLOCK_S]``;
    top, total ``[BLOCK_T]``.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    scores = tl.where(allowed, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = shift_of(new_top)
    decay = tl.exp2(top - shift)
    weights = tl.exp2(scores - shift[:, None])
    weighted = weights.to(q.dtype)
    acc = tl.dot(weighted, v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    return new_top, total * decay + tl.sum(weights, 1), acc


@triton.jit(
    do_not_specialize=[
        "start", "length", "capacity", "rows", "stride_mask", "stride_source",
        "stride_qkv_row", "stride_qkv_t", "stride_kv", "stride_row", "stride_head", "stride_s",
    ]
)  # fmt: skip
def _attention_decode_kernel(
    qkv_ptr, cache_ptr, out_ptr, partial_ptr,
    starts_ptr, first_keys_ptr, mask_ptr, source_ptr,
    start, length, capacity, rows, scale,
    stride_qkv_row, stride_qkv_t, stride_kv, stride_row, stride_head, stride_s,
    stride_mask, stride_source,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One split of one head of one row: attention over its cached keys; the last split appends.

    Grid: (rows, heads, splits). qkv ``[B, T, 3C]``; cache ``[2, R, H, capacity, D]``, any dtype.
    With one split the result goes to out ``[B, T, C]``; with more to partial, float32: normalised
    results ``[B, H, splits, T, D]``, then base-2 logarithms of the sums ``[B, H, splits, T]``.
    Optional: starts and first_keys ``[B]``, mask ``[B, S]`` boolean, source ``[B, capacity]``.
    Strides of qkv and cache are in units of UNIT elements. ``length`` (T) <= BLOCK_T. Masked:
    positions at or behind the row's start, the head size, queries, and writes past the capacity.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    heads = tl.num_programs(1)
    splits = tl.num_programs(2)
    if starts_ptr is not None:
        start = tl.load(starts_ptr + row)
    past = tl.minimum(tl.maximum(start, 0), capacity)
    first = 0
    if first_keys_ptr is not None:
        first = tl.load(first_keys_ptr + row)
    # The splits divide the tiles from that of the first key on.
    origin = tl.minimum(tl.maximum(first, 0), past) // BLOCK_S * BLOCK_S
    share = tl.cdiv(past - origin, splits * BLOCK_S) * BLOCK_S
    low = origin + split * share
    high = tl.minimum(low + share, past)

    offs_d = tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < HEAD_SIZE
    mask_t = offs_t < length
    width = heads * HEAD_SIZE
    key_ptr = cache_ptr + head * (stride_head.to(tl.int64) * UNIT) + offs_d[None, :]
    value_ptr = key_ptr + stride_kv.to(tl.int64) * UNIT
    own_row = row * (stride_row.to(tl.int64) * UNIT)

    # [BLOCK_T, BLOCK_D]; the new keys and values are asked for here and used behind the loop
    q_ptr = (
        qkv_ptr
        + row * (stride_qkv_row.to(tl.int64) * UNIT)
        + offs_t[:, None] * (stride_qkv_t * UNIT)
    )
    q_ptr += head * HEAD_SIZE + offs_d[None, :]
    mask_q = mask_t[:, None] & mask_d[None, :]
    owner = split == splits - 1
    q = tl.load(q_ptr, mask=mask_q, other=0.0)
    k_new = tl.load(q_ptr + width, mask=mask_q & owner, other=0.0)
    v_new = tl.load(q_ptr + 2 * width, mask=mask_q & owner, other=0.0)
    if BLOCK_T == 1:
        q = q.to(tl.float32) * scale

    SLOTS: tl.constexpr = BLOCK_S if BLOCK_T == 1 else BLOCK_T
    top = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    acc = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    for block in tl.range(low, high, BLOCK_S):
        position = block + offs_s
        allowed = (position >= first) & (position < high)
        if source_ptr is not None:
            source = tl.load(source_ptr + row * stride_source + position, mask=allowed, other=0)
            source = tl.minimum(tl.maximum(source, 0), rows - 1)
            slot = source.to(tl.int64) * (stride_row.to(tl.int64) * UNIT)
        else:
            slot = own_row
        # [BLOCK_S, 1]
        slot = (slot + position.to(tl.int64) * (stride_s * UNIT))[:, None]
        mask_kv = allowed[:, None] & mask_d[None, :]
        k = tl.load(key_ptr + slot, mask=mask_kv, other=0.0)
        v = tl.load(value_ptr + slot, mask=mask_kv, other=0.0)
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + row * stride_mask + position, mask=allowed, other=0)
            allowed = allowed & (kept != 0)
            # What a masked slot holds may be NaN, and zero times NaN is no zero.
            v = tl.where(allowed[:, None], v, 0.0)
        if BLOCK_T == 1:
            top, total, acc = attend_one(q, k, v, allowed, top, total, acc)
        else:
            top, total, acc = _attend_rows(q, k, v, allowed[None, :], scale, top, total, acc)

    if BLOCK_T == 1:
        # Merge the key slots.
        slot_top = top
        top = tl.max(slot_top, 0)[None]
        factor = tl.exp2(slot_top - shift_of(top))
        total = tl.sum(total * factor, 0)[None]
        acc = tl.sum(acc * factor[:, None], 0)[None, :]
    if owner:
        position = start + offs_t  # of the new tokens
        inside = mask_t & (position >= 0) & (position < capacity)
        slot = own_row + position.to(tl.int64) * (stride_s * UNIT)
        mask_slot = inside[:, None] & mask_d[None, :]
        dtype = cache_ptr.dtype.element_ty
        tl.store(key_ptr + slot[:, None], k_new.to(dtype), mask=mask_slot)
        tl.store(value_ptr + slot[:, None], v_new.to(dtype), mask=mask_slot)
        if BLOCK_T == 1:
            top, total, acc = attend_one(q, k_new, v_new, mask_t, top, total, acc)
        else:
            seen = mask_t
            if first_keys_ptr is not None:
                seen = seen & (position >= first)
            if mask_ptr is not None:
                kept = tl.load(mask_ptr + row * stride_mask + position, mask=inside, other=0)
                seen = seen & (kept != 0)
            earlier = (offs_t[None, :] < offs_t[:, None]) & seen[None, :]
            seen = earlier | (offs_t[None, :] == offs_t[:, None])
            top, total, acc = _attend_rows(q, k_new, v_new, seen, scale, top, total, acc)

    # [BLOCK_T, BLOCK_D]
    total = tl.where(total > 0.0, total, 1.0)  # 0 for a split without keys, whose top is -inf
    result = acc / total[:, None]
    if partial_ptr is None:
        out_row = (row * length + offs_t)[:, None]
        out = out_ptr + out_row * width + head * HEAD_SIZE + offs_d[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask_q)
    else:
        index = ((row * heads + head) * splits + split) * length + offs_t
        tl.store(partial_ptr + index[:, None] * HEAD_SIZE + offs_d[None, :], result, mask=mask_q)
        count = tl.num_programs(0).to(tl.int64) * heads * splits * length
        tl.store(partial_ptr + count * HEAD_SIZE + index, top + tl.log2(total), mask=mask_t)


@triton.jit(do_not_specialize=["length", "splits"])
def _attention_combine_kernel(
    partial_ptr, out_ptr, length, splits,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one query.

    Grid: (rows * T, heads). partial as `_attention_decode_kernel` leaves it; out ``[B, T, C]``.
    Masked: splits (BLOCK_SPLITS >= their number) and the head size.
    """
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = query // length
    offs_i = tl.arange(0, BLOCK_SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_i = offs_i < splits
    mask_d = offs_d < HEAD_SIZE
    index = ((row * heads + head) * splits + offs_i) * length + query % length
    count = tl.num_programs(0).to(tl.int64) * heads * splits
    # [BLOCK_SPLITS]
    sums = tl.load(partial_ptr + count * HEAD_SIZE + index, mask=mask_i, other=-float("inf"))
    # [BLOCK_SPLITS, BLOCK_D]
    results = tl.load(
        partial_ptr + index[:, None] * HEAD_SIZE + offs_d[None, :],
        mask=mask_i[:, None] & mask_d[None, :],
        other=0.0,
    )
    share = tl.exp2(sums - tl.max(sums, 0))  # the last split saw a key: the maximum is finite
    merged = tl.sum(results * share[:, None], 0) / tl.sum(share, 0)
    out = out_ptr + (query * heads + head) * HEAD_SIZE + offs_d
    tl.store(out, merged.to(out_ptr.dtype.element_ty), mask=mask_d)


def attention_append(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int,
    starts: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    first_keys: Tensor | None,
    source_rows: Tensor | None,
    scale: float,
) -> Tensor:
    """The op: split keys for up to 16 queries a row, tiles of queries for more.

    Args:
        qkv: ``[B, T, 3C]``.
        kv_cache: ``[2, R, H, capacity, D]`` of any dtype of ours; R >= B.
        start: positions in use, where ``starts`` (int32 ``[B]``) is None.
        mask: ``[B, S]`` boolean or None; S >= start + T, or the capacity.
        first_keys: int32 ``[B]`` or None.
        source_rows: int32 ``[B, capacity]`` or None, which it has to be for more queries.
        scale: positive.
        All with a last stride of 1; the other strides of qkv and the cache are multiples of 8.

    Returns:
        ``[B, T, C]``, contiguous, in qkv's dtype.
    """
    batch, length, _ = qkv.shape
    capacity = kv_cache.shape[3]
    _check(qkv, kv_cache, num_heads, mask, source_rows)
    check_rows(batch, qkv.device, starts=starts, first_keys=first_keys)
    if length <= MAX_SPLIT_QUERIES:
        return _attention_decode(qkv, kv_cache, start, starts, mask, first_keys, source_rows, scale)
    if source_rows is not None:
        raise ValueError(f"source_rows serve up to {MAX_SPLIT_QUERIES} queries a row; got {length}")
    if starts is not None:
        starts = starts.clamp(0, capacity - length)  # a row without room writes within its own
    out, _ = launch_attention_fwd(
        qkv,
        num_heads,
        scale=scale,
        past=kv_cache,
        start=start if starts is None else starts,
        key_mask=mask,
        first_keys=first_keys,
        write_cache=True,
    )
    return out


def _attention_decode(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int,
    starts: Tensor | None,
    mask: Tensor | None,
    first_keys: Tensor | None,
    source_rows: Tensor | None,
    scale: float,
) -> Tensor:
    batch, length, width = qkv.shape
    _, rows, heads, capacity, head_size = kv_cache.shape
    out = torch.empty((batch, length, width // 3), dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    config = decode_config(max(qkv.element_size(), kv_cache.element_size()), length)
    past = start if starts is None else capacity
    target = current_target(qkv.device)
    splits = decode_splits(batch * heads, past, config.block_s, target.multiprocessors)
    partial = None
    if splits > 1:
        size = batch * heads * splits * length * (head_size + 1)
        partial = torch.empty(size, dtype=torch.float32, device=qkv.device)
    block_d = max(16, next_power_of_2(head_size))
    qkv_strides = [s // ALIGNMENT for s in qkv.stride()[:2]]
    cache_strides = [s // ALIGNMENT for s in kv_cache.stride()[:4]]
    launch(
        _attention_decode_kernel, (batch, heads, splits),
        (qkv, kv_cache, out, partial, starts, first_keys, mask, source_rows),
        (start, length, capacity, rows, scale * LOG2_E.value,
         *qkv_strides, *cache_strides,
         0 if mask is None else mask.stride(0),
         0 if source_rows is None else source_rows.stride(0)),
        HEAD_SIZE=head_size, BLOCK_D=block_d, BLOCK_T=1 if length == 1 else MAX_SPLIT_QUERIES,
        BLOCK_S=config.block_s, UNIT=ALIGNMENT,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if partial is not None:
        few = splits <= 16
        launch(
            _attention_combine_kernel, (batch * length, heads),
            (partial, out), (length, splits),
            HEAD_SIZE=head_size, BLOCK_D=block_d, BLOCK_SPLITS=16 if few else 64,
            num_warps=1 if few else 4,
        )  # fmt: skip
    return out


def _check(
    qkv: Tensor, kv_cache: Tensor, num_heads: int, mask: Tensor | None, source_rows: Tensor | None
) -> None:
    """Raise a ValueError for what the kernel would misread."""
    batch, length, width = qkv.shape
    rows, capacity = kv_cache.shape[1], kv_cache.shape[3]
    head_size = width // (3 * num_heads)
    check_heads("qkv", qkv, (batch, length, 3 * num_heads * head_size), qkv.device)
    shape = (2, max(rows, batch), num_heads, capacity, head_size)
    check_heads("kv_cache", kv_cache, shape, qkv.device)
    for name, tensor in (("qkv", qkv), ("kv_cache", kv_cache)):
        if not aligned(tensor):
            raise ValueError(
                f"{name}'s strides must be multiples of {ALIGNMENT}; got {tensor.stride()}"
            )
    for name, table, dtype in (
        ("mask", mask, torch.bool),
        ("source_rows", source_rows, torch.int32),
    ):
        if table is not None and (table.dtype != dtype or not contiguous_rows(table)):
            raise ValueError(
                f"{name} must be {dtype}, its rows contiguous; got {table.dtype} with strides "
                f"{table.stride()}"
            )
