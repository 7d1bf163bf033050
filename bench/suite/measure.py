"""Timing: contenders in turn, so that whatever disturbs the machine meets all of them.

Three times are taken of a call on a GPU:

- "device": between two events around the replay of a CUDA graph of the call, so without what Python
  costs; where a call cannot be captured, around the call itself ("events" instead of "graph").
- "host": the clock of the host from the call to the end of the device's work: what a caller waits.
- "issue": the part of it after which the call returns.

Before each of them the L2 cache is filled with other data, by reading it: writing would leave lines
that the timed kernel would have to wait for.
"""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from gpt2fast.benchmark.statistics import paired_ratios as paired_ratios
from gpt2fast.benchmark.statistics import quantiles as quantiles

Call = Callable[[], Any]
Context = Callable[[], AbstractContextManager[Any]]


class Clock:
    """Times calls on one device.

    Args:
        device: where the calls run.
        seconds: what one comparison may take, of each kind of time.
        least, most: bounds of how often each contender is timed.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.25, least: int = 11, most: int = 101
    ) -> None:
        self._seconds, self._least, self._most = seconds, least, most
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._spoiler = torch.ones(cache, device=device)  # float32: four times the cache
        self._sink = torch.empty((), device=device)

    def _flush(self) -> None:
        torch.amax(self._spoiler, dim=0, out=self._sink)

    def _rounds(self, seconds_a_round: float) -> int:
        return max(self._least, min(self._most, int(self._seconds / max(seconds_a_round, 1e-7))))

    def host(
        self, calls: dict[str, Call], contexts: dict[str, Context]
    ) -> dict[str, dict[str, list[float]]]:
        """Seconds by contender and kind, "host" and "issue"."""
        samples: dict[str, dict[str, list[float]]] = {
            name: {"host": [], "issue": []} for name in calls
        }
        begin = time.perf_counter()
        self._host_round(calls, contexts, samples)
        rounds = self._rounds(time.perf_counter() - begin)
        for times in samples.values():
            for kind in times.values():
                kind.clear()  # the first round was the warm-up
        gc.disable()
        try:
            for _ in range(rounds):
                self._host_round(calls, contexts, samples)
        finally:
            gc.enable()
        return samples

    def _host_round(
        self,
        calls: dict[str, Call],
        contexts: dict[str, Context],
        samples: dict[str, dict[str, list[float]]],
    ) -> None:
        for name, call in calls.items():
            with contexts[name]():
                self._flush()
                torch.cuda.synchronize()
                start = time.perf_counter()
                result = call()
                returned = time.perf_counter()
                torch.cuda.synchronize()
                samples[name]["host"].append(time.perf_counter() - start)
                samples[name]["issue"].append(returned - start)
                del result

    def device(
        self,
        calls: dict[str, Call],
        contexts: dict[str, Context],
        before: dict[str, Call] | None = None,
    ) -> dict[str, list[float]]:
        """Seconds by contender, between events; the calls replay graphs or launch by themselves.

        What ``before`` holds of a contender runs after the cache was filled, and is not timed.
        """
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}

        def one_round() -> None:
            for name, call in calls.items():
                with contexts[name]():
                    pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self._flush()
                    if before is not None:
                        before[name]()
                    pair[0].record()
                    call()
                    pair[1].record()
                    marks[name].append(pair)

        one_round()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        one_round()
        torch.cuda.synchronize()
        rounds = self._rounds(time.perf_counter() - begin)
        for pairs in marks.values():
            pairs.clear()
        gc.disable()
        try:
            for _ in range(rounds):
                one_round()
            torch.cuda.synchronize()
        finally:
            gc.enable()
        return {
            name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
            for name, pairs in marks.items()
        }


def synchronises(call: Call) -> str | None:
    """Why a call cannot be captured: it waits for the device. None where it does not.

    The call is told that it is being captured: what it leaves out then does not count, and what it
    does instead has run, and was compiled, before the capture.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def captured(call: Call) -> tuple[Any, Any]:
    """A CUDA graph of a call that has run before on the current stream, and the call's result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = call()
    return graph, result


def peak_bytes(call: Call) -> int:
    """What a call takes of device memory at its peak, beyond what was taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before
