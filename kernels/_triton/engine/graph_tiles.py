"""The kernels of a step of 8 to 256 rows, one a phase of `tiles.py`, and their launchers.

Under programmatic dependent launch they wait at once: behind the wait stand pipelined loops, whose
first loads must not come before it.
"""

import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.engine import configs, tiles
from gpt2fast.kernels._triton.engine.barrier import allow_next, wait_for_previous
from gpt2fast.kernels._triton.target import current_target
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import StepBuffers
from gpt2fast.kernels.packing import DecodeWeights, Matrix


@triton.jit(do_not_specialize=["layer", "norm_layer"])
def _normalize_kernel(
    layer, x_ptr, parts_ptr, bias_ptr, norm_layer, norm_ptr, y_ptr, eps,
    C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`tiles.normalize`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    tiles.normalize(
        tl.program_id(0), tl.num_programs(0),
        layer, x_ptr, parts_ptr, bias_ptr, norm_layer, norm_ptr, y_ptr, eps,
        C, ROWS, PARTS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "slots", "capacity"])
def _qkv_tiles_kernel(
    layer, y_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
    slots_ptr, offsets_ptr, lengths_ptr, slots, capacity,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`tiles.qkv_tiles`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    tiles.qkv_tiles(
        tl.program_id(0), tl.num_programs(0),
        layer, y_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
        slots_ptr, offsets_ptr, lengths_ptr, slots, capacity,
        C, HEADS, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _fc_tiles_kernel(
    layer, y_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`tiles.fc_tiles`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    tiles.fc_tiles(
        tl.program_id(0), tl.num_programs(0),
        layer, y_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr,
        C, N, ROWS, BITS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _part_tiles_kernel(
    layer, y_ptr, weight_ptr, scale_ptr, parts_ptr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`tiles.part_tiles`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    tiles.part_tiles(
        tl.program_id(0), tl.num_programs(0),
        layer, y_ptr, weight_ptr, scale_ptr, parts_ptr,
        N, K, ROWS, BITS, PARTS, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit
def _head_tiles_kernel(
    y_ptr, weight_ptr, scale_ptr, logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GREEDY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`tiles.head_tiles`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    tiles.head_tiles(
        tl.program_id(0), tl.num_programs(0),
        y_ptr, weight_ptr, scale_ptr, logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr,
        C, N, ROWS, BITS, GREEDY, BLOCK_N, BLOCK_M, BLOCK_K, STAGES,
    )  # fmt: skip


def _tile(
    matrix: Matrix, rows: int, element_size: int
) -> tuple[configs.DecodeTile, dict[str, int]]:
    tile = configs.decode_tile(rows, matrix.bits, element_size)
    constants = {
        "ROWS": rows,
        "BITS": matrix.bits,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": min(max(16, rows), configs.DECODE_TILE_ROWS),
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    return tile, constants


def _tiles(outputs: int, constants: dict[str, int]) -> int:
    """How many tiles a product has."""
    rows = triton.cdiv(constants["ROWS"], constants["BLOCK_M"])
    return rows * triton.cdiv(outputs, constants["BLOCK_N"])


def parts_of(matrix: Matrix, rows: int, element_size: int) -> int:
    """PARTS of `launch_parts`."""
    tile, _ = _tile(matrix, rows, element_size)
    target = current_target(matrix.data.device)
    return configs.decode_parts(matrix.outputs, matrix.inputs, rows, tile, target)


def head_shares(head: Matrix, rows: int, element_size: int) -> int:
    """How many programs share a row's logits."""
    tile, constants = _tile(head, rows, element_size)
    most = configs.DECODE_HEAD_PROGRAMS * current_target(head.data.device).multiprocessors
    most = max(1, most * constants["BLOCK_M"] // max(16, rows))
    return min(most, triton.cdiv(head.outputs, tile.block_n))


def launch_normalize(
    buffers: StepBuffers, before: Matrix | None, layer: int, norm: Tensor, norm_layer: int,
    eps: float, pdl: bool,
) -> None:  # fmt: skip
    """``residual``, and the ``parts`` of the product before in its layer, to ``normed``."""
    width, rows = buffers.normed.shape[1], buffers.rows
    parts = 0 if before is None else parts_of(before, rows, buffers.normed.element_size())
    block = triton.next_power_of_2(width)
    _normalize_kernel[(rows,)](
        layer, buffers.residual, buffers.parts, None if before is None else before.bias,
        norm_layer, norm, buffers.normed, eps,
        C=width, ROWS=rows, PARTS=parts, BLOCK=block, PDL=pdl,
        num_warps=max(4, min(16, block // 512)), launch_pdl=pdl,
    )  # fmt: skip


def launch_qkv_tiles(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers, layer: int,
    pdl: bool,
) -> None:  # fmt: skip
    """``normed`` to ``query`` and the cache."""
    matrix = weights.qkv
    _, constants = _tile(matrix, buffers.rows, buffers.normed.element_size())
    _qkv_tiles_kernel[(_tiles(matrix.outputs, constants),)](
        layer, buffers.normed, *matrix.operands, buffers.query, cache,
        buffers.slots, buffers.offsets, state.lengths, cache.shape[2], cache.shape[4],
        C=matrix.inputs, HEADS=weights.heads, PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_fc_tiles(weights: DecodeWeights, buffers: StepBuffers, layer: int, pdl: bool) -> None:
    """``normed`` to ``inner``."""
    matrix = weights.fc
    _, constants = _tile(matrix, buffers.rows, buffers.normed.element_size())
    _fc_tiles_kernel[(_tiles(matrix.outputs, constants),)](
        layer, buffers.normed, *matrix.operands, buffers.inner,
        C=matrix.inputs, N=matrix.outputs, PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_parts(
    matrix: Matrix, inputs: Tensor, buffers: StepBuffers, layer: int, pdl: bool
) -> None:
    """``inputs`` ``[M, K]`` to ``parts``."""
    _, constants = _tile(matrix, buffers.rows, inputs.element_size())
    parts = parts_of(matrix, buffers.rows, inputs.element_size())
    _part_tiles_kernel[(parts * _tiles(matrix.outputs, constants),)](
        layer, inputs, *matrix.operands[:2], buffers.parts,
        N=matrix.outputs, K=matrix.inputs, PARTS=parts, PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_head_tiles(
    weights: DecodeWeights, buffers: StepBuffers, greedy: bool, pdl: bool
) -> None:
    """``normed`` to ``logits`` or ``best_*``."""
    matrix, element_size = weights.head, buffers.normed.element_size()
    _, constants = _tile(matrix, buffers.rows, element_size)
    shares = buffers.best_value.shape[1]
    _head_tiles_kernel[(shares * triton.cdiv(buffers.rows, constants["BLOCK_M"]),)](
        buffers.normed, *matrix.operands[:2], buffers.logits,
        buffers.best_value, buffers.best_index, buffers.best_sum,
        C=matrix.inputs, N=matrix.outputs, GREEDY=greedy, PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip
