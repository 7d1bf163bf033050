"""The regression guard and the comparison of records see a loss, and only a loss."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import compare, guard

ROOT = Path(__file__).resolve().parents[2]
SLOWER = """
_encode = GPT2Tokenizer.encode
def _slow(self, text, **options):
    for _ in range(2):
        _encode(self, text, **options)
    return _encode(self, text, **options)
GPT2Tokenizer.encode = _slow
"""


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one commit with as much of the package as its tokenizer needs."""
    tree = tmp_path / "tree"
    (tree / "gpt2fast").mkdir(parents=True)
    for file in (ROOT / "gpt2fast").glob("*.py"):
        shutil.copy(file, tree / "gpt2fast")
    shutil.copytree(ROOT / "tokenizer", tree / "tokenizer")
    (tree / "kernels").mkdir()
    (tree / "kernels" / "__init__.py").touch()
    shutil.copy(ROOT / "setup.py", tree)
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    return tree


def guarded(tree: Path, *tasks: str, revision: str | None = None) -> tuple[int, str]:
    said: list[str] = []
    status = guard.guard(tree, revision, tasks, said.append)
    return status, "\n".join(said)


def test_a_planted_loss_is_found_and_nothing_else(tree: Path) -> None:
    status, said = guarded(tree, "tokenizer")
    assert status == 0
    assert "no older commit" in said  # as in a shallow clone
    with (tree / "tokenizer" / "__init__.py").open("a") as file:
        file.write(SLOWER)
    status, said = guarded(tree, "tokenizer")  # not committed yet: against HEAD
    assert status == 1, said
    assert "once more: tokenizer" in said
    assert "LOST" in said
    git(tree, "commit", "-a", "-q", "-m", "slower")
    git(tree, "commit", "--allow-empty", "-q", "-m", "the same")
    assert guarded(tree, "tokenizer")[0] == 0


def test_what_the_older_commit_lacks_is_no_loss(tree: Path, tmp_path: Path) -> None:
    init = tree / "tokenizer" / "__init__.py"
    whole = init.read_text(encoding="utf-8")
    init.write_text("", encoding="utf-8")
    git(tree, "commit", "-a", "-q", "-m", "no tokenizer")
    status, said = guarded(tree, "tokenizer")
    assert status == 1  # what fails now is no success
    assert "tokenizer: fails: ImportError" in said
    init.write_text(whole, encoding="utf-8")
    status, said = guarded(tree, "tokenizer")
    assert status == 0
    assert "tokenizer: nothing to compare: the older commit says ImportError" in said
    assert guarded(tmp_path, "tokenizer")[0] == 0  # no repository
    assert guarded(tree, "tokenizer", revision="nowhere") == (
        0,
        "guard: nothing to compare: nowhere is not here, or has no such package",
    )


