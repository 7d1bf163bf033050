"""The ops, from the table of the GPU suite: in turns for a record, and under pytest-benchmark.

    pytest bench/bench_ops.py --benchmark-skip          # beside each other, ratios of turns
    pytest bench/bench_ops.py -k "test_op and layer_norm"

On a CPU ours is the PyTorch implementation, at the sizes of the smallest published model in
float32, beside plain PyTorch and what transformers does. On a GPU ours is the Triton kernels; for
records with flushed caches, graphs and interleaved ratios use ``bench/gpu_suite.py`` there. Every
provider passes the parity gate first. ``GPT2FAST_BENCH_RECORD=1`` writes
``results/cpu/ops.json``; the rest of the environment as in ``bench_decode.py``.
"""

import functools
import sys
import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from bench.suite.cases import Case, Inputs
from bench.suite.gate import Gate, WrongAnswer
from bench.suite.ops import op_cases
from bench.suite.runner import Contender
from gpt2fast.benchmark.contest import closed
from gpt2fast.benchmark.limits import Limits
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, THREADS, Record
from gpt2fast.benchmark.table import AGAIN
from gpt2fast.benchmark.table import OURS as OURS_RECORDED
from gpt2fast.benchmark.tables import times_table

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CASES = op_cases("full", "triton") if ON_GPU else op_cases("cpu", "torch")
PLAIN = "PyTorch"
SECONDS = 2.0  # of a case, unless eight rounds take longer
_LIMITS = ("read_bytes_per_s", "matmul_flop_per_s")


def _measured(case: Case) -> list[str]:
    # On a CPU, torch.compile would spend minutes in the C++ compiler.
    return [name for name, p in case.providers.items() if ON_GPU or p.compile_mode is None]


@functools.lru_cache(maxsize=1)  # the tests of a case follow each other
def _prepared(index: int) -> tuple[Inputs, Gate]:
    with DEVICE:
        inputs = CASES[index].inputs()
        return inputs, Gate(CASES[index], inputs)


# Provider -> contender of a record. What is plain is the base.
_RECORDED = {"ours": OURS_RECORDED, "eager": PLAIN, "flash": PLAIN, "chunked eager": "chunked"}
DIRECTIONS = [(index, direction) for index, case in enumerate(CASES) for direction in case.work]


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("ops", RESULTS if RECORD else None, cases=len(DIRECTIONS))


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits(THREADS)


@pytest.mark.skipif(ON_GPU, reason="bench/gpu_suite.py does this on a GPU")
@pytest.mark.parametrize(
    ("index", "direction"),
    [pytest.param(*pair, id=f"{CASES[pair[0]].name} {pair[1]}") for pair in DIRECTIONS],
)
def test_contest(record: Record, limits: Limits, index: int, direction: str) -> None:
    case = CASES[index]
    known: dict[str, Any] = {"name": f"{case.op} {case.shape} {direction}", "op": case.op}
    known |= {"direction": direction, "model": "gpt2"}
    if record.time_is_up():
        record.add({**known, "not measured": "no time left"})
        pytest.skip("no time left")
    torch.set_num_threads(THREADS)
    inputs, gate = _prepared(index)
    reports: dict[str, dict[str, Any]] = {}
    calls: dict[str, Any] = {}
    contexts: dict[str, Any] = {}
    for provider in [*_measured(case), "ours"]:
        name = _RECORDED.get(provider, provider)
        name = AGAIN if name in reports else name
        contender = Contender(case.providers[provider], inputs, dry_run=False)
        contexts[name] = contender.context
        report = reports[name] = contender.report
        with contender.context():
            try:
                contender.check(case, gate)
                calls[name] = contender.call(direction, gate)
            except WrongAnswer as error:
                report["wrong"] = str(error).splitlines()[0]
            except RuntimeError as error:
                report["not measured"] = str(error).splitlines()[0]
    for name, seconds in _in_turns(calls, contexts).items():
        reports[name]["seconds"] = seconds
    reached = limits.measure()
    made = closed(known, reports, [reached], base=PLAIN)
    floor = case.work[direction].seconds(*(reached[key] for key in _LIMITS))
    for report in reports.values():
        if "p" in report:
            report["share_of_limit"] = floor / report["p"]["p50"]
    record.add(made)
    print("\n" + times_table([made]), file=sys.stderr)
    assert OURS_RECORDED in calls, reports[OURS_RECORDED]


def _in_turns(calls: dict[str, Any], contexts: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each call, every round one of each; the first two rounds are the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for turn in range(2 + (3 if QUICK else 40)):
        if turn > 8 and time.perf_counter() - begun > SECONDS:
            break
        for name, call in calls.items():
            with ExitStack() as stack:
                stack.enter_context(contexts[name]())
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


@pytest.mark.parametrize(
    ("index", "direction", "name"),
    [
        pytest.param(index, direction, name, id=f"{case.name} {direction} {name}")
        for index, case in enumerate(CASES)
        for direction in case.work
        for name in _measured(case)
    ],
)
def test_op(benchmark: Any, index: int, direction: str, name: str) -> None:
    case, (inputs, gate) = CASES[index], _prepared(index)
    contender = Contender(case.providers[name], inputs, dry_run=False)
    benchmark.group = f"{case.name} {direction}"
    work = case.work[direction]
    benchmark.extra_info |= {"bytes": work.bytes, "flops": work.flops}
    with contender.context():
        try:
            contender.check(case, gate)
        except (RuntimeError, WrongAnswer) as error:
            if name == "ours":
                raise
            pytest.skip(str(error).splitlines()[0])
        call = contender.call(direction, gate)

        def finished() -> None:
            call()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark(finished)
    benchmark.extra_info["error"] = contender.report["error"]
