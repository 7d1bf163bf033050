"""Prompt lookup: what is proposed, and that it changes no token and no distribution."""

import math
import tracemalloc
from collections import Counter
from typing import Any

import pytest
import torch

from gpt2fast import Engine, GPT2LMHeadModel
from gpt2fast.engine.batch import _kind_of_step
from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.engine.speculation import PromptLookup
from gpt2fast.kernels.decode_state import RUNNING, DecodeState
from tests.engine.conftest import POSITIONS, VOCAB_SIZE, general, make_model
from tests.engine.reference_runner import ReferenceRunner


def test_longest_and_latest_match() -> None:
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 6, 3, 7, 8, 2, 3]
    assert PromptLookup(tokens, 4, 2).propose(10) == [5, 6, 3, 7]
    assert PromptLookup(tokens, 4, 1).propose(10) == [7, 8, 2, 3]
    assert PromptLookup(tokens, 4, 5).propose(2) == [5, 6]
    assert PromptLookup(tokens, 4, 2).propose(0) == []
    assert PromptLookup([1, 2, 3], 4, 2).propose(10) == []
    assert PromptLookup([4], 4, 2).propose(10) == []


def test_a_repetition_goes_on() -> None:
    assert PromptLookup([5, 1, 2, 1, 2], 7, 2).propose(9) == [1, 2, 1, 2, 1, 2, 1]
    assert PromptLookup([3, 3], 4, 3).propose(9) == [3, 3, 3, 3]


def test_it_follows_the_sequence() -> None:
    tokens = [1, 2, 3]
    lookup = PromptLookup(tokens, 3, 2)
    assert lookup.propose(9) == []
    tokens += [4, 1, 2]
    assert lookup.propose(9) == [3, 4, 1]
    tokens += [8, 1, 2]
    assert lookup.propose(9) == [8, 1, 2]


def test_the_longest_match_is_bounded() -> None:
    """Whatever is asked for: what is remembered would grow with the cube of the length."""
    tokens = [*range(300), *range(30)]
    tracemalloc.start()
    try:
        lookup = PromptLookup(tokens, 4, 300)
        assert lookup.propose(9) == [30, 31, 32, 33]
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert lookup.ngram == 32


def test_drafts_shrink_rest_and_grow() -> None:
    lookup = PromptLookup([7] * 50, 16, 2)
    lengths = []
    for _ in range(4):
        lengths.append(len(lookup.propose(99)))
        lookup.record(lengths[-1], 0)
    assert lengths == [16, 8, 4, 2]
    rest = 0
    while not (proposed := lookup.propose(99)):
        rest += 1
    assert rest == 16
    assert len(proposed) == 1
    for accepted, length in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 16), (3, 6)):
        lookup.record(len(proposed), accepted)
        proposed = lookup.propose(99)
        assert len(proposed) == length


def looping(model: GPT2LMHeadModel) -> tuple[list[int], list[int]]:
    """A prompt that the model goes on from in circles, and what it says."""
    prompt = torch.randint(8, VOCAB_SIZE, (1, 6))
    text = general(model).generate(prompt, max_new_tokens=40, eos_token_id=[])[0].tolist()
    return text[:30], text[30:]


@pytest.mark.parametrize("proposes", [False, True])
def test_accepted_drafts_save_steps(model: GPT2LMHeadModel, proposes: bool) -> None:
    """A text that was seen before comes out in fewer evaluations, token for token."""
    prompt, rest = looping(model)
    prompt = [*prompt[20:], *rest, *prompt[20:]]  # what follows has been there
    expected = general(model).generate(prompt, max_new_tokens=16, eos_token_id=[])[0].tolist()
    runner = ReferenceRunner(model, 1, POSITIONS, look_every=4, proposes=proposes)
    with Engine(model, runner=runner) as engine:
        handle = engine.submit(
            prompt, max_new_tokens=16, eos_token_id=[], prompt_lookup_num_tokens=5
        )
        while engine.unfinished:
            engine.step()
    assert [*prompt, *handle.token_ids] == expected
    assert sum(call[2] for call in runner.calls if call[0] == "advance") < 12


