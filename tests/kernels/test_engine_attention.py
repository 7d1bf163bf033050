"""The engine's attention phases in the interpreter, or on a GPU, against a float64 oracle."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.engine import configs
from gpt2fast.kernels._triton.engine.attention import (
    check_cache_dtype,
    launch_attend,
    launch_combine,
    merged_heads,
)
from gpt2fast.kernels._triton.target import CHIPS, Target, assume
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import StepBuffers
from gpt2fast.kernels.packing import DecodeWeights
from tests.kernels.devices import DEVICE, TRITON_DTYPES
from tests.tolerances import assert_close

HEADS, LAYERS, SLOTS, NAN = 2, 2, 6, float("nan")
WRITTEN = {"splits", "slots", "offsets", "query", "merged", "partial", "sums"}


@triton.jit
def _prologue_kernel(
    partial_ptr, sums_ptr, out_ptr,
    M: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As a projection reads them: several rows at a time, a block of channels a program."""
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (channel < HEADS * HEAD_SIZE)
    merged = merged_heads(partial_ptr, sums_ptr, row, channel, mask, HEADS, HEAD_SIZE, SPLITS)
    tl.store(out_ptr + row * (HEADS * HEAD_SIZE) + channel, merged, mask=mask)


@dataclass
class Step:
    """What one layer of a step attends with: rows (slot, offset), their state, q and cache."""

    rows: list[tuple[int, int]]
    state: DecodeState
    q: Tensor
    cache: Tensor
    scales: Tensor

    def keys(self, row: int) -> tuple[int, int, int, int]:
        """(keys, slot, prefix's slot, its length) of a row."""
        slot, offset = self.rows[row]
        s = self.state
        keys = min(int(s.lengths[slot]) + offset + 1, self.cache.shape[4])
        return keys, slot, int(s.prefix_slots[slot]), int(s.prefix_lengths[slot])

    @property
    def used(self) -> list[int]:
        """The rows that have a slot."""
        return [row for row, (slot, _) in enumerate(self.rows) if slot >= 0]


def make_step(
    rows: list[tuple[int, int]],
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    head_size: int = 32,
    capacity: int = 150,
    cache_dtype: torch.dtype | None = None,
    prefixes: dict[int, tuple[int, int]] | None = None,
    q_scale: float = 1.0,
) -> Step:
    """A random cache that is NaN wherever no row may look; prefixes: slot -> (its slot, length)."""
    generator = torch.Generator(DEVICE).manual_seed(len(rows) + capacity)
    state = DecodeState.empty(SLOTS, capacity, 8, torch.device(DEVICE))
    state.lengths.copy_(torch.tensor(lengths + [0] * (SLOTS - len(lengths))))
    shape = (LAYERS, 2, SLOTS, HEADS, capacity, head_size)
    filled = torch.randn(shape, generator=generator, device=DEVICE).to(cache_dtype or dtype)
    cache = torch.full_like(filled.float(), NAN).to(filled.dtype)
    for slot, (source, length) in (prefixes or {}).items():
        state.prefix_slots[slot], state.prefix_lengths[slot] = source, length
    q = torch.randn(len(rows), HEADS * head_size, generator=generator, device=DEVICE)
    q = (q * q_scale).to(dtype)
    scales = torch.rand(LAYERS, generator=generator, device=DEVICE) + 0.1
    step = Step(rows, state, q, cache, scales)
    for row in step.used:
        keys, slot, source, length = step.keys(row)
        cache[:, :, source, :, :length] = filled[:, :, source, :, :length]
        cache[:, :, slot, :, length:keys] = filled[:, :, slot, :, length:keys]
    return step


