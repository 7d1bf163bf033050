"""The report of the CPU benchmarks says what the records hold, and no more."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from bench import plots, report
from gpt2fast.benchmark.models import weight_bytes
from gpt2fast.benchmark.record import Record
from gpt2fast.benchmark.table import AGAIN, BARE, BASE, OURS
from gpt2fast.benchmark.tables import times_table


def quantiles(p50: float) -> dict[str, float]:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.25 * p50}


def timed(seconds: float) -> dict[str, Any]:
    return {"p": quantiles(seconds), "times_base": quantiles(0.04 / seconds)}


CASE = {
    "model": "gpt2",
    "company": "float32",
    "prompt": 32,
    "new": 129,
    "contenders": {
        BASE: timed(0.04),
        "CTranslate2": {"wrong": "new token 3 is 4, transformers' 5"},
        "llama.cpp": {"not measured": "ModuleNotFoundError: No module named 'llama_cpp'"},
        BARE: timed(0.02),
        OURS: timed(0.025),
        AGAIN: timed(0.026),
    },
    "limits": {"read_bytes_per_s": quantiles(1e10), "matmul_flop_per_s": quantiles(1e11)},
    "noise": 0.04,
}
OTHER = {
    **CASE,
    "company": "smaller",
    "contenders": {BASE: timed(0.5), "gpt2fast int8": timed(0.01)},
}
SKIPPED = {"model": "gpt2-medium", "prompt": 512, "new": 65, "not measured": "no time left"}
LOADING = {
    "model": "gpt2",
    "contenders": {OURS: {"first_token": quantiles(1.5), "peak_bytes": 987_654_321}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decode = Record("decode", tmp_path)
    for case in (CASE, OTHER, SKIPPED):
        decode.add(case)
    loading = Record("loading", tmp_path)
    loading.put("imports", {kind: quantiles(2.0) for kind in ("torch", "gpt2fast", "model")})
    loading.add(LOADING)
    return tmp_path


def test_tables(folder: Path) -> None:
    part = report.section(folder)
    lines = part.splitlines()
    start = lines.index("|  | 124M, 32 + 128 |")
    assert lines[start : start + 6] == [
        "|  | 124M, 32 + 128 |",
        "| --- | --- |",
        f"| {BASE} | 40.0 ms, **1.00** (0.90 to 1.25) |",  # the first company's, not the second's
        "| CTranslate2 | wrong |",
        f"| {BARE} | 20.0 ms, **2.00** (1.80 to 2.50) |",
        f"| {OURS} | 25.0 ms, **1.60** (1.44 to 2.00) |",
    ]
    assert "| gpt2fast int8 | 10.0 ms, **4.00** (3.60 to 5.00) |" in lines
    assert AGAIN not in part
    assert "From a prompt" not in part  # no record of it
    assert "10.0 GB/s" in part
    assert "100 GFLOP/s" in part
    assert "up to 4%" in part
    assert "- llama.cpp: not measured: ModuleNotFoundError: No module named 'llama_cpp'" in lines
    assert "- 355M, 512 + 64: not measured: no time left" in lines
    assert f"| {OURS} | 1.50 | 988 |" in part
    assert "`import gpt2fast` 2.000 s more" in part


def test_who_is_in_two_companies_is_told_once() -> None:
    share = {"share_of_bare": quantiles(0.8)}
    first = {**CASE, "contenders": {BASE: timed(0.04), OURS: {"not measured": "no memory"}}}
    second = {**OTHER, "contenders": {BASE: timed(0.05), OURS: timed(0.025) | share}}
    third = {**second, "contenders": {OURS: timed(0.1) | {"share_of_bare": quantiles(0.2)}}}
    table = times_table([first, second, third])
    assert f"| {OURS} | 25.0 ms, **1.60**" in table
    assert "| 40.0 ms" in table
    (line, _) = report.bare_lines([first, second, third])
    assert line.count("124M, 32 + 128") == 1
    assert "80%" in line
    wrong = {**first, "contenders": {OURS: {"wrong": "new token 0 is 1"}}}
    assert f"| {OURS} | wrong |" in times_table([wrong, second])
    without_base = {**CASE, "contenders": {OURS: {"p": quantiles(0.01)}}}
    assert f"| {OURS} | 10.0 ms |" in times_table([without_base])


def test_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page = "a\n<!-- cpu -->\nold | row\n<!-- /cpu -->\nb\n"
    filled = report.filled(page, "cpu", "new")
    assert filled == "a\n<!-- cpu -->\n\nnew\n<!-- /cpu -->\nb\n"
    assert report.filled(filled, "cpu", "new") == filled
    empty = report.filled(filled, "cpu", report.section(tmp_path))
    assert empty == "a\n<!-- cpu -->\n<!-- /cpu -->\nb\n"
    with pytest.raises(ValueError, match="expected one"):
        report.filled("a\nb\n", "cpu", "new")


def drawn(folder: Path, name: str) -> tuple[set[str], set[str]]:
    """The texts of a plot for a light page, and the colours that one for a dark page adds."""
    light, dark = (
        (folder / f"{name}-{theme}.svg").read_text(encoding="utf-8") for theme in plots.THEMES
    )
    for text in (light, dark):
        assert len(text) < 100_000
        assert "<path id=" not in text or "glyph" not in text
    words = {unescape(word) for word in re.findall(r"<text[^>]*>([^<]+)</text>", light)}
    colours = (set(re.findall(r"#[0-9a-f]{6}", text)) for text in (dark, light))
    return words, next(colours) - next(colours)


def test_plots_of_a_cpu_show_everybody_that_was_timed(folder: Path) -> None:
    record = report.load("decode", folder)
    assert record is not None
    assert plots.draw(record, {"decode": plots.decode_bars}, folder) == ["decode"]
    words, dark_colours = drawn(folder, "decode")
    assert {BASE, OURS, "gpt2fast int8", "124M, 32 + 128", "float32 products alone"} <= words
    assert "CTranslate2" not in words  # it was wrong
    assert plots.THEMES["dark"][0] in dark_colours
    first = (folder / "decode-light.svg").read_text(encoding="utf-8")
    assert f"recorded {record['date']}" in first
    plots.draw(record, {"decode": plots.decode_bars}, folder)
    assert (folder / "decode-light.svg").read_text(encoding="utf-8") == first
    prefill = {"date": "then", "cases": []}
    for prompt in (128, 512):
        case = {"model": "gpt2", "batch": 1, "prompt": prompt, "contenders": {OURS: timed(0.1)}}
        prefill["cases"].append(case)
    assert plots.draw(prefill, {"prefill": plots.prefill_lines}, folder) == ["prefill"]
    assert {"124M, batch 1", OURS} <= drawn(folder, "prefill")[0]
    nothing = {"date": "then", "cases": [SKIPPED]}
    assert plots.draw(nothing, plots.CPU, folder) == []


def test_steps_and_ops_have_tables_of_their_own(folder: Path) -> None:
    training = Record("training", folder)
    steps = {
        BASE: timed(2.0) | {"peak_bytes": 5_000_000_000},
        OURS: timed(1.6) | {"peak_bytes": 3_000_000_000},
    }
    known = {"kind": "training", "model": "gpt2", "batch": 4, "length": 256}
    training.add({**CASE, **known, "contenders": steps})
    ops = Record("ops", folder)
    ours = timed(0.001) | {"share_of_limit": 0.5, "error": {"forward": 2e-7, "backward": 3e-6}}
    theirs = timed(0.002) | {"times_ours": quantiles(0.5)}
    ops.add({"name": "gelu forward", "contenders": {OURS: ours, "PyTorch": theirs}})
    part = report.section(folder)
    assert "|  | 124M training, 4 x 256 |" in part
    assert "2000 ms, **0.02** (0.02 to 0.03), 5000 MB |" in part
    page = report.page(folder)
    assert "| gelu forward | 1 | 50% | 3e-06 | PyTorch 2.00 |" in page
    assert "## training" in page
    report.draw(folder)
    assert "gelu forward" in drawn(folder, "ops")[0]
    assert "ops-dark.svg" in report.page(folder)


def suite_record() -> dict[str, Any]:
    """What a GPU's run would have: of made-up figures."""

    def decoded(batch: int, context: int) -> dict[str, Any]:
        token = {"token": quantiles(1e-4), "bytes": 2.5e8, "share_of_read": 0.6}
        peer = {"token": quantiles(1e-3), "token_ratio": quantiles(10), "all_ratio": quantiles(9)}
        known = {"case": f"b{batch} c{context}", "model": "gpt2", "batch": batch}
        times = {"graph": token, "transformers": peer}
        return {**known, "context": context, "times": times, "providers": {"loop": {}, **times}}

    device = {"device": quantiles(1e-5), "host": quantiles(2e-5), "device_source": "graph"}
    ours = {**device, "flop_per_s": 1e14, "bytes_per_s": 1e12, "share_of_limit": 0.7}
    op = {
        "case": "layer_norm 8x8 bfloat16",
        "work": {"forward": {"bytes": 100, "flops": 0}},
        "providers": {"ours": {"error": {"forward": 1e-3}}},
        "times": {"forward": {"ours": ours, "eager": {"device_ratio": quantiles(1.5)} | device}},
    }
    limits = {
        "read_bytes_per_s": quantiles(4e12),
        "copy_bytes_per_s": quantiles(4e12),
        "matmul_flop_per_s": {"bfloat16": quantiles(7e14)},
        "empty_launch_s": {"issue": quantiles(5e-6), "device": quantiles(1e-6)},
    }
    shapes = ((1, 32), (1, 512), (8, 512), (32, 512))
    decode = {"status": "done", "cases": [decoded(*shape) for shape in shapes]}
    parts = {
        "limits": {"status": "done", "limits": limits, "probes": {}},
        "decode": decode,
        "ops": {"status": "done", "cases": [op]},
    }
    gpu = {"name": "NVIDIA H100"}
    facts = {"date": "then", "commit": "c" * 40, "processor": "p", "gpu": gpu}
    return {"environment": facts, "dry_run": False, "parts": parts}


