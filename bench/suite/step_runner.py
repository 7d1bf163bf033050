"""One case of whole models on a GPU: everybody through the gate, then those that passed in turn.

The oracle is `bench.suite.plain` in float32. In 16 bits an answer may lie as far from it as twice
what that program errs in the same dtype; a peer's may lie twice as far again: its rounding is its
own affair, and another function is further away than that. Distances are norms of differences over
norms. Tokens are judged as in the ladder: none may be worse than the best but for rounding.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.suite import step_cases as names
from bench.suite.decode import shortfalls
from bench.suite.gate import WrongAnswer, distance, poisoned_memory
from bench.suite.measure import Clock, Context, paired_ratios, peak_bytes, quantiles
from bench.suite.plain import PlainGPT2
from bench.suite.runner import SILENCE, Say, first_line
from bench.suite.step_cases import StepCase
from bench.suite.steps import (
    EXACT,
    Answers,
    Step,
    Training,
    inputs_of,
    set_up,
    source_model,
    step_of,
)
from gpt2fast import kernels
from tests.tolerances import BUDGET

SILENCE_COMPILING = 150.0
# How far losses may be apart after the same steps on the same data, relative.
LOSS_APART = 0.02


class StepGate:
    """What is right for a case; `WrongAnswer` where the oracle's own answers are no measure."""

    def __init__(self, case: StepCase, source: Any, inputs: Any, dtype: torch.dtype) -> None:
        self._case, self._inputs, self._floor = case, inputs, _floor(dtype)
        if case.kind == names.GENERATE:
            self._judges = copy.deepcopy(source).float(), source
            return
        exact = PlainGPT2(copy.deepcopy(source).float()).eval()
        self._exact = _answers(case, exact, inputs, torch.float32)
        del exact
        plain = self._exact
        if dtype != torch.float32:
            plain = _answers(case, PlainGPT2(source).eval(), inputs, dtype)
        for key, value in (*self._exact.items(), *plain.items()):
            if not bool(torch.isfinite(value).all()):  # a bound that lets everything through
                raise WrongAnswer(f"the oracle's {key} is not finite")
        self._allowed = {key: distance(plain[key], self._exact[key]) for key in plain}

    def check(self, name: str, answers: Answers) -> dict[str, Any]:
        """What is recorded of the errors; `WrongAnswer` where one is too large."""
        if self._case.kind == names.GENERATE:
            return self._check_tokens(answers["tokens"])
        if missing := sorted(self._exact.keys() ^ answers.keys()):
            raise WrongAnswer(f"{missing[0]}: there is none, or none was expected")
        budget = BUDGET if name in names.OF_OURS else 2 * BUDGET
        errors = {key: distance(answers[key], self._exact[key]) for key in self._exact}
        bounds = {key: budget * self._allowed[key] + self._floor for key in self._exact}
        worst = max(errors, key=lambda key: errors[key] / bounds[key])
        report = {"of": worst, "error": errors[worst], "bound": bounds[worst]}
        if not errors[worst] <= bounds[worst]:
            raise WrongAnswer(f"{worst}: error {errors[worst]:.1e} > {bounds[worst]:.1e}")
        return report

    def _check_tokens(self, chosen: Tensor) -> dict[str, Any]:
        case, ids = self._case, self._inputs[0]
        if chosen.shape != (case.batch, case.new_tokens):
            raise WrongAnswer(f"expected {case.new_tokens} tokens a row; got {list(chosen.shape)}")
        short, allowed = shortfalls(*self._judges, ids, chosen.long())
        if not short <= allowed + 1e-5:
            raise WrongAnswer(
                f"a token's logit is {short:.2e} below the best; {allowed:.2e} may be"
            )
        return {"of": "tokens", "error": short, "bound": allowed}


def _floor(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def _answers(case: StepCase, model: Any, inputs: Any, dtype: torch.dtype) -> Answers:
    return step_of(case, model, inputs, dtype=dtype, compiled=False).answers()


def _context(case: StepCase, name: str, device: torch.device) -> Context:
    """What a contender runs in. PyTorch's attention is pinned, but in `generate`, whose masks that
    backend does not take."""
    if device.type == "cpu" or name in names.OF_OURS or case.kind == names.GENERATE:
        return nullcontext
    return partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)


