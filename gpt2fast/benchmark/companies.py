"""Companies of real processes, one at a time: cases with the same one follow each other."""

import sys

from gpt2fast.benchmark import models
from gpt2fast.benchmark.contest import Company
from gpt2fast.benchmark.processes import Failed, Process
from gpt2fast.benchmark.record import THREADS
from gpt2fast.benchmark.table import BASE, installed


class Companies:
    """Keeps the company that was asked for last; a context that closes it."""

    def __init__(self) -> None:
        self._key: tuple[str, tuple[str, ...]] | None = None
        self._company: Company | None = None

    def of(self, model: str, names: tuple[str, ...]) -> Company:
        """Raises:
        Failed: transformers, which everybody is held against, is not there.
        """
        if self._key != (model, names) or self._company is None:
            self.close()
            self._company = Company(
                names,
                lambda name: started(name, model, THREADS),
                lambda text: print(text, file=sys.stderr),
            )
            self._key = (model, names)
            if self._company.base != BASE:
                reason = self._company.reports[BASE]
                self.close()
                raise Failed(f"{BASE}: {reason}")
        return self._company

    def close(self) -> None:
        if self._company is not None:
            self._company.close()
        self._company = None

    def __enter__(self) -> "Companies":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def started(contender: str, model: str, threads: int) -> Process:
    """A contender's process.

    Raises:
        Failed: it is not installed, or so little memory is left that its model would be swapped.
    """
    if not installed(contender):
        raise Failed("not installed")
    needed = 2 * models.weight_bytes(model, 32)
    available = available_bytes()
    if available is not None and available < needed:
        raise Failed(f"{available / 1e9:.1f} GB of memory left, {needed / 1e9:.1f} needed")
    return Process(contender, model, threads)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None