def test_drafts_are_of_few_numbers(model: GPT2LMHeadModel) -> None:
    """Where each is a kernel: one less than a power of two, within the room that slots have."""
    found = [_kind_of_step(n, room) for n, room in ((1, 9), (2, 9), (4, 9), (8, 9), (63, 63))]
    assert found == [1, 3, 7, 7, 63]
    assert [_kind_of_step(room, room) for room in range(1, 9)] == [1, 1, 3, 3, 3, 3, 7, 7]
    prompt, rest = looping(model)
    ids = [*prompt[20:], *rest, *prompt[20:]]
    for lookup in (2, 6):
        runner = ReferenceRunner(model, 1, POSITIONS, look_every=4, proposes=True)
        with Engine(model, runner=runner) as engine:
            engine.submit(ids, max_new_tokens=16, eos_token_id=[], prompt_lookup_num_tokens=lookup)
            while engine.unfinished:
                engine.step()
        drafts = {call[3] for call in runner.calls if call[0] == "advance"}
        assert drafts <= {0, 1, 3, 7}
        assert max(drafts) == (3 if lookup == 2 else 7)


@pytest.mark.parametrize("ngram", [1, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_generate_gives_the_same_tokens(sampled: bool, ngram: int) -> None:
    model = make_model()
    prompts = [[9, 10, 11, 9, 10], [20, 21, 20, 21, 20, 21], [30]]
    keywords: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": [13, 14, 15]}
    keywords |= {"pad_token_id": 0, "repetition_penalty": 0.9, "min_new_tokens": 9}
    if sampled:
        keywords |= {"do_sample": True, "temperature": 0.6, "seed": 3, "num_return_sequences": 2}
    expected = general(model).generate(prompts, **keywords)
    speculation = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": ngram}
    assert model.generate(prompts, **keywords, **speculation).equal(expected)
    assert general(model).generate(prompts, **keywords, **speculation).equal(expected)
    columns = [step.token_ids for step in model.stream(prompts, **keywords, **speculation)]
    for row, tokens in zip(expected[:, 6:].tolist(), zip(*columns, strict=True), strict=True):
        assert row == [0 if token is None else token for token in tokens]


def bound(freedom: int) -> float:
    """Of Pearson's chi-square, exceeded by chance once in some 10,000 seeds."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


def test_speculation_keeps_the_distribution() -> None:
    """Three tokens of a process whose law is written down, with drafts that are often wrong.

    The model is a table: logits depend on the newest token alone. All triples are counted, so a
    token that comes too often after an accepted or a refused draft shows.
    """
    draws, vocab = 20_000, 4
    table = torch.tensor(
        [[0.0, 1.0, 0.5, -1.0], [1.5, 0.0, 0.0, 0.3], [0.2, 0.1, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]]
    )
    state = DecodeState.empty(draws, 8, vocab, torch.device("cpu"))
    state.status.fill_(RUNNING)
    state.limits.fill_(9)
    state.temperature.fill_(0.8)
    state.uniforms.uniform_()
    while int(state.lengths.min()) < 3:
        ready = [slot for slot, n in enumerate(state.lengths.tolist()) if n < 3]
        first = state.lengths[ready].long()
        index = torch.tensor(ready)
        # Two drafts: one likely, one that depends on the slot.
        state.tokens[index, first + 1] = table[state.tokens[index, first]].argmax(1)
        state.tokens[index, first + 2] = index % vocab
        rows = torch.stack([state.tokens[index, first + j] for j in range(3)], 1).flatten()
        select_and_commit(state, ready, 2, table[rows])
    probabilities = (table / 0.8).double().softmax(-1)
    counts = Counter(map(tuple, state.tokens[:, 1:4].tolist()))
    statistic = 0.0
    for a in range(vocab):
        for b in range(vocab):
            for c in range(vocab):
                p = float(probabilities[0, a] * probabilities[a, b] * probabilities[b, c])
                statistic += (counts[a, b, c] - draws * p) ** 2 / (draws * p)
    assert statistic < bound(vocab**3 - 1)
