"""Programmatic dependent launch: what stands before and behind a kernel's wait for the previous."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WEIGHTS = {"_qkv_kernel", "_add_kernel", "_fc_kernel", "_head_kernel"}


@pytest.fixture(scope="module")
def code() -> list[tuple[str, list[str]]]:
    """Kernels of steps of few and of many rows, and their instructions."""
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.dependent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (name, lines) for kernels in json.loads(done.stdout).values() for name, lines in kernels
    ]


def _wait(lines: list[str]) -> int:
    [wait] = [i for i, line in enumerate(lines) if "ACQBULK" in line]
    return wait


def test_the_next_may_start_and_the_previous_is_waited_for(
    code: list[tuple[str, list[str]]],
) -> None:
    names = {name for name, _ in code}
    assert {*WEIGHTS, "_embed_kernel", "_attend_kernel", "_fc_tiles_kernel"} <= names
    for name, lines in code:
        assert any("PREEXIT" in line for line in lines[: _wait(lines)]), name


def test_nothing_that_another_kernel_wrote_is_touched_before_the_wait(
    code: list[tuple[str, list[str]]],
) -> None:
    """Triton moves a pipelined loop's first loads before what stands in front of the loop."""
    for name, lines in code:
        before = [line.split(maxsplit=1)[1] for line in lines[: _wait(lines)]]
        memory = [
            line for line in before if re.search(r"\b(LD|LDG\w*|ST|STG|RED\w*|ATOM\w*)\.", line)
        ]
        if name not in WEIGHTS:
            assert not memory, name
            continue
        # 16 bytes at a time, as only weights are loaded here; the next input is float32.
        assert memory, name
        assert all("LDG.E.128" in line for line in memory), (name, memory)
        for line in memory:
            first = int(re.search(r"LDG\.E\.128 R(\d+)", line)[1])  # type: ignore[index]
            registers = rf"\bR({'|'.join(str(first + i) for i in range(4))})\b"
            readers = [s for s in before[before.index(line) + 1 :] if re.search(registers, s)]
            assert not readers, (name, "waits for its weights before it waits", readers)
