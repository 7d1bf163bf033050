"""LayerNorm, its residual-add form, and their backward pass.

A row is read once and kept in registers, as CHUNKS tiles ``[BLOCK_M, LANES]`` (a tuple), column
``chunk * LANES + lane``. LANES is what the warps of one row read with 16 bytes a thread: mostly one
warp, whose sums then need neither shared memory nor a barrier, and CHUNKS any number, so that 768
columns are three tiles of 256 and not a power of two.

Forward: statistics take two passes over the registers (the mean, then the centred squares), so a
large mean costs no accuracy.

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
from gpt2fast.kernels._triton.launch import cdiv, launch
from gpt2fast.kernels._triton.target import current_target


@triton.jit
def append_tile(tiles, tile):
    """The tuple with one more."""
    return tiles + (tile,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def load_row_tiles(
    ptr, mask_m, width, BLOCK_M: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr
):
    """The tiles of rows that begin at ``ptr`` ``[BLOCK_M, 1]``, 0 where masked, in their dtype."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        # In the tile's shape even where all rows are one: each warp loads what it needs.
        offs_n = tl.broadcast_to(chunk * LANES + tl.arange(0, LANES)[None, :], (BLOCK_M, LANES))
        tiles = append_tile(tiles, tl.load(ptr + offs_n, mask=mask_m & (offs_n < width), other=0.0))
    return tiles


@triton.jit
def store_row_tile(ptr, tile, mask_m, width, chunk: tl.constexpr, LANES: tl.constexpr):
    """Stores tile ``chunk`` of the rows that begin at ``ptr`` ``[BLOCK_M, 1]``, in their dtype."""
    offs_n = chunk * LANES + tl.arange(0, LANES)[None, :]
    tl.store(ptr + offs_n, tile.to(ptr.dtype.element_ty), mask=mask_m & (offs_n < width))


