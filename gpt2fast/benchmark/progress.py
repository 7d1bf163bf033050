"""What is done, and how long the rest may take."""

import sys
import time
from collections.abc import Callable


class Progress:
    """Counts steps of about one length; each says its text, and when the last will be done.

    Args:
        steps: how many there will be.
        most: seconds after which everything ends in any case.
        clock: seconds.
    """

    def __init__(
        self, steps: int, most: float = float("inf"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._most, self._clock = steps, most, clock
        self._begun = clock()
        self._done = 0

    def line(self, text: str) -> str:
        """The line of a step that begins now."""
        seconds = self._clock() - self._begun
        left = max(self._steps - self._done, 0) * seconds / max(self._done, 1)
        left = min(left, max(self._most - seconds, 0))
        known = f", about {minutes(left)} left" if self._done else ""
        self._done += 1
        return f"[{minutes(seconds)}{known}] {text}"

    def __call__(self, text: str) -> None:
        print(self.line(text), file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """As m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
