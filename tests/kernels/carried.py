"""Names that Triton's compiler forgets to change in a loop.

    python -m tests.kernels.carried

The compiler finds out what a loop changes by walking through its body once: the names whose value
is another one behind it. One that is assigned what a second name holds, where both held the same
when the loop began (``middle = low`` before, ``low = middle`` within), looks unchanged, and would
keep its first value in every round. Triton's interpreter, which runs Python, has it right, so no
test of results shows this without a GPU. Only the compiler's first stage runs here, for one chip.

Prints JSON: how many ``loops`` were looked at, what was ``found`` in the kernels, [function, name]
each, and what in the kernel ``planted`` here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from tests.kernels.offline_compile import CASES, compiling, launches

_CHIP = 90


@triton.jit
def _planted_kernel(x_ptr, rounds):
    low = tl.load(x_ptr)
    middle = low
    while rounds > 0:
        low = middle
        middle += 1
        rounds -= 1
    tl.store(x_ptr, low)


class _Enough(Exception):
    """The first stage is done."""


@contextlib.contextmanager
def _watching() -> Iterator[list[tuple[str, list[str]]]]:
    """Within, compiling stops behind its first stage; yields a list, for every loop (the function,
    the names that it should carry and does not)."""
    from triton.compiler.code_generator import CodeGenerator, _is_triton_value
    from triton.compiler.compiler import ASTSource

    loops: list[tuple[str, list[str]]] = []
    assigned: list[tuple[Any, set[str]]] = []  # by the loops around, and whose they are
    find, assign, make = CodeGenerator._find_carries, CodeGenerator.set_value, ASTSource.make_ir

    def note(self: Any, name: str, value: Any) -> None:
        for owner, names in assigned:
            if owner is self:  # not a function that is called
                names.add(name)
        assign(self, name, value)

    def look(self: Any, node: Any, liveins: Any, ignore: Any = frozenset()) -> Any:
        assigned.append((self, set()))
        carried = find(self, node, liveins, ignore)
        # Those of branches that are really there, not all that the source has.
        forgotten = (assigned.pop()[1] & liveins.keys()) - {*carried[0], *ignore}
        names = sorted(name for name in forgotten if _is_triton_value(liveins[name]))
        loops.append((self.function_name.split("__")[0].rsplit(".", 1)[-1], names))
        return carried

    def stop(self: Any, *args: Any, **keywords: Any) -> None:
        make(self, *args, **keywords)
        raise _Enough

    CodeGenerator._find_carries, CodeGenerator.set_value, ASTSource.make_ir = look, note, stop
    try:
        yield loops
    finally:
        CodeGenerator._find_carries, CodeGenerator.set_value = find, assign
        ASTSource.make_ir = make


def main() -> None:
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what is cached has been through that stage
    seen: set[str] = set()
    with _watching() as loops:
        for case in CASES:
            for launch in launches(case, _CHIP):
                if launch.key not in seen:
                    seen.add(launch.key)
                    with contextlib.suppress(_Enough):
                        launch.compile()
        number = len(loops)
        with compiling(_CHIP) as planted:
            _planted_kernel[(1,)](torch.empty(1, dtype=torch.int32, device="meta"), 5)
        with contextlib.suppress(_Enough):
            planted[0].compile()
    found = [
        sorted({(f, n) for f, names in part for n in names})
        for part in (loops[:number], loops[number:])
    ]
    print(json.dumps({"loops": number, "found": found[0], "planted": found[1]}))


if __name__ == "__main__":
    main()
