"""Every figure in the README is one of a recorded run."""

import json
from pathlib import Path
from typing import Any

from bench import report

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "results" / "cpu" / "tokenizer.json"


def tokenizer_table(record: dict[str, Any]) -> str:
    """The README's table of the tokenizer, made from the record."""
    versions = record["versions"]
    labels = {
        "ours": "gpt2fast",
        "ours, nothing remembered": "gpt2fast, nothing remembered",
        "tiktoken": f"tiktoken {versions['tiktoken']}",
        "tokenizers": f"tokenizers {versions['tokenizers']}",
    }
    rows = ["| tokenizer | encode, MB/s | decode, MB/s |", "| --- | --- | --- |"]
    for name, label in labels.items():
        speeds = [record[task].get(name, {}).get("MB_per_s") for task in ("encode", "decode")]
        cells = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
        rows.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def test_tokenizer_figures_are_those_of_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tokenizer_table(record) in readme
    assert f"{record['processor']}, {record['cores']} cores" in readme


def test_tables_of_the_cpu_benchmarks_are_those_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.filled(readme, report.section()) == readme, "python -m bench.report --write"


def test_losses_of_the_bundled_model() -> None:
    summary = json.loads((ROOT / "gpt2fast/bundled/summary.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "gpt2fast/bundled/README.md").read_text(encoding="utf-8")
    for name in ("rows_of_1024", "bigram", "unigram"):
        loss = summary[f"validation_loss_{name}"]
        assert f"{loss:.2f}" in readme, name
        assert f"{loss:.3f}" in card, name
