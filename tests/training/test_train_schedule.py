import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2fast import GPT2Config, GPT2LMHeadModel
from gpt2fast.training.settings import Settings, derived_seed, parameter_groups
from gpt2fast.training.speed import flops_per_token


def test_progress_is_the_further_of_steps_and_time():
    settings = Settings(steps=100, minutes=10)
    assert settings.progress(25, elapsed=0) == 0.25
    assert settings.progress(25, elapsed=300) == 0.5
    assert settings.progress(25, elapsed=700) == 1.0
    assert settings.progress(100, elapsed=0) == 1.0
    assert Settings(minutes=10).progress(10**6, elapsed=60) == 0.1
    assert Settings(steps=10).progress(5, elapsed=1e9) == 0.5


def test_warm_up_and_cosine():
    settings = Settings(steps=1000, lr=2.0, warmup=9)
    rates = [settings.learning_rate(step, settings.progress(step, 0)) for step in range(1001)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0, rel=1e-3)
    assert max(rates) == rates[9] == pytest.approx(2.0, rel=1e-3)
    assert rates[500] == pytest.approx(1.0)
    assert rates[750] == pytest.approx(1 + math.cos(0.75 * math.pi))
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "--steps, --max-minutes"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup": -1}, "warmup must be at least 0 steps, got -1"),
        ({"row_tokens": 48}, "rows of 48 tokens do not divide n_positions = 64"),
        ({"batch_tokens": 96}, "batch_tokens = 96 is not a multiple"),
        ({"accumulate": 3}, "64 x 3 x 1"),
        ({"long_from": 1.5}, "long_from.*1.5"),
        ({"whole_from": -0.1}, "whole_from.*-0.1"),
    ],
)
def test_impossible_settings(changes, message):
    fields = {"steps": 10, "row_tokens": 32, "batch_tokens": 128, **changes}
    with pytest.raises(ValueError, match=message):
        Settings(**fields).check(n_positions=64)


def test_processes_share_a_step_evenly():
    Settings(steps=1, batch_tokens=128, row_tokens=32).check(n_positions=64, processes=2)
    with pytest.raises(ValueError, match=r"128 is not a multiple of .* processes = 64 x 1 x 4"):
        Settings(steps=1, batch_tokens=128, row_tokens=32).check(n_positions=64, processes=4)


def test_seeds_differ_in_the_bits_that_the_cpu_generator_reads():
    keys = [(seed, purpose, step) for seed in range(8) for purpose in (0, 1) for step in range(64)]
    assert len({derived_seed(*key) % 2**32 for key in keys}) == len(keys)
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3)


def test_the_arithmetic_of_a_token():
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 3, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    ids = torch.randint(32, (5, 8))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # It counts the whole square of attention scores: 2 products of 2 FLOPs, forward and twice
    # backward. A causal model needs half.
    attention = 3 * (2 * 2 * 3 * 8 * 16)
    ours = flops_per_token(model, row_tokens=8, vocabulary=32)
    assert ours == counter.get_total_flops() / ids.numel() - attention / 2
    assert flops_per_token(model, 8, vocabulary=20) == ours - 6 * 12 * 16


def test_only_matrices_decay():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    )
    decayed, others = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert all("ln_" in name or "bias" in name for name in (names[id(p)] for p in others["params"]))
