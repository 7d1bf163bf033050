"""A training step on the CPU beside transformers: forward, backward and AdamW, 124M in float32.

    pytest bench/bench_training.py

Contenders take turns, a step each, on the same ids from the same weights; see `bench.step_contest`.
Environment and records as in ``bench_decode.py``.
"""

import pytest

from bench.step_contest import cases, recorder, run_case
from bench.suite.step_cases import StepCase
from gpt2fast.benchmark.record import Record

CASES = cases("training")


@pytest.fixture(scope="module")
def record() -> Record:
    return recorder("training")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training(record: Record, case: StepCase) -> None:
    run_case(record, case)
