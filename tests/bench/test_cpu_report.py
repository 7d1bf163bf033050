"""The report of the CPU benchmarks says what the records hold, and no more."""

import re
from pathlib import Path
from typing import Any

import pytest

from bench import report
from gpt2fast.benchmark.record import Record
from gpt2fast.benchmark.table import AGAIN, BARE, BASE, OURS


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
    decode = Record("decode", 1.0, tmp_path)
    for case in (CASE, OTHER, SKIPPED):
        decode.add(case)
    loading = Record("loading", 1.0, tmp_path)
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


def test_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page = "a\n<!-- cpu -->\nold | row\n<!-- /cpu -->\nb\n"
    filled = report.filled(page, "new")
    assert filled == "a\n<!-- cpu -->\n\nnew\n<!-- /cpu -->\nb\n"
    assert report.filled(filled, "new") == filled
    assert report.filled(filled, report.section(tmp_path)) == "a\n<!-- cpu -->\n<!-- /cpu -->\nb\n"
    with pytest.raises(ValueError, match="expected one"):
        report.filled("a\nb\n", "new")


def test_plot_shows_everybody_that_was_timed(folder: Path) -> None:
    record = report.load("decode", folder)
    assert record is not None
    report.draw(record, folder / "plot.svg")
    drawn = (folder / "plot.svg").read_text(encoding="utf-8")
    words = re.findall(r"<!-- (.*?) -->", drawn)
    for word in (BASE, OURS, "gpt2fast int8", "124M, 32 + 128", "float32 products alone"):
        assert word in words
    assert "CTranslate2" not in words  # it was wrong
    report.draw(record, folder / "again.svg")
    assert (folder / "again.svg").read_text(encoding="utf-8") == drawn


def test_weights_are_those_of_the_products() -> None:
    assert report.weight_bytes("gpt2", 8) == 12 * 12 * 768 * 768 + 50257 * 768


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
