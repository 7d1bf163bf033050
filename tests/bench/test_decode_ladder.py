"""The decode ladder: which cases there are, and that no wrong token is timed."""

import math
import time

import pytest
import torch
from torch import Tensor

from bench.suite import decode, decode_peers, decode_report, decode_times
from bench.suite.decode import FP8, GENERATE, INT8, LOOP, OURS, DecodeCase, decode_cases
from gpt2fast.engine.runner import OutOfMemory

SIZES = (("n_layer", 2), ("n_embd", 64), ("n_head", 2), ("vocab_size", 97), ("n_positions", 48))
CPU = torch.device("cpu")


def test_cases() -> None:
    cases = decode_cases("full")
    assert cases[0].name == "decode gpt2 B1 after 512"
    assert cases[0].contenders == decode.ALL
    assert len({case.name for case in cases}) == len(cases) == 4 * 4 * 3
    assert all(OURS in case.contenders for case in cases)
    assert {case.batch for case in cases if FP8 in case.contenders} == {8, 32, 128}


def test_peers_generate_what_the_model_does() -> None:
    torch.manual_seed(0)
    model = decode_peers.random_model("tiny", dict(SIZES), torch.float32, CPU)
    ids = torch.randint(97, (2, 7))
    expected = decode_peers.our_generate(model)(ids, 5)
    assert len(expected.unique()) > 2
    for activation in ("gelu_new", "gelu_pytorch_tanh"):
        theirs = decode_peers.transformers_model(model, activation)
        for static in (False, True):
            assert torch.equal(decode_peers.transformers_generate(theirs, static)(ids, 5), expected)


def test_shortfall_of_a_wrong_token() -> None:
    torch.manual_seed(0)
    model = decode_peers.random_model("tiny", dict(SIZES), torch.bfloat16, CPU)
    ids = torch.randint(97, (2, 7))
    chosen = decode_peers.our_generate(model)(ids, 5)
    exact = decode.rounded_model(model, None)
    short, allowed = decode.shortfalls(exact, model, ids, chosen)
    assert short <= allowed
    chosen[1, 3] = (chosen[1, 3] + 1) % 97
    short, allowed = decode.shortfalls(exact, model, ids, chosen)
    assert short > 5 * allowed


def test_a_rounded_cache_is_held_against_a_model_that_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the float32 model, that is: its tokens pass, and other ones do not."""

    def built(contest: decode._Contest, name: str) -> decode_peers.Generate:
        exact = decode.rounding_model(decode.rounded_model(contest.model, None))
        right = decode_peers.our_generate(exact)
        return lambda ids, new_tokens: right(ids, new_tokens) + wrong

    monkeypatch.setattr(decode._Contest, "_built", built)
    monkeypatch.setattr(decode, "_no_float8", lambda device: missing)
    case = DecodeCase("tiny", 2, 30, (FP8,), SIZES, 8)
    missing: str | None = None
    for wrong in (0, 1):
        torch.manual_seed(0)
        contest = decode._Contest(case, CPU, lambda *_: None, {}, False)
        assert ("wrong" in contest.reports[FP8]) == wrong
        assert (FP8 in contest.ready) == (not wrong)
    missing = "an old chip"
    contest = decode._Contest(case, CPU, lambda *_: None, {}, False)
    assert contest.reports[FP8] == {"not measured": "an old chip"}


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(contest: decode._Contest, name: str) -> decode_peers.Generate:
        right = decode_peers.our_generate(contest.model)

        def generate(ids: Tensor, new_tokens: int) -> Tensor:
            if name == INT8:
                raise OutOfMemory("no memory\nmore")
            return right(ids, new_tokens) + (name == GENERATE)

        return generate

    monkeypatch.setattr(decode._Contest, "_built", built)
    case = DecodeCase("tiny", 2, 5, (OURS, INT8, GENERATE, LOOP), SIZES, 3)
    said: list[str] = []
    contest = decode._Contest(
        case, CPU, lambda phase, seconds: said.append(phase), {LOOP: "exit status 11"}, True
    )
    assert set(contest.ready) == {OURS}
    assert "below the best" in contest.reports[GENERATE]["wrong"]
    assert contest.reports[INT8] == {"not measured": "OutOfMemory: no memory"}
    assert contest.reports[LOOP] == {"not measured": "exit status 11"}
    assert said == [f"provider {name}" for name in (OURS, INT8, GENERATE)]


def test_whoever_comes_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ours, which the others are compared with."""

    def built(contest: decode._Contest, name: str) -> decode_peers.Generate:
        return decode_peers.our_generate(contest.model)

    monkeypatch.setattr(decode._Contest, "_built", built)
    case = DecodeCase("tiny", 1, 5, (OURS, GENERATE, LOOP), SIZES, 3)
    for left, measured in (
        (-1.0, {OURS}),
        (12.0, {OURS, GENERATE}),
        (99.0, {OURS, GENERATE, LOOP}),
    ):
        deadline = time.time() + left
        contest = decode._Contest(case, CPU, lambda *_: None, {}, True, deadline)
        assert set(contest.ready) == measured
        for name in {GENERATE, LOOP} - measured:
            assert contest.reports[name] == {"not measured": "no time was left"}


def test_a_first_token_that_takes_as_long_as_all_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([3.0, 2.0, 1.0, 2.0, 1.0, 4.0, 1.0, 2.0])  # first and whole, in turn
    monkeypatch.setattr(decode_times, "_seconds", lambda call: next(clock))
    monkeypatch.setattr(decode_times, "ROUNDS", 2)
    ready = dict.fromkeys((OURS, LOOP), lambda ids, new: ids)
    ids = torch.zeros(1, 1)
    samples = decode_times.whole_times(ready, ids, 5, lambda name: None, False, math.inf)
    times = decode_times.summary(samples, OURS, {OURS: 8})
    assert times[OURS]["token"]["samples"] == 1
    assert times[OURS]["token"]["p50"] == 0.75
    assert times[OURS]["noisy_rounds"] == 1
    assert times[LOOP]["token_ratio"]["p50"] == pytest.approx(1 / 3)
    assert times[LOOP]["all_ratio"]["samples"] == 2
    samples[OURS]["token"] = [math.nan, math.nan]
    times = decode_times.summary(samples, OURS, {OURS: 8})
    case = {"case": "c", "times": times, "providers": times}
    decode_report.add_rates(case, None)
    assert decode_report.rows([case]) == ["| c | graph noise, loop 250000 | loop noise, 0.50 | - |"]
