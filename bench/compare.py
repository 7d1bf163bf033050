"""What got slower from one record to another, beyond what both say of their own noise.

    python bench/compare.py OLD.json NEW.json

Any two records of one benchmark. A figure has p20, p50 and p80; it got slower where the new p20
lies above the old p80 and the medians are 3% apart at least. Where a contender was timed beside a
reference, the figure is its time over the reference's in the same run: an hour in which the whole
machine was slower then changes nothing. Perplexities are compared likewise, with twice their
standard errors, and peaks of memory with an allowance of 5%.

Exit status: 0; 1 where something of ours got slower; 2 where the records have nothing in common.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST = 0.03
_OF_PERPLEXITIES = 0.002
_MEMORY = 0.05
_PERPLEXITY = "perplexity over float32's"
_QUANTILES = ("p20", "p50", "p80")
# First words of contenders of ours, in any record.
OF_OURS = (
    "gpt2fast",
    "ours",
    "accelerated",
    "graph",
    "persistent",
    "generate",
    "int8",
    "int4",
    "fp8",
    "forms",
)
# Of the same machine both may speak.
_SAME = ("processor", "threads", "cores")


@dataclass(frozen=True)
class Figure:
    """Less is better.

    Attributes:
        p20, p50, p80: a time, or another amount.
        ours: whether it is for us to defend.
        least: a smaller difference of medians is none.
    """

    p20: float
    p50: float
    p80: float
    ours: bool
    least: float = LEAST


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    """Everything in a record that can be held against another, by where it stands."""
    found = {
        " / ".join(path): Figure(
            *values,
            ours=any(part.startswith(OF_OURS) for part in path),
            least=_OF_PERPLEXITIES if path[-1] == _PERPLEXITY else LEAST,
        )
        for path, values in _walk(record, ())
    }
    return {path: figure for path, figure in found.items() if figure.p50 > 0}


Values = tuple[float, float, float]


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Values]]:
    if isinstance(value, list):
        for part in value:
            if isinstance(part, dict):
                yield from _walk(part, (*path, _identity(part)))
        return
    if not isinstance(value, dict):
        return
    if (values := _quantiles(value)) is not None:
        yield path, values
        return
    inner = dict(value)
    beside = _quantiles(inner.get("times_base", {}))
    if beside is not None and beside != (1.0, 1.0, 1.0):
        yield (*path, "over the reference"), (1 / beside[2], 1 / beside[1], 1 / beside[0])
        inner = {"peak_bytes": inner.get("peak_bytes")}  # its times depend on the hour
    if peaks := inner.get("peak_bytes"):
        # Of an op on a GPU one for each direction.
        for direction, peak in peaks.items() if isinstance(peaks, dict) else ((None, peaks),):
            where = (*path, "peak_bytes") if direction is None else (*path, "peak_bytes", direction)
            yield where, (peak * (1 - _MEMORY / 2), peak, peak * (1 + _MEMORY / 2))
    if "percent_more" in inner:
        middle, error = 100 + inner["percent_more"], 2 * inner["standard_error"]
        yield (*path, _PERPLEXITY), (middle - error, middle, middle + error)
    for key, part in inner.items():
        if not _is_no_time(key):
            yield from _walk(part, (*path, str(key)))


def _is_no_time(key: str) -> bool:
    return (
        key in ("limits", "issue")
        or key.startswith(("times_", "share_of"))
        or (key.endswith(("_ratio", "_per_s")))
    )


def _quantiles(value: dict[str, Any]) -> Values | None:
    for names in (_QUANTILES, tuple(f"{name}_s" for name in _QUANTILES)):
        if all(isinstance(value.get(name), int | float) for name in names):
            low, middle, high = (float(value[name]) for name in names)
            return low, middle, high
    return None


def _identity(case: dict[str, Any]) -> str:
    """What tells a case from the others: its names and sizes."""
    return " ".join(
        f"{key}={value}"
        for key, value in case.items()
        if isinstance(value, str | int) and not isinstance(value, bool) and key not in _OUTCOME
    )


_OUTCOME = ("status", "reason", "base", "not measured", "wrong")


@dataclass(frozen=True)
class Change:
    """A figure in both records; ``ratio`` is the new median over the old."""

    path: str
    old: Figure
    new: Figure

    @property
    def ratio(self) -> float:
        return self.new.p50 / self.old.p50

    @property
    def slower(self) -> bool:
        return self.new.p20 > self.old.p80 and self.ratio > 1 + self.new.least

    @property
    def faster(self) -> bool:
        return self.new.p80 < self.old.p20 and self.ratio < 1 / (1 + self.new.least)

    def __str__(self) -> str:
        interval = f"{self.new.p20 / self.old.p50:.2f} to {self.new.p80 / self.old.p50:.2f}"
        return f"{self.ratio:.2f} times ({interval})  {self.path}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every figure that both records have."""
    before, after = figures(old), figures(new)
    return [Change(path, before[path], after[path]) for path in before if path in after]


def report(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, int]:
    """What to print, and the exit status."""
    common = changes(old, new)
    if not common:
        return "the records have no figure in common", 2
    facts = [record.get("environment", record) for record in (old, new)]
    told = [[fact.get(key) for fact in facts] for key in _SAME]
    lines = [
        f"{key}: {before} before, {now} now: times of two machines are compared"
        for key, (before, now) in zip(_SAME, told, strict=True)
        if before != now
    ]
    lost = [change for change in common if change.slower and change.new.ours]
    groups = (
        ("slower, ours", lost),
        ("slower, others", [c for c in common if c.slower and not c.new.ours]),
        ("faster", [c for c in common if c.faster]),
    )
    for title, group in groups:
        if group:
            lines.append(f"{title}:")
            lines += [f"  {change}" for change in sorted(group, key=lambda c: -c.ratio)]
    named = sum(len(group) for _, group in groups)
    lines.append(f"{len(common) - named} of {len(common)} figures differ by no more than the noise")
    return "\n".join(lines), int(bool(lost))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    args = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (args.old, args.new)]
    text, status = report(*records)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
