"""From records to Markdown tables and plots: the README's, and a page beside the records.

python -m bench.report            # print what the README's marks would hold
python -m bench.report --write    # fill the README, write every folder's page, draw the plots

What stands in the README between the marks ``<!-- NAME -->`` and ``<!-- /NAME -->`` is made here.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plots
from bench.suite import decode_report, step_report
from bench.suite.report import limit_lines, op_head, op_rows, probe_lines
from gpt2fast.benchmark.record import RESULTS
from gpt2fast.benchmark.table import OURS
from gpt2fast.benchmark.tables import (
    Cases,
    by_contender,
    imports_line,
    loading_table,
    machine_line,
    markdown,
    missing,
    steps_table,
    times_table,
)

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A record, or None where none was written."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


_DECODE = """\
Greedy decoding on a CPU beside other runtimes: milliseconds a token, and how many times as fast as
transformers with SDPA (p20 to p80 of turns within one run). Columns are prompt + new tokens; the
bare loop is the float32 matrix products of a token and nothing else. Where float32 tokens are not
those of transformers, there is no time. Weights are random; [bench/NOTES.md](bench/NOTES.md) has
the method, [bench/results/cpu](bench/results/cpu/README.md) the records and more tables."""
_PREFILL = "From a prompt to its first new token; columns are batch x prompt:"
_LOADING = (
    "From the start of a process to its first token, and its largest memory after 512 + 64 tokens:"
)
_TRAINING = """\
A training step on a CPU, forward, backward and AdamW; columns are batch x tokens. Behind the time
and the ratio to transformers with SDPA stands the process's largest memory:"""
_SCORING = "Log-probabilities of given texts on a CPU, likewise:"
_ACCELERATE = """\
A model of transformers before and after `gpt2fast.accelerate`, on a CPU, likewise:"""
_ACCURACY = """\
What fewer bits cost: perplexity of the bundled model on text that it never saw, and how far the
logits of 124M with random weights lie from float32's (norms). Forms of a GPU are emulated
in PyTorch; int8 is that of a CPU,"""
# What is measured of models beside each other: record, words, table.
_CONTESTS: tuple[tuple[str, str, Callable[[Cases], str]], ...] = (
    ("decode", _DECODE, times_table),
    ("prefill", _PREFILL, times_table),
    ("training", _TRAINING, steps_table),
    ("scoring", _SCORING, steps_table),
    ("accelerate", _ACCELERATE, steps_table),
)
_ALTS = {
    "decode": "tokens a second of every runtime on a CPU",
    "prefill": "prompt tokens a second by the prompt's length",
    "ops": "every op's speed beside plain PyTorch",
    "ladder": "time of a token by context, and speed by batch",
}


def section(folder: Path = RESULTS) -> str:
    """The README's part ``cpu``; empty where there are no records."""
    lines: list[str] = []
    for name, words, table in _CONTESTS:
        record = load(name, folder)
        if record is None or not any("contenders" in case for case in record["cases"]):
            continue
        lines += [words, "", table(record["cases"]), "", f"On {machine_line(record)}.", ""]
        lines += bare_lines(record["cases"])
        lines += _not_measured(record)
        if name in plots.CPU and (folder / f"{name}-light.svg").exists():
            lines += [plots.picture(name, "bench/results/cpu", _ALTS[name]), ""]
    if (record := load("loading", folder)) is not None:
        lines += [_LOADING, "", loading_table(record["cases"]), ""]
        lines += [imports_line(record), ""] if "imports" in record else []
        lines += _not_measured(record)
    if (record := load("accuracy", folder)) is not None:
        levels = max(op["levels"] for op in record["int8"].values())
        tokens = record["perplexity"]["text"]["tokens"]
        words = f"{_ACCURACY} with {levels} levels of activations. {tokens:,} tokens."
        lines += [words, "", accuracy_table(record), ""]
    return "\n".join(lines)


def bare_lines(cases: Cases) -> list[str]:
    """How much of the speed of a token's float32 products alone ours reaches."""
    shares = [
        f"{name}: {share['p50']:.0%} ({share['p20']:.0%} to {share['p80']:.0%})"
        for name, report in by_contender(cases).get(OURS, {}).items()
        if (share := report.get("share_of_bare"))
    ]
    if not shares:
        return []
    return [f"Of the bare loop's speed {OURS} reaches, at {'; at '.join(shares)}.", ""]


def accuracy_table(record: dict[str, Any]) -> str:
    """Perplexity of each form that a model can have, and the error of its logits."""
    errors = record["logits"]["forms"]
    rows = []
    for form, found in record["perplexity"]["forms"].items():
        if form.startswith("not used"):
            continue
        more = ""
        if "percent_more" in found:
            percent = round(found["percent_more"], 2) + 0.0  # never -0
            more = f"{percent:.2f}% (\u00b1 {found['standard_error']:.2f})"
        error = errors.get(form, {}).get("relative_error")
        cells = [form, f"{found['perplexity']:.2f}", more, "" if error is None else f"{error:.4f}"]
        rows.append(cells)
    head = ["weights", "perplexity", "more than float32", "error of 124M's logits"]
    return markdown(head, rows)


def _not_measured(record: dict[str, Any]) -> list[str]:
    lines = missing(record["cases"])
    return [*(f"- {line}" for line in lines), ""] if lines else []


