"""One part of the suite in a process of its own, which may crash or hang without harm to the rest.

    python -m bench.suite.worker '{"part": "ops", "table": "module:function", "dry_run": true, ...}'

It reports on what was its standard output, a JSON object a line: ``{"phase": ..., "seconds": ...}``
before anything that may take long, ``{"cases": [names]}`` and ``{"case": {...}}`` for ops, decoding
and steps of whole models, ``{"limits": {...}}``, ``{"probe": {name: {...}}}``,
``{"exercised": [names]}``. Whatever else is printed goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch

from bench.suite import dry_run
from bench.suite.cases import Case
from bench.suite.gate import WrongAnswer, gradients, with_gradients
from bench.suite.limits import measure_limits
from bench.suite.measure import Clock
from bench.suite.runner import SILENCE, NotCaptured, measure_case
from bench.suite.work import OURS

_DRY = {"seconds": 0.0, "least": 1, "most": 1}
_STEPS = {"seconds": 1.5, "least": 3, "most": 31}  # a step of a whole model takes milliseconds


def load_table(name: str) -> Callable[..., list[Case]]:
    """``"module:function"`` to the function that gives the cases."""
    module, function = name.split(":")
    found: Callable[..., list[Case]] = getattr(importlib.import_module(module), function)
    return found


class _Worker:
    def __init__(self, job: dict[str, Any], channel: TextIO) -> None:
        self._job, self._channel, self._dry_run = job, channel, job["dry_run"]
        self._scale = "tiny" if self._dry_run else "full"
        if self._dry_run:
            dry_run.emulate_gpu()
        elif not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no GPU")
        self._device = torch.device("cpu" if self._dry_run else "cuda")
        # A pass that is captured must run on the stream of the forward pass it belongs to.
        torch.cuda.set_stream(torch.cuda.Stream())

    def tell(self, **message: Any) -> None:
        self._channel.write(json.dumps(message) + "\n")
        self._channel.flush()

    def say(self, phase: str, seconds: float) -> None:
        self.tell(phase=phase, seconds=seconds)

    def _clock(self) -> Clock:
        return Clock(self._device, **(_DRY if self._dry_run else {}))

    def limits(self) -> None:
        clock = self._clock()
        self.tell(limits=measure_limits(self._device, clock, self.say, self._dry_run))

    def probes(self) -> None:
        # Imports Triton, whose interpreter a dry run has to choose before.
        from bench.suite.decode_probes import decode_probes

        for name, result in decode_probes(self._device, self._clock(), self.say, self._dry_run):
            self.tell(probe={name: result})

    def ops(self) -> None:
        clock = self._clock()

        def measure(case: Case) -> dict[str, Any]:
            without = self._job["without"].get(case.name, {})
            uncaptured = self._job["uncaptured"].get(case.op, {})
            try:
                return measure_case(
                    case, self._device, clock, self.say, without, uncaptured, self._dry_run
                )
            except NotCaptured as error:
                self.tell(uncaptured={"op": case.op, error.provider: error.reason})
                raise

        self._measure(load_table(self._job["table"])(self._scale), measure)

    def decode(self) -> None:
        from bench.suite.decode import DecodeCase, decode_cases, measure_decode

        def measure(case: DecodeCase) -> dict[str, Any]:
            without = self._job["without"].get(case.name, {})
            deadline = float("inf") if self._dry_run else self._job["deadline"]
            return measure_decode(case, self._device, self.say, without, self._dry_run, deadline)

        self._measure(decode_cases(self._scale), measure)

    def steps(self) -> None:
        """Those of the parts that are asked for, each of which has a text to look for."""
        from bench.suite.step_cases import StepCase, step_cases
        from bench.suite.step_runner import measure_steps

        clock = Clock(self._device, **(_DRY if self._dry_run else _STEPS))
        parts = self._job["parts"]

        def measure(case: StepCase) -> dict[str, Any]:
            without = self._job["without"].get(case.name, {})
            return measure_steps(case, self._device, clock, self.say, without, self._dry_run)

        cases = [c for c in step_cases(self._scale) if c.part in parts and parts[c.part] in c.name]
        self._measure(cases, measure)

    def _measure(self, cases: Sequence[Any], measure: Callable[[Any], dict[str, Any]]) -> None:
        """The cases in turn, but for those done; none is begun that would end too late."""
        job = self._job
        cases = [case for case in cases if job["only"] in case.name]
        self.tell(cases=[case.name for case in cases])
        for case in cases:
            # Of the ops and of decoding each takes seconds, which the parent allows for.
            expected = 0.0 if self._dry_run else getattr(case, "seconds", 0.0)
            if case.name in job["done"] or time.time() + expected >= job["deadline"]:
                continue
            begin = time.time()
            self.tell(begin=case.name)
            try:
                record = measure(case)
            except torch.OutOfMemoryError as error:
                record = {"case": case.name, "op": case.op, "status": "not measured"}
                record["reason"] = str(error)[:300]
            except WrongAnswer as error:  # of the oracle: those of contenders are in the record
                record = {"case": case.name, "op": case.op, "status": "failed"}
                record["reason"] = str(error)
            record["seconds"] = time.time() - begin
            self.tell(case=record)
            torch.cuda.empty_cache()

    def exercise(self) -> None:
        """Every op once, forward and backward, for a memory checker to watch."""
        cases = load_table(self._job["table"])("tiny" if self._dry_run else "small")
        exercised = []
        for case in cases:
            if self._job["only"] not in case.name:
                continue
            self.say(case.name, SILENCE)
            with self._device:
                inputs = case.inputs()
                provider = case.providers[OURS]
                with provider.context():
                    provider.run(*inputs.leaves, *inputs.others)
                    if case.differentiable:
                        inputs = with_gradients(inputs)
                        outputs = provider.run(*inputs.leaves, *inputs.others)
                        tensors = case.observe(inputs, outputs)
                        upstream = tuple(torch.randn_like(t) for t in tensors)
                        gradients(outputs, inputs.leaves, upstream)
            torch.cuda.synchronize()
            exercised.append(case.name)
        self.tell(exercised=exercised)
        if self._job["plant"]:
            from bench.suite.probes import write_at

            # Last: after it the device may serve this process no more.
            write_at(torch.zeros(1024, device=self._device), 0 if self._dry_run else 1024)
            torch.cuda.synchronize()


def main() -> None:
    job = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(job, channel)
    parts = {
        "limits": worker.limits,
        "probes": worker.probes,
        "decode": worker.decode,
        "steps": worker.steps,
        "ops": worker.ops,
        "exercise": worker.exercise,
    }
    parts[job["part"]]()


if __name__ == "__main__":
    main()
