"""Matrix products with the work around them in their epilogue: out = epilogue(A B).

A is ``[M, K]``; B is ``[K, N]``, stored either way round: the published checkpoints' ``[in, out]``
weights are read as they are, and so are their transposes in backward passes. Sums are float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt2fast.kernels._triton import configs, target
from gpt2fast.kernels._triton.launch import cdiv, descriptor, launch
from gpt2fast.kernels._triton.matmul_epilogue import column_chunks, finish, finish_gelu_grad


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


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    a,
    b,
    bias_ptr,
    residual_ptr,
    pre_ptr,
    gelu_ptr,
    sums_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_a_row,
    stride_b_row,
    stride_residual_row,
    k_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU_GRAD: tl.constexpr,
    SAVE_GELU: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):
    """Tiles [BLOCK_M, BLOCK_N] of epilogue(A B), every num_programs-th of them (1-D grid).

    A: [M, K], B: [K, N] (stored [N, K] where B_TRANSPOSED): see `accumulate`. out, pre, gelu:
    contiguous [M, N]; bias: [N]; residual: [M, N] with rows at stride_residual_row; sums: float32
    [cdiv(M, BLOCK_M), N]. Epilogues: `finish`; `finish_gelu_grad` where GELU_GRAD. SPLIT: a tile
    is summed in parts of k_per_split columns of A, stored without epilogue in out, float32
    [splits, M, N]. Rows past M and columns past N are masked.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    work = tiles * tl.cdiv(K, k_per_split) if SPLIT else tiles
    # Flattened, the loop loads the next tile's first blocks while this one's are stored. Not by
    # pointers: with two sets of them the registers would not do.
    for index in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=USE_TMA):
        tile_m, tile_n = tile_position(index % tiles if SPLIT else index, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        start_k = index // tiles * k_per_split if SPLIT else 0
        end_k = tl.minimum(start_k + k_per_split, K) if SPLIT else K
        acc = accumulate(
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
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            B_TRANSPOSED,
            USE_TMA,
        )
        # By 64 columns, so that little else is in registers beside the sums.
        chunks = column_chunks(acc, BLOCK_M, BLOCK_N)
        CHUNK_N: tl.constexpr = BLOCK_N // len(chunks)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        for chunk in tl.static_range(len(chunks)):
            offs_n = start_n + chunk * CHUNK_N + tl.arange(0, CHUNK_N)
            if SPLIT:
                part_ptr = out_ptr + (index // tiles).to(tl.int64) * M * N
                part_ptrs = part_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
                tl.store(part_ptrs, chunks[chunk], mask=mask)
            elif GELU_GRAD:
                finish_gelu_grad(
                    chunks[chunk],
                    tile_m,
                    offs_m,
                    offs_n,
                    M,
                    N,
                    pre_ptr,
                    gelu_ptr,
                    sums_ptr,
                    out_ptr,
                    SAVE_GELU,
                    SUM_ROWS,
                )
            else:
                finish(
                    chunks[chunk],
                    offs_m,
                    offs_n,
                    M,
                    N,
                    bias_ptr,
                    residual_ptr,
                    stride_residual_row,
                    pre_ptr,
                    out_ptr,
                    HAS_BIAS,
                    SAVE_PRE,
                    GELU,
                    HAS_RESIDUAL,
                )


@triton.jit(do_not_specialize=["M", "splits"])
def _add_splits_kernel(
    part_ptr,
    bias_ptr,
    residual_ptr,
    pre_ptr,
    out_ptr,
    M,
    N,
    stride_residual_row,
    splits,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Add up the parts of a split product, in order, and finish as `_matmul_kernel` would.

    Grid (M, cdiv(N, BLOCK_N)): BLOCK_N columns of one row a program, those past N masked. part:
    float32 [splits, M, N].
    """
    offs_m = tl.program_id(0) + tl.arange(0, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ptrs = part_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    acc = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptrs, mask=(offs_n < N)[None, :], other=0.0)
        part_ptrs += M.to(tl.int64) * N
    finish(
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
        HAS_BIAS,
        SAVE_PRE,
        GELU,
        HAS_RESIDUAL,
    )


_FLAGS = (
    *("SPLIT", "HAS_BIAS", "SAVE_PRE", "GELU", "HAS_RESIDUAL"),
    *("GELU_GRAD", "SAVE_GELU", "SUM_ROWS"),
)
_UNSET = dict.fromkeys(_FLAGS, False)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activate: bool = False,
    save_pre: bool = False,
) -> tuple[Tensor, Tensor]:
    """``a @ b + bias``, or its `gelu` where ``activate``, ``+ residual``; and ``a @ b + bias``.

    Args:
        a: ``[M, K]`` with unit stride along K.
        b: ``[K, N]`` of a's dtype, with unit stride along either.
        bias: ``[N]``, contiguous.
        residual: ``[M, N]`` with unit stride along N.
        activate: apply the tanh-form GELU.
        save_pre: give the second result as well; without it, that one is empty.

    Returns:
        ``[M, N]`` in the dtype that a and residual promote to, and ``[M, N]`` in a's dtype.
    """
    rows, columns, inner = _check(a, b)
    dtype = a.dtype
    if residual is not None:
        _check_fits("residual", residual, (rows, columns), a.device)
        dtype = torch.promote_types(dtype, residual.dtype)
    if bias is not None:
        _check_fits("bias", bias, (columns,), a.device)
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    pre = torch.empty((rows, columns) if save_pre else 0, dtype=a.dtype, device=a.device)
    stride_residual_row = 0 if residual is None else residual.stride(0)
    epilogue = {
        "HAS_BIAS": bias is not None,
        "SAVE_PRE": save_pre,
        "GELU": activate,
        "HAS_RESIDUAL": residual is not None,
    }
    chip = target.current_target(a.device)
    tile = _tile(a, b, chip, light=True)
    splits = configs.matmul_splits(rows, columns, inner, tile, chip)
    if splits == 1:
        pointers = (bias, residual, pre, None, None, out)
        _launch(tile, chip, a, b, pointers, stride_residual_row, inner, **epilogue)
        return out, pre
    # In whole blocks of K, so that tile copies do not reach into the next part.
    k_per_split = cdiv(cdiv(inner, splits), tile.block_k) * tile.block_k
    splits = cdiv(inner, k_per_split)
    parts = torch.empty(splits, rows, columns, dtype=torch.float32, device=a.device)
    _launch(tile, chip, a, b, (None,) * 5 + (parts,), 0, k_per_split, SPLIT=True)
    block = configs.ADD_SPLITS_BLOCK
    launch(
        _add_splits_kernel,
        (rows, cdiv(columns, block)),
        (parts, bias, residual, pre, out),
        (rows, columns, stride_residual_row, splits),
        BLOCK_N=block,
        num_warps=4,
        **epilogue,
    )
    return out, pre


def matmul_gelu_grad(
    a: Tensor, b: Tensor, pre: Tensor, *, save_gelu: bool, sum_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(a @ b) * gelu'(pre)``; ``gelu(pre)``; and the first result's sums over rows, in parts.

    Args:
        a: ``[M, K]`` with unit stride along K.
        b: ``[K, N]`` of a's dtype, with unit stride along either.
        pre: ``[M, N]`` of a's dtype, contiguous.
        save_gelu, sum_rows: give the second and the third result; without, they are empty.

    Returns:
        ``[M, N]`` and ``[M, N]`` in a's dtype; float32 ``[parts, N]``, for the caller to add up.
    """
    rows, columns, inner = _check(a, b)
    _check_fits("pre", pre, (rows, columns), a.device)
    if not pre.is_contiguous():
        raise ValueError(f"expected contiguous pre; got strides {pre.stride()}")
    chip = target.current_target(a.device)
    tile = _tile(a, b, chip)
    out = torch.empty_like(pre)
    value = torch.empty((rows, columns) if save_gelu else 0, dtype=a.dtype, device=a.device)
    parts = (cdiv(rows, tile.block_m), columns) if sum_rows else 0
    sums = torch.empty(parts, dtype=torch.float32, device=a.device)
    pointers = (None, None, pre, value, sums, out)
    flags = {"GELU_GRAD": True, "SAVE_GELU": save_gelu, "SUM_ROWS": sum_rows}
    _launch(tile, chip, a, b, pointers, 0, inner, **flags)
    return out, value, sums


def _check(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """M, N and K of a product that the kernel can do."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"cannot multiply shapes {list(a.shape)} and {list(b.shape)}")
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"expected one dtype and device; got {a.dtype} on {a.device}, {b.dtype} on {b.device}"
        )
    if a.stride(1) != 1 or 1 not in b.stride():
        raise ValueError(f"expected rows of unit stride; got strides {a.stride()} and {b.stride()}")
    return a.shape[0], b.shape[1], a.shape[1]


def _check_fits(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape or tensor.stride(-1) != 1 or tensor.device != device:
        raise ValueError(
            f"expected {name} {list(shape)} on {device} with unit stride; got "
            f"{list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
        )


def _stored(b: Tensor) -> tuple[Tensor, bool]:
    """b as it is stored, and whether that is transposed."""
    return (b, False) if b.stride(1) == 1 else (b.t(), True)


def _tile(a: Tensor, b: Tensor, chip: target.Target, light: bool = False) -> configs.MatmulTile:
    copied = chip.has_tma and _can_be_copied(a) and _can_be_copied(_stored(b)[0])
    return configs.matmul_tile(a.shape[0], b.shape[1], a.element_size(), copied, chip, light)


def _can_be_copied(rows: Tensor) -> bool:
    """Whether the tensor memory accelerator can address it: 16-byte steps from row to row."""
    step = rows.stride(0)
    aligned = step * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    return aligned and step >= rows.shape[1]


def _descriptor(rows: Tensor, block: list[int]) -> TensorDescriptor:
    return descriptor(rows, rows.shape, rows.stride(), block)


def _launch(
    tile: configs.MatmulTile,
    chip: target.Target,
    a: Tensor,
    b: Tensor,
    pointers: tuple[Tensor | None, ...],
    stride_residual_row: int,
    k_per_split: int,
    **flags: bool,
) -> None:
    """`_matmul_kernel` with the tile; ``pointers``: bias, residual, pre, gelu, sums, out."""
    (rows, inner), columns = a.shape, b.shape[1]
    stored, transposed = _stored(b)
    operands: tuple[Any, Any] = (a, stored)
    if tile.use_tma:
        block_b = [tile.block_k, tile.block_n]
        operands = (
            _descriptor(a, [tile.block_m, tile.block_k]),
            _descriptor(stored, block_b[::-1] if transposed else block_b),
        )
    work = cdiv(rows, tile.block_m) * cdiv(columns, tile.block_n)
    work *= cdiv(inner, k_per_split)
    launch(
        _matmul_kernel,
        (min(work, chip.multiprocessors * tile.programs),),
        (*operands, *pointers),
        (rows, columns, inner, a.stride(0), stored.stride(0), stride_residual_row, k_per_split),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=configs.MATMUL_GROUP_M,
        B_TRANSPOSED=transposed,
        USE_TMA=tile.use_tma,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **(_UNSET | flags),
    )
