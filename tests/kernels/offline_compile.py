"""Compiling for GPUs that are not there.

The launchers run as they are, on meta tensors of real sizes: Triton's driver is replaced by one
that names the chip and launches nothing, so what is compiled (to a cubin, ptxas included) is what a
GPU of that kind would get. Read from the cubin: registers, stack and local memory (spills), shared
memory, and the instructions that matter.
"""

import contextlib
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
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
    "all": r"",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration on one chip; descriptors: how many of its arguments are."""

    case: str
    kernel: str
    chip: int
    constants: dict[str, Any]
    descriptors: int
    key: str
    warps: int
    stages: int
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
class _Deferred:
    """What Triton would compile for a launch, and a key of all that the outcome depends on."""

    key: str
    compile: Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    """A launch that did not take place.

    key: of the kernel's source and that of all it calls, signature, constants, options, chip, and
    the versions of Triton and ptxas. It is the same on every machine.
    """

    name: str
    module: str
    chip: int
    constants: dict[str, Any]
    descriptors: int
    key: str
    compile: Callable[[], Any]

    @cached_property
    def kernel(self) -> Any:
        """What Triton compiles for it, when first asked for."""
        return self.compile()


def _defer(
    self: Any,
    _: Any,
    signature: Any,
    device: int,
    constants: Any,
    options: Any,
    attrs: Any,
    *__: Any,
) -> _Deferred:
    """In place of `JITFunction._do_compile`."""
    import triton

    target, backend = self.device_caches[device][2:4]
    source = self.ASTSource(self, signature, constants, attrs)
    parts = (source.hash(), options.hash(), backend.hash(), triton.__version__)
    return _Deferred(
        hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20],
        lambda: self.compile(source, target=target, options=options.__dict__),
    )


@contextlib.contextmanager
def compiling(chip: int) -> Iterator[list[Launch]]:
    """Within, launches are collected for ``chip``; yields the list of them that they fill."""
    from triton.runtime import driver
    from triton.runtime.jit import DependenciesFinder, JITCallable, JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    # Triton's own keys change when a kernel moves within its file.
    JITCallable.starting_line_number = property(lambda self: 1, lambda self, line: None)  # type: ignore[attr-defined]
    launched: list[Launch] = []
    run, compile_now = JITFunction.run, JITFunction._do_compile
    update = DependenciesFinder._update_hash

    def update_in_order(self: Any, function: Any) -> None:
        _ = function.cache_key  # else its globals would count only where it was hashed before
        update(self, function)

    def collect(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> _Deferred:
        deferred = run(self, *args, grid=grid, warmup=True, **keywords)
        constants = {name: value for name, value in keywords.items() if name.isupper()}
        descriptors = sum(isinstance(value, TensorDescriptor) for value in args)
        names = self.__name__, self.__module__
        launch = Launch(*names, chip, constants, descriptors, deferred.key, deferred.compile)
        launched.append(launch)
        return deferred

    before = driver._active
    driver.set_active(_OfflineDriver(chip))
    JITFunction.run = collect  # type: ignore[method-assign]
    JITFunction._do_compile = _defer  # type: ignore[method-assign]
    DependenciesFinder._update_hash = update_in_order  # type: ignore[method-assign]
    try:
        with target.assume(target.CHIPS[chip]):
            yield launched
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_now  # type: ignore[method-assign]
        DependenciesFinder._update_hash = update  # type: ignore[method-assign]
        driver._active = before


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What Triton's copy of the tool prints."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def measure(launch: Launch) -> dict[str, Any]:
    """Compile it, and read the cubin: the fields of `Compiled` behind the key."""
    kernel = launch.kernel
    text = cuobjdump(kernel.asm["cubin"], "-res-usage", "-sass")
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    mnemonics = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)", text, re.M))
    return {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "shared": kernel.metadata.shared,
        "instructions": {
            name: sum(n for mnemonic, n in mnemonics.items() if re.match(pattern, mnemonic))
            for name, pattern in INSTRUCTIONS.items()
        },
    }


def launches(case: str, chip: int) -> list[Launch]:
    """The distinct launches of a case on a chip."""
    with compiling(chip) as launched:
        CASES[case]()
    return list({launch.key: launch for launch in launched}.values())


def compiled(case: str, launch: Launch, measured: dict[str, Any]) -> Compiled:
    """A launch of the case, and what was measured."""
    return Compiled(
        case, launch.name, launch.chip, launch.constants, launch.descriptors, launch.key, **measured
    )
