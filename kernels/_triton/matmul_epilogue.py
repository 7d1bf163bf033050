"""What ``matmul.py`` does to the sums of a product while they are in registers."""

import triton
import triton.language as tl

from gpt2fast.kernels._triton.common import gelu, gelu_and_grad


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))


@triton.jit
def column_chunks(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of acc as a tuple of [BLOCK_M, 64], from left to right; whole if no wider.

    Every thread has columns of each, so nothing moves. BLOCK_N: at most 256.
    """
    chunks = (acc,)
    if BLOCK_N == 128:
        chunks = _halves(acc, BLOCK_M, 128)
    elif BLOCK_N == 256:
        left, right = _halves(acc, BLOCK_M, 256)
        chunks = _halves(left, BLOCK_M, 128) + _halves(right, BLOCK_M, 128)
    return chunks


@triton.jit
def finish(
    acc,
    offs_m,
    offs_n,
    M,
    N,
    bias_ptr,
    residual_ptr,
    stride_residual_row,
    pre_ptr,
    out_ptr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Store gelu(acc + bias) + residual, each where asked for, at rows offs_m and columns offs_n.

    SAVE_PRE: acc + bias, which backward needs, goes to pre_ptr.
    """
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    offsets = rows * N + offs_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if SAVE_PRE:
        tl.store(pre_ptr + offsets, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    if GELU:
        acc = gelu(acc)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows * stride_residual_row + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_gelu_grad(
    acc,
    tile_m,
    offs_m,
    offs_n,
    M,
    N,
    pre_ptr,
    gelu_ptr,
    sums_ptr,
    out_ptr,
    SAVE_GELU: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """Store acc * gelu'(pre); SAVE_GELU: gelu(pre) as well, which was not kept for backward.

    SUM_ROWS: the tile's sums over its rows go to row tile_m of sums_ptr, the bias' gradient in
    parts.
    """
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value, slope = gelu_and_grad(pre)
    acc *= slope
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if SAVE_GELU:
        tl.store(gelu_ptr + offsets, value.to(gelu_ptr.dtype.element_ty), mask=mask)
    if SUM_ROWS:
        tl.store(sums_ptr + tile_m.to(tl.int64) * N + offs_n, tl.sum(acc, 0), mask=mask_n)
