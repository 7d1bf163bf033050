"""The record of what the compiler made: `bench/results/compiled.json`, and its table beside it.

Compiling every kernel in every configuration takes half an hour, and the outcome is the same
wherever nothing it depends on has changed. So it is kept by a key of all that
(`offline_compile.Launch`): a run of the tests finds out the keys, which takes seconds, and judges
what the record has for them. What it has not is compiled there and then, and a sample of the rest.
The key knows nothing of how `offline_compile.measure` reads a cubin: who changes that removes the
record before writing it.
"""

import json
import re
from pathlib import Path
from typing import Any

from gpt2fast.kernels._triton.target import CHIPS
from tests.kernels.offline_compile import INSTRUCTIONS, Compiled, Launch

RESULTS = Path(__file__).parents[2] / "bench" / "results"
RECORD, TABLE = RESULTS / "compiled.json", RESULTS / "compiled.md"
REWRITE = "python -m tests.kernels.offline --write"

# Of the launches, one in so many is compiled although it is recorded; see `sample`.
SAMPLE = 75
# Spills that stay, by case.
KNOWN_SPILLS = {
    "engine persistent, 4 rows": "a row's best logit, its place and sum are kept from output to "
    "output of the head, 12 registers for which four rows leave no room, and on sm_80, where a "
    "warp's threads share none, addresses of the phases; read from L1 beside the 1536 bytes of an "
    "output's weights from memory. Smaller tiles of the head spilled as much",
    "engine persistent, a draft": "of two rows the same on sm_80, where a warp's threads share no "
    "register; not looked into further",
    "engine head: 8 rows, width 768, bfloat16": "on sm_100, four words of where logits "
    "are stored, written once and read once a tile",
}
_MEASURED = ("warps", "stages", "registers", "stack", "local", "shared", "instructions")


def tools() -> dict[str, str]:
    """The versions that compile here."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    found = {"triton": triton.__version__}
    for chip in CHIPS:
        release = re.search(r"\bV([\d.]+)", get_ptxas_version(chip))
        found[f"ptxas for sm_{chip}"] = release[1] if release else "unknown"
    return found


def read() -> dict[str, Any]:
    """``{"tools": {...}, "kernels": {key: {"kernel": ..., "chip": ..., **measured}}}``."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"tools": {}, "kernels": {}}


def measured(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Compiled` that were measured, of an entry of the record."""
    instructions = {name: entry["instructions"].get(name, 0) for name in INSTRUCTIONS}
    return {name: entry[name] for name in _MEASURED} | {"instructions": instructions}


def record(compiled: list[Compiled]) -> str:
    """The record's text, an entry a line; instructions that do not occur are left out."""
    entries = {}
    for c in compiled:
        entry = {name: getattr(c, name) for name in ("kernel", "chip", *_MEASURED)}
        entry["instructions"] = {name: n for name, n in c.instructions.items() if n}
        entries[c.key] = entry
    order = sorted(entries, key=lambda key: (entries[key]["kernel"], entries[key]["chip"], key))
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entries[key])}" for key in order)
    return f'{{\n "tools": {json.dumps(tools())},\n "kernels": {{\n{lines}\n }}\n}}\n'


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


def page(compiled: list[Compiled]) -> str:
    """The text of the table's file."""
    versions = ", ".join(f"{tool} {version}" for tool, version in tools().items())
    title = f"# Compiled kernels: `{REWRITE}`; what the compiler made, not measurements"
    known = [
        f"- {c.case}, sm_{c.chip}: {problem}: {KNOWN_SPILLS[c.case]}."
        for c in compiled
        for problem in c.problems
        if c.case in KNOWN_SPILLS
    ]
    spills = "\n".join(known) or "None."
    return f"{title}\n\n{versions}\n\n{table(compiled)}\n\n## Spills that stay\n\n{spills}\n"


def sample(launches: list[Launch], recorded: dict[str, dict[str, Any]]) -> set[str]:
    """Keys to be compiled although they are recorded: one in SAMPLE, and one of each module.

    The first are chosen by the keys, so they are others after a change; the second are the
    shortest, which compile fast.
    """
    modules = {launch.key: launch.module for launch in launches if launch.key in recorded}
    chosen = {key for key in modules if int(key, 16) % SAMPLE == 0}
    by_length = sorted(modules, key=lambda key: (-recorded[key]["instructions"]["all"], key))
    return chosen | set({modules[key]: key for key in by_length}.values())
