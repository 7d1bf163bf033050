"""Contenders on a step of a whole model on a CPU: gate, warm-up, turns, ratios of neighbours.

Each has a process of its own, `bench.step_worker`, with weights from one seed. All must give the
answers of transformers with SDPA to 1e-4: losses, every gradient, log-probabilities, tokens; and
where they train, have its loss after as many steps. Memory is the largest of a process since it was
ready: the model, its gradients and the optimizer's state, and what a step takes.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.suite.step_cases import SDPA, TRAINING, StepCase, again, cpu_cases
from gpt2fast.benchmark.contest import Asked, Report, Say, Start, Wrong, closed
from gpt2fast.benchmark.processes import Failed, Process
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, THREADS, Record
from gpt2fast.benchmark.tables import missing, times_table

_LOSSES_APART = 1e-3  # relative, after the same few steps
_NAMES = {"gpt2": "124M"}


def cases(part: str) -> list[StepCase]:
    """Those that the environment asks for."""
    if QUICK:
        return cpu_cases(part, "quick")
    compiled = cpu_cases(part, "compiled") if os.environ.get("GPT2FAST_BENCH_COMPILED") else []
    return [*cpu_cases(part, "full"), *compiled]


def title(case: StepCase) -> str:
    """The heading of a case's column."""
    kind = "" if case.kind == case.part else f"{case.kind}, "
    mixed = "up to " if case.mixed else ""
    return f"{_NAMES.get(case.model, case.model)}, {kind}{case.batch} x {mixed}{case.length}"


def contest(
    case: StepCase, start: Start, say: Say, time_is_up: Callable[[], bool] = lambda: False
) -> Report:
    """The record of a case; of fewer rounds where time is up.

    Raises:
        Failed: transformers with SDPA, which says what is right, cannot be asked.
    """
    fields = {key: value for key, value in asdict(case).items() if key != "contenders"}
    fields |= {"name": title(case), "tokens": case.tokens, "flops": case.flops}
    running = _Running(case, start, say)
    try:
        seconds, limits = running.turns(time_is_up)
        for name, taken in seconds.items():
            if taken:
                peak = running.processes[name].ask("memory")["peak_bytes"]
                running.reports[name] |= {"seconds": taken, "peak_bytes": peak}
    finally:
        running.close()
    ours = case.contenders[0]
    record = closed(fields, running.reports, limits, base=SDPA, ours=ours, again=again(ours))
    for report in record["contenders"].values():
        if "p" in report:
            report["tokens_per_s"] = case.tokens / report["p"]["p50"]
    return record


class _Running:
    """Those that are here and right."""

    def __init__(self, case: StepCase, start: Start, say: Say) -> None:
        self.reports: dict[str, Report] = {name: {} for name in case.contenders}
        self.processes: dict[str, Asked] = {}
        self._case, self._say = case, say
        self._measurer: Asked | None = None
        try:
            self._load(start)
            self._measurer = start(SDPA)  # a process of its own, which loads no model
        except BaseException:
            self.close()
            raise

    def _load(self, start: Start) -> None:
        import torch

        expected: Any = None
        with tempfile.TemporaryDirectory() as folder:
            for name in sorted(self.reports, key=lambda name: name != SDPA):
                self._say(f"{self._case.name}: {name}: loading")
                path = str(Path(folder) / "answers")
                try:
                    self.processes[name] = start(name)
                    self.processes[name].ask("set_up", case=asdict(self._case), path=path)
                    answers = torch.load(path)
                    expected = answers if expected is None else expected
                    self.reports[name]["agreement"] = _agreement(answers, expected)
                except Failed as error:
                    self._exclude(name, error)
                    if name == SDPA:
                        raise

    def _exclude(self, name: str, error: Failed) -> None:
        kind = "wrong" if isinstance(error, Wrong) else "not measured"
        self.reports[name][kind] = str(error)
        if name in self.processes:
            self.processes.pop(name).close()

    def turns(
        self, time_is_up: Callable[[], bool]
    ) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
        """Seconds by contender, and the machine's limits, in every round but the warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in self.processes}
        limits = []
        assert self._measurer is not None
        # The answers were a warm-up; the optimizer's state comes with the first step.
        first = -1 if self._case.kind == TRAINING else 0
        for turn in range(first, self._case.rounds):
            if turn > 0 and time_is_up():
                break
            self._say(f"{self._case.name}: turn {turn + 1} of {self._case.rounds}")
            if turn >= 0:
                limits.append(self._measurer.ask("limits"))
            losses = {}
            for name in list(self.processes):
                try:
                    answer = self.processes[name].ask("step")
                except Failed as error:
                    self._exclude(name, error)
                    continue
                losses[name] = answer["loss"]
                if turn >= 0:
                    seconds[name].append(answer["seconds"])
            self._check(losses)
        return {name: seconds[name] for name in self.processes}, limits

    def _check(self, losses: dict[str, float | None]) -> None:
        if SDPA not in losses:
            raise Failed(f"{SDPA}, the reference: {self.reports[SDPA]}")
        right = losses[SDPA]
        for name, loss in losses.items():
            if right is None or loss is None:
                continue
            if not abs(loss - right) <= _LOSSES_APART * right:
                text = f"after the same steps the loss is {loss:.5f}, that of {SDPA} {right:.5f}"
                self._exclude(name, Wrong(text))

    def close(self) -> None:
        measurer = [self._measurer] if self._measurer is not None else []
        for process in (*self.processes.values(), *measurer):
            process.close()


def _agreement(answers: Any, expected: Any) -> dict[str, Any]:
    """The largest distance of an answer; `Wrong` where it is too large."""
    from bench.suite.gate import distance
    from bench.suite.steps import EXACT

    if different := sorted(answers.keys() ^ expected.keys()):
        raise Wrong(f"{different[0]}: there is none, or {SDPA} has none")
    errors = {key: distance(answers[key], expected[key]) for key in expected}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= EXACT:
        raise Wrong(f"{worst} differs from that of {SDPA}: {errors[worst]:.1e}")
    return {"of": worst, "error": errors[worst]}


def recorder(part: str) -> Record:
    """The record of a benchmark."""
    return Record(part, RESULTS if RECORD else None, cases=len(cases(part)))


def run_case(record: Record, case: StepCase) -> None:
    """Measure a case into the record; the test fails where ours was wrong."""
    known = {"name": title(case), "model": case.model}
    if record.time_is_up():
        record.add({**known, "not measured": "no time left"})
        pytest.skip("no time left")
    start = partial(Process, model=case.model, threads=THREADS, worker="bench.step_worker")
    with record.naming_failure(known):
        made = contest(case, start, lambda text: print(text, file=sys.stderr), record.time_is_up)
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith(("gpt2fast", "accelerated")) for name in wrong), wrong
