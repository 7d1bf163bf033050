"""A process with one contender at one step of a whole model, on a CPU in float32.

    python -m bench.step_worker CONTENDER MODEL THREADS IN OUT

Answers as `gpt2fast.benchmark.worker` does, to what a `bench.step_contest` asks.
"""

import gc
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2fast.benchmark.worker import Worker


class StepWorker(Worker):
    """The contender is a name of `bench.suite.step_cases`; behind it may stand "again"."""

    def set_up(self, case: dict[str, Any], path: str) -> dict[str, Any]:
        """Make the step, and save its answers under ``path``, by `torch.save`."""
        import torch

        from bench.suite.step_cases import COMPILING, StepCase
        from bench.suite.steps import inputs_of, set_up, source_model

        torch.set_num_threads(self._threads)
        sizes = tuple((name, value) for name, value in case["sizes"])
        made = StepCase(**{**case, "contenders": tuple(case["contenders"]), "sizes": sizes})
        name, cpu = str(self._contender).removesuffix(" again"), torch.device("cpu")
        self._step = set_up(
            *(made, name, source_model(made, torch.float32, cpu), inputs_of(made, cpu)),
            dtype=torch.float32,
            may_compile=name in COMPILING,
        )
        torch.save(self._step.answers(), path)
        gc.collect()
        with suppress(OSError):  # what counts as the peak begins here, where the system allows it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return {}

    def step(self) -> dict[str, Any]:
        """Seconds that a step took; of training its loss."""
        start = self._clock()
        self._step()
        seconds = self._clock() - start
        loss = getattr(self._step, "loss", None)
        return {"seconds": seconds, "loss": None if loss is None else float(loss)}


def main() -> None:
    contender, _, threads, requests, answers = sys.argv[1:]
    with os.fdopen(int(requests)) as source, os.fdopen(int(answers), "w") as sink:
        StepWorker(contender, int(threads), source, sink, time.perf_counter).serve()


if __name__ == "__main__":
    main()