def test_an_older_commit_that_does_not_work_is_no_loss(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = tree / "gpt2fast" / "__init__.py"
    whole = init.read_text(encoding="utf-8")
    init.write_text("raise RuntimeError\n", encoding="utf-8")
    git(tree, "commit", "-a", "-q", "-m", "broken")
    init.write_text(whole, encoding="utf-8")
    status, said = guarded(tree, "tokenizer")
    assert status == 0, said
    assert "tokenizer: nothing to compare: the older commit says the process ended with 1" in said
    git(tree, "commit", "-a", "-q", "-m", "mended")
    init.write_text("raise RuntimeError\n", encoding="utf-8")
    assert guarded(tree, "tokenizer")[0] == 1
    monkeypatch.setenv("PATH", "")  # nor is a machine without git
    assert guarded(tree, "tokenizer")[0] == 0


class Dying:
    """A tree that answers so many times."""

    def __init__(self, answers: int) -> None:
        self._left = answers

    def seconds(self, task: str) -> float:
        if not self._left:
            raise guard.Failed("the process ended with -9")
        self._left -= 1
        return 1.0

    def close(self) -> None:
        pass


def test_who_dies_between_turns_is_told_apart() -> None:
    said: list[str] = []
    tasks = ("decode", "prefill")
    assert guard.compare(lambda: Dying(3), lambda: Fake(1.0), tasks, said.append) == []
    assert all("nothing to compare: the older commit says the process ended" in s for s in said)
    assert guard.compare(lambda: Fake(1.0), lambda: Dying(3), tasks, said.append) == list(tasks)


class Fake:
    """A tree whose tasks take the given times, in turn."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self._calls = seconds, 0

    def seconds(self, task: str) -> float:
        self._calls += 1
        return self._seconds[self._calls % len(self._seconds)]

    def close(self) -> None:
        pass


def test_a_loss_must_repeat() -> None:
    slow_once = iter([Fake(1.5), Fake(1.0)])
    lost = guard.compare(lambda: Fake(1.0), lambda: next(slow_once), ("decode",), lambda text: None)
    assert lost == []
    unsteady = Fake(1.0, 9.0, 9.0)  # a high median, but as fast at best
    assert not guard.compare(lambda: Fake(1.0), lambda: unsteady, ("decode",), lambda text: None)
    lost = guard.compare(lambda: Fake(1.0), lambda: Fake(1.25), ("decode",), lambda text: None)
    assert lost == ["decode"]


def test_tasks_are_those_of_the_worker() -> None:
    from bench import guard_tasks

    assert tuple(guard_tasks.TASKS) == guard.TASKS


def spread(p50: float, width: float = 0.02) -> dict[str, float]:
    return {"p20": p50 * (1 - width), "p50": p50, "p80": p50 * (1 + width), "samples": 9}


def contest(seconds: float, times: float, machine: float = 1.0) -> dict[str, Any]:
    return {
        "processor": "one",
        "cases": [
            {"model": "gpt2", "prompt": 32, "not measured": "no time left"},
            {
                "model": "gpt2",
                "prompt": 512,
                "noise": 0.01,
                "contenders": {
                    "transformers SDPA": {
                        "p": spread(0.05 * machine),
                        "times_base": {"p20": 1.0, "p50": 1.0, "p80": 1.0},
                    },
                    "gpt2fast": {"p": spread(seconds * machine), "times_base": spread(times)},
                },
                "limits": {"read_bytes_per_s": spread(1e10 / machine)},
            },
        ],
    }


def test_contests_are_compared_by_the_reference() -> None:
    old = contest(0.025, 2.0)
    assert compare.report(old, old) == ("2 of 2 figures differ by no more than the noise", 0)
    slower_hour = compare.report(old, contest(0.025, 2.0, machine=1.5))
    assert slower_hour[1] == 0  # ours is as fast as ever beside the reference
    text, status = compare.report(old, contest(0.03, 1.6))
    assert status == 1
    assert "slower, ours:" in text
    assert "1.25 times" in text
    assert "gpt2fast / over the reference" in text
    assert compare.report(contest(0.03, 1.6), old)[1] == 0
    assert compare.report(old, contest(0.026, 1.95))[1] == 0  # within both spreads


def test_every_kind_of_record_is_compared() -> None:
    tokenizer = {"encode": {"ours": {"p20_s": 0.9, "p50_s": 1.0, "p80_s": 1.1, "MB_per_s": 9.0}}}
    slow = {"encode": {"ours": {"p20_s": 1.9, "p50_s": 2.0, "p80_s": 2.1, "MB_per_s": 4.5}}}
    assert compare.report(tokenizer, slow)[1] == 1
    suite = {"parts": {"ops": {"cases": [{"case": "x", "times": {"ours": {"device": spread(1)}}}]}}}
    case = {"case": "x", "times": {"ours": {"device": spread(1.5)}}}
    worse = {"parts": {"ops": {"cases": [case]}}}
    assert "case=x / times / ours / device" in compare.report(suite, worse)[0]
    form = {"percent_more": 0.3, "standard_error": 0.05}
    accuracy = {"perplexity": {"forms": {"int8": form}}}
    lost = {"perplexity": {"forms": {"int8": {**form, "percent_more": 0.9}}}}
    assert compare.report(accuracy, lost)[1] == 1
    assert compare.report(accuracy, accuracy)[1] == 0
    assert compare.report(tokenizer, accuracy)[1] == 2
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("parts", {"": None}).keys() <= {"parity", "sanitize"}:
            continue  # of a GPU's tests, which are not timed
        assert compare.figures(record), path
        assert compare.report(record, record)[1] == 0
