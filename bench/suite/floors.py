"""The floor of every op, from the work that the table declares and two assumed rates.

    python -m bench.suite.floors

Prints the tables of ``bench/NOTES.md``. The rates are assumptions to plan with: a run of the suite
measures the device's own, and its record states shares of those.
"""

from contextlib import nullcontext

import torch

from bench.suite.cases import GPT2, MODELS
from bench.suite.ops import BRIEF, FULL, model_cases
from bench.suite.work import Work

BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12  # bfloat16 matrix products


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _floor(work: Work) -> str:
    return f"{1e6 * work.seconds(BYTES_PER_SECOND, FLOPS_PER_SECOND):.1f}"


def smallest_model() -> str:
    """Every case of the smallest model, a row a direction."""
    rows = []
    for case in model_cases(GPT2, FULL, torch.bfloat16, nullcontext):
        for direction, work in case.work.items():
            moving, computing = work.bytes / BYTES_PER_SECOND, work.flops / FLOPS_PER_SECOND
            bound = "bytes" if moving >= computing else "FLOPs"
            amounts = [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.2f}"]
            rows.append([f"{case.op} {case.shape}", direction, *amounts, _floor(work), bound])
    return _table(["op", "direction", "MB", "GFLOP", "floor, us", "bound by"], rows)


def all_models() -> str:
    """The floors in microseconds of the models side by side, named by the first one's shape."""
    cases = [list(model_cases(model, BRIEF, torch.bfloat16, nullcontext)) for model in MODELS]
    rows = [
        [f"{same[0].op} {same[0].shape}", d, *(_floor(case.work[d]) for case in same)]
        for same in zip(*cases, strict=True)
        for d in same[0].work
    ]
    return _table(["op", "direction", *(model.name for model in MODELS)], rows)


if __name__ == "__main__":
    print(smallest_model(), all_models(), sep="\n\n")
