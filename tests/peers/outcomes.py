"""A pytest plugin that writes what came of each test: ``{suite: {test: outcome}}``.

An outcome is ``passed``, or ``skipped`` or ``failed`` with the reason after a colon.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

# A control run is that of the peers' own model and tokenizers.
RUN = "GPT2FAST_PEERS_RUN"
CONTROL = os.environ.get(RUN) == "control"
OUTPUT = "GPT2FAST_PEERS_OUTPUT"
_LONGEST = 150
_ORDER = ("passed", "skipped", "failed")


class Recorder:
    """Gathers the reports of a run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = {}
        # Of tests whose subtests are reported one by one: the kinds that occurred.
        self.subtests: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if isinstance(report, pytest.SubtestReport):
            self.subtests.setdefault(report.nodeid, set()).add(report.outcome)
        elif report.when != "call" and report.passed:
            return
        path, _, test = report.nodeid.partition("::")
        suite = self.outcomes.setdefault(Path(path).stem.removeprefix("suite_"), {})
        known = suite.get(test, "passed")
        found = describe(report)
        if kind(found) == "passed" and self.subtests.get(report.nodeid) == {"skipped"}:
            # A test that has skipped whatever it is about.
            return
        if isinstance(report, pytest.SubtestReport) and kind(found) == "skipped":
            # Others of its subtests may run.
            suite.setdefault(test, found)
        elif kind(found) == "passed" and kind(known) == "skipped":
            suite[test] = found
        else:
            suite[test] = max(known, found, key=lambda outcome: _ORDER.index(kind(outcome)))


def kind(outcome: str) -> str:
    """``passed``, ``skipped`` or ``failed``."""
    return outcome.partition(":")[0]


def describe(report: Any) -> str:
    """The outcome of a report, its reason in one line that is the same on every machine."""
    if report.passed:
        return "passed"
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reason = str(reason).removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    line = re.sub(r"0x[0-9a-f]+", "0x...", line)
    line = re.sub(r"(/[\w.+-]+){2,}", "...", line)
    return f"{report.outcome}: {line[:_LONGEST]}"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(), "gpt2fast-outcomes")


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.pluginmanager.get_plugin("gpt2fast-outcomes")
    if recorder is not None:
        Path(os.environ[OUTPUT]).write_text(json.dumps(recorder.outcomes))
