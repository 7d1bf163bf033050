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
    load_bias,
    load_norm,
    load_sweep,
    merge_inputs,
    multiply,
    norm_ahead,
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
    program, programs, weight_ptr, scale_ptr, bias_ptr, norm_ptr, layer,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Ask for the weights that the phase's program multiplies first: a tuple of tiles as stored.

    ONCE: behind them its biases and, with NORM, LayerNorm's weights where `norm_ahead`: they come
    from memory as the weights do, and whoever asks for them later waits as long again. What uses
    them stands behind a branch: otherwise the compiler, which sees no reason against it, would take
    them apart before the wait for the phase before, and so wait for them first.
    """
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, K, BITS)
    first = load_sweep(
        weight_ptr, scale_ptr, low, high, 0, K, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL
    )
    if ONCE:
        first += load_bias(bias_ptr + layer * N, low, high, WARPS, REPEAT)
        if NORM and norm_ahead(K, BITS):
            first += load_norm(norm_ptr + layer * (2 * K), K, WARPS, lanes_of(BITS))
    return first


@triton.jit
def biases_of(
    first, bias_ptr, start, high,
    K: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """The biases of outputs from ``start`` on, out of `first_weights` where ONCE."""
    if ONCE:
        biases = ()
        for repeat in tl.static_range(REPEAT):
            biases += (first[_tiles(K, BITS, REPEAT, UNROLL) + repeat],)
        return biases
    else:
        return load_bias(bias_ptr, start, high, WARPS, REPEAT)


@triton.jit
def norm_of(
    first, K: tl.constexpr, BITS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """LayerNorm's weights, if they are among `first_weights`: AHEAD, ONCE and kept rows."""
    norm = ()
    if AHEAD and norm_ahead(K, BITS):
        for index in tl.static_range((K + lanes_of(BITS) - 1) // lanes_of(BITS) * 2):
            norm += (first[_tiles(K, BITS, REPEAT, UNROLL) + REPEAT + index],)
    return norm


@triton.constexpr_function
def _tiles(inputs, bits, repeat, unroll):
    """How many a sweep has: `linear.load_sweep`."""
    lanes = {32: 128, 16: 256, 8: 256, 4: 512}[bits]
    return repeat * min(unroll, -(-inputs // lanes)) * (2 if bits == 4 else 1)


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
    ONCE: tl.constexpr,
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
    if ONCE:
        if low < high:  # always, but known here only: see `first_weights`
            norm = norm_of(first, C, BITS, REPEAT, UNROLL, KEEP)
            kept = normalize_inputs(
                x_ptr, norm, norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP
            )
            results, _ = multiply(
                first, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, low, high,
                C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True, True,
            )  # fmt: skip
            biases = biases_of(first, bias_ptr, low, high, C, BITS, WARPS, REPEAT, UNROLL, True)
            _store_results(
                results, biases, places, low, high, layer, query_ptr, cache_ptr, slots, capacity,
                C, HEADS, ROWS, WARPS, REPEAT,
            )  # fmt: skip
    else:
        kept = normalize_inputs(x_ptr, (), norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
        tiles = first
        for start in range(low, high, REPEAT * WARPS):
            biases = load_bias(bias_ptr, start, high, WARPS, REPEAT)
            results, tiles = multiply(
                tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
                C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True, False,
            )  # fmt: skip
            _store_results(
                results, biases, places, start, high, layer, query_ptr, cache_ptr, slots, capacity,
                C, HEADS, ROWS, WARPS, REPEAT,
            )  # fmt: skip


@triton.jit
def _store_results(
    results, biases, places, start, high, layer, query_ptr, cache_ptr, slots, capacity,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """`store_qkv` of what `multiply` gives for all rows."""
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        mask = offs_n < high
        bias = biases[repeat].to(tl.float32)
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
    ONCE: tl.constexpr,
):  # fmt: skip
    """inner ``[M, N]`` = gelu(LN_2(x) W + b)."""
    low, high = share_of(program, programs, N)
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, C, BITS)
    norm_ptr += layer * (2 * C)
    bias_ptr += layer * N
    if ONCE:
        if low < high:  # always, but known here only: see `first_weights`
            norm = norm_of(first, C, BITS, REPEAT, UNROLL, KEEP)
            kept = normalize_inputs(
                x_ptr, norm, norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP
            )
            results, _ = multiply(
                first, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, low, high,
                C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True, True,
            )  # fmt: skip
            biases = biases_of(first, bias_ptr, low, high, C, BITS, WARPS, REPEAT, UNROLL, True)
            _store_inner(results, biases, low, high, inner_ptr, N, ROWS, WARPS, REPEAT)
    else:
        kept = normalize_inputs(x_ptr, (), norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
        tiles = first
        for start in range(low, high, REPEAT * WARPS):
            biases = load_bias(bias_ptr, start, high, WARPS, REPEAT)
            results, tiles = multiply(
                tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
                C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True, False,
            )  # fmt: skip
            _store_inner(results, biases, start, high, inner_ptr, N, ROWS, WARPS, REPEAT)


@triton.jit
def _store_inner(
    results, biases, start, high, inner_ptr,
    N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Bias and gelu of what `multiply` gives, to inner ``[M, N]``."""
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        bias = biases[repeat].to(tl.float32)
        for row in tl.static_range(ROWS):
            value = gelu(results[repeat * ROWS + row] + bias)
            inner_ptrs = inner_ptr + row * N + offs_n
            tl.store(inner_ptrs, value.to(inner_ptr.dtype.element_ty), mask=offs_n < high)


@triton.jit
def add(
    program, programs, layer, first,
    input_ptr, sums_ptr, weight_ptr, scale_ptr, bias_ptr, x_ptr,
    N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
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
        kept = merge_inputs(
            input_ptr, sums_ptr, layer, K, HEADS, SPLITS, ROWS, WARPS, lanes_of(BITS)
        )
    if ONCE:
        if low < high:
            before = _load_rows(x_ptr, low, high, N, ROWS, WARPS, REPEAT)
            results, _ = multiply(
                first, kept, input_ptr, None, weight_ptr, scale_ptr, low, high,
                K, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, MERGE, False, True,
            )  # fmt: skip
            biases = biases_of(first, bias_ptr, low, high, K, BITS, WARPS, REPEAT, UNROLL, True)
            _store_sums(before, results, biases, low, high, x_ptr, N, ROWS, WARPS, REPEAT)
    else:
        tiles = first
        for start in range(low, high, REPEAT * WARPS):
            before = _load_rows(x_ptr, start, high, N, ROWS, WARPS, REPEAT)
            biases = load_bias(bias_ptr, start, high, WARPS, REPEAT)
            results, tiles = multiply(
                tiles, kept, input_ptr, None, weight_ptr, scale_ptr, start, high,
                K, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, MERGE, False, False,
            )  # fmt: skip
            _store_sums(before, results, biases, start, high, x_ptr, N, ROWS, WARPS, REPEAT)


@triton.jit
def _load_rows(
    x_ptr, start, high,
    N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """Of x ``[M, N]`` what is added to, in the order of `multiply`'s results."""
    values = ()
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        for row in tl.static_range(ROWS):
            values += (tl.load(x_ptr + row * N + offs_n, mask=offs_n < high, other=0.0),)
    return values


@triton.jit
def _store_sums(
    before, results, biases, start, high, x_ptr,
    N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """What was there, what `multiply` gives, and the bias, to x ``[M, N]``."""
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        bias = biases[repeat].to(tl.float32)
        for row in tl.static_range(ROWS):
            value = before[repeat * ROWS + row] + (results[repeat * ROWS + row] + bias)
            tl.store(x_ptr + row * N + offs_n, value, mask=offs_n < high)


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
    kept = normalize_inputs(x_ptr, (), norm_ptr, eps, C, ROWS, WARPS, lanes_of(BITS), KEEP)
    best = ()
    for _ in tl.static_range(ROWS):
        top = tl.full([WARPS], -float("inf"), tl.float32)
        best += ((top, tl.zeros([WARPS], tl.int32), tl.zeros([WARPS], tl.float32)),)
    tiles = first
    for start in range(low, high, REPEAT * WARPS):
        results, tiles = multiply(
            tiles, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
            C, ROWS, BITS, lanes_of(BITS), WARPS, REPEAT, UNROLL, KEEP, True, False,
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
