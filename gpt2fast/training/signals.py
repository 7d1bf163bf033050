"""SIGINT and SIGTERM end a run between two steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals(insist: bool = True) -> Iterator[list[int]]:
    """Collect STOP_SIGNALS in a list.

    With ``insist`` a second one of the same kind acts as usual. Without, it does not: ``torchrun``
    passes on what a terminal or a scheduler has sent to every process already.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if insist:
            signal.signal(number, previous[number])

    for number in STOP_SIGNALS:
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for stopped_by, handler in previous.items():
            signal.signal(stopped_by, handler)
