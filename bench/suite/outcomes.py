"""A pytest plugin: every test's outcome, a line of JSON each, written as soon as it is known.

    GPT2FAST_OUTCOMES=FILE pytest -p bench.suite.outcomes

Unlike a report at the end it survives the end of a time limit.
"""

import json
import os
from typing import Any

_MESSAGE = 1500  # characters of a failure that are kept


def _write(identifier: str, outcome: str, seconds: float, message: str) -> None:
    line = {"id": identifier, "outcome": outcome, "seconds": round(seconds, 3)}
    if message:
        # A skip names its file; where the checkout lies is nobody's business.
        line["message"] = message.replace(f"{os.getcwd()}/", "")[-_MESSAGE:]
    with open(os.environ["GPT2FAST_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ  # the process that hands the tests out reports


def pytest_collectreport(report: Any) -> None:
    if report.failed and not _in_worker():
        _write(report.nodeid or "collection", "error", 0.0, str(report.longrepr))


def pytest_runtest_logreport(report: Any) -> None:
    if _in_worker() or (report.when != "call" and report.passed):
        return
    outcome = report.outcome if report.when == "call" or report.skipped else "error"
    _write(report.nodeid, outcome, report.duration, str(report.longrepr or ""))
