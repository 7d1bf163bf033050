"""Every kernel, in every configuration, compiles for the chips it is meant for, and fits them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.kernels import _triton
from gpt2fast.kernels._triton.target import CHIPS

ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(_triton.__file__).parent.glob("*.py"))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("offline") / "records.json"
    done = _python("-m", "tests.kernels.offline", "--json", str(path))
    assert path.exists(), done.stderr[-3000:]
    assert done.stdout.count("| sm_") == len(json.loads(path.read_text()))
    print(done.stdout)  # the table, shown where a test fails
    loaded: list[dict[str, Any]] = json.loads(path.read_text())
    return loaded


def test_no_spills_and_all_within_the_chips(records: list[dict[str, Any]]) -> None:
    assert {record["chip"] for record in records} == set(CHIPS)
    assert not [
        (r["case"], r["kernel"], r["chip"], r["problems"]) for r in records if r["problems"]
    ]


def test_every_kernel_is_compiled_for_every_chip(records: list[dict[str, Any]]) -> None:
    defined = {
        name
        for source in SOURCES
        for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)
    }
    assert len(defined) >= 10
    for chip in CHIPS:
        assert {r["kernel"] for r in records if r["chip"] == chip} == defined


# Kernel -> the instructions that its design rests on, by chip.
MATRIX_KERNELS = ("matmul", "attention_fwd", "attention_bwd")


def test_the_instructions_that_matter(records: list[dict[str, Any]]) -> None:
    """16-bit matrix products run on tensor cores, and on sm_90 read tiles by descriptor."""
    for record in records:
        seen, name = record["instructions"], record["kernel"]
        if not any(part in name for part in MATRIX_KERNELS) or "float32" in record["case"]:
            continue
        assert seen["tensor core"], (record["case"], name, record["chip"])


BROKEN = """
import triton, triton.language as tl
from tests.kernels import offline, offline_cases

@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    y = tl.load(x_ptr + BLOCK * BLOCK + offs[:, None] * BLOCK + offs[None, :])
    tl.store(x_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(x, y, input_precision="ieee"))

offline_cases.CASES.clear()
offline_cases.CASES["broken"] = lambda: _broken_kernel[(1,)](
    offline_cases.empty(1 << 16), BLOCK={block}, num_warps={warps}
)
found = [p for c in offline.compile_case("broken", 90) for p in c.problems]
print(found)
"""


@pytest.mark.parametrize(("block", "warps", "problem"), [(128, 1, "spills"), (32, 4, "")])
def test_the_check_can_fail(block: int, warps: int, problem: str, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(block=block, warps=warps))
    done = _python(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    assert problem in done.stdout
    assert (done.stdout.strip() == "[]") == (not problem)


def test_too_much_shared_memory_is_a_problem() -> None:
    from tests.kernels.offline import Compiled

    quiet = {"spill": 0}
    fits = Compiled("case", "kernel", 80, {}, 4, 3, 255, 0, 0, 163 << 10, quiet)
    too_big = Compiled("case", "kernel", 80, {}, 4, 3, 255, 0, 0, (163 << 10) + 1, quiet)
    assert not fits.problems
    assert "shared memory" in too_big.problems[0]
