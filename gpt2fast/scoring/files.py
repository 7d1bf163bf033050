"""Texts in files: plain ones, and JSON Lines.

- ``.txt``: documents separated by a line ``<|endoftext|>``, as for training; without one the whole
  file. Documents of white space alone are left out, others are taken as they are.
- ``.jsonl``: one object a line, with ``text`` (a string) or ``token_ids`` (integers), and
  optionally an ``id`` of any kind, which is handed on. Other fields are not read; blank lines are
  skipped.

Both are UTF-8; a byte order mark at the beginning of a file is no text. Every complaint names the
file and the line.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2fast.scoring.scorer import checked_ids
from gpt2fast.training.data import split_documents


@dataclass(frozen=True)
class Record:
    """A text of a file.

    Attributes:
        place: the file and line, for messages.
        text: a string, or token ids.
        labels: what its result says about where it comes from: file, line or document, id.
    """

    place: str
    text: str | list[int]
    labels: dict[str, Any]


def read(path: Path) -> Iterator[Record]:
    """The texts of a file, in order.

    Raises:
        ValueError: a line is not UTF-8, no JSON, or no text; another ending.
        OSError: it cannot be read.
    """
    if path.suffix == ".txt":
        return _read_text(path)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    raise ValueError(f"texts come from .txt and .jsonl files; got {path}")


def survey(paths: Sequence[Path], vocab_size: int) -> tuple[int, str]:
    """How many texts there are, and a hash of all files.

    Everything that can be wrong is found here, in seconds, and not after hours of scoring.

    Raises:
        ValueError, OSError: as `read`; ids that are not integers in ``[0, vocab_size)``; no text.
    """
    texts, digest = 0, hashlib.sha256()
    for path in paths:
        for record in read(path):
            if not isinstance(record.text, str):
                checked_ids(record.place, record.text, vocab_size)
            texts += 1
        with path.open("rb") as file:
            digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    return texts, digest.hexdigest()[:16]


def _read_text(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {_where(error)}") from error
    for number, document in enumerate(split_documents(text.removeprefix("\ufeff")), 1):
        labels = {"file": str(path), "document": number}
        yield Record(f"{path}, document {number}", document, labels)


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(map(bytes.strip, file), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line:
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8: {_where(error)}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not JSON: {error}") from error
            text = _text(place, value)
            labels = {"file": str(path), "line": number}
            yield Record(place, text, labels | _id(place, value))


def _text(place: str, value: Any) -> Any:
    if not isinstance(value, dict) or ("text" in value) == ("token_ids" in value):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f'{place}: expected an object with "text" or "token_ids"; got {found}')
    text = value.get("text", value.get("token_ids"))
    if "text" in value and not isinstance(text, str):
        raise ValueError(f'{place}: "text" must be a string; got {type(text).__name__}')
    if "token_ids" in value and not isinstance(text, list):
        raise ValueError(f'{place}: "token_ids" must be a list; got {type(text).__name__}')
    return text


def _id(place: str, value: dict[str, Any]) -> dict[str, Any]:
    if "id" not in value:
        return {}
    try:
        json.dumps(value["id"], allow_nan=False)  # as the result will be written
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place}: "id" cannot be written as JSON: {error}') from error
    return {"id": value["id"]}


def _where(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x}, {error.reason}"
