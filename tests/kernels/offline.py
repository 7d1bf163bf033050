"""Compile every kernel, in every configuration, for GPUs that are not there.

    python -m tests.kernels.offline [--chips 80 90 100] [--only TEXT] [--without TEXT]
                                    [--json FILE] [--jobs N]

The launchers run as they are, on meta tensors of real sizes: Triton's driver is replaced by one
that names the chip and launches nothing, so what is compiled (to a cubin, ptxas included) is what a
GPU of that kind would get. Read from the cubin: registers, stack and local memory (spills), shared
memory, and the instructions that matter.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gpt2fast.kernels._triton import target
from tests.kernels import offline_decode
from tests.kernels.offline_cases import CASES

CASES.update(offline_decode.CASES)

# SASS mnemonics by what they tell; a column of the table each, but for spills.
INSTRUCTIONS = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTC*MMA": r"UTC[A-Z]*MMA",
    "tile load": r"UTMALDG",
    "async copy": r"LDGSTS",
    "async copy 16 B": r"LDGSTS(?:\.\w+)*\.128\b",
    "load": r"LDG(?!STS)",
    "load 16 B": r"LDG(?:\.\w+)*\.(?:128|256)\b",
    "store": r"STG",
    "store 16 B": r"STG(?:\.\w+)*\.(?:128|256)\b",
    "spill": r"STL|LDL",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration on one chip; descriptors: how many of its arguments are."""

    case: str
    kernel: str
    chip: int
    constants: dict[str, Any]
    warps: int
    stages: int
    descriptors: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: dict[str, int]

    @property
    def problems(self) -> list[str]:
        """What keeps it from being fit to run."""
        found = []
        if self.stack or self.local or self.instructions["spill"]:
            found.append(
                f"spills: {self.stack} B of stack, {self.local} B of local memory, "
                f"{self.instructions['spill']} spilling instructions"
            )
        room = target.CHIPS[self.chip].shared_memory
        if self.shared > room:
            found.append(f"{self.shared} B of shared memory, the chip has {room}")
        return found


class _OfflineDriver:
    """A Triton driver for a chip that is not there."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        return self.chip  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    keywords: dict[str, Any]
    descriptors: int


@contextlib.contextmanager
def compiling(chip: int) -> Iterator[list[_Launch]]:
    """Within, launches compile for ``chip``; yields the list of them that they fill."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    launched: list[_Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        descriptors = sum(isinstance(value, TensorDescriptor) for value in args)
        launched.append(_Launch(kernel, keywords, descriptors))
        return kernel

    before = driver._active
    driver.set_active(_OfflineDriver(chip))
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        with target.assume(target.CHIPS[chip]):
            yield launched
    finally:
        JITFunction.run = run
        driver._active = before


def _cuobjdump(cubin: bytes, *options: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def _inspect(case: str, chip: int, launch: _Launch) -> Compiled:
    """Read a compiled kernel's cubin."""
    kernel = launch.kernel
    usage = dict(
        re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump(kernel.asm["cubin"], "-res-usage"))
    )
    sass = _cuobjdump(kernel.asm["cubin"], "-sass")
    mnemonics = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)", sass, re.M))
    counts = {
        name: sum(n for mnemonic, n in mnemonics.items() if re.match(pattern, mnemonic))
        for name, pattern in INSTRUCTIONS.items()
    }
    metadata = kernel.metadata
    constants = {name: value for name, value in launch.keywords.items() if name.isupper()}
    return Compiled(
        case=case,
        kernel=metadata.name,
        chip=chip,
        constants=constants,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        descriptors=launch.descriptors,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        shared=metadata.shared,
        instructions=counts,
    )


def compile_case(name: str, chip: int) -> list[Compiled]:
    """Every distinct kernel that the case launches on the chip."""
    with compiling(chip) as launched:
        CASES[name]()
    distinct = {launch.kernel.hash: launch for launch in launched}
    return [_inspect(name, chip, launch) for launch in distinct.values()]


def _compile_pair(pair: tuple[str, int]) -> list[Compiled]:
    try:
        return compile_case(*pair)
    except Exception as error:
        raise RuntimeError(f"{pair[0]} does not compile for sm_{pair[1]}: {error}") from error


def table(compiled: list[Compiled]) -> str:
    """The results as Markdown."""
    columns = [name for name in INSTRUCTIONS if name != "spill"]
    head = ["case", "kernel", "chip", "warps", "stages", "registers", "shared B", *columns]
    rows = [
        [
            c.case,
            c.kernel.strip("_"),
            f"sm_{c.chip}",
            c.warps,
            c.stages,
            c.registers,
            c.shared,
            *(c.instructions[name] for name in columns),
        ]
        for c in compiled
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", default=sorted(target.CHIPS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--without", default="\n", help="cases whose name does not contain this")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    names = [name for name in CASES if options.only in name and options.without not in name]
    pairs = [(name, chip) for name in names for chip in options.chips]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        compiled = [c for group in pool.map(_compile_pair, pairs) for c in group]
    print(table(compiled))
    problems = [f"{c.case}, {c.kernel}, sm_{c.chip}: {p}" for c in compiled for p in c.problems]
    if options.json:
        records = [{**asdict(c), "problems": c.problems} for c in compiled]
        options.json.write_text(json.dumps(records, indent=1))
    print("\n".join(problems) or "no spills, and all within the chips' shared memory")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
