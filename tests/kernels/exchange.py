"""A kernel whose programs read what others wrote in the same launch: what a grid barrier is for.

    python -m tests.kernels.exchange 80 90 100

prints its machine code for these chips as JSON, ``{chip: [instruction, ...]}``.
"""

import json
import re
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.engine.barrier import arrive, first_epoch, hold, prefetch, wait
from gpt2fast.kernels._triton.target import CHIPS
from tests.kernels import offline_compile

WARPS = 8


@triton.jit(do_not_specialize=["rounds"])
def _exchange_kernel(
    counter_ptr, x_ptr, weights_ptr, out_ptr, rounds,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """In each round a program writes a row, and adds up its neighbour's and one of weights.

    x ``[2, PROGRAMS, BLOCK]`` int32: a round's row is written over only behind the next round's
    barrier. weights ``[PROGRAMS, 8 * BLOCK]`` bfloat16, out ``[PROGRAMS, BLOCK]`` int32.
    """
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    epoch = first_epoch(counter_ptr, PROGRAMS)
    total = tl.zeros([BLOCK], tl.int32)
    for turn in tl.range(0, rounds):
        own_ptr = x_ptr + (turn % 2) * PROGRAMS * BLOCK
        tl.store(own_ptr + program * BLOCK + offs, turn + program + offs)
        prefetch(weights_ptr.to(tl.pointer_type(tl.int8)) + program * BLOCK * 16, BLOCK * 16, BULK)
        arrive(counter_ptr)
        weights = tl.load(weights_ptr + program * BLOCK * 8 + tl.arange(0, BLOCK * 8))
        epoch = wait(counter_ptr, epoch, PROGRAMS)
        weights = hold(weights)
        other = (program + 1) % PROGRAMS
        total += tl.load(own_ptr + other * BLOCK + offs)
        total += tl.sum(weights.to(tl.float32), 0).to(tl.int32)
    tl.store(out_ptr + program * BLOCK + offs, total)


def exchange(rounds: int, programs: int, device: torch.device, launches: int, bulk: bool) -> Tensor:
    """``[programs, 256]``: what every thread of every program added up in the last launch."""
    block = WARPS * 32
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.zeros(2, programs, block, dtype=torch.int32, device=device)
    weights = torch.zeros(programs, 8 * block, dtype=torch.bfloat16, device=device)
    weights[:, 0] = 1
    out = torch.empty(programs, block, dtype=torch.int32, device=device)
    for _ in range(launches):
        _exchange_kernel[(programs,)](
            counter, rows, weights, out, rounds,
            PROGRAMS=programs, BLOCK=block, BULK=bulk,
            num_warps=WARPS, launch_cooperative_grid=True,
        )  # fmt: skip
    return out


def machine_code(cubin: bytes) -> list[str]:
    """The instructions, without their addresses and the compiler's annotations."""
    sass = offline_compile.cuobjdump(cubin, "-sass")
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.M)
    return [f"{address} {instruction}" for address, instruction in found]


def main() -> None:
    code = {}
    for chip in map(int, sys.argv[1:]):
        with offline_compile.compiling(chip) as launched:
            exchange(3, 108, torch.device("meta"), 1, CHIPS[chip].has_tma)
        code[chip] = machine_code(launched[0].kernel.asm["cubin"])
    print(json.dumps(code))


if __name__ == "__main__":
    main()
