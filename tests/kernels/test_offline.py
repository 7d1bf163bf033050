"""Every kernel, in every configuration, compiles for the chips it is meant for, and fits them."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.kernels import _triton
from gpt2fast.kernels._triton import configs
from gpt2fast.kernels._triton.engine import configs as engine_configs
from gpt2fast.kernels._triton.target import CHIPS, Target
from gpt2fast.kernels.decode_step import BUCKETS, FEW_ROWS
from tests.kernels.offline_record import KNOWN_SPILLS, RECORD, REWRITE, TABLE

ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(_triton.__file__).parent.rglob("*.py"))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: in this one the kernels belong to the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All launches by the record, and what was compiled: see `tests.kernels.offline`."""
    path = tmp_path_factory.mktemp("offline") / "result.json"
    done = _python("-m", "tests.kernels.offline", "--recorded", "--json", str(path))
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["compiled"]


def test_no_spills_and_all_within_the_chips(records: list[dict[str, Any]]) -> None:
    """But for the spills that are known."""
    assert {record["chip"] for record in records} == set(CHIPS)
    wrong = [(r["case"], r["kernel"], r["chip"], r["problems"]) for r in records if r["problems"]]
    assert not [problem for problem in wrong if problem[0] not in KNOWN_SPILLS]
    assert {case for case, *_ in wrong} == set(KNOWN_SPILLS)
    for record in records:
        # The most has the persistent kernel of four rows on compute capability 8.0.
        assert record["stack"] <= 352, record["case"]
        assert record["shared"] <= CHIPS[record["chip"]].shared_memory, record["case"]


def test_loops_carry_what_they_change() -> None:
    """Triton forgets a name that is assigned what another held when the loop began."""
    done = _python("-m", "tests.kernels.carried")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["planted"] == [["_planted_kernel", "low"]]
    assert result["loops"] > 100
    assert not result["found"]


def test_the_record_is_up_to_date(result: dict[str, Any]) -> None:
    recorded = json.loads(RECORD.read_text())["tools"]
    if result["tools"] != recorded:
        pytest.skip(f"recorded with {recorded}; here are {result['tools']}: all was compiled")
    kernels = {r["key"]: (r["case"], r["kernel"], r["chip"]) for r in result["compiled"]}
    missing = [kernels[key] for key in result["missing"]]
    assert (missing, result["unused"]) == ([], []), f"kernels have changed: run {REWRITE}"
    assert TABLE.read_text() == result["page"], f"run {REWRITE}"


def test_the_record_says_what_the_compiler_makes(result: dict[str, Any]) -> None:
    """In a sample, which has launches of every file of kernels."""
    kernels = {r["key"]: r["kernel"] for r in result["compiled"]}
    assert not result["untrue"], [kernels[key] for key in result["untrue"]]
    assert len(result["sampled"]) >= max(10, len(kernels) // 40)
    files = {kernel: source for source in SOURCES for kernel in _kernels_of(source)}
    assert {files[kernels[key]] for key in result["sampled"]} == set(files.values())


def _kernels_of(source: Path) -> list[str]:
    return re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)


def test_every_kernel_is_compiled_for_every_chip(records: list[dict[str, Any]]) -> None:
    defined = {name for source in SOURCES for name in _kernels_of(source)}
    assert len(defined) >= 10
    for chip in CHIPS:
        assert {r["kernel"] for r in records if r["chip"] == chip} == defined


def test_steps_are_compiled_as_engines_launch_them(records: list[dict[str, Any]]) -> None:
    """Under programmatic dependent launch where the chip has it: more registers are alive then."""
    found = {(r["chip"], r["constants"]["PDL"]) for r in records if "PDL" in r["constants"]}
    assert found == {(chip, chip >= 90) for chip in CHIPS}


