"""`Engine`: whoever runs beside a sequence, it comes out as `generate` gives it."""

import random
from typing import Any

import pytest
import torch

from gpt2fast import Engine, GPT2LMHeadModel, GPT2Tokenizer
from gpt2fast.engine.batch import read_at_once, read_each
from gpt2fast.engine.scheduler import Sequence
from tests.engine.conftest import POSITIONS, VOCAB_SIZE, general, make_model
from tests.engine.reference_runner import ReferenceRunner

RUNNERS = ["torch", "copying", "sharing", "eight steps", "proposing"]


def make_engine(model: GPT2LMHeadModel, kind: str, slots: int, **keywords: Any) -> Engine:
    if kind == "torch":
        return Engine(model, slots, **keywords)
    capacity = keywords.pop("capacity", POSITIONS)
    shares, proposes = kind in ("sharing", "proposing"), kind == "proposing"
    look_every = 8 if kind in ("eight steps", "proposing") else 1
    runner = ReferenceRunner(model, slots, capacity, shares, look_every, proposes)
    return Engine(model, slots, capacity, runner=runner, **keywords)


def alone(model: GPT2LMHeadModel, ids: list[int], **keywords: Any) -> Any:
    """What the model's forward pass generates for one prompt, with `Engine.submit`'s keywords."""
    sampled = keywords.get("temperature", 0.0) > 0
    keywords = {"top_k": None, "do_sample": sampled, **keywords}
    if not sampled:
        keywords["seed"] = None
    keywords |= {"return_dict_in_generate": True, "output_logprobs": True}
    return general(model).generate(ids, **keywords)


def random_request(chance: random.Random) -> tuple[list[int], dict[str, Any]]:
    prompt = [chance.randrange(8, VOCAB_SIZE) for _ in range(chance.choice([1, 2, 5, 17, 40]))]
    keywords: dict[str, Any] = {"max_new_tokens": chance.randrange(1, 25), "eos_token_id": []}
    if chance.random() < 0.5:
        keywords |= {"temperature": chance.choice([0.7, 1.0, 1.8]), "seed": chance.randrange(99)}
        keywords |= {"top_k": chance.choice([None, 9]), "top_p": chance.choice([None, 0.9])}
        keywords |= {"min_p": chance.choice([None, 0.02])}
    if chance.random() < 0.4:
        keywords |= {"repetition_penalty": 1.3}
    if chance.random() < 0.5:
        ends = [chance.randrange(8, VOCAB_SIZE) for _ in range(8)]
        keywords |= {"eos_token_id": ends, "min_new_tokens": chance.randrange(6)}
    if chance.random() < 0.5:
        keywords |= {"prompt_lookup_num_tokens": chance.randrange(1, 6)}
    return prompt, keywords


@pytest.mark.parametrize("kind", RUNNERS)
def test_sequences_join_and_leave(model: GPT2LMHeadModel, kind: str) -> None:
    """Requests of all kinds, handed in at random moments, on three slots."""
    chance = random.Random(5)
    requests = [random_request(chance) for _ in range(18)]
    common = requests[4][0] + [11] * 20
    requests += [([*common[:25], *requests[i][0][:3]], requests[i][1]) for i in range(4)]
    handles: list[Sequence] = []
    news: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    with make_engine(model, kind, 3, prefill_tokens=7) as engine:
        while engine.unfinished or len(handles) < len(requests):
            if len(handles) < len(requests) and chance.random() < 0.6:
                prompt, keywords = requests[len(handles)]
                handles.append(engine.submit(prompt, output_logprobs=True, **keywords))
            for sequence, tokens, reason in engine.step():
                news.setdefault(id(sequence), []).extend(tokens)
                if reason is not None:
                    assert id(sequence) not in ends
                    ends[id(sequence)] = reason
        assert engine.step() == []
    for handle, (prompt, keywords) in zip(handles, requests, strict=True):
        expected = alone(model, prompt, **keywords)
        assert handle.token_ids == expected.sequences[0, len(prompt) :].tolist()
        assert handle.finish_reason == expected.finish_reasons[0] == ends[id(handle)]
        assert news[id(handle)] == handle.token_ids
        torch.testing.assert_close(
            torch.tensor(handle.logprobs), expected.logprobs[0], rtol=1e-4, atol=1e-4
        )
    assert len(set(ends.values())) == 3  # eos, length and context


