"""Whole decoding steps in one kernel, whose programs wait for each other between the phases.

Every program does its share of every phase (`phases.py`, `attention.py`, `sampling.py`), one phase
after the other, and meets the others at a grid barrier in between (`barrier.py`). What that buys
over a kernel a phase (`graph.py`): a barrier takes less time than a launch, and a program that has
arrived asks for its first weights of the next phase before it waits. With one program a
multiprocessor these are, for the smaller models, all that it will multiply there. What does not
fit into registers is asked for from L2, one phase earlier.

All programs must be resident at a time: the launch is cooperative, which refuses any other.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.engine import configs, phases, sampling
from gpt2fast.kernels._triton.engine.attention import attention_phase, combine_phase
from gpt2fast.kernels._triton.engine.barrier import arrive, first_epoch, hold, prefetch, wait
from gpt2fast.kernels._triton.engine.linear import at_once, share_of
from gpt2fast.kernels._triton.layer_norm import append_tile
from gpt2fast.kernels._triton.target import Target, current_target
from gpt2fast.kernels.decode_state import RUNNING, DecodeState
from gpt2fast.kernels.decode_step import StepBuffers
from gpt2fast.kernels.packing import DecodeWeights

_RUNNING = tl.constexpr(RUNNING)


class _Weights(NamedTuple):
    """`DecodeWeights`; a matrix is (data, scale, bias)."""

    wte: Any
    wpe: Any
    ln_1: Any
    ln_2: Any
    ln_f: Any
    qkv: Any
    out: Any
    fc: Any
    proj: Any
    head: Any
    scales: Any


class _State(NamedTuple):
    """`DecodeState`, as far as a step reads and writes it."""

    tokens: Any
    lengths: Any
    limits: Any
    eos: Any
    status: Any
    seen: Any
    scored: Any
    log_probs: Any
    prefix_slots: Any
    prefix_lengths: Any


class _Buffers(NamedTuple):
    """`StepBuffers`, as far as few rows need them."""

    slots: Any
    offsets: Any
    residual: Any
    query: Any
    merged: Any
    inner: Any
    partial: Any
    sums: Any
    logits: Any
    best_value: Any
    best_index: Any
    best_sum: Any
    chosen: Any
    chosen_log_probs: Any


@triton.jit
def _meet(counter_ptr, epoch, PROGRAMS: tl.constexpr):
    """A whole barrier; nothing where there is one program."""
    if PROGRAMS > 1:
        arrive(counter_ptr)
        epoch = wait(counter_ptr, epoch, PROGRAMS)
    return epoch


@triton.jit
def _meet_with_weights(
    counter_ptr, epoch, program, matrix, norm_ptr, layer,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, PROGRAMS: tl.constexpr,
    WARPS: tl.constexpr, REPEAT: tl.constexpr, UNROLL: tl.constexpr, ONCE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A barrier, and the first weights of the phase behind it, asked for before the waiting."""
    if PROGRAMS > 1:
        arrive(counter_ptr)
    loaded = phases.first_weights(
        program, PROGRAMS, matrix[0], matrix[1], matrix[2], norm_ptr, layer,
        N, K, BITS, WARPS, REPEAT, UNROLL, ONCE, NORM,
    )  # fmt: skip
    first = loaded
    if PROGRAMS > 1:
        epoch = wait(counter_ptr, epoch, PROGRAMS)
        first = ()
        for index in tl.static_range(len(loaded)):
            first = append_tile(first, hold(loaded[index]))
    return epoch, first


