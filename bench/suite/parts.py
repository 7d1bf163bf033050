"""The parts of the GPU suite, as its parent process sees them."""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.suite import decode_report, report, sanitizer, step_report
from bench.suite.cases_state import CasesState
from bench.suite.environment import ROOT
from bench.suite.processes import Failed, Process, TimedOut, tail
from bench.suite.step_cases import STEP_PARTS

# Whole models share a process: it loads what they need once, and takes their cases in turn.
_GROUPS = (("parity",), ("sanitize",), ("limits",), ("decode",), STEP_PARTS, ("ops",))
PARTS = tuple(part for group in _GROUPS for part in group)
_TIMED = {"decode", *STEP_PARTS, "ops"}
# What of the whole budget a group may take at most, so that the next have their share; the last
# that was asked for takes what is left.
_MOST = dict(zip(_GROUPS, (0.5, 0.15, 0.1, 0.25, 0.3, 1.0), strict=True))
_OVERRUN = 15.0  # seconds that a case may run on when the budget ends
_STARTING = 120.0  # seconds until a process must give its first sign of life
# The tests' time is that of compiling hundreds of kernels, on the host.
_TEST_PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 2))
# Errors that another test may be to blame for: they are run again, alone.
_VICTIMS = re.compile(r"out of memory|OutOfMemory|CUDA error|unspecified launch failure")
# Stands for the tests of all kernels in a dry run.
_DRY_TESTS = ["tests/kernels/test_embedding.py", "-k", "ids or shapes"]


