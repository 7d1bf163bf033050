"""The persistent kernel leaves what the kernels of a step, one after the other, leave.

In the interpreter it has one program, and no barriers; what those are stands in
`test_engine_barrier`. On a GPU the same tests meet all programs and barriers.
"""

import contextlib
import copy
from dataclasses import fields
from typing import Any

import pytest
import torch

from gpt2fast.kernels._triton import target
from gpt2fast.kernels.decode_state import EOS, LIMIT, RUNNING, DecodeState
from gpt2fast.kernels.decode_step import (
    StepBuffers,
    decode_persistent,
    evaluate,
    persistent_buffers,
    propose,
    select_and_commit,
)
from gpt2fast.kernels.packing import DecodeWeights
from tests.kernels.decode_weights import random_weights
from tests.kernels.devices import DEVICE

SLOTS, CAPACITY, VOCAB, HEADS = 3, 24, 50, 2


def _weights(bits: int = 32, dtype: torch.dtype = torch.float32, layers: int = 1) -> DecodeWeights:
    return random_weights(
        bits, dtype, width=32, inner=128, heads=HEADS, vocab=VOCAB, positions=CAPACITY,
        layers=layers,
    )  # fmt: skip


def _state() -> DecodeState:
    """Three slots of different lengths, none of which ends."""
    state = DecodeState.empty(SLOTS, CAPACITY, VOCAB, torch.device(DEVICE))
    state.tokens.random_(0, VOCAB)
    state.lengths.copy_(torch.tensor([7, 13, 2]))
    state.limits.fill_(CAPACITY)
    state.status.fill_(RUNNING)
    state.scored.fill_(1)
    state.uniforms.uniform_()
    return state


def _both(
    weights: DecodeWeights,
    state: DecodeState,
    slots: list[int],
    splits: int,
    steps: int,
    greedy: bool,
    drafts: int = 0,
    ngram: int = 0,
) -> DecodeState:
    """Steps by both drivers, of which the state and the cache are compared; returns the state."""
    layers, width = weights.qkv.data.shape[0], weights.out.inputs
    shape = (layers, 2, SLOTS, HEADS, CAPACITY, width // HEADS)
    caches = [torch.randn(shape).to(weights.wte.dtype)] * 2
    caches[1] = caches[0].clone()
    states = state, copy.deepcopy(state)
    # Few programs for the interpreter to run.
    few = target.assume(target.Target((9, 0), 1, 227 << 10))
    with few if DEVICE == "cpu" else contextlib.nullcontext():
        rows = [slot for slot in slots for _ in range(drafts + 1)]
        buffers = [StepBuffers.allocate(weights, len(rows), splits) for _ in range(2)]
        buffers[1] = persistent_buffers(buffers[1])
        for each in buffers:
            each.slots.copy_(torch.tensor(rows))
            each.offsets.copy_(torch.arange(len(rows)) % (drafts + 1))
        for _ in range(steps):
            if ngram:
                propose(states[0], buffers[0], drafts, ngram)
            evaluate(weights, states[0], caches[0], buffers[0], greedy=greedy)
            select_and_commit(states[0], buffers[0], drafts, greedy=greedy)
        decode_persistent(
            weights, states[1], caches[1], buffers[1], steps,
            greedy=greedy, drafts=drafts, ngram=ngram,
        )  # fmt: skip
    for field in fields(DecodeState):
        ours, theirs = (getattr(each, field.name) for each in reversed(states))
        if field.name == "log_probs":
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, theirs), field.name
    error = (caches[1].float() - caches[0].float()).abs().max()
    assert error <= 4 * torch.finfo(weights.wte.dtype).eps * caches[0].float().abs().max()
    return states[1]


@pytest.fixture(autouse=True)
def _device() -> Any:
    with torch.device(DEVICE):
        yield


def test_tokens_of_one_sequence() -> None:
    state = _both(_weights(layers=2), _state(), [1], splits=1, steps=2, greedy=True)
    assert state.lengths.tolist() == [7, 15, 2]


def test_ragged_rows_that_end_and_one_without_a_slot() -> None:
    state = _state()
    state.limits[2] = 4
    state.temperature[:2] = 0.8
    state.top_k[0] = 5
    state.top_p[1] = 0.8
    state.penalty[0] = 1.3
    weights = _weights(8, torch.float16)
    ended = _both(weights, state, [2, 0, 1, -1], splits=2, steps=2, greedy=False)
    assert ended.lengths.tolist() == [9, 15, 3]
    assert ended.status.tolist() == [RUNNING, RUNNING, LIMIT]


def test_stops_where_no_slot_runs_any_longer() -> None:
    state = _state()
    state.eos[0] = torch.arange(8)  # of slot 0 alone
    state.tokens[0] = 1
    weights = _weights()
    weights.head.data.zero_()  # id 0 is the first of equals
    ended = _both(weights, state, [0], splits=1, steps=2, greedy=True)
    assert (ended.lengths[0], ended.status[0]) == (8, EOS)


def test_drafts_are_proposed_and_checked() -> None:
    state = _state()
    state.tokens[1] = torch.arange(CAPACITY + 1) % 3
    weights = _weights(4, torch.float16)
    _both(weights, state, [1, 0], splits=3, steps=2, greedy=True, drafts=1, ngram=2)


def test_refuses_what_it_cannot_do() -> None:
    weights, state = _weights(), _state()
    cache = torch.zeros(1, 2, SLOTS, HEADS, CAPACITY, 16)
    many = StepBuffers.allocate(weights, 8, 1)
    with pytest.raises(ValueError, match="up to 4 rows; got 8"):
        decode_persistent(weights, state, cache, many, 1, greedy=True)
    few = persistent_buffers(StepBuffers.allocate(weights, 2, 1))
    with pytest.raises(ValueError, match="one step; got 2"):
        decode_persistent(weights, state, cache, few, 2, greedy=True, drafts=1)