@pytest.mark.parametrize("kind", ["copying", "sharing"])
def test_a_common_beginning_is_evaluated_once(model: GPT2LMHeadModel, kind: str) -> None:
    """Also by those that come while the first is still running, and after it has ended."""
    prompt = torch.randint(8, VOCAB_SIZE, (24,)).tolist()
    other = [*prompt[:20], 9, 10]
    engine = make_engine(model, kind, 4)
    runner: Any = engine._runner
    keywords = {"max_new_tokens": 12, "eos_token_id": []}
    first = engine.submit(prompt, **keywords)
    engine.step()
    same = engine.submit(prompt, temperature=1.0, seed=3, **keywords)
    branch = engine.submit(other, max_new_tokens=20, eos_token_id=[])
    engine.step()
    prefilled = [call[1:] for call in runner.calls if call[0] == "prefill"]
    assert prefilled == [(0, 0, 24), (2, 20, 22)]
    while first.finish_reason is None or same.finish_reason is None:
        engine.step()
    # Where the first slot is still read from, nobody else gets it.
    late = engine.submit([5] * 20, **keywords)
    last = engine.submit([6] * 20, **keywords)
    engine.step()
    assert {late.slot, last.slot} == ({1, 3} if kind == "sharing" else {0, 1})
    assert branch.finish_reason is None
    while engine.unfinished:
        engine.step()
    for handle, ids in ((first, prompt), (branch, other), (late, [5] * 20), (last, [6] * 20)):
        expected = alone(model, ids, max_new_tokens=len(handle.token_ids), eos_token_id=[])
        assert handle.token_ids == expected.sequences[0, len(ids) :].tolist()
    drawn = alone(model, prompt, temperature=1.0, seed=3, **keywords)
    assert same.token_ids == drawn.sequences[0, 24:].tolist()
    engine.step()
    again = [engine.submit([n] * 3, max_new_tokens=1) for n in range(20, 24)]
    engine.step()
    assert sorted(handle.slot for handle in again) == [0, 1, 2, 3]


def test_a_borrower_lends_nothing(model: GPT2LMHeadModel) -> None:
    """What it has of its own stands in one slot and its beginning in another: who has more in
    common with it shares the beginning's owner."""
    prompt = torch.randint(8, VOCAB_SIZE, (20,)).tolist()
    branch = [*prompt[:18], *torch.randint(8, VOCAB_SIZE, (8,)).tolist()]
    prompts = [prompt, branch, [*branch[:24], 9]]
    with make_engine(model, "sharing", 3) as engine:
        handles = [engine.submit(ids, max_new_tokens=6, eos_token_id=[]) for ids in prompts]
        while engine.unfinished:
            engine.step()
    runner: Any = engine._runner
    prefilled = [call[1:] for call in runner.calls if call[0] == "prefill"]
    assert prefilled == [(0, 0, 20), (1, 18, 26), (2, 18, 25)]
    for handle, ids in zip(handles, prompts, strict=True):
        expected = alone(model, ids, max_new_tokens=6, eos_token_id=[])
        assert handle.token_ids == expected.sequences[0, len(ids) :].tolist()


def test_long_prompts_do_not_hold_up_those_that_run(model: GPT2LMHeadModel) -> None:
    engine = make_engine(model, "copying", 2, prefill_tokens=8)
    running = engine.submit([9, 10], max_new_tokens=30, eos_token_id=[])
    engine.step()
    runner: Any = engine._runner
    runner.calls.clear()
    late = engine.submit(torch.randint(8, VOCAB_SIZE, (30,)), max_new_tokens=5, eos_token_id=[])
    for count in range(1, 5):
        before = len(running.token_ids)
        engine.step()
        assert len(running.token_ids) == before + 1
        assert len(late.token_ids) == (2 if count == 4 else 0)
    prefilled = [call[2:] for call in runner.calls if call[0] == "prefill"]
    assert prefilled == [(0, 8), (8, 16), (16, 24), (24, 30)]


