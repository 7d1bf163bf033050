"""A decoding step as a chain of kernels, one a phase: what a CUDA graph captures.

The launchers take everything static from the buffers and the weights and launch; they allocate
nothing and wait for nothing. Under programmatic dependent launch (PDL) a kernel starts while the
one before it is ending: it asks for its first weights, which nobody writes, and only then waits.
"""

import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.engine import attention, configs, graph_tiles, phases
from gpt2fast.kernels._triton.engine.barrier import allow_next, wait_for_previous
from gpt2fast.kernels._triton.target import current_target
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import FEW_ROWS, StepBuffers
from gpt2fast.kernels.packing import DecodeWeights, Matrix


@triton.jit(do_not_specialize=["capacity", "vocab_size", "positions"])
def _embed_kernel(
    tokens_ptr, slots_ptr, offsets_ptr, lengths_ptr, wte_ptr, wpe_ptr, x_ptr,
    capacity, vocab_size, positions,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`phases.embed`; grid: (programs,)."""
    allow_next(PDL)
    wait_for_previous(PDL)
    phases.embed(
        tl.program_id(0), tl.num_programs(0),
        tokens_ptr, slots_ptr, offsets_ptr, lengths_ptr, wte_ptr, wpe_ptr, x_ptr,
        capacity, vocab_size, positions, C, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "slots", "capacity"])
def _qkv_kernel(
    layer, x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
    slots_ptr, offsets_ptr, lengths_ptr, slots, capacity, eps,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
    ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`phases.qkv`; grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = phases.first_weights(
        program, programs, weight_ptr, scale_ptr, bias_ptr, norm_ptr, layer,
        3 * C, C, BITS, WARPS, REPEAT, UNROLL, ONCE, KEEP,
    )  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    phases.qkv(
        program, programs, layer, first,
        x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, query_ptr, cache_ptr,
        slots_ptr, offsets_ptr, lengths_ptr, slots, capacity, eps,
        C, HEADS, ROWS, BITS, WARPS, REPEAT, UNROLL, KEEP, ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _fc_kernel(
    layer, x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr, eps,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
    ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`phases.fc`; grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = phases.first_weights(
        program, programs, weight_ptr, scale_ptr, bias_ptr, norm_ptr, layer,
        N, C, BITS, WARPS, REPEAT, UNROLL, ONCE, KEEP,
    )  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    phases.fc(
        program, programs, layer, first,
        x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, inner_ptr, eps,
        C, N, ROWS, BITS, WARPS, REPEAT, UNROLL, KEEP, ONCE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _add_kernel(
    layer, input_ptr, sums_ptr, weight_ptr, scale_ptr, bias_ptr, x_ptr,
    N: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`phases.add`; grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = phases.first_weights(
        program, programs, weight_ptr, scale_ptr, bias_ptr, None, layer,
        N, K, BITS, WARPS, REPEAT, UNROLL, ONCE, False,
    )  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    phases.add(
        program, programs, layer, first,
        input_ptr, sums_ptr, weight_ptr, scale_ptr, bias_ptr, x_ptr,
        N, K, HEADS, SPLITS, ROWS, BITS, WARPS, REPEAT, UNROLL, ONCE,
    )  # fmt: skip


@triton.jit
def _head_kernel(
    x_ptr, norm_ptr, weight_ptr, scale_ptr,
    logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr, eps,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GREEDY: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`phases.head`; grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = phases.first_weights(
        program, programs, weight_ptr, scale_ptr, None, None, program * 0,
        N, C, BITS, WARPS, REPEAT, UNROLL, False, False,
    )  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    phases.head(
        program, programs, first, x_ptr, norm_ptr, weight_ptr, scale_ptr,
        logits_ptr, best_value_ptr, best_index_ptr, best_sum_ptr, eps,
        C, N, ROWS, BITS, GREEDY, WARPS, REPEAT, UNROLL, KEEP,
    )  # fmt: skip


def _rows_launch(matrix: Matrix, rows: int) -> tuple[int, dict[str, int]]:
    """How many programs multiply the matrix with so many rows, and their tile."""
    target = current_target(matrix.data.device)
    tile = configs.decode_rows_tile(matrix.outputs, matrix.inputs, rows, target)
    needed = triton.cdiv(matrix.outputs, tile.warps * tile.repeat)
    programs = min(needed, tile.programs * target.multiprocessors)
    constants = {
        "ROWS": rows,
        "BITS": matrix.bits,
        "WARPS": tile.warps,
        "REPEAT": tile.repeat,
        "UNROLL": tile.unroll,
        "ONCE": programs == needed,
        "num_warps": tile.warps,
    }
    return programs, constants


def shares(weights: DecodeWeights, rows: int) -> tuple[int, int]:
    """Parts of a split product, and programs that share a row's logits: sizes of the buffers."""
    if rows <= FEW_ROWS:
        return 1, _rows_launch(weights.head, rows)[0]
    element_size = weights.wte.element_size()
    parts = (graph_tiles.parts_of(m, rows, element_size) for m in (weights.out, weights.proj))
    return max(parts), graph_tiles.head_shares(weights.head, rows, element_size)


def launch_embed(
    weights: DecodeWeights, state: DecodeState, buffers: StepBuffers, pdl: bool
) -> None:
    """Token rows to ``residual``."""
    (vocab_size, width), positions = weights.wte.shape, weights.wpe.shape[0]
    block = configs.DECODE_EMBED_BLOCK
    _embed_kernel[(buffers.rows * triton.cdiv(width, block),)](
        state.tokens, buffers.slots, buffers.offsets, state.lengths, weights.wte, weights.wpe,
        buffers.residual, state.tokens.shape[1] - 1, vocab_size, positions,
        C=width, ROWS=buffers.rows, BLOCK=block, num_warps=4,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


def launch_qkv(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers, layer: int,
    pdl: bool,
) -> None:  # fmt: skip
    """``residual`` to ``query`` and the cache."""
    matrix, width = weights.qkv, weights.qkv.inputs
    programs, constants = _rows_launch(matrix, buffers.rows)
    _qkv_kernel[(programs,)](
        layer,
        buffers.residual, weights.ln_1, *matrix.operands,
        buffers.query, cache, buffers.slots, buffers.offsets, state.lengths,
        cache.shape[2], cache.shape[4], weights.eps,
        C=width, HEADS=weights.heads, KEEP=configs.decode_rows_keep(buffers.rows, width),
        PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_fc(weights: DecodeWeights, buffers: StepBuffers, layer: int, pdl: bool) -> None:
    """``residual`` to ``inner``."""
    matrix, width = weights.fc, weights.fc.inputs
    programs, constants = _rows_launch(matrix, buffers.rows)
    _fc_kernel[(programs,)](
        layer,
        buffers.residual, weights.ln_2, *matrix.operands, buffers.inner,
        weights.eps, C=width, N=matrix.outputs,
        KEEP=configs.decode_rows_keep(buffers.rows, width), PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_add(
    matrix: Matrix, heads: int, inputs: Tensor, buffers: StepBuffers, layer: int, pdl: bool
) -> None:
    """``inputs``, or ``partial`` where those are it, to what is added to ``residual``."""
    programs, constants = _rows_launch(matrix, buffers.rows)
    merge = inputs is buffers.partial
    _add_kernel[(programs,)](
        layer,
        inputs, buffers.sums, *matrix.operands, buffers.residual,
        N=matrix.outputs, K=matrix.inputs, HEADS=heads, SPLITS=buffers.splits if merge else 1,
        PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def launch_head(weights: DecodeWeights, buffers: StepBuffers, greedy: bool, pdl: bool) -> None:
    """``residual`` to ``logits`` or ``best_*``."""
    matrix, width = weights.head, weights.head.inputs
    programs, constants = _rows_launch(matrix, buffers.rows)
    del constants["ONCE"]  # its programs go over it in a loop
    _head_kernel[(programs,)](
        buffers.residual, weights.ln_f, *matrix.operands[:2], buffers.logits,
        buffers.best_value, buffers.best_index, buffers.best_sum, weights.eps,
        C=width, N=matrix.outputs, GREEDY=greedy,
        KEEP=configs.decode_rows_keep(buffers.rows, width), PDL=pdl, launch_pdl=pdl, **constants,
    )  # fmt: skip


def evaluate(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers,
    greedy: bool, pdl: bool,
) -> None:  # fmt: skip
    """All phases from the tokens to the logits: see `gpt2fast.kernels.decode_step.evaluate`."""
    launch_embed(weights, state, buffers, pdl)
    phases_of_rows = _few_rows if buffers.rows <= FEW_ROWS else _many_rows
    phases_of_rows(weights, state, cache, buffers, greedy, pdl)


def _few_rows(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers,
    greedy: bool, pdl: bool,
) -> None:  # fmt: skip
    merges = buffers.splits > 1
    merge_here = merges and configs.decode_rows_keep(buffers.rows, weights.out.inputs)
    for layer in range(weights.qkv.data.shape[0]):
        launch_qkv(weights, state, cache, buffers, layer, pdl)
        attention.launch_attend(weights, state, cache, buffers, layer, pdl)
        if merges and not merge_here:
            attention.launch_combine(weights, buffers, pdl)
        heads = buffers.partial if merge_here else buffers.merged
        launch_add(weights.out, weights.heads, heads, buffers, layer, pdl)
        launch_fc(weights, buffers, layer, pdl)
        launch_add(weights.proj, weights.heads, buffers.inner, buffers, layer, pdl)
    launch_head(weights, buffers, greedy, pdl)


def _many_rows(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers,
    greedy: bool, pdl: bool,
) -> None:  # fmt: skip
    eps = weights.eps
    before = None
    for layer in range(weights.qkv.data.shape[0]):
        graph_tiles.launch_normalize(
            buffers, before, max(layer - 1, 0), weights.ln_1, layer, eps, pdl
        )
        graph_tiles.launch_qkv_tiles(weights, state, cache, buffers, layer, pdl)
        attention.launch_attend(weights, state, cache, buffers, layer, pdl)
        if buffers.splits > 1:
            attention.launch_combine(weights, buffers, pdl)
        graph_tiles.launch_parts(weights.out, buffers.merged, buffers, layer, pdl)
        graph_tiles.launch_normalize(buffers, weights.out, layer, weights.ln_2, layer, eps, pdl)
        graph_tiles.launch_fc_tiles(weights, buffers, layer, pdl)
        graph_tiles.launch_parts(weights.proj, buffers.inner, buffers, layer, pdl)
        before = weights.proj
    graph_tiles.launch_normalize(buffers, before, layer, weights.ln_f, 0, eps, pdl)
    graph_tiles.launch_head_tiles(weights, buffers, greedy, pdl)
