"""Matrix products with the work around them in their epilogue: out = epilogue(A B).

A is ``[M, K]``; B is ``[K, N]``, stored either way round: the published checkpoints' ``[in, out]``
weights are read as they are, and so are their transposes in backward passes. Sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, GROUP_M rows of tiles at a time, down each column of the group.

    Programs that run together then share few rows of A and few columns of B, which stay in L2.
    """
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def accumulate(
    a,
    b,
    start_m,
    start_n,
    M,
    N,
    start_k,
    end_k,
    stride_a_row,
    stride_b_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """The tile of A B at (start_m, start_n), summed over columns start_k..end_k of A, in float32.

    With USE_TMA, a and b are descriptors: a of blocks [BLOCK_M, BLOCK_K], b of [BLOCK_K, BLOCK_N]
    or, where B_TRANSPOSED, of [BLOCK_N, BLOCK_K]; start_k must then be a multiple of BLOCK_K, and
    so must end_k unless it is K. Otherwise they are pointers to rows of unit-stride elements, at
    stride_a_row and stride_b_row. B_TRANSPOSED: b is stored ``[N, K]``. Rows past M, columns past N
    and, of the sum, past end_k count as zero.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if not USE_TMA:
        a_ptrs = a + offs_m.to(tl.int64)[:, None] * stride_a_row + offs_k[None, :]
        if B_TRANSPOSED:
            b_ptrs = b + offs_n.to(tl.int64)[None, :] * stride_b_row + offs_k[:, None]
        else:
            b_ptrs = b + offs_k.to(tl.int64)[:, None] * stride_b_row + offs_n[None, :]
    for k in range(start_k, end_k, BLOCK_K):
        if USE_TMA:
            a_tile = a.load([start_m, k])  # [BLOCK_M, BLOCK_K]
            # [BLOCK_K, BLOCK_N]
            b_tile = b.load([start_n, k]).T if B_TRANSPOSED else b.load([k, start_n])
        else:
            mask_k = tl.arange(0, BLOCK_K) < end_k - k
            a_tile = tl.load(a_ptrs, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
            b_tile = tl.load(b_ptrs, mask=mask_k[:, None] & (offs_n < N)[None, :], other=0.0)
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K if B_TRANSPOSED else BLOCK_K * stride_b_row
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc
