"""One case from inputs to record: all providers through the gate, then those that passed timed."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._functorch import config as functorch_config

from bench.suite.cases import Case, Inputs, Provider
from bench.suite.gate import Gate, WrongAnswer, gradients, poisoned_memory, with_gradients
from bench.suite.measure import (
    Call,
    Clock,
    captured,
    paired_ratios,
    peak_bytes,
    quantiles,
    synchronises,
)
from bench.suite.work import AGAIN, OURS

# How long, in seconds, a provider may be silent while it gets ready.
SILENCE = 60.0
SILENCE_SEARCHING = 180.0  # torch.compile in a mode that times candidates

Say = Callable[[str, float], None]


class NotCaptured(Exception):
    """A capture failed. That may leave PyTorch's generators and allocator in the middle of it, so
    the process should go no further: try again without capturing that provider."""

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(f"{provider}: {reason}")
        self.provider, self.reason = provider, reason


class Contender:
    """A provider on the case's inputs, with what the gate found."""

    def __init__(self, provider: Provider, inputs: Inputs, dry_run: bool) -> None:
        self.context = provider.context
        self._run = provider.run
        if provider.compile_mode is not None and not dry_run:
            # Compiled code may overwrite what it saved, unless it is told that passes repeat.
            functorch_config.donated_buffer = False
            self._run = torch.compile(provider.run, dynamic=False, mode=provider.compile_mode)
        self._inputs, self._leaves = inputs, with_gradients(inputs)
        self.report: dict[str, Any] = {}

    def forward(self) -> Any:
        return self._run(*self._inputs.leaves, *self._inputs.others)

    def recorded(self) -> Any:
        """The outputs with their autograd graph."""
        return self._run(*self._leaves.leaves, *self._leaves.others)

    def call(self, direction: str, gate: Gate) -> Call:
        """What is timed. Make it within the provider's context: the backward pass is that of a
        forward pass recorded here."""
        if direction == "forward":
            return self.forward
        leaves, upstream = self._leaves.leaves, gate.upstream
        if direction == "backward":
            outputs = self.recorded()
            return lambda: gradients(outputs, leaves, upstream, again=True)
        return lambda: gradients(self.recorded(), leaves, upstream)

    def check(self, case: Case, gate: Gate) -> None:
        """Fill the report with the errors; `WrongAnswer` where one is too large."""
        case.poison(self._inputs)
        errors = self.report["error"] = {"forward": gate.forward_error(self.forward())}
        if case.differentiable:
            outputs = self.recorded()
            errors["forward, recorded"] = gate.forward_error(outputs)
            grads = gradients(outputs, self._leaves.leaves, gate.upstream)
            errors["backward"] = gate.backward_error(grads)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"[:300]


def measure_case(
    case: Case,
    device: torch.device,
    clock: Clock,
    say: Say,
    without: dict[str, str],
    uncaptured: dict[str, str],
    dry_run: bool = False,
) -> dict[str, Any]:
    """The record of one case.

    Args:
        case: what to measure.
        device: where.
        clock: times the calls.
        say: told what comes next, and how long at most until it is told again.
        without: providers that broke an earlier attempt, with the reason.
        uncaptured: providers that cannot be captured in a graph, with the reason.
        dry_run: compile nothing.

    Raises:
        NotCaptured: another provider cannot.
    """
    say("inputs", SILENCE)
    if "torch._dynamo" in sys.modules:  # which else would be imported, for nothing
        torch._dynamo.reset()
    seed = int.from_bytes(os.urandom(4), "little")  # fresh inputs every time, but repeatable
    torch.manual_seed(seed)
    with device:  # not around what is timed: it costs every call of PyTorch
        inputs = case.inputs()
        say("oracle", SILENCE)
        gate = Gate(case, inputs)
    contenders, reports = _prepare(case, inputs, gate, say, without, dry_run)
    record: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seed": seed,
        "status": "measured" if OURS in contenders else "failed",
        "work": {d: {"bytes": w.bytes, "flops": w.flops} for d, w in case.work.items()},
        "providers": reports,
        "times": {},
    }
    if OURS not in contenders:
        return record  # nothing to compare with
    for direction in case.work:
        say(f"timing {direction}", SILENCE)
        times = record["times"][direction] = _times(direction, contenders, gate, clock, uncaptured)
        if "wrong" in times[OURS]:
            record["status"] = "failed"
    return record


def _prepare(
    case: Case, inputs: Inputs, gate: Gate, say: Say, without: dict[str, str], dry_run: bool
) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
    """Those that passed the gate, and what is to be said of everybody."""
    contenders: dict[str, Contender] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name, provider in case.providers.items():
        report = reports[name] = {}
        if name in without:
            report["not measured"] = without[name]
            continue
        searching = "autotune" in (provider.compile_mode or "")
        say(f"provider {name}", SILENCE_SEARCHING if searching else SILENCE)
        try:
            contender = Contender(provider, inputs, dry_run)
            contender.report = report
            with contender.context():
                with poisoned_memory() if name == OURS else nullcontext():
                    contender.check(case, gate)
                if case.memory:
                    report["peak_bytes"] = {
                        direction: peak_bytes(contender.call(direction, gate))
                        for direction in case.work
                        if direction != "backward"
                    }
        except WrongAnswer as error:
            report["wrong"] = str(error)
        except Exception as error:
            report["wrong" if name == OURS else "not measured"] = first_line(error)
        else:
            contenders[name] = contender
    return contenders, reports


def _times(
    direction: str,
    contenders: dict[str, Contender],
    gate: Gate,
    clock: Clock,
    uncaptured: dict[str, str],
) -> dict[str, Any]:
    """Times of everybody in one direction, with ratios to ours pair by pair."""
    contexts = {name: contender.context for name, contender in contenders.items()}
    calls: dict[str, Call] = {}
    times: dict[str, Any] = {name: {} for name in contenders}
    replayed: dict[str, Any] = {}
    device_calls: dict[str, Call] = {}
    for name, contender in contenders.items():
        with contexts[name]():
            call = calls[name] = contender.call(direction, gate)
            # Compared are times of one kind: where ours cannot be captured, nobody is.
            ours = times[OURS].get("device_source", "graph")
            why_not = uncaptured.get(name) or synchronises(call)
            if ours != "graph":
                why_not = f"{OURS} is not captured"
            if why_not is None:
                try:
                    graph, replayed[name] = captured(call)
                except Exception as error:
                    raise NotCaptured(name, first_line(error)) from error
                device_calls[name] = graph.replay
        times[name]["device_source"] = "events" if why_not else "graph"
        if why_not:
            times[name]["not captured"] = why_not
        device_calls.setdefault(name, call)
    device_calls[AGAIN], contexts[AGAIN] = device_calls[OURS], contexts[OURS]
    device = clock.device(device_calls, contexts)
    host = clock.host(calls, contexts)
    check = gate.forward_error if direction == "forward" else gate.backward_error
    for name in contenders:
        try:
            if name in replayed:
                check(replayed[name])
        except WrongAnswer as error:
            times[name] = {"wrong": f"replayed from a graph: {error}"}
            continue
        times[name]["device"] = quantiles(device[name])
        times[name] |= {kind: quantiles(samples) for kind, samples in host[name].items()}
        if name != OURS:
            if times[name]["device_source"] == times[OURS]["device_source"]:
                times[name]["device_ratio"] = paired_ratios(device[OURS], device[name])
            times[name]["host_ratio"] = paired_ratios(host[OURS]["host"], host[name]["host"])
    times[AGAIN] = {"device_ratio": paired_ratios(device[OURS], device[AGAIN])}
    return times
