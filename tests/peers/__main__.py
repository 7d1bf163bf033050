"""Run others' tests on this library and compare with the table: ``python -m tests.peers``."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.peers import table, vocabulary
from tests.peers.outcomes import OUTPUT, RUN
from tests.peers.sources import ROOT, TIKTOKEN, TRANSFORMERS, fetch

SOURCES = (TRANSFORMERS, TIKTOKEN)


def run(which: str) -> table.Outcomes:
    """What comes of all suites, in two processes of one thread; ``which`` is ours or control."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "outcomes.json")
        surroundings = {RUN: which, OUTPUT: str(output), "OMP_NUM_THREADS": "1"}
        # As in the tests of this library, nothing comes from the Hub.
        surroundings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch}
        command = [sys.executable, "-m", "pytest", "--config-file=tests/peers/run.ini"]
        command += ["-p", "tests.peers.outcomes", "--numprocesses=2", "--dist=worksteal", "-qq"]
        command += ["--tb=no", "--disable-warnings", "tests/peers"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **surroundings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # 1 means that tests failed; what that is worth, the table says.
        if done.returncode not in (0, 1):
            print(done.stdout)
            raise SystemExit(f"others' tests did not run: pytest ended with {done.returncode}")
        outcomes: table.Outcomes = json.loads(output.read_text())
        return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="make this run, and a control run, the table"
    )
    options = parser.parse_args()
    for source in SOURCES:
        if version(source.name) != source.version:
            raise SystemExit(
                f"the tests are those of {source.name} {source.version}, installed is "
                f"{version(source.name)}: sources.py and constraints.txt must agree"
            )
        try:
            fetch(source)
        except ConnectionError as error:
            raise SystemExit(f"{error}\nWithout it others' tests cannot run.") from None
    # That of an earlier run may be of another `save_pretrained`.
    shutil.rmtree(vocabulary.FOLDER, ignore_errors=True)
    ours = run("ours")
    if options.write:
        stored = {"ours": ours, "control": run("control")}
        table.RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        table.PAGE.write_text(table.page(**stored, versions={s.name: s.version for s in SOURCES}))
        return
    worse, better = table.changes(table.read()["ours"], ours)
    print(f"others' tests: {len(worse)} worse than the table, {len(better)} better", flush=True)
    for line in worse:
        print(f"worse: {line}")
    for line in better:
        print(f"better: {line}")
    if better:
        print("python -m tests.peers --write betters the table")
    if worse:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
