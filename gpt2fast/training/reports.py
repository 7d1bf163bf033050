"""What a run tells while it goes: lines on the terminal, and records in ``log.jsonl``."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt2fast.files import replacing


class Reports:
    """Writes ``log.jsonl`` in ``folder`` and prints; one that is not ``active`` is silent.

    One process of a run is active.
    """

    def __init__(self, folder: Path, active: bool) -> None:
        self.path = folder / "log.jsonl"
        self.active = active
        self._bar: tqdm | None = None

    @contextlib.contextmanager
    def bar(self, step: int, steps: int | None) -> Any:
        """A progress bar, on terminals; yields the function that advances it."""
        hidden = not (self.active and sys.stderr.isatty())
        with tqdm(desc="train", unit="step", initial=step, total=steps, disable=hidden) as bar:
            self._bar = None if hidden else bar
            yield bar.update
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.active:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def log(self, **record: Any) -> None:
        """Append a record."""
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def start(self) -> None:
        """Begin an empty log."""
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def drop_after(self, step: int) -> None:
        """Forget what was logged after a checkpoint at ``step``: those steps are taken again."""
        if not self.active:
            return
        if not self.path.is_file():
            self.start()
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with replacing(self.path) as partial:
            partial.write_text("".join(kept))