@triton.jit
def _prefetch(
    program, matrix, layer,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, PROGRAMS: tl.constexpr,
    MOST: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Ask for the first MOST bytes of the program's weights of a layer to be brought into L2."""
    if PROGRAMS > 1:
        ROW: tl.constexpr = K * BITS // 8
        low, high = share_of(program, PROGRAMS, N)
        begin = low * ROW // 16 * 16
        size = tl.minimum(high * ROW - begin, MOST) // 16 * 16
        ptr = matrix[0].to(tl.pointer_type(tl.int8)) + layer.to(tl.int64) * (N * ROW)
        prefetch(ptr + begin, size, BULK)


@triton.jit
def _choose_best(
    counter_ptr, epoch, program, state, buffers, capacity,
    V: tl.constexpr, ROWS: tl.constexpr, DRAFTS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The likeliest token for every row, and what counts of them into the state."""
    sampling.select_best(
        program, PROGRAMS, buffers.best_value, buffers.best_index, buffers.best_sum,
        buffers.slots, state.status, buffers.chosen, buffers.chosen_log_probs,
        ROWS, PROGRAMS, triton.next_power_of_2(PROGRAMS),
    )  # fmt: skip
    if DRAFTS > 0:
        epoch = _meet(counter_ptr, epoch, PROGRAMS)
    else:
        tl.debug_barrier()  # without drafts a program commits what it has chosen
    sampling.commit(
        program, PROGRAMS, buffers.chosen, buffers.chosen_log_probs, buffers.slots,
        state.tokens, state.lengths, state.limits, state.eos, state.status, state.seen,
        state.scored, state.log_probs, capacity, V, ROWS, DRAFTS,
    )  # fmt: skip
    tl.debug_barrier()
    return epoch


@triton.jit
def _any_runs(slots_ptr, status_ptr, ROWS: tl.constexpr):
    """Whether a row's slot is RUNNING."""
    slots = tl.load(slots_ptr + tl.arange(0, ROWS))
    status = tl.load(status_ptr + slots, mask=slots >= 0, other=-1)
    return tl.max((status == _RUNNING).to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=["steps", "layers", "slots", "capacity", "positions"])
def _decode_kernel(
    counter_ptr, weights, state, buffers, cache_ptr, steps, layers, slots, capacity, positions, eps,
    C: tl.constexpr, F: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, MERGE: tl.constexpr, KEEP: tl.constexpr,
    GREEDY: tl.constexpr, DRAFTS: tl.constexpr, NGRAM: tl.constexpr,
    BITS: tl.constexpr, HEAD_BITS: tl.constexpr, PROGRAMS: tl.constexpr, WARPS: tl.constexpr,
    QKV_REPEAT: tl.constexpr, QKV_UNROLL: tl.constexpr,
    OUT_REPEAT: tl.constexpr, OUT_UNROLL: tl.constexpr,
    FC_REPEAT: tl.constexpr, FC_UNROLL: tl.constexpr,
    PROJ_REPEAT: tl.constexpr, PROJ_UNROLL: tl.constexpr,
    HEAD_REPEAT: tl.constexpr, HEAD_UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    COMBINE_BLOCK: tl.constexpr, PROPOSE_BLOCK: tl.constexpr,
    MOST: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """``steps`` steps, or fewer where no slot runs any longer.

    Grid: (PROGRAMS,), cooperative. counter int64 ``[1]``; weights a `_Weights`, state a `_State`,
    buffers a `_Buffers`, whose ``best_*`` are ``[M, PROGRAMS]``: shapes and dtypes are those of the
    phases. GREEDY: choose by maxima and commit; otherwise there is one step, whose logits are left.
    NGRAM: propose DRAFTS tokens before every step. MERGE: the projection of the heads merges the
    splits. BLOCK_C >= C. MOST: bytes of its weights that a program asks for ahead.
    """
    program = tl.program_id(0)
    epoch = first_epoch(counter_ptr, PROGRAMS)
    qkv, out, fc, proj, head = weights.qkv, weights.out, weights.fc, weights.proj, weights.head
    step = 0
    runs = steps > 0
    while runs:
        if NGRAM > 0:
            sampling.propose(
                program, PROGRAMS, buffers.slots, state.tokens, state.lengths, state.status,
                capacity, ROWS, DRAFTS, NGRAM, PROPOSE_BLOCK,
            )  # fmt: skip
            epoch = _meet(counter_ptr, epoch, PROGRAMS)
        # A row a program: without drafts that which has committed the row's token.
        phases.embed(
            program, PROGRAMS, state.tokens, buffers.slots, buffers.offsets, state.lengths,
            weights.wte, weights.wpe, buffers.residual, capacity, V, positions, C, ROWS, BLOCK_C,
        )  # fmt: skip
        for number in tl.range(0, layers, num_stages=1):
            layer = tl.cast(number, tl.int32)  # a Python number in the interpreter
            epoch, first = _meet_with_weights(
                counter_ptr, epoch, program, qkv, weights.ln_1, layer,
                3 * C, C, BITS, PROGRAMS, WARPS, QKV_REPEAT, QKV_UNROLL,
                at_once(3 * C, PROGRAMS, WARPS, QKV_REPEAT), KEEP,
            )  # fmt: skip
            _prefetch(program, out, layer, C, C, BITS, PROGRAMS, MOST, BULK)
            phases.qkv(
                program, PROGRAMS, layer, first,
                buffers.residual, weights.ln_1, qkv[0], qkv[1], qkv[2], buffers.query, cache_ptr,
                buffers.slots, buffers.offsets, state.lengths, slots, capacity, eps,
                C, HEADS, ROWS, BITS, WARPS, QKV_REPEAT, QKV_UNROLL, KEEP,
                at_once(3 * C, PROGRAMS, WARPS, QKV_REPEAT),
            )  # fmt: skip
            epoch = _meet(counter_ptr, epoch, PROGRAMS)
            _prefetch(program, fc, layer, F, C, BITS, PROGRAMS, MOST, BULK)
            attention_phase(
                program, PROGRAMS, buffers.query, cache_ptr, weights.scales,
                buffers.merged, buffers.partial, buffers.sums,
                buffers.slots, buffers.offsets, state.lengths,
                state.prefix_slots, state.prefix_lengths,
                layer, slots, capacity, ROWS, HEADS, C // HEADS, BLOCK_D, BLOCK_S, SPLITS,
            )  # fmt: skip
            if SPLITS > 1 and not MERGE:
                epoch = _meet(counter_ptr, epoch, PROGRAMS)
                combine_phase(
                    program, PROGRAMS, buffers.partial, buffers.sums, buffers.merged,
                    ROWS, HEADS, C // HEADS, SPLITS, COMBINE_BLOCK,
                )  # fmt: skip
            epoch, first = _meet_with_weights(
                counter_ptr, epoch, program, out, None, layer,
                C, C, BITS, PROGRAMS, WARPS, OUT_REPEAT, OUT_UNROLL,
                at_once(C, PROGRAMS, WARPS, OUT_REPEAT), False,
            )  # fmt: skip
            _prefetch(program, proj, layer, C, F, BITS, PROGRAMS, MOST, BULK)
            phases.add(
                program, PROGRAMS, layer, first,
                buffers.partial if MERGE else buffers.merged, buffers.sums,
                out[0], out[1], out[2], buffers.residual,
                C, C, HEADS, SPLITS if MERGE else 1, ROWS, BITS, WARPS, OUT_REPEAT, OUT_UNROLL,
                at_once(C, PROGRAMS, WARPS, OUT_REPEAT),
            )  # fmt: skip
            epoch, first = _meet_with_weights(
                counter_ptr, epoch, program, fc, weights.ln_2, layer,
                F, C, BITS, PROGRAMS, WARPS, FC_REPEAT, FC_UNROLL,
                at_once(F, PROGRAMS, WARPS, FC_REPEAT), KEEP,
            )  # fmt: skip
            if layer + 1 < layers:
                _prefetch(program, qkv, layer + 1, 3 * C, C, BITS, PROGRAMS, MOST, BULK)
            else:
                _prefetch(program, head, layer * 0, V, C, HEAD_BITS, PROGRAMS, MOST, BULK)
            phases.fc(
                program, PROGRAMS, layer, first,
                buffers.residual, weights.ln_2, fc[0], fc[1], fc[2], buffers.inner, eps,
                C, F, ROWS, BITS, WARPS, FC_REPEAT, FC_UNROLL, KEEP,
                at_once(F, PROGRAMS, WARPS, FC_REPEAT),
            )  # fmt: skip
            epoch, first = _meet_with_weights(
                counter_ptr, epoch, program, proj, None, layer,
                C, F, BITS, PROGRAMS, WARPS, PROJ_REPEAT, PROJ_UNROLL,
                at_once(C, PROGRAMS, WARPS, PROJ_REPEAT), False,
            )  # fmt: skip
            phases.add(
                program, PROGRAMS, layer, first, buffers.inner, None,
                proj[0], proj[1], proj[2], buffers.residual,
                C, F, HEADS, 1, ROWS, BITS, WARPS, PROJ_REPEAT, PROJ_UNROLL,
                at_once(C, PROGRAMS, WARPS, PROJ_REPEAT),
            )  # fmt: skip
        epoch, first = _meet_with_weights(
            counter_ptr, epoch, program, head, None, program * 0,
            V, C, HEAD_BITS, PROGRAMS, WARPS, HEAD_REPEAT, HEAD_UNROLL, False, False,
        )  # fmt: skip
        # Between the steps' commits, so all programs see the same.
        runs = (step + 1 < steps) & _any_runs(buffers.slots, state.status, ROWS)
        phases.head(
            program, PROGRAMS, first, buffers.residual, weights.ln_f, head[0], head[1],
            buffers.logits, buffers.best_value, buffers.best_index, buffers.best_sum, eps,
            C, V, ROWS, HEAD_BITS, GREEDY, WARPS, HEAD_REPEAT, HEAD_UNROLL, KEEP,
        )  # fmt: skip
        if GREEDY:
            epoch = _meet(counter_ptr, epoch, PROGRAMS)
            epoch = _choose_best(
                counter_ptr, epoch, program, state, buffers, capacity, V, ROWS, DRAFTS, PROGRAMS
            )
        step += 1


def persistent_programs(device: torch.device) -> int:
    """Programs of the kernel: one a multiprocessor; one in all in the interpreter."""
    if device.type == "cpu":
        return 1
    return min(configs.PERSISTENT_PROGRAMS, current_target(device).multiprocessors)


def _tiles(weights: DecodeWeights, rows: int, programs: int, target: Target) -> dict[str, int]:
    tiles = {}
    for name in ("qkv", "out", "fc", "proj", "head"):
        matrix = getattr(weights, name)
        tile = configs.persistent_tile(
            matrix.outputs, matrix.inputs, matrix.bits, rows, programs, target
        )
        tiles[f"{name.upper()}_REPEAT"] = tile.repeat
        tiles[f"{name.upper()}_UNROLL"] = tile.unroll
    return tiles


def launch_decode(
    weights: DecodeWeights,
    state: DecodeState,
    cache: Tensor,
    buffers: StepBuffers,
    steps: int,
    greedy: bool,
    drafts: int,
    ngram: int,
) -> None:
    """See `gpt2fast.kernels.decode_step.decode_persistent`.

    Sampling takes a kernel of its own behind every step: in this one it would not fit into the
    registers beside the addresses of all phases.
    """
    if greedy:
        _launch_steps(weights, state, cache, buffers, steps, True, drafts, ngram)
        return
    for _ in range(steps):
        if drafts and ngram:
            sampling.launch_propose(state, buffers, drafts, ngram)
        _launch_steps(weights, state, cache, buffers, 1, False, 0, 0)
        sampling.launch_select(state, buffers, drafts, False)


def _launch_steps(
    weights: DecodeWeights, state: DecodeState, cache: Tensor, buffers: StepBuffers,
    steps: int, greedy: bool, drafts: int, ngram: int,
) -> None:  # fmt: skip
    """A launch of the kernel."""
    target = current_target(cache.device)
    programs, rows = persistent_programs(cache.device), buffers.rows
    layers, _, slots, heads, capacity, head_size = cache.shape
    width = weights.out.inputs
    keep = configs.decode_rows_keep(rows, width)
    matrices = {n: getattr(weights, n).operands for n in ("qkv", "out", "fc", "proj", "head")}
    packed = _Weights(**{n: matrices.get(n, getattr(weights, n)) for n in _Weights._fields})
    _decode_kernel[(programs,)](
        buffers.arrivals, packed,
        _State(*(getattr(state, name) for name in _State._fields)),
        _Buffers(*(getattr(buffers, name) for name in _Buffers._fields)),
        cache, steps, layers, slots, capacity, weights.wpe.shape[0], weights.eps,
        C=width, F=weights.fc.outputs, V=weights.head.outputs, HEADS=heads,
        ROWS=rows, SPLITS=buffers.splits, MERGE=buffers.splits > 1 and keep, KEEP=keep,
        GREEDY=greedy, DRAFTS=drafts, NGRAM=ngram if drafts else 0,
        BITS=weights.qkv.bits, HEAD_BITS=weights.head.bits,
        PROGRAMS=programs, WARPS=configs.PERSISTENT_WARPS,
        **_tiles(weights, rows, programs, target),
        BLOCK_C=triton.next_power_of_2(width), BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_S=configs.engine_attention_few(cache.element_size(), head_size).block_s,
        COMBINE_BLOCK=configs.ENGINE_COMBINE_BLOCK, PROPOSE_BLOCK=configs.ENGINE_PROPOSE_BLOCK,
        MOST=configs.PERSISTENT_AHEAD, BULK=target.has_tma,
        num_warps=configs.PERSISTENT_WARPS, launch_cooperative_grid=programs > 1,
    )  # fmt: skip