def oracle(step: Step, layer: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Plain attention of every row that has a slot, in ``dtype``."""
    heads, head_size = step.cache.shape[3], step.cache.shape[5]
    out = []
    for row in step.used:
        keys, slot, source, length = step.keys(row)
        own, shared = step.cache[layer, :, slot], step.cache[layer, :, source]
        k, v = torch.cat((shared[:, :, :length], own[:, :, length:keys]), 2).to(dtype)
        q = step.q[row].to(dtype).view(heads, 1, head_size)
        scores = q @ k.transpose(1, 2) * step.scales[layer].to(dtype)
        out.append((scores.softmax(-1) @ v).flatten())
    return torch.stack(out)


def run(step: Step, layer: int, splits: int, block: int = 16, programs: int = 3) -> StepBuffers:
    """On so many programs, with tiles of ``block`` keys; unwritten results are NaN."""
    rows, heads, head_size = len(step.rows), step.cache.shape[3], step.cache.shape[5]
    row_slots, row_offsets = torch.tensor(step.rows, dtype=torch.int32, device=DEVICE).t()
    none = torch.empty(0)
    buffers = StepBuffers(
        splits=splits,
        slots=row_slots.contiguous(),
        offsets=row_offsets.contiguous(),
        query=step.q,
        merged=torch.full_like(step.q, NAN),
        partial=torch.full((rows, heads, splits, head_size), NAN, device=DEVICE),
        sums=torch.full((rows, heads, splits), NAN, device=DEVICE),
        **dict.fromkeys(set(StepBuffers.__dataclass_fields__) - WRITTEN, none),  # type: ignore
    )
    weights = cast(DecodeWeights, SimpleNamespace(scales=step.scales, heads=heads))
    with pytest.MonkeyPatch.context() as patch, assume(Target((9, 0), programs, 227 << 10)):
        config = configs.DecodeConfig(block, warps=4, stages=1)
        patch.setattr(configs, "engine_attention", lambda *_: config)
        patch.setattr(configs, "engine_attention_few", lambda *_: config)
        patch.setattr(configs, "ENGINE_ATTENTION_PROGRAMS", 1)
        launch_attend(weights, step.state, step.cache, buffers, layer)
        if splits > 1:
            launch_combine(weights, buffers)
    return buffers


def check(step: Step, layer: int, splits: int, block: int = 16, programs: int = 3) -> StepBuffers:
    buffers = run(step, layer, splits, block, programs)
    plain = oracle(step, layer, step.q.dtype).to(step.q.dtype)
    assert_close("attention", "forward", buffers.merged[step.used], oracle(step, layer), plain)
    return buffers


# Plain decoding, one slot's drafts, a short prompt, and padding between.
PLAIN = [(0, 0), (3, 0), (1, 0), (-1, 0)]
DRAFTS = [(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2)]
LENGTHS = [0, 15, 100, 64, 149]


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [PLAIN, DRAFTS], ids=["plain", "drafts"])
def test_rows(rows: list[tuple[int, int]], splits: int, dtype: torch.dtype) -> None:
    check(make_step(rows, LENGTHS, dtype), 1, splits, block=32)


@pytest.mark.parametrize("programs", [1, 7, 200])
def test_any_number_of_programs(programs: int) -> None:
    check(make_step(PLAIN, LENGTHS), 1, 3, programs=programs)


@pytest.mark.parametrize("keys", [1, 16, 17, 48, 49, 150])
def test_lengths_around_the_tiles(keys: int) -> None:
    """Splits without keys, with one, with whole tiles and with parts of them."""
    step = make_step([(1, 0)], [0, keys - 1])
    result = check(step, 0, 4)
    share = -(-keys // (4 * 16)) * 16
    empty = [split * share >= keys for split in range(4)]
    for split in range(4):
        neutral = bool((result.partial[:, :, split] == 0).all())
        assert neutral == empty[split]
        assert bool(torch.isinf(result.sums[:, :, split]).all()) == empty[split]


@pytest.mark.parametrize("head_size", [40, 64, 128])
def test_head_sizes(head_size: int) -> None:
    step = make_step([(0, 0), (4, 0)], LENGTHS, head_size=head_size)
    check(step, 1, 3, block=32)
    check(step, 0, 1, block=64)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("length", [1, 16, 37, 64])
def test_shared_prefix(length: int, splits: int) -> None:
    """Slots 1 and 3 read slot 4's first positions; their own there are NaN."""
    prefixes = {1: (4, length), 3: (4, length)}
    rows = [(1, 0), (3, 0), (3, 1), (4, 0)]
    step = make_step(rows, [0, length, 0, 80, 90], prefixes=prefixes)
    assert step.cache[0, 0, 1, 0, 0, 0].isnan()
    check(step, 0, splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_without_a_slot_are_left_alone(splits: int) -> None:
    buffers = check(make_step([(-1, 0), (0, 0), (-1, 0)], [40]), 0, splits)
    for row in (0, 2):
        assert (buffers.merged if splits == 1 else buffers.partial)[row].isnan().all()


def test_positions_behind_the_capacity_read_nothing_behind_it() -> None:
    """A slot at its limit, or drafts at the end of the cache: results nobody uses, no overrun."""
    check(make_step([(0, 0), (1, 1), (1, 3)], [50, 48], capacity=50), 0, 2)


def test_large_scores() -> None:
    """One key takes all the weight, and exponentials of the others vanish."""
    check(make_step(PLAIN, LENGTHS, q_scale=100.0), 0, 4)


def test_prologue_merges_blocks_of_channels() -> None:
    step = make_step(DRAFTS[:3], LENGTHS, head_size=40)
    result = check(step, 0, 5)
    merged = torch.full_like(result.merged, NAN)
    _prologue_kernel[(2,)](
        result.partial, result.sums, merged,
        M=3, HEADS=HEADS, HEAD_SIZE=40, SPLITS=5, BLOCK=64, ROWS=4,
    )  # fmt: skip
    assert torch.equal(merged, result.merged)


def test_float8_cache() -> None:
    """The keys and values are those of the cache, so the result is as exact as with any other."""
    step = make_step(PLAIN, LENGTHS, cache_dtype=torch.float8_e4m3fn)
    check(step, 0, 1)
    check(step, 1, 3)


def test_cache_dtypes() -> None:
    check_cache_dtype(torch.bfloat16, CHIPS[80])
    check_cache_dtype(torch.float8_e4m3fn, CHIPS[90])
    with pytest.raises(ValueError, match=r"8\.9 or later; this GPU has 8\.0"):
        check_cache_dtype(torch.float8_e4m3fn, CHIPS[80])
    with pytest.raises(ValueError, match="one of float32, float16, bfloat16, float8_e4m3fn; got"):
        check_cache_dtype(torch.int8, CHIPS[90])


def test_splits_fill_the_chip_within_what_a_projection_merges() -> None:
    chip = CHIPS[90]
    assert configs.engine_splits(1, 12, 1, 64, chip) == 1
    assert configs.engine_splits(1, 12, 512, 64, chip) == 4
    assert configs.engine_splits(4, 12, 1024, 64, chip) == 8
    assert configs.engine_splits(64, 12, 1024, 64, chip) == 1
    for rows in (1, 2, 4, 8, 64):
        assert configs.engine_splits(rows, 12, 8192, 64, chip) <= 16


def test_splits_of_the_persistent_kernel() -> None:
    """No program has a second item where one is enough, and none walks further than it has to."""
    splits = {rows: configs.persistent_splits(rows, 12, 1024, 64, 128) for rows in (1, 2, 4)}
    assert splits == {1: 4, 2: 2, 4: 8}
    assert configs.persistent_splits(1, 25, 1024, 64, 128) == 4
    assert configs.persistent_splits(1, 12, 64, 64, 128) == 1
