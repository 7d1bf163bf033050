"""LayerNorm, its residual-add form, and their backward pass.

Forward: a row is read once and kept in registers, where its statistics take two passes (the mean,
then the centred squares), so a large mean costs no accuracy. Tiles are
``[CHUNKS, BLOCK_M, LANES]``, column ``chunk * LANES + lane``: Triton spreads warps over the last
dimension first and the middle one next, so with LANES as wide as the 16-byte accesses of one warp,
a warp owns whole rows, and their sums need neither shared memory nor a barrier.

Backward, with g = weight * dy and z = (x - mean) * rstd:

    dx = rstd * (g - mean(g) - z * mean(g * z)) + dsummed
    dweight = sum(dy * z)    dbias = sum(dy)    over all rows

Each program owns a contiguous range of rows and adds up its share of dweight and dbias in
float32; a second kernel adds the shares up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton import configs
from gpt2fast.kernels._triton.target import current_target


@triton.jit
def row_tile_columns(CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """The columns of a forward tile, ``[CHUNKS, 1, LANES]``."""
    offs_chunk = tl.arange(0, CHUNKS) * LANES
    return offs_chunk[:, None, None] + tl.arange(0, LANES)[None, None, :]


@triton.jit
def normalize_rows(
    x,
    mask,
    offs_n,
    offs_m,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    rows,
    width,
    eps,
    SAVE_STATISTICS: tl.constexpr,
):
    """LayerNorm of a float32 tile ``[CHUNKS, BLOCK_M, LANES]``, which is 0 where masked.

    weight_ptr, bias_ptr: ``[width]``. statistics_ptr: float32 ``[2, rows]``, the mean and
    1 / sqrt(var + eps) of every row, stored where SAVE_STATISTICS.
    """
    # In the tile's shape, so that each warp loads what it needs: no exchange through shared memory.
    offs_affine = tl.broadcast_to(offs_n, x.shape)
    weight = tl.load(weight_ptr + offs_affine, mask=offs_affine < width, other=0.0)
    bias = tl.load(bias_ptr + offs_affine, mask=offs_affine < width, other=0.0)
    count = width.to(tl.float32)
    mean = tl.div_rn(tl.sum(tl.sum(x, 0), 1), count)  # [BLOCK_M]
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    var = tl.div_rn(tl.sum(tl.sum(centred * centred, 0), 1), count)
    rstd = tl.rsqrt(var + eps)
    if SAVE_STATISTICS:
        tl.store(statistics_ptr + offs_m, mean, mask=offs_m < rows)
        tl.store(statistics_ptr + rows + offs_m, rstd, mask=offs_m < rows)
    return centred * rstd[None, :, None] * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    summed_ptr,
    statistics_ptr,
    rows,
    width,
    stride_x_row,
    stride_residual_row,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    SAVE_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """y = LayerNorm(x + residual) and the sum, for BLOCK_M rows; grid: (row blocks,).

    x_ptr, residual_ptr: ``[rows, width]`` with their strides. y_ptr, summed_ptr: the same,
    contiguous. The statistics are those of the sum as it is stored. Rows and columns are masked.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = row_tile_columns(CHUNKS, LANES)
    # [CHUNKS, BLOCK_M, LANES]
    mask = (offs_m < rows)[None, :, None] & (offs_n < width)
    row = offs_m.to(tl.int64)[None, :, None]
    x = tl.load(x_ptr + row * stride_x_row + offs_n, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual_row + offs_n, mask=mask, other=0.0)
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * width + offs_n, summed, mask=mask)
        x = summed.to(tl.float32)
    y = normalize_rows(
        x, mask, offs_n, offs_m, weight_ptr, bias_ptr, statistics_ptr, rows, width, eps,
        SAVE_STATISTICS,
    )  # fmt: skip
    tl.store(y_ptr + row * width + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _layer_norm_bwd_kernel(
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    dx_ptr,
    dx_cast_ptr,
    partial_ptr,
    rows,
    width,
    rows_per_program,
    stride_dy_row,
    stride_dsummed_row,
    stride_x_row,
    HAS_DSUMMED: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_CAST: tl.constexpr,
    NEED_AFFINE: tl.constexpr,
    WHOLE_TILE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of a range of rows, and their share of dweight and dbias.

    Grid: (programs,). dy_ptr, dsummed_ptr, x_ptr: ``[rows, width]`` with their strides.
    weight_ptr: ``[width]``. statistics_ptr: float32 ``[2, rows]``. dx_ptr and dx_cast_ptr (dx in
    another dtype): ``[rows, width]``, contiguous. partial_ptr: float32 ``[2, programs, width]``.
    Rows and columns are masked: what lies outside counts as dy = 0.
    """
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    # Where threads share columns, summing a tile over its rows crosses them: once, at the end.
    SUM_M: tl.constexpr = BLOCK_M if WHOLE_TILE_SUMS else 1
    dweight = tl.zeros((SUM_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((SUM_M, BLOCK_N), tl.float32)
    first = pid * rows_per_program
    for start in tl.range(first, min(first + rows_per_program, rows), BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        # [BLOCK_M, BLOCK_N]
        mask = mask_m[:, None] & mask_n[None, :]
        row = offs_m.to(tl.int64)[:, None]
        columns = offs_n[None, :]
        dy = tl.load(dy_ptr + row * stride_dy_row + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x_row + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + rows + offs_m, mask=mask_m, other=0.0)[:, None]
        z = (x - mean) * rstd
        if NEED_AFFINE:
            if WHOLE_TILE_SUMS:
                dweight += dy * z
                dbias += dy
            else:
                dweight += tl.sum(dy * z, 0, keep_dims=True)
                dbias += tl.sum(dy, 0, keep_dims=True)
        if NEED_DX:
            g = dy * weight
            scale = 1.0 / width.to(tl.float32)
            mean_g = tl.sum(g, 1, keep_dims=True) * scale
            mean_gz = tl.sum(g * z, 1, keep_dims=True) * scale
            dx = (g - mean_g - z * mean_gz) * rstd
            if HAS_DSUMMED:
                offs_dsummed = row * stride_dsummed_row + columns
                dx += tl.load(dsummed_ptr + offs_dsummed, mask=mask, other=0.0).to(tl.float32)
            offs_dx = row * width + columns
            tl.store(dx_ptr + offs_dx, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEED_CAST:
                tl.store(dx_cast_ptr + offs_dx, dx.to(dx_cast_ptr.dtype.element_ty), mask=mask)
    if NEED_AFFINE:
        dweight_ptr = partial_ptr + pid.to(tl.int64) * width
        dbias_ptr = dweight_ptr + tl.num_programs(0).to(tl.int64) * width
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, 0), mask=mask_n)
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, 0), mask=mask_n)


@triton.jit(do_not_specialize=["count"])
def _affine_sum_kernel(
    partial_ptr,
    dweight_ptr,
    dbias_ptr,
    count,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up the programs' shares, ``partial_ptr`` float32 ``[2, count, width]``.

    Grid: (column blocks, 2); the second dimension is dweight, then dbias, each ``[width]``.
    """
    which = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    partial_ptr += which.to(tl.int64) * count * width
    # [BLOCK_M, BLOCK_N]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < count)[:, None] & mask_n[None, :]
        total += tl.load(
            partial_ptr + offs_m.to(tl.int64)[:, None] * width + offs_n[None, :],
            mask=mask,
            other=0.0,
        )
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(dweight_ptr + offs_n, result.to(dweight_ptr.dtype.element_ty), mask=mask_n)
    else:
        tl.store(dbias_ptr + offs_n, result.to(dbias_ptr.dtype.element_ty), mask=mask_n)


def row_stride(name: str, x: Tensor, like: Tensor) -> int:
    """Elements between the rows of x ``[..., C]``, which must have the shape and device of like.

    Raises:
        ValueError: it has not, or its rows are not contiguous, or not equally far apart.
    """
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(
            f"{name} must be {list(like.shape)} on {like.device}; got {list(x.shape)} on {x.device}"
        )
    if x.is_contiguous():
        return x.shape[-1]
    try:
        stride, adjacent = x.view(-1, x.shape[-1]).stride()
    except RuntimeError:
        adjacent = 0
    if adjacent != 1:
        raise ValueError(
            f"{name} must have contiguous rows at one distance; got shape {list(x.shape)} with "
            f"strides {list(x.stride())}"
        )
    return stride


def check_affine(weight: Tensor, bias: Tensor, like: Tensor) -> None:
    """Raises ValueError where weight or bias is not a contiguous ``[C]`` beside like."""
    for name, parameter in (("weight", weight), ("bias", bias)):
        if (
            parameter.shape != like.shape[-1:]
            or not parameter.is_contiguous()
            or parameter.device != like.device
        ):
            raise ValueError(
                f"{name} must be a contiguous {list(like.shape[-1:])} on {like.device}; got "
                f"{list(parameter.shape)} with strides {list(parameter.stride())} on "
                f"{parameter.device}"
            )


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, x + residual, [mean, rstd])``, the last two empty where not asked for; y in dtype."""
    check_affine(weight, bias, x)
    stride_x, stride_residual = row_stride("x", x, x), 0
    width = x.shape[-1]
    rows, itemsize = x.numel() // width, x.itemsize
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed_dtype = x.dtype
    if residual is not None:
        stride_residual = row_stride("residual", residual, x)
        summed_dtype = torch.promote_types(x.dtype, residual.dtype)
        itemsize = min(itemsize, residual.itemsize)
    summed = torch.empty(
        x.shape if residual is not None else 0, dtype=summed_dtype, device=x.device
    )
    statistics = torch.empty(
        2, rows if save_statistics else 0, dtype=torch.float32, device=x.device
    )
    if rows:
        tile = configs.row_tile(width, itemsize)
        _layer_norm_fwd_kernel[(triton.cdiv(rows, tile.block_m),)](
            x, residual, weight, bias, y, summed, statistics,
            rows, width, stride_x, stride_residual, eps,
            HAS_RESIDUAL=residual is not None, SAVE_STATISTICS=save_statistics,
            BLOCK_M=tile.block_m, CHUNKS=tile.chunks, LANES=tile.lanes, num_warps=tile.warps,
        )  # fmt: skip
    return y, summed, statistics


def layer_norm_bwd(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    need_dx: bool,
    cast: torch.dtype | None,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dx in dtype cast, dweight, dbias)``, empty where not needed.

    x is what was normalised, with ``statistics`` as `layer_norm_fwd` saved them. dx has its dtype
    and includes ``dsummed``, the gradient that reaches x beside the normalisation.
    """
    check_affine(weight, weight, x)
    width = x.shape[-1]
    rows = x.numel() // width
    if statistics.shape != (2, rows):
        raise ValueError(f"statistics must be [2, {rows}]; got {list(statistics.shape)}")
    stride_dy, stride_x = row_stride("dy", dy, x), row_stride("x", x, x)
    stride_dsummed = 0 if dsummed is None else row_stride("dsummed", dsummed, x)
    device = x.device
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=device)
    dx_cast = torch.empty(x.shape if need_dx and cast else 0, dtype=cast or x.dtype, device=device)
    make = torch.empty if rows else torch.zeros
    dweight, dbias = (
        make(width if need_affine else 0, dtype=weight.dtype, device=device) for _ in range(2)
    )
    if not rows:
        return dx, dx_cast, dweight, dbias
    tile = configs.layer_norm_bwd_tile(width, max(dy.itemsize, x.itemsize))
    programs = current_target(device).multiprocessors * tile.programs
    rows_per_program = triton.cdiv(triton.cdiv(rows, tile.block_m), programs) * tile.block_m
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty(
        2, programs if need_affine else 0, width, dtype=torch.float32, device=device
    )
    _layer_norm_bwd_kernel[(programs,)](
        dy, dsummed, x, weight, statistics, dx, dx_cast, partial,
        rows, width, rows_per_program, stride_dy, stride_dsummed, stride_x,
        HAS_DSUMMED=dsummed is not None, NEED_DX=need_dx, NEED_CAST=need_dx and cast is not None,
        NEED_AFFINE=need_affine, WHOLE_TILE_SUMS=tile.whole_tile_sums,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if need_affine:
        block_m, block_n, num_warps = configs.LAYER_NORM_AFFINE_SUM
        _affine_sum_kernel[(triton.cdiv(width, block_n), 2)](
            partial, dweight, dbias, programs, width,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    return dx, dx_cast, dweight, dbias