def test_rows_that_have_ended_cost_nothing(model: GPT2LMHeadModel) -> None:
    engine = make_engine(model, "copying", 4)
    for count in (3, 6, 9):
        engine.submit([count] * 4, max_new_tokens=count, eos_token_id=[])
    while engine.unfinished:
        engine.step()
    runner: Any = engine._runner
    widths = [len(call[1]) for call in runner.calls if call[0] == "advance"]
    assert widths == [3] * 2 + [2] * 3 + [1] * 3


def test_nobody_steps_beyond_the_end(model: GPT2LMHeadModel) -> None:
    """A runner that takes eight steps at a time is asked for no more than are needed."""
    engine = make_engine(model, "eight steps", 2)
    engine.submit([9, 10, 11], max_new_tokens=12, eos_token_id=[])
    while engine.unfinished:
        engine.step()
    runner: Any = engine._runner
    assert [call[2] for call in runner.calls if call[0] == "advance"] == [8, 3]


def test_stop_strings(model: GPT2LMHeadModel) -> None:
    """The token that completes one is the last, however far the runner went on."""
    tokenizer = GPT2Tokenizer()
    plain = alone(model, [9, 10], max_new_tokens=20, eos_token_id=[]).sequences[0].tolist()
    stop = tokenizer.decode(plain[8:10])
    expected = alone(
        model, [9, 10], max_new_tokens=20, eos_token_id=[], stop_strings=stop, tokenizer=tokenizer
    )
    for kind in RUNNERS:
        with make_engine(model, kind, 1) as engine:
            handle = engine.submit(
                [9, 10],
                max_new_tokens=20,
                eos_token_id=[],
                stop_strings=stop,
                tokenizer=tokenizer,
            )
            while engine.unfinished:
                engine.step()
            assert handle.finish_reason == "stop_string" == expected.finish_reasons[0]
            assert handle.token_ids == expected.sequences[0, 2:].tolist()
            assert handle.token_ids == plain[2 : 2 + len(handle.token_ids)]


def test_small_capacity_ends_rows(model: GPT2LMHeadModel) -> None:
    for kind in RUNNERS:
        with make_engine(model, kind, 2, capacity=12) as engine:
            assert (engine.slots, engine.capacity) == (2, 12)
            short = engine.submit([9] * 3, max_new_tokens=10, eos_token_id=[])
            full = engine.submit([9] * 12, eos_token_id=[], prompt_lookup_num_tokens=5)
            longer = engine.submit([9] * 8, eos_token_id=[], prompt_lookup_num_tokens=5)
            while engine.unfinished:
                engine.step()
            assert (len(short.token_ids), short.finish_reason) == (10, "length")
            assert (len(full.token_ids), full.finish_reason) == (1, "context")
            assert (len(longer.token_ids), longer.finish_reason) == (5, "context")


def test_reading_the_state_at_once() -> None:
    table = torch.arange(40).view(4, 10)
    spans = [(2, 0, 3), (0, 9, 10), (3, 4, 4), (1, 5, 10)]
    expected = [[20, 21, 22], [9], [], [15, 16, 17, 18, 19]]
    assert read_each(table, spans) == expected
    assert read_at_once(table, spans) == expected
    assert read_at_once(table, spans[2:3]) == [[]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    with Engine(model, 2) as engine:
        handle = engine.submit([9, 10, 11], max_new_tokens=5, eos_token_id=[])
        while engine.unfinished:
            engine.step()
    ids = torch.tensor([[9, 10, 11, *handle.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, 2:-1].float()
    # Other sums, so equals by a few roundings may be told apart in another way.
    chosen = logits.gather(1, ids[0, 3:, None]).squeeze(1)
    bound = 8 * torch.finfo(dtype).eps * float(logits.abs().max())
    assert (logits.amax(1) - chosen <= bound).all()
