"""Work on a CUDA device that is recorded once and replayed: a graph for each kind of step."""

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

Work = Callable[[], None]

# Streams of objects that were closed. Libraries keep a workspace for every stream they ever saw, of
# up to 32 MB, so new ones are made only where none is left.
_UNUSED_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)

# PyTorch records one graph at a time, and its allocator gives nothing back meanwhile.
_RECORDING = threading.Lock()


class Replayer:
    """Runs pieces of work on one device, from the second time on as CUDA graphs.

    The first time work runs as it is: kernels are compiled then, libraries make their workspaces,
    and work that comes once is not recorded for nothing. On a device without graphs that is all.

    Everything runs on a stream of this object's own, which waits for the caller's current stream
    and is waited for by it.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None  # all graphs work in the same memory, one after the other
        self._last: torch.cuda.Stream | None = None  # of the callers', that `ordered` has seen
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            unused = _UNUSED_STREAMS[device]
            try:
                stream = unused.pop()
            except IndexError:
                with torch.cuda.device(device):
                    stream = torch.cuda.Stream()
            self._stream = stream
            # Once: when this object is closed, or when nobody has it any longer.
            self._leave = weakref.finalize(self, unused.append, stream)
            self._leave.atexit = False

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Within, work is issued to this object's stream."""
        own = self._stream
        if own is None:
            yield
            return
        with torch.cuda.device(self._device):
            own.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(own):
                    yield
            finally:
                torch.cuda.current_stream().wait_stream(own)

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Within, what is recorded may be run on the caller's current stream as well.

        For callers that do nothing else on this device's streams in between: they spare the two
        waits of `stream`, which is for recording. One thread at a time.
        """
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            # On another stream the last replay may still be at work, in the memory of this one.
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current
        yield

    def run(self, key: Hashable, work: Work) -> None:
        """Do ``work``, which does the same whenever it comes with this key.

        Within `stream`; what is recorded already, within `ordered` at least.

        Raises:
            torch.OutOfMemoryError: nothing of the work was done.
        """
        if self._stream is None:
            work()
        elif key not in self._graphs:
            work()
            self._graphs[key] = None
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = self._recorded(work)
            graph.replay()

    def _recorded(self, work: Work) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile is no business of this capture.
        with (
            _RECORDING,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            work()
        return graph

    def forget(self, key: Hashable = None) -> None:
        """Drop all graphs, or that of a key, and wait for what they are doing."""
        for stream in (self._stream, self._last):
            if stream is not None:
                stream.synchronize()
        if key is not None:
            self._graphs.pop(key, None)
            return
        self._graphs.clear()
        self._pool = None  # it ends with the last graph that works in it

    def close(self) -> None:
        """Drop everything; nothing may be run afterwards."""
        self.forget()
        if self._stream is not None:
            self._leave()
            self._stream = None


def empty_cache() -> None:
    """Give the devices back what no tensor and no graph uses, while nobody records."""
    if torch.cuda.is_initialized():  # never in a forked process, which may have inherited the lock
        with _RECORDING:
            torch.cuda.empty_cache()


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it is ending."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
