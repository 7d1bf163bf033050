"""The times of the decode ladder: whole generations in turn, and steps alone on the device."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.suite.decode_peers import Generate
from bench.suite.measure import paired_ratios, quantiles

ROUNDS = 7  # at most; as many as fit into the time of a case, and two at least
SECONDS = 6.0  # for the rounds of a case
_STEP_ROUNDS = 5
_AHEAD_CYCLES = 6_000_000  # about 3 ms, in which the host issues a generation's steps


class Steps(NamedTuple):
    """A contender's prompts by themselves, and steps behind them, which wait for nothing."""

    prepare: Callable[[], Any]
    advance: Callable[[int], Any]


def whole_times(
    ready: dict[str, Generate],
    ids: Tensor,
    new: int,
    begun: Callable[[str], None],
    dry: bool,
    deadline: float,
) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender: of "all" tokens, of the "first", and of a "token" between.

    Where the first token alone took as long as all, that is noise: "token" is NaN.

    Args:
        begun: told who is timed next.
        deadline: in the time of ``time.time``; two rounds there are in any case.
    """
    samples: dict[str, dict[str, list[float]]] = {
        name: {"all": [], "first": [], "token": []} for name in ready
    }
    begin = time.time()
    for done in range(1 if dry else ROUNDS):
        until_next = (time.time() - begin) * (done + 1) / max(done, 1)
        if done >= 2 and (until_next > SECONDS or begin + until_next > deadline):
            break
        for name, generate in ready.items():
            begun(name)
            first = _seconds(partial(generate, ids, 1))
            whole = _seconds(partial(generate, ids, new))
            samples[name]["all"].append(whole)
            samples[name]["first"].append(first)
            usable = whole > first or dry
            token = max(whole - first, 1e-9) / (new - 1) if usable else math.nan
            samples[name]["token"].append(token)
    return samples


def step_times(steps: Steps, new: int, dry: bool) -> dict[str, list[float]]:
    """Seconds a step: "device" between events with all steps issued before the first one runs,
    so without the host's; "issue", what the host takes to issue one."""
    count = new - 1
    times: dict[str, list[float]] = {"device": [], "issue": []}
    for _ in range(1 if dry else _STEP_ROUNDS):
        steps.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not dry:
            torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        begin = time.perf_counter()
        steps.advance(count)
        times["issue"].append((time.perf_counter() - begin) / count)
        end.record()
        torch.cuda.synchronize()
        times["device"].append(start.elapsed_time(end) / 1e3 / count)
    return times


def summary(
    samples: dict[str, dict[str, list[float]]], first: str, sizes: dict[str, int]
) -> dict[str, Any]:
    """Quantiles by contender and kind, with ratios to the contender ``first``, and the bytes."""
    times: dict[str, Any] = {}
    for name, kinds in samples.items():
        times[name] = {
            kind: quantiles(known) for kind, values in kinds.items() if (known := _known(values))
        }
        noise = sum(map(math.isnan, kinds["token"]))
        if noise:
            times[name]["noisy_rounds"] = noise
        if name != first and first in samples:
            for kind in ("all", "token"):
                rounds = zip(samples[first][kind], kinds[kind], strict=True)
                pairs = [pair for pair in rounds if not any(map(math.isnan, pair))]
                if pairs:
                    times[name][f"{kind}_ratio"] = paired_ratios(
                        *map(list, zip(*pairs, strict=True))
                    )
        if name in sizes:
            times[name]["bytes"] = sizes[name]
    return times


def _known(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
