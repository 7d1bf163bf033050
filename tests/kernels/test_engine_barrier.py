"""The grid barrier: what the chips are given, and on a GPU that nothing passes it too early."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast.kernels._triton.target import CHIPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def code() -> dict[int, list[str]]:
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.exchange", *map(str, CHIPS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(chip): lines for chip, lines in json.loads(done.stdout).items()}


def _only(lines: list[str], pattern: str) -> int:
    """Where the one instruction stands that matches."""
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    assert len(found) == 1, (pattern, [lines[i] for i in found])
    return found[0]


def _loop_around(lines: list[str], at: int) -> range:
    """The smallest loop around an instruction: from a branch's target to the branch."""
    addresses = {line.split()[0]: i for i, line in enumerate(lines)}
    loops = []
    for i, line in enumerate(lines):
        if branch := re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+)", line):
            begin = addresses.get(branch[1].rjust(4, "0"), i + 1)
            if begin <= at <= i:
                loops.append(range(begin, i + 1))
    return min(loops, key=len)


@pytest.mark.parametrize("chip", CHIPS)
def test_releases_then_adds_once(code: dict[int, list[str]], chip: int) -> None:
    lines = code[chip]
    add = _only(lines, r"\bREDG?\.E\.ADD\.64\.STRONG\.GPU")
    fence = _only(lines, r"\bMEMBAR\.\w+\.GPU")
    barrier = max(i for i in range(fence) if "BAR.SYNC" in lines[i])
    store = max(i for i in range(fence) if "STG" in lines[i])
    assert store < barrier < fence < add
    assert not any(re.search(r"\bATOM", line) for line in lines)


@pytest.mark.parametrize("chip", CHIPS)
def test_one_thread_polls_with_acquiring_reads_and_a_bound(
    code: dict[int, list[str]], chip: int
) -> None:
    lines = code[chip]
    poll = _only(lines, r"\bLDG?\.E\.64\.STRONG\.GPU")
    loop = [lines[i] for i in _loop_around(lines, poll)]
    assert len(loop) < 16
    assert any("CCTL.IVALL" in line for line in loop)
    assert not any(re.search(r"\b(BAR|WARPSYNC|STG|RED|MEMBAR|NANOSLEEP)\b", s) for s in loop)
    assert _only(lines, r"\bBPT\.TRAP") > poll
    # The others wait for it, and only then read.
    after = _loop_around(lines, poll).stop
    barrier = min(i for i in range(after, len(lines)) if "BAR.SYNC" in lines[i])
    exchanged = min(i for i in range(after, len(lines)) if re.search(r"\bLDG\.E\b", lines[i]))
    assert after <= barrier < exchanged


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_on_their_way_while_it_waits(code: dict[int, list[str]], chip: int) -> None:
    lines = code[chip]
    poll = _only(lines, r"\bLDG?\.E\.64\.STRONG\.GPU")
    load = _only(lines, r"\bLDG\.E\.128\b")
    assert _only(lines, r"\bREDG?\.E\.ADD") < load < poll
    # Nobody takes them apart before, who would wait for them.
    first = int(re.search(r"LDG\.E\.128 R(\d+)", lines[load])[1])  # type: ignore[index]
    registers = rf"\bR({'|'.join(str(first + i) for i in range(4))})\b"
    assert not [
        s for s in lines[load + 1 : _loop_around(lines, poll).start] if re.search(registers, s)
    ]
    assert any(re.search(registers, line) for line in lines[poll:])


@pytest.mark.parametrize("chip", CHIPS)
def test_asks_for_weights_in_l2(code: dict[int, list[str]], chip: int) -> None:
    bulk = any("UBLKPF.L2" in line for line in code[chip])
    lines = any("CCTL.E.PF2" in line for line in code[chip])
    assert (bulk, lines) == (CHIPS[chip].has_tma, not CHIPS[chip].has_tma)


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [False, True])
def test_every_thread_reads_what_its_neighbour_has_just_written(bulk: bool) -> None:
    from tests.kernels.exchange import exchange

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    if bulk and properties.major < 9:
        pytest.skip("no bulk prefetch before compute capability 9.0")
    programs, rounds = min(128, properties.multi_processor_count), 1000
    out = exchange(rounds, programs, device, launches=3, bulk=bulk)
    neighbour = (torch.arange(programs, device=device) + 1) % programs
    each_round = neighbour[:, None] + torch.arange(out.shape[1], device=device) + 1
    expected = rounds * each_round + rounds * (rounds - 1) // 2
    assert torch.equal(out, expected.int())


@pytest.mark.gpu
def test_a_grid_that_is_not_resident_is_refused() -> None:
    from tests.kernels.exchange import exchange

    device = torch.device("cuda")
    many = 64 * torch.cuda.get_device_properties(device).multi_processor_count
    with pytest.raises(RuntimeError, match=r"cooperative|too large"):
        exchange(1, many, device, launches=1, bulk=False)
    exchange(1, 8, device, launches=1, bulk=False)  # the device serves on
