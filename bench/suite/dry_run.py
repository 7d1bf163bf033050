"""A stand-in for a GPU, so that a dry run walks through the code that a GPU would run.

Kernels run in Triton's interpreter on the CPU. The functions of ``torch.cuda`` that the benchmarks
use are replaced: events read the host's clock, a graph remembers nothing and replays nothing,
memory is not counted. The times mean nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from gpt2fast.kernels._triton.engine import configs
from tests.interpreter import prepare_once_a_launch, round_to_float8


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return (end._time - self._time) * 1e3


class _Graph:
    def replay(self) -> None:
        pass


@contextlib.contextmanager
def _capture(graph: _Graph, stream: Any) -> Iterator[None]:
    yield


def emulate_gpu() -> None:
    """Replace what the benchmarks use of ``torch.cuda``, for the rest of this process."""
    prepare_once_a_launch()
    round_to_float8()
    # The interpreter's time goes by tiles and programs, not by their size.
    tile = configs.DecodeRowsTile(warps=64, repeat=4, unroll=1, programs=1)
    configs.decode_rows_tile = lambda *_: tile
    properties = SimpleNamespace(
        name="no GPU: a dry run",
        major=9,
        minor=0,
        multi_processor_count=4,
        total_memory=1 << 30,
        L2_cache_size=1 << 10,
    )
    replacements = {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "Stream": SimpleNamespace,
        "current_stream": lambda: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: properties,
        "graph": _capture,
        "max_memory_allocated": lambda: 0,
        "memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "set_stream": lambda stream: None,
        "set_sync_debug_mode": lambda mode: None,
        "synchronize": lambda: None,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
