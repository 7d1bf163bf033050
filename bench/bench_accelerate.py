"""Models of transformers on the CPU, accelerated, against themselves.

    pytest bench/bench_accelerate.py

Training, a prompt, greedy generation and perplexity. Contenders take turns; see
`bench.step_contest`. Environment and records as in ``bench_decode.py``.
"""

import pytest

from bench.step_contest import cases, recorder, run_case
from bench.suite.step_cases import StepCase
from gpt2fast.benchmark.record import Record

CASES = cases("accelerate")


@pytest.fixture(scope="module")
def record() -> Record:
    return recorder("accelerate")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accelerate(record: Record, case: StepCase) -> None:
    run_case(record, case)
