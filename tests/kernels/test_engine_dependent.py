"""Machine code of decoding steps: what stands before and behind a wait for what others write.

Kernels wait for the previous one under programmatic dependent launch; the persistent kernel's
programs wait for each other.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.kernels._triton import target
from gpt2fast.kernels._triton.engine import configs

ROOT = Path(__file__).parents[2]
WEIGHTS = {"_qkv_kernel", "_add_kernel", "_fc_kernel", "_head_kernel"}


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `tests.kernels.dependent` prints."""
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.dependent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def code(printed: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Kernels of steps of few and of many rows, and their instructions."""
    return [(name, lines) for rows in ("1", "16") for name, lines in printed[rows]]


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
        # 16 bytes at a time, as only weights are loaded here, and biases; what is not a weight is
        # float32.
        assert any("LDG.E.128" in line for line in memory), name
        for line in memory:
            load = re.search(r"LDG\.E\.(128|U16) R(\d+)", line)
            assert load, (name, line)
            count = 4 if load[1] == "128" else 1
            registers = rf"\bR({'|'.join(str(int(load[2]) + i) for i in range(count))})\b"
            readers = [s for s in before[before.index(line) + 1 :] if re.search(registers, s)]
            assert not readers, (name, "waits for its weights before it waits", readers)


def test_persistent_kernel_asks_for_the_next_weights_between_arriving_and_waiting(
    printed: dict[str, Any],
) -> None:
    """In the machine code for one row of gpt2; nothing takes them apart before the wait."""
    [(_, addressed)] = printed["persistent"]
    lines = [line.split(maxsplit=1)[1] for line in addressed]
    arrivals = [i for i, line in enumerate(lines) if "REDG.E.ADD.64.STRONG.GPU" in line]
    polls = [i for i, line in enumerate(lines) if "LDG.E.64.STRONG.GPU" in line]
    assert len(arrivals) == len(polls) == 7
    loads = []
    for arrival, poll in zip(arrivals, polls, strict=True):
        between = lines[arrival:poll]
        loads.append(sum("LDG.E.128" in line for line in between))
        for i, line in enumerate(between):
            if load := re.search(r"LDG\.E\.128(?:\.\w+)* R(\d+)", line):
                own = "|".join(str(int(load[1]) + n) for n in range(4))
                assert not [s for s in between[i + 1 :] if re.search(rf"\bR({own})\b", s)], line
    tiles = [
        configs.persistent_tile(outputs, inputs, 16, 1, 128, target.CHIPS[90])
        for outputs, inputs in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768))
    ]
    qkv, out, fc, proj, head = (tile.repeat * tile.unroll for tile in tiles)
    norm = 2 * 3  # LayerNorm's weight and bias
    # Attention and the choice have none.
    assert loads == [qkv + norm, 0, out, fc + norm, proj, head, 0]
    assert sum(line.startswith(("LDL", "STL")) for line in lines) == 0
