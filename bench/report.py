"""From the records of the CPU benchmarks to Markdown tables, the README's, and a plot.

python -m bench.report            # print the tables
python -m bench.report --write    # put them into the README, and draw the plot
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
README = ROOT / "README.md"
PLOT = RESULTS / "decode.svg"

Cases = list[dict[str, Any]]
# What is a contender's for the method alone.
_AGAIN = "gpt2fast again"
_BARE = "bare loop"
_MODELS = {"gpt2": "124M", "gpt2-medium": "355M"}


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _by_contender(cases: Cases) -> dict[str, dict[str, dict[str, Any]]]:
    """Contender -> column -> report; of several companies the first counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        for name, report in case.get("contenders", {}).items():
            if name != _AGAIN:
                found.setdefault(name, {}).setdefault(column(case), report)
    return found


def column(case: dict[str, Any]) -> str:
    """The name of a case's column."""
    model = _MODELS.get(case["model"], case["model"])
    if "new" in case:
        return f"{model}, {case['prompt']} + {case['new'] - 1}"
    return f"{model}, {case['batch']} x {case['prompt']}"


def _cell(report: dict[str, Any] | None) -> str:
    if report is None or "p" not in report:
        return "wrong" if report and "wrong" in report else ""
    times = report["times_base"]
    spread = f" ({times['p20']:.2f} to {times['p80']:.2f})"
    return f"{1e3 * report['p']['p50']:.1f} ms, **{times['p50']:.2f}**{spread}"


def times_table(cases: Cases) -> str:
    """Median milliseconds, times transformers' speed with p20 and p80 in brackets."""
    columns = list(dict.fromkeys(map(column, cases)))
    rows = []
    for name, reports in _by_contender(cases).items():
        cells = [_cell(reports.get(key)) for key in columns]
        if any(cells):
            rows.append([name, *cells])
    return _markdown(["", *columns], rows)


def loading_table(record: dict[str, Any]) -> str:
    """Seconds from the start of a process to the first token, and its largest memory."""
    rows = []
    cases = [case for case in record["cases"] if "contenders" in case]
    columns = [_MODELS.get(case["model"], case["model"]) for case in cases]
    for name in dict.fromkeys(name for case in cases for name in case["contenders"]):
        cells = []
        for case in cases:
            report = case["contenders"].get(name, {})
            first, peak = report.get("first_token"), report.get("peak_bytes")
            cells.append(f"{first['p50']:.1f}" if first else "")
            cells.append(f"{peak / 1e6:.0f}" if peak else "")
        if any(cells):
            rows.append([name, *cells])
    head = [f"{c}, {what}" for c in columns for what in ("first token, s", "memory, MB")]
    return _markdown(["", *head], rows)


def missing(cases: Cases) -> list[str]:
    """Who was not measured, or wrong, and why; each once."""
    lines = {
        f"{name}: {kind}: {report[kind]}": None
        for case in cases
        for name, report in case.get("contenders", {}).items()
        for kind in ("not measured", "wrong")
        if kind in report
    }
    lines |= {
        f"{column(c)}: not measured: {c['not measured']}": None
        for c in cases
        if "not measured" in c
    }
    return list(lines)


def load(name: str) -> dict[str, Any] | None:
    """A record, or None where none was written."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
