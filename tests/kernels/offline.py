"""Compile every kernel, in every configuration, for GPUs that are not there.

    python -m tests.kernels.offline [--chips 80 90 100] [--only TEXT] [--json FILE] [--jobs N]
    python -m tests.kernels.offline --write
    python -m tests.kernels.offline --recorded --json FILE

The first compiles, and prints a table and what is wrong. The second writes the record
(`offline_record`) and compiles what is not in it: about half an hour of one core where that is
everything. The third judges by the record, as the tests do, and compiles a sample.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpt2fast.kernels._triton import target
from tests.kernels import offline_record
from tests.kernels.offline_compile import CASES, Compiled, Launch, compiled, launches, measure

# A process takes as long to start as a dozen of the kernels to compile.
FEW = 40


def _measure(job: tuple[str, int, set[str]]) -> dict[str, dict[str, Any]]:
    """Those of a case's launches on a chip with the given keys."""
    case, chip, keys = job
    found = {}
    for launch in launches(case, chip):
        if launch.key in keys:
            start = time.monotonic()
            try:
                found[launch.key] = measure(launch)
            except Exception as error:
                raise RuntimeError(f"{case} does not compile for sm_{chip}: {error}") from error
            seconds = time.monotonic() - start
            print(f"{case}, {launch.name}, sm_{chip}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def measure_all(
    named: list[tuple[str, Launch]], wanted: set[str], jobs: int
) -> dict[str, dict[str, Any]]:
    """``{key: measured}`` of the wanted keys; jobs: processes."""
    by_case = defaultdict(set)
    for key, (case, launch) in {launch.key: (case, launch) for case, launch in named}.items():
        if key in wanted:
            by_case[case, launch.chip].add(key)
    work = [(*pair, keys) for pair, keys in by_case.items()]
    found: dict[str, dict[str, Any]] = {}
    if jobs == 1 or len(wanted) < FEW:
        for job in work:
            found.update(_measure(job))
        return found
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for part in pool.map(_measure, work):
            found.update(part)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", default=sorted(target.CHIPS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--recorded", action="store_true", help="compile a sample of what is recorded")
    how.add_argument(
        "--write", action="store_true", help="bring the record and its table up to date"
    )
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    # Not what an earlier run has left on disk, unless that is asked for.
    os.environ.setdefault("TRITON_ALWAYS_COMPILE", "1")
    if options.write and (options.only or set(options.chips) != set(target.CHIPS)):
        raise SystemExit("--write is for all cases and chips")
    named = [
        (case, launch)
        for case in CASES
        if options.only in case
        for chip in options.chips
        for launch in launches(case, chip)
    ]
    keys = {launch.key for _, launch in named}
    kept = offline_record.read()["kernels"] if options.recorded or options.write else {}
    recorded = {key: offline_record.measured(kept[key]) for key in keys & set(kept)}
    sampled: set[str] = set()
    if options.recorded:
        sampled = offline_record.sample([launch for _, launch in named], recorded)
    afresh = measure_all(named, (keys - set(recorded)) | sampled, options.jobs)
    known = afresh | recorded
    all_compiled = [compiled(case, launch, known[launch.key]) for case, launch in named]
    if options.write:
        offline_record.RECORD.write_text(offline_record.record(all_compiled))
        offline_record.TABLE.write_text(offline_record.page(all_compiled))
    problems = _report(all_compiled)
    if options.json:
        result = {
            "compiled": [{**asdict(c), "problems": c.problems} for c in all_compiled],
            "tools": offline_record.tools(),
            "page": offline_record.page(all_compiled),
            "sampled": sorted(sampled),
            "missing": sorted(keys - set(kept)),
            "unused": sorted(set(kept) - keys),
            "untrue": sorted(
                key for key in recorded.keys() & afresh if recorded[key] != afresh[key]
            ),
        }
        options.json.write_text(json.dumps(result, indent=1))
    return bool(problems)


def _report(all_compiled: list[Compiled]) -> list[str]:
    """Print the table and the problems; returns those that are not known."""
    print(offline_record.table(all_compiled))
    problems = [
        f"{c.case}, {c.kernel}, sm_{c.chip}: {problem}"
        for c in all_compiled
        for problem in c.problems
        if c.case not in offline_record.KNOWN_SPILLS
    ]
    print("\n".join(problems) or "no spills, and all within the chips' shared memory")
    return problems


if __name__ == "__main__":
    sys.exit(main())
