"""Results on disk: appended to, group by group, so that a run which was killed can go on.

Beside the output lies ``<output>.progress``: the settings, how far the output is valid, and the
sums so far. It is replaced whole after every group, once that group's lines are on the disk. What
a kill leaves behind its last entry, half a line perhaps, is cut off when the run goes on.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from gpt2fast.files import replacing, try_lock
from gpt2fast.scoring.scorer import perplexity


class Results:
    """Results on standard output, and their sums.

    Attributes:
        texts: how many there are.
        n_scored, log_prob: the sums of theirs.
    """

    def __init__(self) -> None:
        self.texts = self.n_scored = 0
        self.log_prob = 0.0

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def perplexity(self) -> float:
        return perplexity(self.log_prob, self.n_scored)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add results, each with ``n_scored`` and ``log_prob``, and write them down.

        Raises:
            OSError: they cannot be written.
        """
        self.texts += len(records)
        self.n_scored += sum(record["n_scored"] for record in records)
        self.log_prob = math.fsum([self.log_prob, *(record["log_prob"] for record in records)])
        self._write("".join(f"{json.dumps(record, allow_nan=False)}\n" for record in records))

    def _write(self, lines: str) -> None:
        sys.stdout.write(lines)
        sys.stdout.flush()


class SavedResults(Results):
    """Results in a file, which a run that is cut off may go on with."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        """Begin a file, or go on with one.

        Args:
            path: of the file.
            settings: what a run must agree in to go on: plain JSON values.
            resume: go on if there is a file.

        Raises:
            ValueError: there is a file and ``resume`` is False, it was made with other settings,
                it is not what a run left, or another run is writing it.
            OSError: it cannot be read or written.
        """
        super().__init__()
        self._progress = path.with_name(f"{path.name}.progress")
        self._settings = settings
        self._size = 0
        if path.exists() or self._progress.exists():
            if not resume:
                raise ValueError(f"{path} exists: add --resume, or choose another --out")
            self._take_up(path)
        else:
            self._save()
        self._file: BinaryIO = path.open("ab")
        if not try_lock(self._file):
            self._file.close()
            raise ValueError(f"{path}: another run is writing it")
        self._file.truncate(self._size)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, lines: str) -> None:
        data = lines.encode("ascii")
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._size += len(data)
        self._save()

    def _save(self) -> None:
        state = {
            "texts": self.texts,
            "n_scored": self.n_scored,
            "log_prob": self.log_prob,
            "bytes": self._size,
            "settings": self._settings,
        }
        with replacing(self._progress) as partial:
            partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def _take_up(self, path: Path) -> None:
        try:
            state = json.loads(self._progress.read_text(encoding="utf-8"))
            settings = state["settings"]
            self.texts, self.n_scored = int(state["texts"]), int(state["n_scored"])
            self.log_prob, self._size = float(state["log_prob"]), int(state["bytes"])
        except FileNotFoundError as error:
            raise ValueError(f"{path} cannot be gone on with: {error.filename} is gone") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._progress} is damaged: {error!r}") from error
        names = [*dict.fromkeys([*self._settings, *settings])]
        for name in names:
            then, now = settings.get(name), self._settings.get(name)
            if then != now:
                raise ValueError(
                    f"{path} was begun with {name} {then!r}, now it is {now!r}: "
                    "choose another --out"
                )
        size = path.stat().st_size if path.exists() else 0
        if size < self._size:
            raise ValueError(f"{path} has lost lines: {size} bytes of {self._size} are left")
