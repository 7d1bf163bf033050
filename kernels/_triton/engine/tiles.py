"""A decoding step's phases for 8 to 256 rows: matrix products in tiles, on the tensor cores.

A tile is ``[BLOCK_N, BLOCK_M]``, outputs by rows: BLOCK_M is all rows (padded to 16) up to 128, so
that every weight is read once from memory, and the weights are the operand that may come from
registers, where low bits are expanded. Sums are float32. What differs from the phases for a few
rows (`phases.py`):

- LayerNorm is a phase of its own, `normalize`: all tiles of a product need all rows.
- The two products that are added to the residual stream have few outputs. Their inputs are divided
  into PARTS, of which each tile is one program's; `normalize` adds them up, and the bias.

    normalize   x = x + (parts + b); y = LN(x)
    qkv_tiles   q, k, v = y W + b; k and v go into the cache
    (attention, merging its splits)
    part_tiles  parts of merged heads W
    normalize
    fc_tiles    h = gelu(y W + b)
    part_tiles  parts of h W
    normalize
    head_tiles  logits = y W, or only what the largest one's choice takes

Names of sizes are those of `phases.py`; activations (y, q, h) are in one dtype, that of the
products' operands.
"""

import triton
import triton.language as tl

from gpt2fast.kernels._triton.common import LOG2_E, gelu
from gpt2fast.kernels._triton.engine.linear import int4_to_float32, int8_to_float32
from gpt2fast.kernels._triton.engine.phases import of_layer, position_of, store_qkv

_GROUP = tl.constexpr(128)  # packing.INT4_GROUP


