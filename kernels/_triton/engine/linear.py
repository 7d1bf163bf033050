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
    x_ptr, norm_ptr, eps,
    K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Statistics of rows x ``[ROWS, K]``, in two passes over a row in registers.

    Returns:
        KEEP: the tiles of all normalised rows, row by row. Otherwise mean and 1 / sqrt(var + eps)
        of each row, ``[WARPS, 1]``.
    """
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    kept = ()
    for row in tl.static_range(ROWS):
        x = ()
        total = tl.zeros((WARPS, LANES), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            x += (load_row(x_ptr + row * K, chunk, K, WARPS, LANES),)
            total += x[chunk]
        mean = tl.sum(total, 1, keep_dims=True) / K
        squares = tl.zeros((WARPS, LANES), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            centred = x[chunk] - mean
            if (chunk + 1) * LANES > K:
                centred = tl.where(chunk * LANES + tl.arange(0, LANES)[None, :] < K, centred, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / K + eps)
        if KEEP:
            for chunk in tl.static_range(CHUNKS):
                tile = normalize_tile(x[chunk], mean, rstd, norm_ptr, chunk, K, WARPS, LANES)
                kept += (tile,)
        else:
            kept += (mean, rstd)
    return kept


@triton.jit
def merge_inputs(
    partial_ptr, sums_ptr,
    K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tiles of rows of merged heads, of which attention left SPLITS parts."""
    kept = ()
    for row in tl.static_range(ROWS):
        for chunk in tl.static_range((K + LANES - 1) // LANES):
            # One row of the tile: the warps divide the work, and then exchange it.
            offs_k = chunk * LANES + tl.arange(0, LANES)[None, :]
            tile = merged_heads(
                partial_ptr, sums_ptr, row, offs_k, offs_k < K, HEADS, K // HEADS, SPLITS
            )
            tile = tl.where(offs_k < K, tile, 0.0)
            kept += (tl.broadcast_to(tile, (WARPS, LANES)),)
    return kept


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
    KEEP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Inner products of ROWS rows with the outputs of which ``first`` is the first sweep.

    The rows are ``kept``, where KEEP; otherwise x ``[ROWS, K]``, in any dtype, and with NORM its
    LayerNorm: `normalize_inputs` then made ``kept``, of the same rows.

    Returns:
        float32 ``[WARPS]`` for each of REPEAT outputs a warp and each row, in this order; and the
        first sweep of the outputs REPEAT * WARPS further on.
    """
    CHUNKS: tl.constexpr = (K + LANES - 1) // LANES
    SWEEPS: tl.constexpr = (CHUNKS + UNROLL - 1) // UNROLL
    acc = ()
    for _ in tl.static_range(REPEAT * ROWS):
        acc += (tl.zeros((WARPS, LANES), tl.float32),)
    tiles = first
    for sweep in tl.static_range(SWEEPS):
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
