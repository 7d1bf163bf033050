"""A decoding step's phases for one to four rows, as device functions.

Each does the share of program number ``program`` of ``programs``, any number, of its outputs, so
that a kernel of its own (`graph.py`) or one kernel for all (`persistent.py`) can call it. What a
phase reads, an earlier one has finished writing; what it writes, no other program touches.

    embed       x = wte[token] + wpe[position]
    qkv         q, k, v = LN_1(x) W + b; k and v go into the cache
    (attention)
    add         x = x + merged heads W + b
    fc          h = gelu(LN_2(x) W + b)
    add         x = x + h W + b
    head        logits = LN_f(x) W, or only what the largest one's choice takes

Shapes: C the width, N outputs, K inputs, M rows, S slots. x is float32 ``[M, C]``; weights are of
all layers, ``layer`` a number known on the device. A phase's first weights are loaded by
`first_weights`, apart from it, as early as the caller can. Rows whose slot is -1 write no keys and
values, and what else they write is read by nobody.
"""

# Tuples grow in device functions, whose types mypy takes for those of the empty ones.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from gpt2fast.kernels._triton.common import LOG2_E, gelu
from gpt2fast.kernels._triton.engine.linear import (
    lanes_of,
    load_sweep,
    merge_inputs,
    multiply,
    normalize_inputs,
    share_of,
)


@triton.jit
def position_of(slots_ptr, offsets_ptr, lengths_ptr, row):
    """Slots and positions of token rows, -1 and 0 where there is none."""
    slot = tl.load(slots_ptr + row)
    used = slot >= 0
    length = tl.load(lengths_ptr + slot, mask=used, other=0)
    offset = tl.load(offsets_ptr + row, mask=used, other=0)
    return slot, length + offset


