"""Companies of real processes, one at a time: cases with the same one follow each other."""

import sys
from functools import partial

from gpt2fast.benchmark.contest import Company
from gpt2fast.benchmark.processes import Process
from gpt2fast.benchmark.record import THREADS


class Companies:
    """Keeps the company that was asked for last; a context that closes it."""

    def __init__(self) -> None:
        self._key: tuple[str, tuple[str, ...]] | None = None
        self._company: Company | None = None

    def of(self, model: str, names: tuple[str, ...]) -> Company:
        if self._key != (model, names) or self._company is None:
            self.close()
            start = partial(Process, model=model, threads=THREADS)
            self._company = Company(names, start, lambda text: print(text, file=sys.stderr))
            self._key = (model, names)
        return self._company

    def close(self) -> None:
        if self._company is not None:
            self._company.close()
        self._company = None

    def __enter__(self) -> "Companies":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()
