"""Whole steps of the decode engine, a kernel a phase, against the plain model."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gpt2fast.kernels._triton import target
from gpt2fast.kernels._triton.engine import configs
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import BUCKETS, StepBuffers, bucket, check_weights, evaluate
from gpt2fast.kernels.packing import DecodeWeights
from tests.kernels.decode_weights import exact_model, random_weights
from tests.kernels.devices import DEVICE
from tests.tolerances import assert_close

SLOTS, CAPACITY, VOCAB, HEADS, WIDTH = 4, 12, 29, 2, 16
# Slots and offsets of each step's rows. Slot 2 begins with several rows at once, whose earlier
# ones are the later ones' past, as drafts are; slot 3 reads its first positions from slot 2.
STEPS = {
    1: (((2, 0),), ((2, 0),), ((3, 0),)),
    2: (((2, 0), (2, 1)), ((0, 0), (3, 0)), ((3, 0), (-1, 5))),
    4: (((2, 0), (2, 1), (2, 2), (0, 0)), ((0, 0), (3, 0), (-1, 5)), ((3, 1), (3, 0), (0, 0))),
}
SHARED = 2


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter programs and tiles cost time; on a GPU the chip's own."""
    if DEVICE == "cuda":
        yield
    else:
        tile = configs.DecodeRowsTile(warps=16, repeat=1, unroll=2, programs=2)
        monkeypatch.setattr(configs, "decode_rows_tile", lambda *_: tile)
        with target.assume(target.Target((9, 0), 1, 227 << 10)):
            yield


def _weights(bits: int, dtype: torch.dtype) -> DecodeWeights:
    return random_weights(
        bits, dtype, width=WIDTH, inner=40, heads=HEADS, vocab=VOCAB, positions=CAPACITY
    )


def _state() -> DecodeState:
    state = DecodeState.empty(SLOTS, CAPACITY, VOCAB, torch.device(DEVICE))
    state.tokens.random_(0, VOCAB)
    state.tokens[3, :SHARED] = state.tokens[2, :SHARED]
    state.lengths[3] = state.prefix_lengths[3] = SHARED
    state.prefix_slots[3] = 2
    return state


def _set_rows(buffers: StepBuffers, rows: tuple[tuple[int, int], ...]) -> None:
    buffers.slots.fill_(-1)
    for index, (slot, offset) in enumerate(rows):
        buffers.slots[index], buffers.offsets[index] = slot, offset


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids[None]).logits[0, -1]
    return logits


@pytest.mark.parametrize(
    ("rows", "splits", "bits", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (2, 3, 8, torch.float32),
        (4, 2, 16, torch.float16),
        (4, 1, 4, torch.float16),
        (8, 2, 32, torch.float32),
        (16, 1, 8, torch.float16),
    ],
    ids=str,
)
def test_steps_give_the_plain_models_logits(
    rows: int, splits: int, bits: int, dtype: torch.dtype
) -> None:
    weights = _weights(bits, dtype)
    model = exact_model(weights)
    plain = copy.deepcopy(model).to(dtype) if dtype != torch.float32 else None
    state, buffers = _state(), StepBuffers.allocate(weights, rows, splits)
    cache = torch.full(
        (2, 2, SLOTS, HEADS, CAPACITY, WIDTH // HEADS), float("nan"), dtype=dtype, device=DEVICE
    )
    written = torch.zeros(SLOTS, CAPACITY, dtype=torch.bool)
    for step in STEPS[min(rows, 4)]:
        _set_rows(buffers, step)
        evaluate(weights, state, cache, buffers, greedy=False)
        for index, (slot, offset) in enumerate(step):
            if slot < 0:
                continue
            position = int(state.lengths[slot]) + offset
            written[slot, position] = True
            ids = state.tokens[slot, : position + 1]
            same = None if plain is None else _logits(plain, ids).float()
            oracle = _logits(model, ids)
            assert_close("model", "forward", buffers.logits[index], oracle, same, dtype)
        for slot, _ in step:
            if slot >= 0:
                state.lengths[slot] += 1
    logits = buffers.logits.clone()
    for slot, _ in step:  # the same rows once more
        if slot >= 0:
            state.lengths[slot] -= 1
    evaluate(weights, state, cache, buffers, greedy=True)
    for index, (slot, _) in enumerate(step):
        if slot >= 0:
            _check_best(buffers, index, logits[index])
    kept = written.to(DEVICE)[None, None, :, None, :, None].expand(cache.shape)
    assert torch.equal(torch.isfinite(cache), kept)


def _check_best(buffers: StepBuffers, row: int, logits: Tensor) -> None:
    best = int(buffers.best_value[row].argmax())
    assert buffers.best_value[row, best] == logits.max()
    assert buffers.best_index[row, best] == logits.argmax()
    sums = buffers.best_value[row] + buffers.best_sum[row].log()
    torch.testing.assert_close(sums.logsumexp(0), logits.logsumexp(0), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", BUCKETS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_real_widths_in_every_bucket(rows: int, bits: int) -> None:
    dtype = torch.bfloat16
    weights = random_weights(
        bits, dtype, width=768, inner=3072, heads=12, vocab=5003, positions=64, layers=2
    )
    model = exact_model(weights)
    state = DecodeState.empty(rows, 64, 5003, torch.device(DEVICE))
    state.tokens.random_(0, 5003)
    buffers = StepBuffers.allocate(weights, rows, 2)
    buffers.slots.copy_(torch.arange(rows))
    cache = torch.zeros(2, 2, rows, 12, 64, 64, dtype=dtype, device=DEVICE)
    for pdl in (False, True):
        for position in range(3):
            state.lengths.fill_(position)
            evaluate(weights, state, cache, buffers, greedy=False, pdl=pdl)
        with torch.no_grad():
            oracle = model(state.tokens[:, :3]).logits[:, -1]
            plain = copy.deepcopy(model).to(dtype)(state.tokens[:, :3]).logits[:, -1].float()
        assert_close("model", "forward", buffers.logits, oracle, plain, dtype)


def test_a_bucket_holds_the_rows() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 5, 256)] == [1, 2, 4, 8, 256]
    for rows in (0, 257):
        with pytest.raises(ValueError, match=f"got {rows}"):
            bucket(rows)


def test_buffers_refuse_what_the_kernels_would_misread() -> None:
    weights = _weights(8, torch.float32)
    with pytest.raises(ValueError, match="rows must be one of"):
        StepBuffers.allocate(weights, 3, 1)
    with pytest.raises(ValueError, match="splits must be at least 1; got 0"):
        StepBuffers.allocate(weights, 4, 0)
    for name, wrong, message in (
        ("qkv", weights.out, "qkv must be contiguous"),
        ("fc", dataclasses.replace(weights.fc, bits=4), "fc must be contiguous"),
        ("head", dataclasses.replace(weights.head, bits=16), "head has 16 bits in torch.int8"),
        ("wte", weights.wte.double(), "embeddings must be in one of"),
        ("heads", 5, "multiples of 8, and of the heads; got 16, 40 and 5 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            check_weights(dataclasses.replace(weights, **{name: wrong}))
