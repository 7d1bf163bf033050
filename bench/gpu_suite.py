"""Everything that only a GPU can show, in one command and under nine minutes.

    python bench/gpu_suite.py [--only PART ...] [--budget-seconds 520] [--out FILE.json] [--dry-run]

Parts, the most important first: ``parity`` (the tests of the kernels, on the GPU), ``sanitize``
(memory errors and races), ``limits`` (what the device reaches), ``decode`` (whole generations
against their peers), ``training``, ``prefill`` and ``scoring`` (steps of whole models),
``accelerate`` (models of transformers on our kernels against themselves), ``ops`` (every op against
its own peers). ``--only ops:attention`` takes the cases, or tests, whose name contains "attention".

It runs from a checkout that is not installed. Each part is a process of its own, so one that
crashes or hangs takes nothing else down. The record is written after every case. The exit status is
1 where anything computed a wrong answer or the checkers found a fault, 3 where parity was to be
shown and was not, for want of time. ``--dry-run`` walks through the same code on a CPU, with tiny
shapes and Triton's interpreter; its times mean nothing, and it does not write into bench/results.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of this folder, whose names are not meant for the top level

from bench.suite import report  # noqa: E402
from bench.suite.environment import commit, environment, gpu_state, now  # noqa: E402
from bench.suite.parts import PARTS, Suite  # noqa: E402

RESULTS = ROOT / "bench" / "results"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART[:TEXT]")
    parser.add_argument("--budget-seconds", type=float, default=520.0)
    parser.add_argument("--out", type=Path, help="the record; default: by device, in bench/results")
    parser.add_argument(
        "--table", default="bench.suite.ops:op_cases", help="module:function, the cases"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    options = parser.parse_args()
    options.only = dict(item.partition(":")[::2] for item in options.only)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    gpu = gpu_state()
    if not options.dry_run and gpu is None:
        parser.error("nvidia-smi shows no GPU; --dry-run walks through the code without one")
    if options.out is None:
        folder = ROOT / "build" if options.dry_run else RESULTS / _slug((gpu or {})["name"])
        options.out = folder / f"gpu_suite-{commit()['commit'][:12]}.json"
    options.out = options.out.resolve()
    if options.dry_run and RESULTS in options.out.parents:
        parser.error("a dry run measures nothing: it does not write into bench/results")
    return options


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Record:
    """The run so far, in a file that is replaced whole whenever something is added."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data, self._begin = path, data, time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        self.data["seconds"] = round(time.time() - self._begin, 1)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = _arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    deadline = time.time() + options.budget_seconds
    record = Record(
        options.out,
        {
            "schema": 1,
            "dry_run": options.dry_run,
            "status": "running",
            "arguments": sys.argv[1:],
            "budget_seconds": options.budget_seconds,
            "environment": environment(),
            "parts": {},
            "failures": [],
        },
    )
    suite = Suite(record.data, record.write, options.out.with_suffix(".log"), options, deadline)
    try:
        suite.run()
        record.data["status"] = "complete"
    except KeyboardInterrupt:
        record.data["status"] = "interrupted"
    record.data["environment"]["gpu_at_the_end"] = gpu_state()
    record.data["environment"]["date_at_the_end"] = now()
    record.write()
    print(report.summary(record.data))
    print(f"record: {record.path}")
    if record.data["status"] == "interrupted":
        return 130
    if record.data["failures"]:
        return 1
    parity = record.data["parts"].get("parity", {"status": "passed"})
    return 0 if parity["status"] == "passed" else 3


if __name__ == "__main__":
    sys.exit(main())
