"""Selection and commit in torch, against the functions that `generate` chooses tokens with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.generation.options import GenerationOptions
from gpt2fast.generation.sampling import build_processors, sample
from gpt2fast.kernels.decode_state import BROKEN, EOS, IDLE, LIMIT, RUNNING, DecodeState

VOCAB, CAPACITY = 300, 24

WAYS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4},
    {"min_length": 12, "eos_token_id": [3, 8, 120]},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 9},
    {"do_sample": True, "temperature": 1.9, "top_k": 0, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 2.5, "top_p": 0.9, "min_p": 0.02, "min_length": 30}
    | {"eos_token_id": 8, "repetition_penalty": 0.8},
]


def make_state(lengths: list[int]) -> DecodeState:
    """All slots running, with a newest token behind ``lengths`` cached ones."""
    state = DecodeState.empty(len(lengths), CAPACITY, VOCAB, torch.device("cpu"))
    state.status.fill_(RUNNING)
    state.limits.fill_(CAPACITY + 1)
    state.uniforms.uniform_()
    state.scored.fill_(1)
    for slot, length in enumerate(lengths):
        state.lengths[slot] = length
        state.tokens[slot, : length + 1] = torch.randint(0, VOCAB, (length + 1,))
        state.seen[slot, state.tokens[slot, : length + 1]] = 1
    return state


def set_options(state: DecodeState, slot: int, options: GenerationOptions) -> list[int]:
    eos = options.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)  # type: ignore
    state.eos[slot, : len(ends)] = torch.tensor(ends, dtype=torch.int32)
    state.least[slot] = options.min_length
    state.penalty[slot] = options.repetition_penalty
    if options.do_sample:
        state.temperature[slot] = options.temperature
        state.top_k[slot] = options.top_k or 0
        state.top_p[slot] = options.top_p or 1
        state.min_p[slot] = options.min_p or 0
    return ends


def choice(
    ids: Tensor, logits: Tensor, options: GenerationOptions, ends: list[int], uniform: Tensor
) -> int:
    """The next token after ``ids`` ``[T]`` for logits ``[V]``, as `generate` chooses it."""
    scores = logits[None]
    for process in build_processors(options, ends, 1, None):
        scores = process(ids[None], scores)
    chosen = sample(scores, uniform[None]) if options.do_sample else scores.argmax(-1)
    return int(chosen)


@pytest.mark.parametrize("drafts", [0, 3])
def test_choices_are_generates(drafts: int) -> None:
    """A slot for each way, each at a length of its own; every row that is reached."""
    lengths = [4 + slot for slot in range(len(WAYS))]
    state = make_state(lengths)
    options = [GenerationOptions(**way) for way in WAYS]
    ends = [set_options(state, slot, each) for slot, each in enumerate(options)]
    logits = torch.randn(len(WAYS) * (drafts + 1), VOCAB) * 3
    kept = logits.clone()
    # Drafts that hold for two rows, then none: each slot accepts three tokens.
    expected: list[list[int]] = []
    for slot, length in enumerate(lengths):
        row = []
        for j in range(min(drafts, 2) + 1):
            at = length + j
            token = choice(
                state.tokens[slot, : at + 1],
                logits[slot * (drafts + 1) + j],
                options[slot],
                ends[slot],
                state.uniforms[slot, at + 1],
            )
            row.append(token)
            if drafts:
                state.tokens[slot, at + 1] = token if j < 2 else (token + 1) % VOCAB
        expected.append(row)
    select_and_commit(state, range(len(WAYS)), drafts, logits)
    assert logits.equal(kept)
    for slot, (length, tokens) in enumerate(zip(lengths, expected, strict=True)):
        new = slice(length + 1, length + 1 + len(tokens))
        assert not set(tokens) & set(ends[slot])
        assert state.lengths[slot] == length + len(tokens)
        assert state.tokens[slot, new].tolist() == tokens
        assert state.status[slot] == RUNNING
        assert state.seen[slot, tokens].all()
        first = slot * (drafts + 1)
        rows = logits[first : first + len(tokens)].log_softmax(-1)
        wanted = rows[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(state.log_probs[slot, new], wanted)


def test_greedy_takes_the_first_of_equals() -> None:
    state = make_state([3, 3])
    logits = torch.zeros(2, VOCAB)
    logits[1, [40, 20, 60]] = 2.0
    select_and_commit(state, [0, 1], 0, logits)
    assert state.tokens[:, 4].tolist() == [0, 20]


def test_ends() -> None:
    """By an id, by the limit, by both; and a draft behind the end does not count."""
    state = make_state([5, 5, 5, 5])
    state.eos[:, 0] = 9
    state.limits[:] = torch.tensor([20, 7, 7, 20])
    logits = torch.full((12, VOCAB), -1.0)
    chosen = [[9, 1, 1], [2, 1, 1], [9, 1, 1], [2, 9, 1]]
    for slot, tokens in enumerate(chosen):
        state.tokens[slot, 6:8] = torch.tensor(tokens[:2])
        for j, token in enumerate(tokens):
            logits[slot * 3 + j, token] = 1.0
    select_and_commit(state, [0, 1, 2, 3], 2, logits)
    assert state.status.tolist() == [EOS, LIMIT, EOS, EOS]
    assert state.lengths.tolist() == [6, 6, 6, 7]


def test_least_length() -> None:
    """The end is ruled out up to the last token before it, and no further."""
    state = make_state([5, 5])
    state.eos[:, :2] = torch.tensor([9, 11])
    state.least[:] = torch.tensor([8, 6])
    logits = torch.zeros(8, VOCAB)
    logits[:, 11], logits[:, 20] = 2.0, 1.0
    state.tokens[:, 6:9] = 20
    select_and_commit(state, [0, 1], 3, logits)
    assert state.status.tolist() == [EOS, EOS]
    assert state.tokens[0, 6:9].tolist() == [20, 20, 11]
    assert state.lengths.tolist() == [8, 6]


def test_slots_that_do_not_run_are_left_alone() -> None:
    state = make_state([5, 6, 7, 8])
    state.status[:] = torch.tensor([RUNNING, EOS, IDLE, RUNNING])
    before = {name: value.clone() for name, value in vars(state).items()}
    logits = torch.randn(4, VOCAB)
    select_and_commit(state, [3, 2, 1, 0], 0, logits)
    for name, value in vars(state).items():
        assert value[1:3].equal(before[name][1:3])
    assert state.lengths.tolist() == [6, 6, 7, 9]
    assert state.tokens[0, 6] == logits[3].argmax()
    assert state.tokens[3, 9] == logits[0].argmax()
    state.status.fill_(IDLE)
    select_and_commit(state, [0], 0, logits[:1])
    assert state.lengths[0] == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_break_their_slot_alone(temperature: float) -> None:
    """NaN, infinity and nothing left; behind a draft that does not hold, nobody looks."""
    state = make_state([5] * 5)
    state.temperature.fill_(temperature)
    logits = torch.randn(10, VOCAB)
    logits[0, 17] = torch.nan
    logits[2, 17] = torch.inf
    logits[4] = -torch.inf
    logits[7, 17] = torch.nan  # slot 3, behind a draft that holds
    logits[9, 17] = torch.nan  # slot 4, behind one that does not
    for slot, agrees in ((3, True), (4, False)):
        logits[2 * slot] = -1.0e4
        logits[2 * slot, 50] = 0.0
        state.tokens[slot, 6] = 50 if agrees else 51
    select_and_commit(state, range(5), 1, logits)
    assert state.status.tolist() == [BROKEN, BROKEN, BROKEN, BROKEN, RUNNING]
    assert state.lengths.tolist() == [5, 5, 5, 6, 6]
    assert state.tokens[3:, 6].tolist() == [50, 50]


def test_log_probs_only_where_they_are_read() -> None:
    state = make_state([5, 5])
    state.scored.fill_(0)
    select_and_commit(state, [0, 1], 0, torch.randn(2, VOCAB))
    assert (state.log_probs == 0).all()