_ENCODERS = ("ours", "ours, nothing remembered", "tiktoken", "tokenizers")


def tokenizer_section(folder: Path = RESULTS) -> str:
    """The README's part ``tokenizer``; empty where there is no record."""
    record = load("tokenizer", folder)
    if record is None:
        return ""
    rows = []
    for name in _ENCODERS:
        speeds = [record[task].get(name, {}).get("MB_per_s") for task in ("encode", "decode")]
        version = f" {record['versions'][name]}" if name in record["versions"] else ""
        cells = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
        rows.append([name.replace("ours", "gpt2fast") + version, *cells])
    text = "English novels" if record["text"]["kind"] == "file" else "made-up text"
    size = f"{record['text']['bytes'] / 1e6:.0f} MB"
    return "\n".join(
        [
            f"The tokenizer's speed, on {size} of {text} in one thread ({record['processor']}, "
            f"{record['cores']} cores; the",
            "record is [bench/results/cpu/tokenizer.json](bench/results/cpu/tokenizer.json)):",
            "",
            markdown(["tokenizer", "encode, MB/s", "decode, MB/s"], rows),
            "",
        ]
    )


def ops_table(cases: Cases) -> str:
    """Every op and direction: time, share of the floor at the measured limits, error, ratios."""
    rows = []
    for case in cases:
        ours = case.get("contenders", {}).get(OURS, {})
        if "p" not in ours:
            continue
        others = (
            f"{name} {report['times_ours']['p50'] ** -1:.2f}"
            for name, report in case["contenders"].items()
            if "times_ours" in report and not name.startswith(OURS)
        )
        cells = [
            case["name"],
            f"{1e3 * ours['p']['p50']:.3g}",
            f"{ours['share_of_limit']:.0%}",
            f"{max(ours['error'].values()):.0e}",
            ", ".join(others),
        ]
        rows.append(cells)
    return markdown(["op", "ms", "of the limit", "error", "others' time over ours"], rows)


def page(folder: Path) -> str:
    """The page that stands beside the records of a folder."""
    lines = ["# Records", "", "Made by `python -m bench.report --write` from the records here.", ""]
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        facts = plots.facts(record)
        device = (facts.get("gpu") or {}).get("name") or facts["processor"]
        words = f"{facts['date']}, commit {str(facts['commit'])[:12]}, {device}"
        lines += [f"## {path.stem}", "", f"[{path.name}]({path.name}): {words}.", ""]
        lines += _suite_lines(record) if "parts" in record else _cpu_lines(path.stem, record)
        for name in plots.named(path.stem, record):
            if (folder / f"{name}-light.svg").exists():
                lines += [plots.picture(name, ".", _ALTS[name.rpartition("-")[2]]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _cpu_lines(name: str, record: dict[str, Any]) -> list[str]:
    if name == "accuracy":
        return [accuracy_table(record), ""]
    if "cases" not in record:
        return []
    if name == "loading":
        return [loading_table(record["cases"]), "", *_not_measured(record)]
    tables = {known: table for known, _, table in _CONTESTS} | {"ops": ops_table}
    table = tables.get(name, times_table)(record["cases"])
    return [table, "", f"On {machine_line(record)}.", "", *_not_measured(record)]


def _suite_lines(record: dict[str, Any]) -> list[str]:
    """Of a record of the GPU suite."""
    parts = record["parts"]
    lines = ["DRY RUN: the times mean nothing", ""] if record["dry_run"] else []
    lines += [f"- {name}: {part['status']}" for name, part in parts.items()]
    limits = parts.get("limits", {})
    if "limits" in limits:
        lines += [f"- {line}" for line in limit_lines(limits["limits"])]
        lines += [f"- {line}" for line in probe_lines(limits.get("probes", {}))]
    steps = [case for name in _STEPS for case in parts.get(name, {}).get("cases", [])]
    tables = (
        (decode_report.HEAD, decode_report.rows(parts.get("decode", {}).get("cases", []))),
        (step_report.HEAD, step_report.rows(steps)),
        (op_head, op_rows(parts.get("ops", {}).get("cases", []))),
    )
    for head, rows in tables:
        lines += ["", head, *rows] if rows else []
    return [*lines, ""]


_STEPS = ("prefill", "training", "scoring", "accelerate")
# Part of the README -> what makes it.
PARTS: dict[str, Callable[[Path], str]] = {"tokenizer": tokenizer_section, "cpu": section}


def filled(page: str, name: str, part: str) -> str:
    """A page with a part between its marks, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one {start.strip()} and one {end.strip()} on the page")
    before, _, rest = page.partition(start)
    return before + start + (f"\n{part}\n" if part else "") + end + rest.partition(end)[2]


def readme(text: str, folder: Path = RESULTS) -> str:
    """The README with every part made anew."""
    for name, make in PARTS.items():
        text = filled(text, name, make(folder))
    return text


def draw(folder: Path) -> None:
    """The plots of a folder's records, beside them."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        plots.draw(record, plots.named(path.stem, record), folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="the README, the pages and the plots")
    if not parser.parse_args().write:
        print("\n".join(make(RESULTS) for make in PARTS.values()))
        return
    for folder in sorted({path.parent for path in RESULTS.parent.glob("*/*.json")}):
        draw(folder)
        (folder / "README.md").write_text(page(folder), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