@triton.jit
def normalize_rows(
    x,
    offs_m,
    mask_m,
    weight_ptr,
    bias_ptr,
    y_ptr,
    statistics_ptr,
    rows,
    width,
    eps,
    SAVE_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Stores the LayerNorm of rows whose float32 tiles are ``x``, 0 where masked.

    offs_m, mask_m: ``[BLOCK_M, 1]``. weight_ptr, bias_ptr: ``[width]``. y_ptr: ``[rows, width]``,
    contiguous. statistics_ptr: float32 ``[2, rows]``, the mean and 1 / sqrt(var + eps) of every
    row, stored where SAVE_STATISTICS.
    """
    weight = load_row_tiles(weight_ptr, mask_m, width, BLOCK_M, LANES, CHUNKS)
    bias = load_row_tiles(bias_ptr, mask_m, width, BLOCK_M, LANES, CHUNKS)
    count = width.to(tl.float32)
    # [BLOCK_M, LANES]
    total = tl.zeros((BLOCK_M, LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += x[chunk]
    mean = tl.div_rn(tl.sum(total, 1, keep_dims=True), count)
    squares = tl.zeros((BLOCK_M, LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        mask_n = chunk * LANES + tl.arange(0, LANES)[None, :] < width
        centred = tl.where(mask_n, x[chunk] - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.div_rn(tl.sum(squares, 1, keep_dims=True), count) + eps)
    if SAVE_STATISTICS:
        tl.store(statistics_ptr + offs_m, mean, mask=mask_m)
        tl.store(statistics_ptr + rows + offs_m, rstd, mask=mask_m)
    row_ptr = y_ptr + offs_m.to(tl.int64) * width
    for chunk in tl.static_range(CHUNKS):
        z = (x[chunk] - mean) * rstd
        y = z * weight[chunk].to(tl.float32) + bias[chunk].to(tl.float32)
        store_row_tile(row_ptr, y, mask_m, width, chunk, LANES)


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
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """y = LayerNorm(x + residual) and the sum, for BLOCK_M rows; grid: (row blocks,).

    x_ptr, residual_ptr: ``[rows, width]`` with their strides. y_ptr, summed_ptr: the same,
    contiguous. The statistics are those of the sum as it is stored. Rows and columns are masked.
    """
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mask_m = offs_m < rows
    row = offs_m.to(tl.int64)
    loaded = load_row_tiles(x_ptr + row * stride_x_row, mask_m, width, BLOCK_M, LANES, CHUNKS)
    x = ()
    if HAS_RESIDUAL:
        residual = load_row_tiles(
            residual_ptr + row * stride_residual_row, mask_m, width, BLOCK_M, LANES, CHUNKS
        )
        for chunk in tl.static_range(CHUNKS):
            summed = loaded[chunk].to(tl.float32) + residual[chunk].to(tl.float32)
            summed = summed.to(summed_ptr.dtype.element_ty)
            store_row_tile(summed_ptr + row * width, summed, mask_m, width, chunk, LANES)
            x = append_tile(x, summed.to(tl.float32))
    else:
        for chunk in tl.static_range(CHUNKS):
            x = append_tile(x, loaded[chunk].to(tl.float32))
    normalize_rows(
        x, offs_m, mask_m, weight_ptr, bias_ptr, y_ptr, statistics_ptr, rows, width, eps,
        SAVE_STATISTICS, BLOCK_M, LANES, CHUNKS,
    )  # fmt: skip


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
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of a range of rows, and their share of dweight and dbias.

    Grid: (programs,). dy_ptr, dsummed_ptr, x_ptr: ``[rows, width]`` with their strides.
    weight_ptr: ``[width]``. statistics_ptr: float32 ``[2, rows]``. dx_ptr and dx_cast_ptr (dx in
    another dtype): ``[rows, width]``, contiguous. partial_ptr: float32 ``[2, programs, width]``.
    Rows and columns are masked: what lies outside counts as dy = 0.
    """
    pid = tl.program_id(0)
    scale = 1.0 / width.to(tl.float32)
    every = tl.full((BLOCK_M, 1), True, tl.int1)
    weight = load_row_tiles(weight_ptr, every, width, BLOCK_M, LANES, CHUNKS)
    # In the tile's shape: its rows lie in different threads, and are added up once, at the end.
    dweight = ()
    dbias = ()
    for _ in tl.static_range(CHUNKS):
        dweight = append_tile(dweight, tl.zeros((BLOCK_M, LANES), tl.float32))
        dbias = append_tile(dbias, tl.zeros((BLOCK_M, LANES), tl.float32))
    first = pid * rows_per_program
    for start in tl.range(first, min(first + rows_per_program, rows), BLOCK_M, num_stages=STAGES):
        offs_m = (start + tl.arange(0, BLOCK_M))[:, None]
        mask_m = offs_m < rows
        row = offs_m.to(tl.int64)
        dy = load_row_tiles(dy_ptr + row * stride_dy_row, mask_m, width, BLOCK_M, LANES, CHUNKS)
        x = load_row_tiles(x_ptr + row * stride_x_row, mask_m, width, BLOCK_M, LANES, CHUNKS)
        if HAS_DSUMMED:
            dsummed = load_row_tiles(
                dsummed_ptr + row * stride_dsummed_row, mask_m, width, BLOCK_M, LANES, CHUNKS
            )
        mean = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(statistics_ptr + rows + offs_m, mask=mask_m, other=0.0)
        z = ()
        sum_g = tl.zeros((BLOCK_M, LANES), tl.float32)
        sum_gz = tl.zeros((BLOCK_M, LANES), tl.float32)
        new_dweight = ()
        new_dbias = ()
        for chunk in tl.static_range(CHUNKS):
            z = append_tile(z, (x[chunk].to(tl.float32) - mean) * rstd)
            upstream = dy[chunk].to(tl.float32)
            g = upstream * weight[chunk].to(tl.float32)
            sum_g += g
            sum_gz += g * z[chunk]
            new_dweight = append_tile(new_dweight, dweight[chunk] + upstream * z[chunk])
            new_dbias = append_tile(new_dbias, dbias[chunk] + upstream)
        if NEED_AFFINE:
            dweight = new_dweight
            dbias = new_dbias
        if NEED_DX:
            mean_g = tl.sum(sum_g, 1, keep_dims=True) * scale
            mean_gz = tl.sum(sum_gz, 1, keep_dims=True) * scale
            for chunk in tl.static_range(CHUNKS):
                g = dy[chunk].to(tl.float32) * weight[chunk].to(tl.float32)
                dx = (g - mean_g - z[chunk] * mean_gz) * rstd
                if HAS_DSUMMED:
                    dx += dsummed[chunk].to(tl.float32)
                store_row_tile(dx_ptr + row * width, dx, mask_m, width, chunk, LANES)
                if NEED_CAST:
                    store_row_tile(dx_cast_ptr + row * width, dx, mask_m, width, chunk, LANES)
    if NEED_AFFINE:
        dweight_ptr = partial_ptr + pid.to(tl.int64) * width
        dbias_ptr = dweight_ptr + tl.num_programs(0).to(tl.int64) * width
        for chunk in tl.static_range(CHUNKS):
            offs_n = chunk * LANES + tl.arange(0, LANES)
            tl.store(dweight_ptr + offs_n, tl.sum(dweight[chunk], 0), mask=offs_n < width)
            tl.store(dbias_ptr + offs_n, tl.sum(dbias[chunk], 0), mask=offs_n < width)


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
        launch(
            _layer_norm_fwd_kernel, (cdiv(rows, tile.block_m),),
            (x, residual, weight, bias, y, summed, statistics),
            (rows, width, stride_x, stride_residual, eps),
            HAS_RESIDUAL=residual is not None, SAVE_STATISTICS=save_statistics,
            BLOCK_M=tile.block_m, LANES=tile.lanes, CHUNKS=tile.chunks, num_warps=tile.warps,
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
    tile, per_multiprocessor, stages = configs.layer_norm_bwd_tile(
        width, min(dy.itemsize, x.itemsize), max(dy.itemsize, x.itemsize)
    )
    programs = current_target(device).multiprocessors * per_multiprocessor
    rows_per_program = cdiv(cdiv(rows, tile.block_m), programs) * tile.block_m
    programs = cdiv(rows, rows_per_program)
    partial = torch.empty(
        2, programs if need_affine else 0, width, dtype=torch.float32, device=device
    )
    launch(
        _layer_norm_bwd_kernel, (programs,),
        (dy, dsummed, x, weight, statistics, dx, dx_cast, partial),
        (rows, width, rows_per_program, stride_dy, stride_dsummed, stride_x),
        HAS_DSUMMED=dsummed is not None, NEED_DX=need_dx, NEED_CAST=need_dx and cast is not None,
        NEED_AFFINE=need_affine, BLOCK_M=tile.block_m, LANES=tile.lanes, CHUNKS=tile.chunks,
        STAGES=stages, num_warps=tile.warps,
    )  # fmt: skip
    if need_affine:
        block_m, block_n, num_warps = configs.LAYER_NORM_AFFINE_SUM
        launch(
            _affine_sum_kernel, (cdiv(width, block_n), 2),
            (partial, dweight, dbias), (programs, width),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    return dx, dx_cast, dweight, dbias
