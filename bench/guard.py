"""The regression guard: a short CPU subset on this tree and on an older commit, in turns.

    python bench/guard.py [--base REVISION] [TASK ...]

The older one is HEAD where the tree differs from it, otherwise the commit before it. It is unpacked
beside, and both serve a process from the same environment. A task is lost where it takes 20% more
time, by the median of neighbouring turns and by the least times, and does so again between two new
processes. Without an older commit (a shallow clone, a copy), or where that one lacks a task or does
not work, there is nothing to compare: the guard says so, and that is no failure.

Exit status: 0; 1 where a task is lost, or fails in this tree.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("guard_tasks.py")
TASKS = ("tokenizer", "decode", "decode_int8", "prefill", "training", "scoring")
ROOMS = ("gpt2fast", "kernels", "tokenizer", "setup.py")
LOSS = 0.20
TURNS = 7

Say = Callable[[str], None]


class Failed(Exception):
    """A task cannot run; the message says why."""


class OlderFailed(Exception):
    """A task cannot run in the older tree, or nothing can."""


class Timed(Protocol):
    """Times tasks of one tree."""

    def seconds(self, task: str) -> float: ...

    def close(self) -> None: ...


class Tree:
    """The process of a tree."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            package = Path(self._answer()["package"])
            if tree.resolve() not in package.resolve().parents:
                raise Failed(f"expected the package of {tree}; got {package}")
        except Failed:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"the process ended with {self._process.wait(30)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, task: str) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"the process ended with {self._process.wait(30)}") from None
        answer = self._answer()
        if "error" in answer:
            raise Failed(answer["error"])
        return float(answer["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class _Older:
    """The older tree, whose failures are nobody's now: not even to start is one."""

    def __init__(self, start: Callable[[], Timed]) -> None:
        self._tree: Timed | None = None
        self._reason = ""
        try:
            self._tree = start()
        except Failed as error:
            self._reason = str(error)

    def seconds(self, task: str) -> float:
        if self._tree is None:
            raise OlderFailed(self._reason)
        try:
            return self._tree.seconds(task)
        except Failed as error:
            raise OlderFailed(str(error)) from None

    def close(self) -> None:
        if self._tree is not None:
            self._tree.close()


@dataclass(frozen=True)
class Outcome:
    """Of a task: how many times as long it takes now, by medians and by least times."""

    median: float
    least: float

    @property
    def lost(self) -> bool:
        return min(self.median, self.least) > 1 + LOSS


def compare(
    old: Callable[[], Timed], new: Callable[[], Timed], tasks: tuple[str, ...], say: Say
) -> list[str]:
    """The tasks that are lost, each confirmed between new processes, or that fail now."""
    outcomes, failed = _round(old, new, tasks, say)
    suspects = tuple(task for task, outcome in outcomes.items() if outcome.lost)
    if suspects:
        say(f"once more: {', '.join(suspects)}")
        again, failed_again = _round(old, new, suspects, say)
        failed += failed_again
        suspects = tuple(task for task, outcome in again.items() if outcome.lost)
    return [*suspects, *failed]


def _round(
    old: Callable[[], Timed], new: Callable[[], Timed], tasks: tuple[str, ...], say: Say
) -> tuple[dict[str, Outcome], list[str]]:
    """Each task's outcome between two processes, and the tasks that fail in the new tree."""
    outcomes, failed = {}, []
    with ExitStack() as stack:
        after = new()
        stack.callback(after.close)
        before = _Older(old)
        stack.callback(before.close)
        for task in tasks:
            pairs = []
            try:
                after.seconds(task)
                before.seconds(task)
                for turn in range(TURNS):
                    if turn % 2:
                        now, then = after.seconds(task), before.seconds(task)
                    else:
                        then, now = before.seconds(task), after.seconds(task)
                    pairs.append((max(then, 1e-9), now))
            except OlderFailed as error:
                say(f"{task}: nothing to compare: the older commit says {error}")
                continue
            except Failed as error:
                say(f"{task}: fails: {error}")
                failed.append(task)
                continue
            middle = median(now / then for then, now in pairs)
            least = min(now for _, now in pairs) / min(then for then, _ in pairs)
            outcomes[task] = Outcome(middle, least)
            least_ms = 1e3 * min(now for _, now in pairs)
            say(f"{task}: {least_ms:.1f} ms, {middle:.2f} times the older time, least {least:.2f}")
    return outcomes, failed


def _git(root: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout if done.returncode == 0 else None


def base_of(root: Path) -> str | None:
    """The commit to compare with; None where there is none."""
    revision = "HEAD" if _git(root, "status", "--porcelain", "--", *ROOMS) else "HEAD~1"
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return found.decode().strip() if found else None


def unpack(root: Path, revision: str, folder: Path) -> bool:
    """A commit's package into a folder; False where the commit has none, or is not there."""
    packed = _git(root, "archive", revision, *ROOMS)
    if packed is None:
        return False
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return True


def guard(root: Path, revision: str | None, tasks: tuple[str, ...], say: Say) -> int:
    """Compare the tree at ``root`` with a commit; the exit status."""
    revision = revision or base_of(root)
    if revision is None:
        say("guard: nothing to compare: no older commit is here")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not unpack(root, revision, Path(folder)):
            say(f"guard: nothing to compare: {revision} is not here, or has no such package")
            return 0
        say(f"guard: against {revision[:12]}, times of the processor in one thread")
        try:
            lost = compare(lambda: Tree(Path(folder)), lambda: Tree(root), tasks, say)
        except Failed as error:
            say(f"guard: {error}")
            return 1
    if lost:
        say(f"guard: LOST, more than {LOSS:.0%} slower than {revision[:12]}: {', '.join(lost)}")
    return int(bool(lost))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="REVISION", help="the commit to compare with")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"tasks are {', '.join(TASKS)}; got {', '.join(sorted(unknown))}")
    tasks = tuple(args.tasks) or TASKS
    return guard(ROOT, args.base, tasks, lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
