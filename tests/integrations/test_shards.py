"""Lines of a file divided among processes: every line once, in order, whatever is killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.integrations.shards import map_lines

Row = dict[str, Any]
SETTINGS = {"model": "double"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """37 objects, with blank lines between some."""
    lines = [json.dumps({"id": f"é{i}", "n": i}) + "\n" + "\n" * (i % 5 == 3) for i in range(37)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


EXPECTED = [{"id": f"é{i}", "twice": 2 * i} for i in range(37)]


class Work:
    """Doubles numbers, and notes them; fails at the batch that would bring it to ``stop``."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[int] = []
        self._stop = stop

    def __call__(self, rows: list[Row]) -> list[Row]:
        if self._stop is not None and len(self.seen) + len(rows) > self._stop:
            raise InterruptedError
        self.seen += [row["n"] for row in rows]
        return [{"id": row["id"], "twice": 2 * row["n"]} for row in rows]


@pytest.fixture
def run(source: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def one(rank: int, world_size: int, work: Any, **options: Any) -> bool:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        keywords = {"settings": SETTINGS, "batch_size": 4, **options}
        return map_lines(source, source.with_name("out.jsonl"), work, **keywords)

    return one


def results(source: Path) -> list[Row]:
    text = source.with_name("out.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_byte_order_mark_is_no_text(source: Path, run: Any) -> None:
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert run(0, 1, Work())
    assert results(source) == EXPECTED


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_every_line_once_and_in_order(run: Any, source: Path, world_size: int) -> None:
    works = [Work() for _ in range(world_size)]
    finished = [run(rank, world_size, work) for rank, work in enumerate(works)]
    last = min(world_size - 1, 43)  # whose line is the last; there are blank ones
    assert finished == [rank >= last for rank in range(world_size)]
    assert sorted(n for work in works for n in work.seen) == [*range(37)]
    assert results(source) == EXPECTED


def test_it_goes_on_with_another_number_of_processes(run: Any, source: Path) -> None:
    seen = []
    for rank, world_size, stop in [(0, 2, 8), (1, 2, 4), (2, 3, 4), (1, 2, 4)]:
        work = Work(stop)
        with pytest.raises(InterruptedError):
            run(rank, world_size, work)
        assert not source.with_name("out.jsonl").exists()
        seen += work.seen
    work = Work()
    assert run(0, 1, work)
    assert sorted(seen + work.seen) == [*range(37)]
    assert results(source) == EXPECTED
    again = Work()
    assert run(0, 1, again)
    assert not again.seen


def test_half_a_line_is_worked_on_again(run: Any, source: Path) -> None:
    with pytest.raises(InterruptedError):
        run(0, 1, Work(8))
    part = source.with_name("out.jsonl.parts") / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-3])
    work = Work()
    assert run(0, 1, work)
    assert work.seen[0] == 7
    assert results(source) == EXPECTED


def test_kill(run: Any, source: Path) -> None:
    program = f"""
import os, signal
from gpt2fast.integrations.shards import map_lines

def work(rows):
    if rows[0]["n"] >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{{"id": row["id"], "twice": 2 * row["n"]}} for row in rows]

map_lines({str(source)!r}, {str(source.with_name("out.jsonl"))!r}, work, settings={SETTINGS!r},
          batch_size=4)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL
    work = Work()
    assert run(0, 1, work)
    assert work.seen == [*range(12, 37)]
    assert results(source) == EXPECTED


def test_other_settings_or_another_source_are_refused(run: Any, source: Path) -> None:
    with pytest.raises(InterruptedError):
        run(0, 1, Work(4))
    with pytest.raises(ValueError, match=r"another model: 'double', now 'triple'"):
        run(0, 1, Work(), settings={"model": "triple"})
    with pytest.raises(ValueError, match=r"another seed: None, now 1"):
        run(0, 1, Work(), settings={**SETTINGS, "seed": 1})
    with source.open("ab") as file:
        file.write(b'{"id": "more", "n": 1}\n')
    with pytest.raises(ValueError, match="another source"):
        run(0, 1, Work())


def test_a_setting_may_be_called_source(run: Any, source: Path) -> None:
    settings = {"source": source.name}
    with pytest.raises(InterruptedError):
        run(0, 1, Work(4), settings=settings)
    source.write_bytes(source.read_bytes()[1:])
    with pytest.raises(ValueError, match="another source's sha256"):
        run(0, 1, Work(), settings=settings)


def test_the_source_is_not_written_over(run: Any, source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for out in (source, link, tmp_path / "." / "in.jsonl"):
        with pytest.raises(ValueError, match="take the place of the source"):
            map_lines(source, out, Work(), settings=SETTINGS)
    assert source.read_bytes() == before


def test_numbers_out_of_range(run: Any) -> None:
    with pytest.raises(ValueError, match="RANK must be 0 to WORLD_SIZE - 1; got 2 of 2"):
        run(2, 2, Work())
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        run(0, 1, Work(), batch_size=0)


@pytest.mark.parametrize("line", [b"\x00\x00\n", b"5\n", b"[1]\n"])
def test_a_damaged_part_is_named(run: Any, source: Path, line: bytes) -> None:
    with pytest.raises(InterruptedError):
        run(0, 1, Work(4))
    part = source.with_name("out.jsonl.parts") / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes() + line)
    with pytest.raises(ValueError, match=r"0-of-1.jsonl:5 is damaged, remove it"):
        run(0, 1, Work())
    part.unlink()
    assert run(0, 1, Work())
    assert results(source) == EXPECTED


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"in.jsonl:49: not JSON in UTF-8"),
        (b'{"id": "\xff"}', r"in.jsonl:49: not JSON in UTF-8: 'utf-8' codec"),
        (b"[1, 2]", r"in.jsonl:49: expected an object; got \[1, 2\]"),
    ],
)
def test_a_bad_line_is_named(run: Any, source: Path, line: bytes, message: str) -> None:
    source.write_bytes(source.read_bytes() + b"\n\n\n\n" + line)
    with pytest.raises(ValueError, match=message):
        run(0, 1, Work())
    assert not source.with_name("out.jsonl").exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [([], "0 results for 4 lines"), ([{"x": float("nan")}] * 4, "not JSON compliant")],
)
def test_bad_results(run: Any, result: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(0, 1, lambda _: result)


def test_parts_that_hold_a_line_twice_are_refused(run: Any, source: Path) -> None:
    run(0, 1, Work())
    parts = source.with_name("out.jsonl.parts")
    (parts / "7-of-9.jsonl").write_bytes((parts / "0-of-1.jsonl").read_bytes())
    with pytest.raises(ValueError, match="line 1 twice"):
        run(0, 1, Work())
