"""The notes' tables are what the case table declares."""

from pathlib import Path

from bench.suite import floors
from bench.suite.work import Work

NOTES = (Path(__file__).resolve().parents[2] / "bench" / "NOTES.md").read_text(encoding="utf-8")


def test_notes_hold_the_floors() -> None:
    assert floors.smallest_model() in NOTES
    assert floors.all_models() in NOTES


def test_floor_is_the_longer_of_the_two() -> None:
    work = Work(bytes=10, flops=100) + Work(bytes=10)
    assert work == Work(20, 100)
    assert work.seconds(bytes_per_second=10, flops_per_second=100) == 2
    assert work.seconds(bytes_per_second=100, flops_per_second=10) == 10
