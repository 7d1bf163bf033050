"""One part of the suite in a process of its own, which may crash or hang without harm to the rest.

    python -m bench.suite.worker '{"part": "ops", "table": "module:function", "dry_run": true, ...}'

It reports on what was its standard output, a JSON object a line: ``{"phase": ..., "seconds": ...}``
before anything that may take long, ``{"cases": [names]}`` and ``{"case": {...}}`` for the ops and
for decoding, ``{"limits": {...}}``, ``{"probe": {name: {...}}}``, ``{"exercised": [names]}``.
Whatever else is printed goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from bench.suite import dry_run
from bench.suite.cases import Case
from bench.suite.gate import gradients, with_gradients
from bench.suite.limits import measure_limits
from bench.suite.measure import Clock
from bench.suite.runner import SILENCE, NotCaptured, measure_case
from bench.suite.work import OURS

_DRY = {"seconds": 0.0, "least": 1, "most": 1}


def load_table(name: str) -> Callable[..., list[Case]]:
    """``"module:function"`` to the function that gives the cases."""
    module, function = name.split(":")
    found: Callable[..., list[Case]] = getattr(importlib.import_module(module), function)
    return found


class _Worker:
    def __init__(self, job: dict[str, Any], channel: TextIO) -> None:
        self._job, self._channel, self._dry_run = job, channel, job["dry_run"]
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
        """Measures the cases in turn, but for those done; stops at the deadline."""
        job = self._job
        cases = load_table(job["table"])("tiny" if self._dry_run else "full")
        cases = [case for case in cases if job["only"] in case.name]
        self.tell(cases=[case.name for case in cases])
        clock = self._clock()
        for case in cases:
            if case.name in job["done"]:
                continue
            if time.time() >= job["deadline"]:
                break
            begin = time.time()
            self.tell(begin=case.name)
            without = job["without"].get(case.name, {})
            uncaptured = job["uncaptured"].get(case.op, {})
            try:
                record = measure_case(
                    case, self._device, clock, self.say, without, uncaptured, self._dry_run
                )
            except NotCaptured as error:
                self.tell(uncaptured={"op": case.op, error.provider: error.reason})
                raise
            except torch.OutOfMemoryError as error:
                record = {"case": case.name, "status": "not measured", "reason": str(error)[:300]}
            record["seconds"] = time.time() - begin
            self.tell(case=record)
            torch.cuda.empty_cache()

    def decode(self) -> None:
        """The decode ladder's cases in turn, as `ops`."""
        from bench.suite.decode import decode_cases, measure_decode

        job = self._job
        cases = decode_cases("tiny" if self._dry_run else "full")
        cases = [case for case in cases if job["only"] in case.name]
        self.tell(cases=[case.name for case in cases])
        for case in cases:
            if case.name in job["done"]:
                continue
            if time.time() >= job["deadline"]:
                break
            begin = time.time()
            self.tell(begin=case.name)
            without = job["without"].get(case.name, {})
            try:
                record = measure_decode(case, self._device, self.say, without, self._dry_run)
            except torch.OutOfMemoryError as error:
                record = {"case": case.name, "status": "not measured", "reason": str(error)[:300]}
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
        "ops": worker.ops,
        "exercise": worker.exercise,
    }
    parts[job["part"]]()


if __name__ == "__main__":
    main()
