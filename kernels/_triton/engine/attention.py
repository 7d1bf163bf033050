"""Attention of token rows over the engine's cache, as phases of a decoding step.

A row is one token: of a slot, at ``lengths[slot] + offset``. It attends to its slot's positions up
to and with its own, whose keys and values are in the cache already; the first ``prefix_lengths``
of them are read from slot ``prefix_slots``. Rows of one slot, and slots of one prefix, each read
the keys they share: from L2, where the first one brings them.

Each head of each row is divided among SPLITS programs, by tiles of keys, so that the row's own
length, which only the device knows, decides what a split reads. Splits leave normalised results
and the base-2 logarithms of their sums; who reads these merges them: the projection behind, in its
prologue (`merged_heads`), or for many rows a phase of its own (`combine_phase`).

Rows without a slot (-1) are skipped: nothing of theirs is written. What an earlier phase may have
written in the same launch is read from L2 (``.cg``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.decode import attend_one, shift_of
from gpt2fast.kernels._triton.engine import configs
from gpt2fast.kernels._triton.engine.barrier import allow_next, wait_for_previous
from gpt2fast.kernels._triton.target import Target, current_target
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import FEW_ROWS, StepBuffers
from gpt2fast.kernels.packing import DecodeWeights

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@triton.jit
def attention_phase(
    program, programs,
    q_ptr, cache_ptr, scales_ptr, out_ptr, partial_ptr, sums_ptr,
    row_slots_ptr, row_offsets_ptr, lengths_ptr, prefix_slots_ptr, prefix_lengths_ptr,
    layer, slots, capacity,
    rows, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All splits of all heads of M = ``rows`` rows, dealt out among the programs.

    q ``[M, C]``; cache ``[L, 2, slots, HEADS, capacity, HEAD_SIZE]`` of `CACHE_DTYPES`; scales
    float32 ``[L]``; row_slots and row_offsets int32 ``[M]``; the rest is `DecodeState`'s. With one
    split the result goes to out ``[M, C]``; with more to partial ``[M, HEADS, SPLITS, HEAD_SIZE]``
    and sums ``[M, HEADS, SPLITS]``, float32; a split without keys writes 0 and -inf. The pointers
    that SPLITS leaves unused may be None. Masked: keys behind the row's own, and the head size.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < HEAD_SIZE
    scale = tl.load(scales_ptr + layer) * LOG2_E
    # Rows outermost: programs beside each other read one row's keys, and each gets its part of
    # long rows and short ones.
    for item in range(program, rows * HEADS * SPLITS, programs):
        split = item % SPLITS
        head = item // SPLITS % HEADS
        row = item // (SPLITS * HEADS)
        slot = tl.load(row_slots_ptr + row)
        if slot >= 0:
            offset = tl.load(row_offsets_ptr + row)
            position = tl.load(lengths_ptr + slot, cache_modifier=".cg") + offset
            keys = tl.minimum(position + 1, capacity)
            prefix_slot = tl.load(prefix_slots_ptr + slot)
            prefix_length = tl.load(prefix_lengths_ptr + slot)
            share = tl.cdiv(keys, SPLITS * BLOCK_S) * BLOCK_S
            low = split * share
            high = tl.minimum(low + share, keys)

            q_offset = (tl.cast(row, tl.int64) * HEADS + head) * HEAD_SIZE + offs_d
            q = tl.load(q_ptr + q_offset, mask=mask_d, other=0.0, cache_modifier=".cg")
            q = (q.to(tl.float32) * scale)[None, :]
            # In units of one head's positions; each factor keeps the divisibility of the sizes.
            plane = tl.cast(slots, tl.int64) * HEADS * capacity
            own = (slot.to(tl.int64) * HEADS + head) * capacity
            other = (prefix_slot.to(tl.int64) * HEADS + head) * capacity
            key_ptr = cache_ptr + tl.cast(layer, tl.int64) * 2 * plane * HEAD_SIZE + offs_d[None, :]
            value_ptr = key_ptr + plane * HEAD_SIZE

            top = tl.full([BLOCK_S], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_S], tl.float32)
            acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            # A tile is asked for in the turn before its own, or the compiler, to save registers,
            # would take it apart into loads that wait for each other.
            k, v = _load_keys(
                key_ptr, value_ptr, low + offs_s, high, prefix_length, own, other, mask_d, HEAD_SIZE
            )
            for block in range(low, high, BLOCK_S):
                key = block + offs_s
                top, total, acc = attend_one(q, k, v, key < high, top, total, acc)
                k, v = _load_keys(
                    key_ptr, value_ptr, key + BLOCK_S, high, prefix_length, own, other, mask_d,
                    HEAD_SIZE,
                )  # fmt: skip

            # Merge the softmaxes of a tile's key slots.
            largest = tl.max(top, 0)
            factor = tl.exp2(top - shift_of(largest))
            whole = tl.sum(total * factor, 0)
            whole = tl.where(whole > 0.0, whole, 1.0)  # 0 for a split without keys
            result = tl.sum(acc * factor[:, None], 0) / whole
            if SPLITS == 1:
                result = result.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + q_offset, result, mask=mask_d)
            else:
                part = (tl.cast(row, tl.int64) * HEADS + head) * SPLITS + split
                result = result.to(partial_ptr.dtype.element_ty)
                tl.store(partial_ptr + part * HEAD_SIZE + offs_d, result, mask=mask_d)
                tl.store(sums_ptr + part, largest + tl.log2(whole))


@triton.jit
def _load_keys(
    key_ptr, value_ptr, key, high, prefix_length, own, other, mask_d, HEAD_SIZE: tl.constexpr
):
    """Keys and values at positions ``key``, as far as they are < high; 0 elsewhere."""
    index = (tl.where(key < prefix_length, other, own) + key)[:, None] * HEAD_SIZE
    # What lies behind the keys may be NaN: it is not loaded.
    mask = (key < high)[:, None] & mask_d[None, :]
    k = tl.load(key_ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
    v = tl.load(value_ptr + index, mask=mask, other=0.0, cache_modifier=".cg")
    return k, v


@triton.jit
def merged_heads(
    partial_ptr, sums_ptr, row, channel, mask,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Channels of rows of the merged heads, from what `attention_phase` left of its splits.

    row and channel are int tensors (row may be a scalar) of shapes that broadcast to mask's, which
    is the result's, float32. Masked elements are 0. Rows that were skipped give any value.
    """
    first = (row * HEADS + channel // HEAD_SIZE) * SPLITS
    inside = channel % HEAD_SIZE
    largest = tl.full(mask.shape, -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        value = tl.load(sums_ptr + first + split, mask=mask, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, value)
    total = tl.zeros(mask.shape, tl.float32)
    merged = tl.zeros(mask.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        value = tl.load(sums_ptr + first + split, mask=mask, other=0.0, cache_modifier=".cg")
        share = tl.exp2(value - largest)  # finite: a row's first split has a key
        offs = (first + split) * HEAD_SIZE + inside
        result = tl.load(partial_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
        merged += share * result.to(tl.float32)
        total += share
    return merged / total


@triton.jit
def combine_phase(
    program, programs, partial_ptr, sums_ptr, out_ptr,
    rows, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`merged_heads` of M = ``rows`` rows into out ``[M, C]``, BLOCK channels at a time."""
    CHANNELS: tl.constexpr = HEADS * HEAD_SIZE
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    for item in range(program, rows * BLOCKS, programs):
        row = item // BLOCKS
        channel = item % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = channel < CHANNELS
        merged = merged_heads(partial_ptr, sums_ptr, row, channel, mask, HEADS, HEAD_SIZE, SPLITS)
        out = out_ptr + tl.cast(row, tl.int64) * CHANNELS + channel
        tl.store(out, merged.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["layer", "slots", "capacity", "rows"])
def _attend_kernel(
    q_ptr, cache_ptr, scales_ptr, out_ptr, partial_ptr, sums_ptr,
    row_slots_ptr, row_offsets_ptr, lengths_ptr, prefix_slots_ptr, prefix_lengths_ptr,
    layer, slots, capacity,
    rows, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`attention_phase` on a grid of any size."""
    allow_next(PDL)
    wait_for_previous(PDL)
    attention_phase(
        tl.program_id(0), tl.num_programs(0),
        q_ptr, cache_ptr, scales_ptr, out_ptr, partial_ptr, sums_ptr,
        row_slots_ptr, row_offsets_ptr, lengths_ptr, prefix_slots_ptr, prefix_lengths_ptr,
        layer, slots, capacity,
        rows, HEADS, HEAD_SIZE, BLOCK_D, BLOCK_S, SPLITS,
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    partial_ptr, sums_ptr, out_ptr,
    rows, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`combine_phase` on a grid of any size."""
    allow_next(PDL)
    wait_for_previous(PDL)
    combine_phase(
        tl.program_id(0), tl.num_programs(0), partial_ptr, sums_ptr, out_ptr,
        rows, HEADS, HEAD_SIZE, SPLITS, BLOCK,
    )  # fmt: skip


def launch_attend(
    weights: DecodeWeights,
    state: DecodeState,
    cache: Tensor,
    buffers: StepBuffers,
    layer: int,
    pdl: bool = False,
) -> None:
    """One layer's attention: ``buffers.query`` and the cache ``[L, 2, S, H, capacity, D]`` into
    ``merged`` with one split, else ``partial`` and ``sums``."""
    _, _, slots, heads, capacity, head_size = cache.shape
    rows, splits = buffers.rows, buffers.splits
    direct = splits == 1
    few = rows <= FEW_ROWS
    config_of = configs.engine_attention_few if few else configs.engine_attention
    config = config_of(cache.element_size(), head_size)
    programs = configs.ENGINE_ATTENTION_PROGRAMS * current_target(cache.device).multiprocessors
    _attend_kernel[(min(rows * heads * splits, programs),)](
        buffers.query, cache, weights.scales,
        buffers.merged if direct else None,
        None if direct else buffers.partial, None if direct else buffers.sums,
        buffers.slots, buffers.offsets,
        state.lengths, state.prefix_slots, state.prefix_lengths,
        layer, slots, capacity,
        rows, HEADS=heads, HEAD_SIZE=head_size, BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_S=config.block_s, SPLITS=splits, PDL=pdl,
        num_warps=config.warps, launch_pdl=pdl,
    )  # fmt: skip


def launch_combine(weights: DecodeWeights, buffers: StepBuffers, pdl: bool = False) -> None:
    """Merge the splits in ``buffers``: ``partial`` and ``sums`` into ``merged``."""
    rows, splits = buffers.rows, buffers.splits
    width = buffers.merged.shape[1]
    block = configs.ENGINE_COMBINE_BLOCK
    _combine_kernel[(rows * triton.cdiv(width, block),)](
        buffers.partial, buffers.sums, buffers.merged,
        rows, HEADS=weights.heads, HEAD_SIZE=width // weights.heads, SPLITS=splits, BLOCK=block,
        PDL=pdl, num_warps=configs.ENGINE_COMBINE_WARPS, launch_pdl=pdl,
    )  # fmt: skip


def check_cache_dtype(dtype: torch.dtype, target: Target) -> None:
    """Raise a ValueError unless the chip can read and write a cache of this dtype."""
    if dtype not in CACHE_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES)
        raise ValueError(f"the cache's dtype must be one of {names}; got {dtype}")
    if dtype == torch.float8_e4m3fn and target.capability < (8, 9):
        major, minor = target.capability
        raise ValueError(
            f"a cache of float8_e4m3fn needs compute capability 8.9 or later; this GPU has "
            f"{major}.{minor}"
        )
