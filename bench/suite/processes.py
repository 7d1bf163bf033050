"""Running a part in another process: with a time limit, and ended whole."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bench.suite.environment import ROOT


class Failed(Exception):
    """A process ended badly, fell silent for too long, or met the deadline."""


class TimedOut(Failed):
    """The deadline came first."""


class Process:
    """A child in a process group of its own, killed whole when the ``with`` ends."""

    def __init__(
        self, command: list[str], log: TextIO, variables: dict[str, str], messages: bool = False
    ) -> None:
        self._log = log
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        # The tests' processes are not workers of a pytest that runs this suite.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        self._child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "PYTHONUNBUFFERED": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if messages else log,
            stderr=log,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def wait(self, deadline: float) -> int:
        """The exit status; `TimedOut` at the deadline."""
        try:
            return self._child.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            raise TimedOut("stopped at its time limit") from None

    def messages(self, deadline: float, patience: float) -> Iterator[dict[str, Any]]:
        """What the child reports, until it ends.

        A message with "seconds" says how long the next may take; before the first it is
        ``patience``.

        Raises:
            Failed: it ended with an error, or was silent for too long.
            TimedOut: the deadline came.
        """
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while True:
            now = time.time()
            try:
                line = lines.get(timeout=max(0.0, min(patience, deadline - now)))
            except queue.Empty:
                if time.time() >= deadline:
                    raise TimedOut("stopped at its time limit") from None
                raise Failed(f"no sign of life for {patience:.0f} s") from None
            if line is None:
                break
            message = json.loads(line)
            patience = message.get("seconds", patience)
            yield message
        status = self.wait(deadline)
        if status < 0:
            raise Failed(f"killed by signal {signal.Signals(-status).name}")
        if status:
            raise Failed(f"exit status {status}")

    def _read(self, lines: "queue.Queue[str | None]") -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            lines.put(line)
        lines.put(None)


def tail(path: Path, characters: int = 1500) -> str:
    """The end of a log."""
    return path.read_text(encoding="utf-8", errors="replace")[-characters:]
