"""Log-probabilities of texts on the CPU, beside the loop over logits that everybody writes.

    pytest bench/bench_scoring.py

One case is of texts of mixed lengths, one of 16 full contexts, for its memory. Contenders take
turns; see `bench.step_contest`. Environment and records as in ``bench_decode.py``.
"""

import pytest

from bench.step_contest import cases, recorder, run_case
from bench.suite.step_cases import StepCase
from gpt2fast.benchmark.record import Record

CASES = cases("scoring")


@pytest.fixture(scope="module")
def record() -> Record:
    return recorder("scoring")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scoring(record: Record, case: StepCase) -> None:
    run_case(record, case)