def test_a_record_of_the_gpu_suite_has_its_page_and_plots(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(suite_record()), encoding="utf-8")
    report.draw(tmp_path)
    words, _ = drawn(tmp_path, "suite-ladder")
    assert {"graph", "transformers", "roofline", "124M, batch 1", "context 512"} <= words
    assert "layer_norm 8x8 bfloat16 forward" in drawn(tmp_path, "suite-ops")[0]
    page = report.page(tmp_path)
    assert "then, commit cccccccccccc, NVIDIA H100." in page
    assert "graph 100 (60%)" in page
    assert "layer_norm 8x8 bfloat16" in page
    assert "read 4000 GB/s" in page
    assert "suite-ladder-dark.svg" in page


def test_weights_are_those_of_the_products() -> None:
    assert weight_bytes("gpt2", 8) == 12 * 12 * 768 * 768 + 50257 * 768


def test_accuracy_of_every_form_in_use() -> None:
    record = {
        "perplexity": {
            "forms": {
                "float32": {"perplexity": 20.0},
                "fp16": {"perplexity": 19.9999, "percent_more": -0.0005, "standard_error": 0.001},
                "int8": {"perplexity": 20.05, "percent_more": 0.25, "standard_error": 0.04},
                "not used: int8 weights, clipped": {"perplexity": 21.0},
            }
        },
        "logits": {"forms": {"int8": {"relative_error": 0.0444}}},
    }
    rows = report.accuracy_table(record).splitlines()[2:]
    assert rows == [
        "| float32 | 20.00 |  |  |",
        "| fp16 | 20.00 | 0.00% (\u00b1 0.00) |  |",
        "| int8 | 20.05 | 0.25% (\u00b1 0.04) | 0.0444 |",
    ]