@contextmanager
def _watched(name: str, dry_run: bool) -> Iterator[None]:
    """Around the answers: ours, where it is not compiled, finds NaN in fresh memory; a dry run
    has the kernels in their interpreter for them alone."""
    with ExitStack() as stack:
        if name in names.OF_OURS and name not in names.COMPILING:
            stack.enter_context(poisoned_memory())
            if dry_run:
                stack.enter_context(kernels.backend("triton"))
        yield


def measure_steps(
    case: StepCase,
    device: torch.device,
    clock: Clock,
    say: Say,
    without: dict[str, str],
    dry_run: bool,
) -> dict[str, Any]:
    """The record of one case.

    Args:
        say: told what comes next, and how long at most until it is told again.
        without: contenders that broke an earlier attempt, with the reason.
        dry_run: compile nothing.
    """
    say("oracle", SILENCE)
    torch._dynamo.reset()
    dtype = torch.float32 if dry_run else torch.bfloat16
    source, inputs = source_model(case, dtype, device), inputs_of(case, device)
    gate = StepGate(case, source, inputs, dtype)
    reports: dict[str, dict[str, Any]] = {name: {} for name in case.contenders}
    ready: dict[str, Step] = {}
    for name, report in reports.items():
        say(f"provider {name}", SILENCE_COMPILING if name in names.COMPILING else SILENCE)
        begin = time.perf_counter()
        try:
            if name in without:
                raise RuntimeError(without[name])
            step = set_up(case, name, source, inputs, dtype, may_compile=not dry_run)
            with _context(case, name, device)():
                with _watched(name, dry_run):
                    answers = step.answers()
                report |= gate.check(name, answers)
                del answers
                report["peak_bytes"] = peak_bytes(step)
        except WrongAnswer as error:
            report["wrong"] = str(error)
        except Exception as error:
            no_room = isinstance(error, torch.OutOfMemoryError)
            ours = name in names.OF_OURS and not no_room
            report["wrong" if ours else "not measured"] = first_line(error)
        else:
            ready[name] = step
        report["ready_s"] = time.perf_counter() - begin
    del gate
    torch.cuda.empty_cache()
    times = _times(case, ready, reports, device, clock, say)
    wrong = [n for n in case.contenders if n in names.OF_OURS and "wrong" in reports[n]]
    return {
        "case": case.name,
        "op": case.op,
        "kind": case.kind,
        "model": case.model,
        "batch": case.batch,
        "length": case.length,
        "dtype": str(dtype).removeprefix("torch."),
        "work": {"tokens": case.tokens, "flops": case.flops},
        "status": "failed" if wrong else "measured",
        **({"reason": f"{wrong[0]}: {reports[wrong[0]]['wrong']}"} if wrong else {}),
        "providers": reports,
        "times": times,
    }


def _times(
    case: StepCase,
    ready: dict[str, Step],
    reports: dict[str, dict[str, Any]],
    device: torch.device,
    clock: Clock,
    say: Say,
) -> dict[str, Any]:
    """Times by contender, with ratios to the first pair by pair; who ends up elsewhere has none."""
    say("timing", SILENCE)
    contexts = {name: _context(case, name, device) for name in ready}
    on_device = clock.device(dict(ready), contexts)
    say("timing again", SILENCE)
    by_host = clock.host(dict(ready), contexts)
    ours = case.contenders[0]
    times: dict[str, Any] = {}
    for name, step in ready.items():
        if isinstance(step, Training) and (apart := _apart(step, ready[next(iter(ready))])):
            reports[name]["wrong"] = apart
            continue
        times[name] = {"device": quantiles(on_device[name])}
        times[name] |= {kind: quantiles(samples) for kind, samples in by_host[name].items()}
        if name != ours and ours in ready:
            times[name]["device_ratio"] = paired_ratios(on_device[ours], on_device[name])
            times[name]["host_ratio"] = paired_ratios(by_host[ours]["host"], by_host[name]["host"])
    if ours in times and len(on_device[ours]) > 1:
        # A round against the next: the noise. Ours twice a round would be twice as many steps.
        times[ours]["again"] = paired_ratios(on_device[ours][1:], on_device[ours][:-1])
    return times


def _apart(step: Training, first: Any) -> str | None:
    """Whether training led elsewhere than the first contender's equally many steps."""
    assert step.loss is not None
    losses = float(step.loss), float(first.loss)
    if abs(losses[0] - losses[1]) <= LOSS_APART * losses[1]:
        return None
    return f"after the same steps the loss is {losses[0]:.4f}, not {losses[1]:.4f}"