@triton.jit
def normalize(
    program, programs, layer, x_ptr, parts_ptr, bias_ptr, norm_layer, norm_ptr, y_ptr, eps,
    C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y ``[M, C]`` = LayerNorm of x, to which parts float32 ``[PARTS, M, C]`` and the layer's bias
    are added first, in place, where there are PARTS. norm: ``[norm layers, 2, C]``. BLOCK >= C.
    """
    offs_c = tl.arange(0, BLOCK)
    mask = offs_c < C
    norm_ptr += norm_layer * (2 * C)
    weight = tl.load(norm_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(norm_ptr + C + offs_c, mask=mask, other=0.0).to(tl.float32)
    for row in range(program, ROWS, programs):
        x = tl.load(x_ptr + row * C + offs_c, mask=mask, other=0.0)
        if PARTS > 0:
            added = tl.load(bias_ptr + layer * C + offs_c, mask=mask, other=0.0).to(tl.float32)
            for part in tl.static_range(PARTS):
                offset = (part * ROWS + row) * C
                added += tl.load(parts_ptr + offset + offs_c, mask=mask, other=0.0)
            x += added
            tl.store(x_ptr + row * C + offs_c, x, mask=mask)
        mean = tl.sum(x, 0) / C
        centred = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
        y = centred * rstd * weight + shift
        tl.store(y_ptr + row * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def multiply_tile(
    weight_ptr, scale_ptr, y_ptr, start_n, start_m, low, high,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W y^T ``[BLOCK_N, BLOCK_M]`` at (start_n, start_m), summed over inputs low .. high.

    W ``[N, K]`` as packed, y ``[ROWS, K]``. low is a multiple of BLOCK_K, and so is high unless it
    is K or more. int4: BLOCK_K is a group of 128. Outputs past N and rows past ROWS are 0.
    """
    PACK: tl.constexpr = 2 if BITS == 4 else 1
    GROUPS: tl.constexpr = (K + _GROUP - 1) // _GROUP
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // PACK)
    mask_n = (offs_n < N)[:, None]
    mask_m = (offs_m < ROWS)[None, :]
    weight_ptrs = weight_ptr + offs_n[:, None] * (K // PACK) + offs_w[None, :]
    y_ptrs = y_ptr + offs_m[None, :] * K + offs_k[:, None]
    dtype = y_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(low, high, BLOCK_K, num_stages=STAGES):
        mask_w = mask_n & (k // PACK + offs_w < K // PACK)[None, :]
        w = tl.load(weight_ptrs + k // PACK, mask=mask_w, other=0)
        y = tl.load(y_ptrs + k, mask=(k + offs_k < K)[:, None] & mask_m, other=0.0)
        if BITS == 4:
            scale_ptrs = scale_ptr + offs_n * GROUPS + k // _GROUP
            scale = tl.load(scale_ptrs, mask=offs_n < N, other=0.0)
            part = tl.dot(int4_to_float32(w).to(dtype), y, input_precision="ieee")
            acc += part * scale[:, None]
        else:
            if BITS == 8:
                w = int8_to_float32(w).to(dtype)
            acc = tl.dot(w, y, acc, input_precision="ieee")
    if BITS == 8:
        acc *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    return acc


@triton.jit
def qkv_tiles(
    program, programs, layer,
    y_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
    slots_ptr, offsets_ptr, lengths_ptr, slots, capacity,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries ``[M, C]``, and keys and values into the cache at the rows' slots and positions."""
    N: tl.constexpr = 3 * C
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, C, BITS)
    bias_ptr += layer * N
    TILES_M: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    for tile in range(program, (N + BLOCK_N - 1) // BLOCK_N * TILES_M, programs):
        start, start_m = tile // TILES_M * BLOCK_N, tile % TILES_M * BLOCK_M
        value = multiply_tile(
            weight_ptr, scale_ptr, y_ptr, start, start_m, 0, C,
            N, C, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
        offs_n = (start + tl.arange(0, BLOCK_N))[:, None]
        mask_n = offs_n < N
        value += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        row = (start_m + tl.arange(0, BLOCK_M))[None, :]
        slot, position = position_of(slots_ptr, offsets_ptr, lengths_ptr, tl.minimum(row, ROWS - 1))
        store_qkv(
            value, offs_n, mask_n & (row < ROWS), row, slot, position,
            layer, query_ptr, cache_ptr, slots, capacity, C, HEADS,
        )  # fmt: skip


@triton.jit
def fc_tiles(
    program, programs, layer, y_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """inner ``[M, N]`` = gelu(y W + b)."""
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, C, BITS)
    bias_ptr += layer * N
    TILES_M: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    for tile in range(program, (N + BLOCK_N - 1) // BLOCK_N * TILES_M, programs):
        start, start_m = tile // TILES_M * BLOCK_N, tile % TILES_M * BLOCK_M
        value = multiply_tile(
            weight_ptr, scale_ptr, y_ptr, start, start_m, 0, C,
            N, C, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
        offs_n = (start + tl.arange(0, BLOCK_N))[:, None]
        mask_n = offs_n < N
        value = gelu(value + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32))
        row = (start_m + tl.arange(0, BLOCK_M))[None, :]
        inner_ptrs = inner_ptr + row * N + offs_n
        tl.store(inner_ptrs, value.to(inner_ptr.dtype.element_ty), mask=mask_n & (row < ROWS))


@triton.jit
def part_tiles(
    program, programs, layer, y_ptr, weight_ptr, scale_ptr, parts_ptr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """parts float32 ``[PARTS, M, N]``: y W, summed over equal parts of the inputs."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS * BLOCK_K
    weight_ptr, scale_ptr = of_layer(weight_ptr, scale_ptr, layer, N, K, BITS)
    TILES_M: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    for index in range(program, TILES * TILES_M * PARTS, programs):
        start, start_m = index // TILES_M % TILES * BLOCK_N, index % TILES_M * BLOCK_M
        part = index // (TILES * TILES_M)
        low = part * SHARE
        value = multiply_tile(
            weight_ptr, scale_ptr, y_ptr, start, start_m, low, tl.minimum(low + SHARE, K),
            N, K, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
        offs_n = (start + tl.arange(0, BLOCK_N))[:, None]
        row = (start_m + tl.arange(0, BLOCK_M))[None, :]
        parts_ptrs = parts_ptr + (part * ROWS + row) * N + offs_n
        tl.store(parts_ptrs, value, mask=(offs_n < N) & (row < ROWS))


@triton.jit
def head_tiles(
    program, programs, y_ptr, weight_ptr, scale_ptr,
    logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GREEDY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """logits float32 ``[M, N]`` = y W, or the best of each share of them: `phases.head`.

    Programs that are beside each other have the same outputs, for all tiles of rows; their number
    is a multiple of how many those are. best_*: ``[M, shares]``; of the tiles of outputs a share
    has every ``shares``-th one, whose bounds take no registers.
    """
    TILES_M: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    shares = programs // TILES_M
    start_m = program % TILES_M * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)
    mask_m = row < ROWS
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(program // TILES_M, (N + BLOCK_N - 1) // BLOCK_N, shares):
        start = tile * BLOCK_N
        value = multiply_tile(
            weight_ptr, scale_ptr, y_ptr, start, start_m, 0, C,
            N, C, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
        offs_n = (start + tl.arange(0, BLOCK_N))[:, None]
        mask_n = offs_n < N
        if GREEDY:
            value = tl.where(mask_n, value, -float("inf"))
            # A NaN is no maximum, and makes the sum NaN.
            tile_top = tl.max(value, 0)
            new_top = tl.where(tile_top > top, tile_top, top)
            first = tl.min(tl.where(value == tile_top[None, :], offs_n, 2147483647), 0)
            place = tl.where(tile_top > top, first, place)
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total *= tl.exp2((top - shift) * LOG2_E)
            total += tl.sum(tl.exp2((value - shift[None, :]) * LOG2_E), 0)
            top = new_top
        else:
            logits_ptrs = logits_ptr + row[None, :] * N + offs_n
            tl.store(logits_ptrs, value, mask=mask_n & mask_m[None, :])
    if GREEDY:
        index = row * shares + program // TILES_M
        tl.store(best_value_ptr + index, top, mask=mask_m)
        tl.store(best_index_ptr + index, place, mask=mask_m)
        tl.store(best_sum_ptr + index, total, mask=mask_m)