def _tests_with(text: str) -> list[str]:
    """The test files that mention it: the others may import what is not installed here."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if text in path.read_text("utf-8") and path != ROOT / "tests/bench/test_gpu_suite.py"
    ]


def _caches(folder: Path) -> dict[str, str]:
    """Where the run keeps what it compiles.

    torch.compile starts from nothing: its cache does not know what our ops do inside. Triton's goes
    by the source of a kernel and may be old; it is named because torch.compile would move it.
    """
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "TRITON_CACHE_DIR": triton,
    }


class Suite:
    """Runs the parts one after the other and fills the record.

    Args:
        record: the record, filled in place; ``write`` saves it.
        log: where the processes' own output goes.
        options: the command line.
        deadline: when the budget ends.
    """

    def __init__(
        self,
        record: dict[str, Any],
        write: Callable[[], None],
        log: Path,
        options: argparse.Namespace,
        deadline: float,
    ) -> None:
        self._record, self._write, self._options = record, write, options
        self._log_path = log
        self._deadline = deadline
        dry_run = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._variables = dry_run if options.dry_run else {}

    def run(self) -> None:
        only = self._options.only
        # Without the limits there would be nothing to hold the times against.
        wanted = {*only, *(("limits",) if _TIMED & only.keys() else ())}
        with (
            self._log_path.open("w", encoding="utf-8") as self._log,
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches,
        ):
            self._variables |= _caches(Path(caches))
            groups = [tuple(part for part in group if part in wanted) for group in _GROUPS]
            last = max(i for i, group in enumerate(groups) if group)
            for i, group in enumerate(groups):
                share = 1.0 if i == last else _MOST[_GROUPS[i]]
                if group:
                    self._run_group(group, share * self._options.budget_seconds)

    def _run_group(self, group: tuple[str, ...], seconds: float) -> None:
        only = {name: self._options.only.get(name, "") for name in group}
        parts = {name: {"status": "running"} for name in group}
        self._record["parts"] |= parts
        self._write()
        begin = time.time()
        end = min(self._deadline, begin + seconds)
        try:
            if begin >= self._deadline:
                raise TimedOut("no time was left")
            if group[0] in _TIMED:
                self._cases(parts, end, only)
            else:
                getattr(self, f"_{group[0]}")(parts[group[0]], end, only[group[0]])
        except TimedOut as error:
            for part in parts.values():
                part |= {"status": "incomplete", "reason": str(error)}
        except Failed as error:
            for name, part in parts.items():
                self._fail(name, str(error), part)
        for part in parts.values():
            part["seconds"] = round(time.time() - begin, 1)
        self._write()

    def _fail(self, name: str, reason: str, part: dict[str, Any]) -> None:
        part |= {"status": "failed", "reason": reason, "log": tail(self._log_path)}
        self._record["failures"].append(f"{name}: {reason}")

    # parity

    def _parity(self, part: dict[str, Any], end: float, only: str) -> None:
        # Those that want a GPU, for the sizes of real models, then those that run on any device.
        kernels, marked = _tests_with("tests.kernels.devices"), _tests_with("mark.gpu")
        if self._options.dry_run:
            kernels, marked = _DRY_TESTS, marked[:1]
        tests: dict[str, dict[str, Any]] = {}
        part["tests"] = tests
        matching = ["-k", only] if only else []
        late = None
        runs = [([*marked, "-m", "gpu"], 0.5), ([*kernels, "-m", "not gpu"], 1.0)]
        for arguments, share in runs if marked else runs[1:]:
            until = time.time() + share * (end - time.time())
            try:
                self._pytest([*arguments, *matching], until, tests, _TEST_PROCESSES)
            except TimedOut as error:
                late = error
        victims = [
            name
            for name, test in tests.items()
            if test["outcome"] in ("failed", "error") and _VICTIMS.search(test["message"])
        ]
        if victims and late is None:
            again: dict[str, dict[str, Any]] = {}
            self._pytest(victims, end, again, 1)
            for name, test in again.items():
                tests[name] = {**test, "first": tests[name]["message"]}
        part["counts"] = dict(Counter(test["outcome"] for test in tests.values()))
        wrong = [name for name, t in tests.items() if t["outcome"] in ("failed", "error")]
        self._record["failures"] += [f"parity: {name}" for name in wrong]
        if wrong:
            part["status"] = "failed"
        elif late is not None:
            raise late
        elif not part["counts"].get("passed"):
            raise Failed("no test passed")
        else:
            part["status"] = "passed"

    def _pytest(
        self, arguments: list[str], until: float, tests: dict[str, Any], processes: int
    ) -> None:
        """Add the outcomes to ``tests``, those too that were known when time was up."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-c", "pyproject.toml", "--rootdir", "."]
        command += ["-p", "bench.suite.outcomes", "-p", "bench.suite.order"]
        command += ["--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist") and not self._options.dry_run and processes > 1:
            # Each process starts with neighbouring tests, which share kernels, so few are compiled
            # twice; whoever is done takes from who is not.
            command += ["-n", str(processes), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "90"]
        with tempfile.TemporaryDirectory() as folder:
            outcomes = Path(folder) / "outcomes"
            outcomes.touch()
            # One thread each: the processes are as many as the cores.
            variables = {"OMP_NUM_THREADS": "1", **self._variables}
            variables["GPT2FAST_OUTCOMES"] = str(outcomes)
            status = None
            try:
                with Process([*command, *arguments], self._log, variables) as process:
                    status = process.wait(until)
            finally:
                for line in outcomes.read_text("utf-8").splitlines():
                    test = json.loads(line)
                    tests[test.pop("id")] = test
            # 0: passed, 1: some failed, 5: none selected.
            if status not in (0, 1, 5):
                raise Failed(f"pytest ended with status {status}")

    # sanitize

    def _sanitize(self, part: dict[str, Any], end: float, only: str) -> None:
        part["exercised"] = self._exercise([], end, only, plant=False)
        program = sanitizer.find_sanitizer()
        part["tools"] = {}
        for tool in sanitizer.TOOLS:
            part["tools"][tool] = self._checked(program, tool, end, only)
            self._write()
        states = {tool["status"] for tool in part["tools"].values()}
        for status in ("failed", "incomplete", "not available", "skipped"):
            if status in states:
                part["status"] = status
                return
        part["status"] = "passed"

    def _exercise(self, before: list[str], end: float, only: str, plant: bool) -> list[str]:
        """Run every op on small shapes; returns the cases' names."""
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if plant else {}
        job = {"part": "exercise", "only": only, "plant": plant}
        exercised: list[str] = []
        with self._worker(job, before, variables) as process:
            for message in process.messages(end, _STARTING):
                exercised = message.get("exercised", exercised)
                if exercised and before:
                    process.wait(end)  # whatever its status: the tool's log tells more
                    break
        return exercised

    def _checked(self, program: str | None, tool: str, end: float, only: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / tool
            command = sanitizer.sanitizer_command(program or "compute-sanitizer", tool, log)
            if self._options.dry_run:
                return {"status": "skipped", "reason": "a dry run", "command": command}
            if program is None:
                return {"status": "not available", "reason": "compute-sanitizer is not installed"}
            plant, exercised, ended = tool == "memcheck", [], ""
            try:
                exercised = self._exercise(command, end, only, plant)
            except TimedOut as error:
                return {"status": "incomplete", "reason": str(error)}
            except Failed as error:
                ended = str(error)
            text = log.read_text("utf-8", errors="replace") if log.exists() else ""
        return self._judged(tool, plant, exercised, ended, text)

    def _judged(
        self, tool: str, plant: bool, exercised: list[str], ended: str, text: str
    ) -> dict[str, Any]:
        """What a checker's report says about our kernels."""
        found = sanitizer.findings(text)
        result: dict[str, Any] = {"exercised": len(exercised), "findings": found[:50]}
        names = sanitizer.our_kernels()
        ours = [finding for finding in found if any(name in finding for name in names)]
        if ours:
            result["status"] = "failed"
            self._record["failures"] += [f"{tool}: {finding}" for finding in ours[:5]]
        elif not sanitizer.finished(text):
            result |= {"status": "not available", "reason": ended, "report": text[-1500:]}
        elif plant and not any(sanitizer.PLANTED in finding for finding in found):
            reason = "it did not report the out-of-bounds write that was planted"
            result |= {"status": "not available", "reason": reason, "report": text[-1500:]}
        elif not exercised:
            result |= {"status": "failed", "reason": ended, "report": text[-1500:]}
            self._record["failures"].append(f"{tool}: {ended}")
        else:
            result["status"] = "passed"
        return result

    # limits, decode, whole models and ops

    def _worker(self, job: dict[str, Any], before: list[str], variables: dict[str, str]) -> Process:
        options = self._options
        job = {**job, "table": options.table, "dry_run": options.dry_run}
        command = [*before, sys.executable, "-m", "bench.suite.worker", json.dumps(job)]
        return Process(command, self._log, {**self._variables, **variables}, messages=True)

    def _limits(self, part: dict[str, Any], end: float, only: str) -> None:
        with self._worker({"part": "limits"}, [], {}) as process:
            for message in process.messages(end, _STARTING):
                part |= {"limits": message["limits"]} if "limits" in message else {}
        self._probes(part, end)
        part["status"] = "measured"

    def _probes(self, part: dict[str, Any], end: float) -> None:
        """In a process of their own, and whatever becomes of it: nothing is held against them."""
        probes = part["probes"] = {}
        try:
            with self._worker({"part": "probes"}, [], {}) as process:
                for message in process.messages(end, _STARTING):
                    probes |= message.get("probe", {})
        except (Failed, TimedOut) as error:
            probes["error"] = str(error)

    def _cases(self, parts: dict[str, dict[str, Any]], end: float, only: dict[str, str]) -> None:
        """Cases one after the other, each in a process that outlives the case if it can.

        The case of a whole model begins with its part's name; others are of a part alone."""
        for part in parts.values():
            part["cases"] = []
        (first, *_), state = parts, CasesState()
        steps = first in STEP_PARTS
        while not state.finished and time.time() < end:
            job = {"part": "steps" if steps else first, "deadline": end, **state.job()}
            job |= {"parts": only, "only": ""} if steps else {"only": only[first]}
            try:
                with self._worker(job, [], {}) as process:
                    for message in process.messages(end + _OVERRUN, _STARTING):
                        state.take(message)
                        if "case" in message:
                            self._took(parts, message["case"])
                    break  # it ended by itself: done, or out of time
            except TimedOut:
                break
            except Failed as error:
                broken = state.broken(str(error))
                if broken is None:
                    raise
                if broken:
                    self._took(parts, broken)
        for name, part in parts.items():
            part["counts"] = dict(Counter(case["status"] for case in part["cases"]))
            part["missing"] = [m for m in state.missing() if not steps or m.split()[0] == name]
            part["status"] = "incomplete" if part["missing"] else "measured"

    def _took(self, parts: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
        """Rates, failures and the file, after each case."""
        name = next(iter(parts))
        if name in STEP_PARTS:
            name = case["case"].split()[0]
        parts[name]["cases"].append(case)
        limits = self._record["parts"].get("limits", {}).get("limits")
        reports = {"ops": report, "decode": decode_report}
        reports.get(name, step_report).add_rates(case, limits)
        if case["status"] == "failed":
            self._record["failures"].append(f"{name}: {case['case']}: {_reason(case)}")
        self._write()


def _reason(case: dict[str, Any]) -> str:
    if "reason" in case:
        return str(case["reason"])
    times = [times["ours"] for times in case["times"].values()]
    return next(r["wrong"] for r in (case["providers"]["ours"], *times) if "wrong" in r)
