"""A file of JSON Lines worked through by several processes, as torchrun starts them.

Process r of n takes the lines r, r + n, r + 2n, ... and appends their results to a file of its own
in ``<out>.parts``. Whoever finds, at its end, that no line is missing merges the parts into
``<out>``, in the order of the input. Processes meet nowhere else, so they may run on several
machines that share a file system.

A job that was killed goes on where it was when the same command runs again, with as many processes
or another number of them: lines that are in any part are not worked on again. What a kill leaves
at the end of a part, half a line, is cut off.
"""

import codecs
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from gpt2fast.files import replacing

__all__ = ["map_lines"]

Row = dict[str, Any]


def map_lines(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    work: Callable[[list[Row]], Iterable[Row]],
    *,
    settings: Row,
    batch_size: int = 64,
) -> bool:
    """Work through this process's share of a file.

    The process's number and their count are RANK and WORLD_SIZE of the environment, where torchrun
    puts them; without them it is one process.

    Args:
        source: JSON Lines, an object a line, UTF-8; blank lines are skipped.
        out: another file; receives a line for each line of ``source``, in that order.
        work: takes objects and gives as many results, plain JSON values, which go to ``out``.
        settings: plain JSON values that the results depend on; a job goes on only with the same.
        batch_size: how many lines ``work`` gets at once.

    Returns:
        Whether all lines are done, so that ``out`` is there. If not, other processes are at work.

    Raises:
        ValueError: a line is not UTF-8, no JSON or no object: the message has its number; the parts
            come from another source or other settings, or are damaged; ``work`` gives another
            number of results, or numbers that JSON has not, as NaN; ``out`` is ``source``; RANK or
            ``batch_size`` is out of range.
        OSError: a file cannot be read or written.
    """
    source, out = Path(source), Path(out)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK must be 0 to WORLD_SIZE - 1; got {rank} of {world_size}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if out.resolve() == source.resolve():
        raise ValueError(f"the results would take the place of the source, {source}")
    parts = out.with_name(f"{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    _agree(parts / "settings.json", {**settings, "source's sha256": _sha256(source)})
    done = _done(parts)
    mine = (
        (number, row)
        for number, row in _rows(source)
        if number % world_size == rank and number not in done
    )
    own = parts / f"{rank}-of-{world_size}.jsonl"
    with own.open("ab") as file:
        file.truncate(_valid_bytes(own))
        while batch := list(islice(mine, batch_size)):
            results = list(work([row for _, row in batch]))
            if len(results) != len(batch):
                raise ValueError(f"work gave {len(results)} results for {len(batch)} lines")
            for (number, _), result in zip(batch, results, strict=True):
                file.write(_line([number, result]))
            file.flush()
            os.fsync(file.fileno())
    if _done(parts) != {number for number, _ in _rows(source)}:
        return False
    # Two that end at the same moment write the same file twice.
    with replacing(out) as partial, partial.open("wb") as file:
        last = -1
        for number, result in heapq.merge(
            *map(_entries, _parts(parts)), key=lambda entry: entry[0]
        ):
            if number <= last:
                raise ValueError(f"{parts} holds line {number + 1} twice or too late: remove it")
            file.write(_line(result))
            last = number
    return True


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii") + b"\n"


def _rows(source: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a file with their line's number, from 0."""
    with source.open("rb") as file:
        for number, line in enumerate(file):
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source}:{number + 1}: not JSON in UTF-8: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{source}:{number + 1}: expected an object; got {row!r:.60}")
            yield number, row


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.jsonl"))


def _entries(part: Path) -> Iterator[tuple[int, Row]]:
    """The numbers and results in a part, which ascend. Half a line at its end is no entry."""
    with part.open("rb") as file:
        for place, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    number, result = json.loads(line)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{part}:{place} is damaged, remove it: {error}") from error
                yield number, result


def _done(folder: Path) -> set[int]:
    return {number for part in _parts(folder) for number, _ in _entries(part)}


def _valid_bytes(part: Path) -> int:
    """The length of a file without half a line at its end."""
    with part.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _agree(path: Path, settings: Row) -> None:
    """Write down what a job depends on, or compare with what was written down."""
    with suppress(FileNotFoundError):
        then = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{path.parent} was made with another {name}: {then.get(name)!r}, now "
                    f"{now.get(name)!r}; choose another output or remove the folder"
                )
        return
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
