"""Products of one to four rows with a packed matrix, one output a warp.

A matrix ``[N, K]`` lies output-major (`gpt2fast.kernels.packing`), so an output is one contiguous
stream of weights. Each warp multiplies whole outputs: a tile ``[WARPS, LANES]`` is one load of 16
bytes a thread (8 of int4), row = warp, and its inner product needs neither shared memory nor a
barrier. REPEAT such outputs a warp are under way at a time, in sweeps of UNROLL tiles of K each. A
sweep's weights are loaded while the one before is multiplied, across outputs too, so the stream
does not pause; the very first sweep, `load_sweep`, is a function of its own, because it depends on
nothing that an earlier phase computes and can be asked for before that has ended.

Every warp holds the rows that are multiplied for itself, in the same form: ``[WARPS, LANES]``,
equal in all warps. Sums are float32. K is any multiple of 8; the columns of the last tile that lie
behind it are masked.
"""

# Tuples grow in device functions, whose types mypy takes for those of the empty ones.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from gpt2fast.kernels._triton.engine.attention import merged_heads

# (q + 1.5 * 2^23) has q in its last bits. Arithmetic on those is faster than conversions, of which
# a multiprocessor does 16 a cycle.
_INT8_BITS = tl.constexpr(0x4B400000)
_INT8_OFFSET = tl.constexpr(12582912.0)
_INT4_BITS = tl.constexpr(0x4B000000)
_INT4_OFFSET = tl.constexpr(8388608.0 + 8.0)
_GROUP = tl.constexpr(128)  # packing.INT4_GROUP


@triton.constexpr_function
def lanes_of(bits):
    """LANES: inner products' terms that a warp loads at a time.

    16 bytes a thread of 32 and 16 bits, 8 of fewer: each term takes a register for each row.
    """
    return {32: 128, 16: 256, 8: 256, 4: 512}[bits]


