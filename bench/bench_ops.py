"""The ops under pytest-benchmark, from the table of the GPU suite.

    pytest bench/bench_ops.py
    pytest bench/bench_ops.py -k "layer_norm and forward"

On a CPU ours is the PyTorch implementation, at the sizes of the smallest published model in
float32, beside plain PyTorch and what transformers does. On a GPU ours is the Triton kernels; for
records with flushed caches, graphs and interleaved ratios use ``bench/gpu_suite.py`` there. Every
provider passes the parity gate first.
"""

import functools
from typing import Any

import pytest
import torch

from bench.suite.cases import Case, Inputs
from bench.suite.gate import Gate, WrongAnswer
from bench.suite.ops import op_cases
from bench.suite.runner import Contender

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CASES = op_cases("full", "triton") if ON_GPU else op_cases("cpu", "torch")


def _measured(case: Case) -> list[str]:
    # On a CPU, torch.compile would spend minutes in the C++ compiler.
    return [name for name, p in case.providers.items() if ON_GPU or p.compile_mode is None]


@functools.lru_cache(maxsize=1)  # the tests of a case follow each other
def _prepared(index: int) -> tuple[Inputs, Gate]:
    with DEVICE:
        inputs = CASES[index].inputs()
        return inputs, Gate(CASES[index], inputs)


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