def _selectable(chip: Target) -> dict[str, set[Any]]:
    """Kernel -> the tiles that `configs` selects for 16-bit operands on the chip, for any sizes.

    A tile is what `_compiled_tile` reads from a record.
    """
    rows = (1, 17, 64, 65, 640, 1024, 16384)
    matmul = {
        configs.matmul_tile(m, n, 2, can_copy, chip, light)
        for m in rows
        for n in (768, 3072, 6400)
        for can_copy in (False, True)
        for light in (False, True)
    }
    lm_head = {
        configs.lm_head_tile(m, top, can_copy, chip)
        for m in rows
        for top in (0, 1, 64)
        for can_copy in (False, True)
    }
    fwd = {
        configs.attention_fwd_config(chip, 2, width, queries, crowded)
        for width in (64, 128)
        for queries in rows
        for crowded in (False, True)
    }
    bwd = [configs.attention_bwd_configs(chip, 2, width) for width in (64, 128)]
    decode = {configs.decode_config(2, queries) for queries in (1, 16)}
    return {
        "_matmul_kernel": {
            (t.block_m, t.block_n, t.block_k, t.use_tma, t.warps, t.stages) for t in matmul
        },
        "_lm_head_tiles_kernel": {
            (t.block_rows, t.block_vocab, t.block_bytes // 2, t.tma, t.warps, t.stages)
            for t in lm_head
        },
        "_attention_fwd_kernel": {astuple(tile) for tile in fwd},
        "_attention_bwd_dq_kernel": {astuple(for_dq) for for_dq, _ in bwd},
        "_attention_bwd_dkdv_kernel": {astuple(for_dkdv) for _, for_dkdv in bwd},
        "_attention_decode_kernel": {astuple(tile) for tile in decode},
    }


def _compiled_tile(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_V", "BLOCK_K", "USE_TMA")
    constants = record["constants"]
    return *(constants[n] for n in names if n in constants), record["warps"], record["stages"]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_tile_is_compiled_for_every_chip_that_selects_it(
    records: list[dict[str, Any]], chip: int
) -> None:
    for kernel, tiles in _selectable(CHIPS[chip]).items():
        compiled = {
            _compiled_tile(r)
            for r in records
            if r["kernel"] == kernel and r["chip"] == chip and "float32" not in r["case"]
        }
        assert compiled == tiles, (kernel, chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_tile_of_decoding_steps_is_compiled(records: list[dict[str, Any]], chip: int) -> None:
    tiles, few = set(), set()
    for record in records:
        constants = record["constants"]
        if record["chip"] != chip or "ROWS" not in constants:
            continue
        if "UNROLL" in constants:
            few.add(tuple(constants[name] for name in ("WARPS", "REPEAT", "UNROLL")))
        elif "STAGES" in constants:
            names = constants["BLOCK_N"], constants["BLOCK_K"], record["warps"], constants["STAGES"]
            tiles.add(names)
    assert tiles == {
        astuple(engine_configs.decode_tile(rows, bits, element_size))
        for rows in BUCKETS
        if rows > FEW_ROWS
        for bits, element_size in ((32, 4), (16, 2), (8, 2), (4, 2), (8, 4), (4, 4))
    }
    assert few == {
        astuple(engine_configs.decode_rows_tile(outputs, inputs, rows, CHIPS[chip]))[:3]
        for width in (768, 1600)
        for outputs, inputs in (
            *((3 * width, width), (width, width), (4 * width, width)),
            *((width, 4 * width), (50257, width)),
        )
        for rows in (1, 2, 4)
    }


def test_every_entry_of_the_tables_is_selected_on_some_chip() -> None:
    """So that the sizes in `_selectable` reach them all."""
    entries = [
        entry
        for value in vars(configs).values()
        for entry in (value if isinstance(value, tuple) else (value,))
    ]
    selectable = [_selectable(chip) for chip in CHIPS.values()]
    for kernel, kind in (
        ("_matmul_kernel", configs.MatmulTile),
        ("_lm_head_tiles_kernel", configs.LMHeadTile),
    ):
        known = set().union(*(tiles[kernel] for tiles in selectable))
        found = [entry for entry in entries if isinstance(entry, kind)]
        assert len(found) >= 4
        for entry in found:
            m, n, k, *rest = astuple(entry)
            k //= 2 if kind is configs.LMHeadTile else 1
            warps, stages, _, tma = rest
            float32_only = entry == configs._MATMUL_TILE_FLOAT32
            assert ((m, n, k, tma, warps, stages) in known) != float32_only, entry


# Kernels of matrix products, but those of few rows, whose time is that of reading.
MATRIX_KERNELS = {
    "_matmul_kernel",
    "_attention_fwd_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_dkdv_kernel",
    "_lm_head_tiles_kernel",
}
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTC*MMA"}


def test_matrix_products_run_on_the_chips_own_matrix_units(records: list[dict[str, Any]]) -> None:
    """16-bit ones, from 64 rows of a tile; with tiles copied as the launcher meant them to be."""
    checked: Counter[int] = Counter()
    for record in records:
        seen, chip = record["instructions"], record["chip"]
        if record["kernel"] not in MATRIX_KERNELS or "float32" in record["case"]:
            continue
        label = (record["case"], record["kernel"], chip)
        if record["constants"]["BLOCK_M"] < 64:
            assert any(seen[name] for name in MATRIX_INSTRUCTIONS.values()), label
            continue
        checked[chip] += 1
        assert seen[MATRIX_INSTRUCTIONS[chip]], label
        assert bool(seen["tile load"]) == bool(record["descriptors"]), label
        assert record["descriptors"] or seen["async copy 16 B"], label
        attention = "attention" in record["kernel"]
        may_copy = attention or record["constants"]["USE_TMA"]
        assert bool(record["descriptors"]) == (chip >= 90 and may_copy), label
    assert min(checked[chip] for chip in CHIPS) >= 10


# Kernels whose time is that of memory -> what their 16-byte accesses are.
MEMORY_KERNELS = {
    "_layer_norm_fwd_kernel": ("load 16 B", "store 16 B"),
    "_layer_norm_bwd_kernel": ("load 16 B", "store 16 B"),
    "_embedding_fwd_kernel": ("load 16 B", "store 16 B"),
    "_cross_entropy_kernel": ("load 16 B",),
    "_attention_decode_kernel": ("load 16 B",),
    "_add_splits_kernel": ("load 16 B",),
    **dict.fromkeys(("_qkv_kernel", "_fc_kernel", "_add_kernel", "_head_kernel"), ("load 16 B",)),
    "_normalize_kernel": ("load 16 B",),
    "_qkv_tiles_kernel": ("load 16 B",),
    "_fc_tiles_kernel": ("load 16 B",),
    "_part_tiles_kernel": ("load 16 B",),
    "_head_tiles_kernel": ("load 16 B",),
}


def test_memory_is_read_and_written_16_bytes_at_a_time(records: list[dict[str, Any]]) -> None:
    checked: Counter[str] = Counter()
    for record in records:
        wanted = MEMORY_KERNELS.get(record["kernel"], ())
        for name in wanted:
            count = record["instructions"][name]
            if name.startswith("load"):  # of which some are copied to shared memory
                count += record["instructions"]["async copy 16 B"]
            assert count, (record["case"], record["kernel"], record["chip"], name)
        checked[record["kernel"]] += 1
    assert set(MEMORY_KERNELS) <= set(checked)


BROKEN = """
import json, sys
from pathlib import Path
import torch, triton, triton.language as tl
from gpt2fast.kernels._triton.target import CHIPS
from tests.kernels import offline, offline_cases, offline_compile, offline_record

@triton.jit
def _centred_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x - tl.sum(x, 0))

def case(block):
    x = offline_cases.empty(block, dtype=torch.float32)
    return lambda: _centred_kernel[(1,)](x, BLOCK=block, maxnreg=40)

for chip in (80, 100):
    del CHIPS[chip]
offline_compile.CASES.clear()
offline_compile.CASES.update(spills=case(8192), fits=case(1024))
folder = Path(sys.argv[1])
offline_record.RECORD, offline_record.TABLE = folder / "record.json", folder / "table.md"

def run(*arguments):
    sys.argv = ["offline", "--jobs", "1", "--json", str(folder / "result.json"), *arguments]
    status = offline.main()
    return {"status": status, **json.loads((folder / "result.json").read_text())}

results = [run("--write"), run("--recorded")]
record = json.loads(offline_record.RECORD.read_text())
for entry in record["kernels"].values():
    entry["registers"] += 1
record["kernels"]["of no kernel"] = record["kernels"].popitem()[1]
offline_record.RECORD.write_text(json.dumps(record))
results.append(run("--recorded"))
(folder / "results.json").write_text(json.dumps(results))
"""


def test_the_check_can_fail(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = _python(str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    written, recorded, doctored = json.loads((tmp_path / "results.json").read_text())
    problems = {r["case"]: r["problems"] for r in written["compiled"]}
    assert "spills" in problems["spills"][0]
    assert not problems["fits"]
    assert written["status"] == recorded["status"] == 1
    # What the record has is taken from there, and a sample is found to be so or not.
    assert recorded["compiled"] == written["compiled"]
    assert len(recorded["compiled"]) == 2
    assert not recorded["missing"] + recorded["unused"] + recorded["untrue"]
    assert recorded["page"] == (tmp_path / "table.md").read_text()
    assert doctored["unused"] == ["of no kernel"]
    assert len(doctored["missing"]) == 1
    assert doctored["untrue"] == doctored["sampled"] != []


def test_too_much_shared_memory_is_a_problem() -> None:
    from tests.kernels.offline_compile import Compiled

    quiet = {"spill": 0}
    fits = Compiled("case", "kernel", 80, {}, 0, "key", 4, 3, 255, 0, 0, 163 << 10, quiet)
    too_big = Compiled("case", "kernel", 80, {}, 0, "key", 4, 3, 255, 0, 0, (163 << 10) + 1, quiet)
    assert not fits.problems
    assert "shared memory" in too_big.problems[0]