@triton.constexpr_function
def at_once(outputs, programs, warps, repeat):
    """Whether the programs multiply all their outputs at a time, without a loop."""
    return -(-outputs // programs) <= warps * repeat


@triton.constexpr_function
def norm_ahead(inputs, bits):
    """Whether LayerNorm's weights are loaded before the rows are there: 8 registers a tile."""
    return inputs <= 4 * {32: 128, 16: 256, 8: 256, 4: 512}[bits]


@triton.jit
def share_of(program, programs, total):
    """The program's part [low, high) of ``total``: contiguous, and equal to one more or less."""
    return program * total // programs, (program + 1) * total // programs


@triton.jit
def int8_to_float32(q):
    """int8 exactly in float32."""
    return (q.to(tl.int32) + _INT8_BITS).to(tl.float32, bitcast=True) - _INT8_OFFSET


@triton.jit
def int4_to_float32(data):
    """uint8 ``[R, K / 2]`` -> float32 ``[R, K]``: both halves of every byte, less 8."""
    low = (data.to(tl.int32) & 15) + _INT4_BITS
    high = (data.to(tl.int32) >> 4) + _INT4_BITS
    return tl.interleave(low, high).to(tl.float32, bitcast=True) - _INT4_OFFSET


@triton.jit
def to_float32(data, BITS: tl.constexpr):
    """Weights as they are stored, in float32, but for their scale."""
    if BITS == 8:
        weights = int8_to_float32(data)
    elif BITS == 4:
        weights = int4_to_float32(data)
    else:
        weights = data.to(tl.float32)
    return weights


@triton.jit
def load_sweep(
    weight_ptr, scale_ptr, start, high,
    SWEEP: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Ask for sweep SWEEP of outputs start .. start + REPEAT * WARPS, as far as they are < high.

    Returns:
        For each of REPEAT outputs a warp and each tile of the sweep, the weights ``[WARPS, LANES]``
        as stored (int4: LANES / 2 bytes, then float32 scales ``[WARPS, LANES / 16]``), 0 behind N
        and K.
    """
    PACK: tl.constexpr = 2 if BITS == 4 else 1
    GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP
    tiles = ()
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        mask_n = (offs_n < high)[:, None]
        for chunk in tl.static_range(SWEEP * UNROLL, (SWEEP + 1) * UNROLL):
            if chunk * LANES < K:
                offs_k = chunk * (LANES // PACK) + tl.arange(0, LANES // PACK)[None, :]
                mask = mask_n
                if (chunk + 1) * LANES > K:
                    mask = mask_n & (offs_k < K // PACK)
                pointers = weight_ptr + offs_n[:, None] * (K // PACK) + offs_k
                tiles += (tl.load(pointers, mask=mask, other=0),)
                if BITS == 4:
                    group = (chunk * LANES + tl.arange(0, LANES // 16) * 16)[None, :] // _GROUP
                    pointers = scale_ptr + offs_n[:, None] * GROUPS + group
                    scale = tl.load(pointers, mask=mask_n & (group < GROUPS), other=0.0)
                    tiles += (scale,)
    return tiles


@triton.jit
def load_row(ptr, chunk: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Columns of tile ``chunk`` of a row, float32 ``[WARPS, LANES]``, the same in every warp."""
    # In the tile's shape, though its rows are one: each warp loads what it needs.
    offs_k = tl.broadcast_to(chunk * LANES + tl.arange(0, LANES)[None, :], (WARPS, LANES))
    if (chunk + 1) * LANES > K:
        return tl.load(ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    return tl.load(ptr + offs_k).to(tl.float32)


@triton.jit
def load_norm(norm_ptr, K: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    """LayerNorm's weight and bias of each tile of K, as stored: norm ``[2, K]``."""
    norm = ()
    for chunk in tl.static_range((K + LANES - 1) // LANES):
        offs_k = tl.broadcast_to(chunk * LANES + tl.arange(0, LANES)[None, :], (WARPS, LANES))
        mask = offs_k < K
        for part in tl.static_range(2):
            if (chunk + 1) * LANES > K:
                norm += (tl.load(norm_ptr + part * K + offs_k, mask=mask, other=0.0),)
            else:
                norm += (tl.load(norm_ptr + part * K + offs_k),)
    return norm


@triton.jit
def load_bias(
    bias_ptr, start, high, WARPS: tl.constexpr, REPEAT: tl.constexpr
):  # fmt: skip
    """The bias of outputs start .. start + REPEAT * WARPS, as stored, in the order of results."""
    biases = ()
    for repeat in tl.static_range(REPEAT):
        offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
        biases += (tl.load(bias_ptr + offs_n, mask=offs_n < high, other=0.0),)
    return biases


@triton.jit
def normalize_tile(
    x, mean, rstd, norm_ptr,
    chunk: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LayerNorm of one tile of a row; norm ``[2, K]``: weight, bias. 0 behind K."""
    weight = load_row(norm_ptr, chunk, K, WARPS, LANES)
    bias = load_row(norm_ptr + K, chunk, K, WARPS, LANES)
    return (x - mean) * rstd * weight + bias


@triton.jit
def normalize_inputs(
    x_ptr, norm, norm_ptr, eps,
    K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Statistics of rows x ``[ROWS, K]``, from one pass over each; norm: `load_norm`'s, or ().

    Sums and sums of squares are of what a row differs from its first element, so that one chain of
    exchanges between threads serves both, and a large mean costs no digits.

    Returns:
        KEEP: the tiles of all normalised rows, row by row. Otherwise mean and 1 / sqrt(var + eps)
        of each row, ``[WARPS, 1]``.
    """
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    weights = norm
    if KEEP and len(norm) == 0:
        # Before the statistics, which take as long as these loads.
        weights = load_norm(norm_ptr, K, WARPS, LANES)
    kept = ()
    for row in tl.static_range(ROWS):
        x = ()
        for chunk in tl.static_range(CHUNKS):
            x += (load_row(x_ptr + row * K, chunk, K, WARPS, LANES),)
        shift = tl.load(x_ptr + row * K)
        total = tl.zeros((WARPS, LANES), tl.float32)
        squares = tl.zeros((WARPS, LANES), tl.float32)
        moved = ()
        for chunk in tl.static_range(CHUNKS):
            tile = x[chunk] - shift
            if (chunk + 1) * LANES > K:
                tile = tl.where(chunk * LANES + tl.arange(0, LANES)[None, :] < K, tile, 0.0)
            moved += (tile,)
            total += tile
            squares += tile * tile
        mean = tl.sum(total, 1, keep_dims=True) * (1.0 / K)
        second = tl.sum(squares, 1, keep_dims=True) * (1.0 / K)
        # NaN stays NaN.
        variance = second - mean * mean
        variance = tl.where(variance < 0.0, 0.0, variance)
        rstd = tl.rsqrt(variance + eps)
        if KEEP:
            for chunk in tl.static_range(CHUNKS):
                weight = weights[2 * chunk].to(tl.float32)
                bias = weights[2 * chunk + 1].to(tl.float32)
                kept += ((moved[chunk] - mean) * rstd * weight + bias,)
        else:
            kept += (mean + shift, rstd)
    return kept


@triton.jit
def merge_inputs(
    partial_ptr, sums_ptr, layer,
    K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tiles of rows of merged heads, of which attention left SPLITS parts.

    Every warp merges all of them for itself: dividing the work would take exchanges through shared
    memory, two barriers each. All loads stand before the first use of one, and parts are of the
    activations' dtype, so that few loads are to be waited for.
    """
    HEAD_SIZE: tl.constexpr = K // HEADS
    OWN: tl.constexpr = LANES // 32
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    kept = ()
    for row in tl.static_range(ROWS):
        if HEAD_SIZE % OWN == 0:
            # A thread's channels are of one head: one load of a sum serves them.
            logs, parts = (), ()
            for chunk in tl.static_range(CHUNKS):
                # In one dimension Triton has no choice how to deal out the loads to threads: it
                # would otherwise exchange them through shared memory.
                first = chunk * LANES + tl.arange(0, WARPS * 32) % 32 * OWN
                place = (row * HEADS + first // HEAD_SIZE) * SPLITS
                for split in tl.static_range(SPLITS):
                    logs += (tl.load(sums_ptr + place + split, mask=first < K, other=0.0),)
            for chunk in tl.static_range(CHUNKS):
                offs_k = tl.broadcast_to(
                    chunk * LANES + tl.arange(0, LANES)[None, :], (WARPS, LANES)
                )
                head = (row * HEADS + offs_k // HEAD_SIZE) * (SPLITS * HEAD_SIZE)
                part_ptrs = partial_ptr + head + offs_k % HEAD_SIZE
                for split in tl.static_range(SPLITS):
                    if (chunk + 1) * LANES > K:
                        part = tl.load(part_ptrs + split * HEAD_SIZE, mask=offs_k < K, other=0.0)
                    else:
                        part = tl.load(part_ptrs + split * HEAD_SIZE)
                    parts += (part,)
            merged = ()
            for _ in tl.static_range(CHUNKS):
                merged += (tl.zeros((WARPS, LANES), tl.float32),)
            # Always so, but the compiler does not know: otherwise it would save registers and
            # wait for some of the loads before it asks for others.
            if layer >= 0:
                merged = _merge_parts(logs, parts, CHUNKS, SPLITS, WARPS, LANES)
            kept += merged
        else:
            for chunk in tl.static_range(CHUNKS):
                offs_k = chunk * LANES + tl.arange(0, LANES)[None, :]
                tile = merged_heads(
                    partial_ptr, sums_ptr, row, offs_k, offs_k < K, HEADS, HEAD_SIZE, SPLITS
                )
                tile = tl.where(offs_k < K, tile, 0.0)
                kept += (tl.broadcast_to(tile, (WARPS, LANES)),)
    return kept


@triton.jit
def _merge_parts(
    logs, parts,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tiles of one row, from the logarithms of its parts' sums, a value a thread."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        largest = logs[chunk * SPLITS]
        for split in tl.static_range(1, SPLITS):
            largest = tl.maximum(largest, logs[chunk * SPLITS + split])
        total = tl.zeros((WARPS * 32,), tl.float32)
        tile = tl.zeros((WARPS, LANES), tl.float32)
        for split in tl.static_range(SPLITS):
            # finite: a row's first split has a key
            share = tl.exp2(logs[chunk * SPLITS + split] - largest)
            total += share
            part = parts[chunk * SPLITS + split].to(tl.float32)
            tile += part * _spread(share, WARPS, LANES // 32)
        tiles += (tile * _spread(1.0 / total, WARPS, LANES // 32),)
    return tiles


@triton.jit
def _spread(value, WARPS: tl.constexpr, OWN: tl.constexpr):
    """A value a thread for each of the thread's OWN elements of a tile ``[WARPS, 32 * OWN]``."""
    value = tl.broadcast_to(tl.reshape(value, (WARPS, 32, 1)), (WARPS, 32, OWN))
    return tl.reshape(value, (WARPS, 32 * OWN))


@triton.jit
def _add_products(
    acc, tiles, kept, x_ptr, norm_ptr,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``acc`` with the products of one sweep: COUNT tiles of K, of which FIRST is the first."""
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    STEP: tl.constexpr = 2 if BITS == 4 else 1
    for index in tl.static_range(COUNT):
        x = ()
        for row in tl.static_range(ROWS):
            if KEEP:
                x += (kept[row * CHUNKS + FIRST + index],)
            else:
                tile = load_row(x_ptr + row * K, FIRST + index, K, WARPS, LANES)
                if NORM:
                    tile = normalize_tile(
                        tile, kept[2 * row], kept[2 * row + 1], norm_ptr,
                        FIRST + index, K, WARPS, LANES,
                    )  # fmt: skip
                x += (tile,)
        added = ()
        for repeat in tl.static_range(REPEAT):
            weights = to_float32(tiles[(repeat * COUNT + index) * STEP], BITS)
            if BITS == 4:
                scale = tiles[(repeat * COUNT + index) * STEP + 1][:, :, None]
                scale = tl.broadcast_to(scale, (WARPS, LANES // 16, 16))
                weights *= tl.reshape(scale, (WARPS, LANES))
            for row in tl.static_range(ROWS):
                added += (acc[repeat * ROWS + row] + weights * x[row],)
        acc = added
    return acc


@triton.jit
def multiply(
    first, kept, x_ptr, norm_ptr, weight_ptr, scale_ptr, start, high,
    K: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr,
    KEEP: tl.constexpr, NORM: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Inner products of ROWS rows with the outputs of which ``first`` is the first sweep.

    The rows are ``kept``, where KEEP; otherwise x ``[ROWS, K]``, in any dtype, and with NORM its
    LayerNorm: `normalize_inputs` then made ``kept``, of the same rows.

    Returns:
        float32 ``[WARPS]`` for each of REPEAT outputs a warp and each row, in this order; and,
        unless ONCE, the first sweep of the outputs REPEAT * WARPS further on.
    """
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    SWEEPS: tl.constexpr = (CHUNKS + UNROLL - 1) // UNROLL
    acc = ()
    for _ in tl.static_range(REPEAT * ROWS):
        acc += (tl.zeros((WARPS, LANES), tl.float32),)
    tiles = first
    for sweep in tl.static_range(SWEEPS):
        ahead = ()
        if not ONCE or sweep < SWEEPS - 1:
            ahead = load_sweep(
                weight_ptr, scale_ptr,
                start + REPEAT * WARPS if sweep == SWEEPS - 1 else start, high,
                0 if sweep == SWEEPS - 1 else sweep + 1,
                K, BITS, LANES, WARPS, REPEAT, UNROLL,
            )  # fmt: skip
        acc = _add_products(
            acc, tiles, kept, x_ptr, norm_ptr,
            sweep * UNROLL, CHUNKS - sweep * UNROLL if sweep == SWEEPS - 1 else UNROLL,
            K, ROWS, BITS, LANES, WARPS, REPEAT, KEEP, NORM,
        )  # fmt: skip
        tiles = ahead
    results = ()
    for repeat in tl.static_range(REPEAT):
        if BITS == 8:
            offs_n = start + repeat * WARPS + tl.arange(0, WARPS)
            scale = tl.load(scale_ptr + offs_n, mask=offs_n < high, other=0.0)
        for row in tl.static_range(ROWS):
            result = tl.sum(acc[repeat * ROWS + row], 1)
            if BITS == 8:
                result *= scale
            results += (result,)
    return results, tiles