@triton.jit
def embed(
    program, programs,
    tokens_ptr, slots_ptr, offsets_ptr, lengths_ptr, wte_ptr, wpe_ptr, x_ptr,
    capacity, vocab_size, positions,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x of all rows; 0 for rows without a slot. Tokens int64 ``[S, capacity + 1]``.

    Tokens and positions out of range are moved to the nearest.
    """
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    for index in range(program, ROWS * BLOCKS, programs):
        row = index // BLOCKS
        offs_c = index % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = offs_c < C
        slot, position = position_of(slots_ptr, offsets_ptr, lengths_ptr, row)
        used = slot >= 0
        position = tl.minimum(tl.maximum(position, 0), capacity)
        where = slot.to(tl.int64) * (capacity + 1) + position
        token = tl.load(tokens_ptr + where, mask=used, other=0)
        token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
        position = tl.minimum(position, positions - 1).to(tl.int64)
        mask_used = mask & used
        word = tl.load(wte_ptr + token * C + offs_c, mask=mask_used, other=0.0)
        place = tl.load(wpe_ptr + position * C + offs_c, mask=mask_used, other=0.0)
        tl.store(x_ptr + row * C + offs_c, word.to(tl.float32) + place.to(tl.float32), mask=mask)


@triton.jit
def of_layer(
    weight_ptr, scale_ptr, layer, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Where a layer's weights and scales begin."""
    layer = layer.to(tl.int64)
    weight_ptr += layer * (N * K // 2 if BITS == 4 else N * K)
    if BITS == 8:
        scale_ptr += layer * N
    if BITS == 4:
        scale_ptr += layer * (N * ((K + 127) // 128))
    return weight_ptr, scale_ptr


@triton.jit
def first_weights(
    program, programs, weight_ptr, scale_ptr, layer,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Ask for the weights that the phase's program multiplies first: a tuple of tiles as stored."""
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, K, BITS)
    return load_sweep(
        weight_ptr, scale_ptr, low, high, 0, K, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL
    )


@triton.jit
def as_cached(value, cache_ptr):
    """float32 in the cache's dtype; float8, which has no infinity, saturates (NaN stays NaN)."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv:
        value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    return value.to(cache_ptr.dtype.element_ty)


@triton.jit
def store_qkv(
    value, offs_n, mask, row, slot, position, layer, query_ptr, cache_ptr, slots, capacity,
    C: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store outputs offs_n of row ``row``: of 3C, the first C to query ``[M, C]``, the others to
    cache ``[L, 2, S, H, capacity, D]`` where the row has a slot and its position a place.
    """
    HEAD_SIZE: tl.constexpr = C // HEADS
    is_query = offs_n < C
    query_ptrs = query_ptr + row * C + offs_n
    tl.store(query_ptrs, value.to(query_ptr.dtype.element_ty), mask=mask & is_query)
    part = offs_n // C - 1
    column = offs_n % C
    index = ((layer.to(tl.int64) * 2 + part) * slots + slot) * HEADS + column // HEAD_SIZE
    index = (index * capacity + position) * HEAD_SIZE + column % HEAD_SIZE
    inside = (slot >= 0) & (position >= 0) & (position < capacity)
    tl.store(cache_ptr + index, as_cached(value, cache_ptr), mask=mask & inside & ~is_query)


@triton.jit
def qkv(
    program, programs, layer, first,
    x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
    slots_ptr, offsets_ptr, lengths_ptr, slots, capacity, eps,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Queries ``[M, C]``, and keys and values into the cache at the rows' slots and positions."""
    N: tl.constexpr = 3 * C
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, C, BITS)
    norm_ptr += layer * (2 * C)
    bias_ptr += layer * N
    places = ()
    for row in tl.static_range(ROWS):
        places += (position_of(slots_ptr, offsets_ptr, lengths_ptr, row),)
    kept = normalize_inputs(x_ptr, norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
    tiles = first
    for start in range(low, high, REPEAT * WARPS):
        results, tiles = multiply(
            tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
            C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True,
        )  # fmt: skip
        for repeat in tl.static_range(REPEAT):
            offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
            mask = offs_n < high
            bias = tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
            for row in tl.static_range(ROWS):
                store_qkv(
                    results[repeat * ROWS + row] + bias, offs_n, mask, row,
                    places[row][0], places[row][1], layer, query_ptr, cache_ptr, slots, capacity,
                    C, HEADS,
                )  # fmt: skip


@triton.jit
def fc(
    program, programs, layer, first,
    x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr, eps,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """inner ``[M, N]`` = gelu(LN_2(x) W + b)."""
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, C, BITS)
    norm_ptr += layer * (2 * C)
    bias_ptr += layer * N
    kept = normalize_inputs(x_ptr, norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
    tiles = first
    for start in range(low, high, REPEAT * WARPS):
        results, tiles = multiply(
            tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
            C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True,
        )  # fmt: skip
        for repeat in tl.static_range(REPEAT):
            offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
            mask = offs_n < high
            bias = tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
            for row in tl.static_range(ROWS):
                value = gelu(results[repeat * ROWS + row] + bias)
                inner_ptrs = inner_ptr + row * N + offs_n
                tl.store(inner_ptrs, value.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add(
    program, programs, layer, first,
    input_ptr, sums_ptr, weight_ptr, scale_ptr, bias_ptr, x_ptr,
    N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x ``[M, N]`` += input W + b, in place.

    input: ``[M, K]`` in any dtype; with SPLITS > 1 the parts of merged heads and, beside them, sums
    (`attention.attention_phase`).
    """
    MERGE: tl.constexpr = SPLITS > 1
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, K, BITS)
    bias_ptr += layer * N
    kept = ()
    if MERGE:
        kept = merge_inputs(input_ptr, sums_ptr, K, HEADS, SPLITS, ROWS, WARPS, lanes_of(BITS))
    tiles = first
    for start in range(low, high, REPEAT * WARPS):
        results, tiles = multiply(
            tiles, kept, input_ptr, None, weight_ptr, scale_ptr, start, high,
            K, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, MERGE, False,
        )  # fmt: skip
        for repeat in tl.static_range(REPEAT):
            offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
            mask = offs_n < high
            bias = tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
            for row in tl.static_range(ROWS):
                x_ptrs = x_ptr + row * N + offs_n
                x = tl.load(x_ptrs, mask=mask, other=0.0)
                tl.store(x_ptrs, x + (results[repeat * ROWS + row] + bias), mask=mask)


@triton.jit
def keep_best(best, value, offs, mask):
    """``best`` (maximum, its place, sum of exp(value - maximum)) with more values in its shape.

    The first of equal values stays. A NaN is no maximum, and makes the sum NaN.
    """
    top, where, total = best
    value = tl.where(mask, value, -float("inf"))
    larger = value > top
    new_top = tl.where(larger, value, top)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    total = total * tl.exp2((top - shift) * LOG2_E) + tl.exp2((value - shift) * LOG2_E)
    return new_top, tl.where(larger, offs, where), total


@triton.jit
def store_best(best, index, value_ptr, place_ptr, sum_ptr):
    """Store the best of a vector at ``index``: see `keep_best`. Without values: -inf, 0, 0."""
    tops, places, totals = best
    top = tl.max(tops, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    tl.store(value_ptr + index, top)
    tl.store(place_ptr + index, tl.min(tl.where(tops == top, places, 2147483647), 0))
    tl.store(sum_ptr + index, tl.sum(totals * tl.exp2((tops - shift) * LOG2_E), 0))


@triton.jit
def head(
    program, programs, first,
    x_ptr, norm_ptr, weight_ptr, scale_ptr,
    logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr, eps,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GREEDY: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """logits float32 ``[M, N]`` = LN_f(x) W.

    GREEDY: instead, or beside them unless KEEP, of each program's share of a row's logits, the
    largest (best_value float32), its first place (best_index int32) and the sum of
    exp(logit - largest) (best_sum float32), each ``[M, programs]``.
    """
    low, high = share_of(program, programs, N)
    kept = normalize_inputs(x_ptr, norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
    best = ()
    for _ in tl.static_range(ROWS):
        top = tl.full([WARPS], -float("inf"), tl.float32)
        best += ((top, tl.zeros([WARPS], tl.int32), tl.zeros([WARPS], tl.float32)),)
    tiles = first
    for start in range(low, high, REPEAT * WARPS):
        results, tiles = multiply(
            tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
            C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True,
        )  # fmt: skip
        for repeat in tl.static_range(REPEAT):
            offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
            mask = offs_n < high
            better = ()
            for row in tl.static_range(ROWS):
                value = results[repeat * ROWS + row]
                if GREEDY:
                    better += (keep_best(best[row], value, offs_n, mask),)
                # A loop without a store: its loads of the rows, equal in every turn, would be moved
                # before it, and not fit into registers.
                if not GREEDY or not KEEP:
                    tl.store(logits_ptr + row * N + offs_n, value, mask=mask)
            if GREEDY:
                best = better
    if GREEDY:
        for row in tl.static_range(ROWS):
            index = row * programs + program
            store_best(best[row], index, best_value_ptr, best_index_ptr, best_sum_ptr)
