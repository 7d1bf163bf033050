"""The machine code of a step's kernels under programmatic dependent launch, and of the persistent
kernel for one row of gpt2, as JSON.

    python -m tests.kernels.dependent

prints ``{rows or "persistent": [[kernel, [instruction, ...]], ...]}`` for compute capability 9.0,
the first that has such launches.
"""

import json

import torch
from torch import Tensor

from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import StepBuffers, evaluate, select_and_commit
from gpt2fast.kernels.packing import DecodeWeights, Matrix
from tests.kernels import offline_compile
from tests.kernels.exchange import machine_code
from tests.kernels.offline_cases import empty

ROWS = (1, 16)  # one of each way of multiplying


def weights(
    width: int, layers: int, heads: int, vocab_size: int, bits: int = 16, positions: int = 1024
) -> DecodeWeights:
    """Weights without data."""

    def matrix(count: int, outputs: int, inputs: int, bits: int) -> Matrix:
        stored = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
        data = empty(count, outputs, inputs // (2 if bits == 4 else 1), dtype=stored)
        scale: Tensor | None = None
        if bits < 16:
            groups = [-(-inputs // 128)] if bits == 4 else []
            scale = empty(count, outputs, *groups, dtype=torch.float32)
        return Matrix(data, scale, empty(count, outputs), bits)

    head = matrix(1, vocab_size, width, max(bits, 8))
    return DecodeWeights(
        wte=empty(vocab_size, width),
        wpe=empty(positions, width),
        ln_1=empty(layers, 2, width),
        ln_2=empty(layers, 2, width),
        ln_f=empty(2, width),
        qkv=matrix(layers, 3 * width, width, bits),
        out=matrix(layers, width, width, bits),
        fc=matrix(layers, 4 * width, width, bits),
        proj=matrix(layers, width, 4 * width, bits),
        head=Matrix(head.data, head.scale, None, head.bits),
        heads=heads,
        eps=1e-5,
        scales=empty(layers, dtype=torch.float32),
    )


def main() -> None:
    code: dict[int | str, list[tuple[str, list[str]]]] = {}
    for rows in ROWS:
        with offline_compile.compiling(90) as launched:
            model = weights(256, 1, 4, 1024)
            state = DecodeState.empty(2, 1024, 1024, torch.device("meta"))
            buffers = StepBuffers.allocate(model, rows, 4)
            evaluate(model, state, empty(1, 2, 2, 4, 1024, 64), buffers, greedy=True, pdl=True)
            select_and_commit(state, buffers, 0, greedy=True, pdl=True)
        distinct = {launch.key: launch for launch in launched}.values()
        code[rows] = [(one.name, machine_code(one.kernel.asm["cubin"])) for one in distinct]
    with offline_compile.compiling(90) as launched:
        offline_compile.CASES["engine persistent"]()
    code["persistent"] = [(one.name, machine_code(one.kernel.asm["cubin"])) for one in launched]
    print(json.dumps(code))


if __name__ == "__main__":
    main()
