"""From the cases of records to Markdown tables."""

from typing import Any

from gpt2fast.benchmark.table import AGAIN

Cases = list[dict[str, Any]]
# Preset -> its usual name.
MODELS = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


_LAST = {"p50": float("inf")}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def column(case: dict[str, Any]) -> str:
    """The name of a case's column: its own, or what tells it from the others."""
    if "name" in case:
        return str(case["name"])
    model = MODELS.get(case["model"], case["model"])
    if "kind" in case:  # of steps of whole models
        return f"{model} {case['kind']}, {_load_of(case)}"
    if "new" in case:
        return f"{model}, {case['prompt']} + {case['new'] - 1}"
    if "batch" in case:
        return f"{model}, {case['batch']} x {case['prompt']}"
    return str(model)


def _load_of(case: dict[str, Any]) -> str:
    return str(case.get("workload") or f"{case['batch']} x {case['length']}")


def by_contender(cases: Cases) -> dict[str, dict[str, dict[str, Any]]]:
    """Contender -> column -> report; where two companies have it, the first that measured it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        for name, report in case.get("contenders", {}).items():
            reports, key = found.setdefault(name, {}), column(case)
            if "not measured" in reports.get(key, {"not measured": ""}):
                reports[key] = report
    found.pop(AGAIN, None)
    return found


def _cell(report: dict[str, Any] | None) -> str:
    if report is None or "p" not in report:
        return "wrong" if report and "wrong" in report else ""
    milliseconds = 1e3 * report["p"]["p50"]
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 1 else 3
    text = f"{milliseconds:.{digits}f} ms"
    if times := report.get("times_base"):  # the base itself may have failed
        text += f", **{times['p50']:.2f}** ({times['p20']:.2f} to {times['p80']:.2f})"
    return text


def times_table(cases: Cases, fastest_first: bool = False) -> str:
    """Median milliseconds, then how many times as fast as the base, with p20 and p80."""
    columns = list(dict.fromkeys(column(case) for case in cases if "contenders" in case))
    contenders = by_contender(cases)
    names = list(contenders)
    if fastest_first:
        names.sort(key=lambda name: contenders[name].get(columns[0], {}).get("p", _LAST)["p50"])
    rows = [[name, *(_cell(contenders[name].get(key)) for key in columns)] for name in names]
    return markdown(["", *columns], [row for row in rows if any(row[1:])])


def steps_table(cases: Cases) -> str:
    """`times_table`, with the largest memory of each contender in megabytes."""
    columns = list(dict.fromkeys(column(case) for case in cases if "contenders" in case))
    rows = []
    for name, reports in by_contender(cases).items():
        cells = []
        for report in (reports.get(key, {}) for key in columns):
            peak = f", {report['peak_bytes'] / 1e6:.0f} MB" if report.get("peak_bytes") else ""
            cells.append(f"{_cell(report)}{peak}" if "p" in report else _cell(report))
        rows.append([name, *cells])
    return markdown(["", *columns], [row for row in rows if any(row[1:])])


def loading_table(cases: Cases) -> str:
    """Seconds from the start of a process to its first token, and its largest memory."""
    columns = list(dict.fromkeys(column(case) for case in cases if "contenders" in case))
    rows = []
    for name, reports in by_contender(cases).items():
        row = [name]
        for report in (reports.get(key, {}) for key in columns):
            first, peak = report.get("first_token"), report.get("peak_bytes")
            row.append(f"{first['p50']:.2f}" if first else "")
            row.append(f"{peak / 1e6:.0f}" if peak else "")
        rows.append(row)
    head = [f"{c}, {what}" for c in columns for what in ("first token, s", "peak, MB")]
    return markdown(["", *head], [row for row in rows if any(row[1:])])


def imports_line(record: dict[str, Any]) -> str:
    """What importing costs, in a sentence."""
    seconds = {kind: p["p50"] for kind, p in record["imports"].items()}
    return (
        f"`import torch` takes {seconds['torch']:.2f} s there, `import gpt2fast` "
        f"{seconds['gpt2fast']:.3f} s more, the model's class {seconds['model']:.2f} s more."
    )


def missing(cases: Cases) -> list[str]:
    """Who was not measured, or wrong, and why; each once."""
    lines = {
        f"{name}: {kind}: {report[kind]}": None
        for case in cases
        for name, report in case.get("contenders", {}).items()
        for kind in ("not measured", "wrong")
        if kind in report
    }
    skipped = (case for case in cases if "not measured" in case)
    for case in skipped:
        group = f" ({case['company']})" if "company" in case else ""
        lines[f"{column(case)}{group}: not measured: {case['not measured']}"] = None
    return list(lines)


def machine_line(record: dict[str, Any]) -> str:
    """Where, with what, and how still it was."""
    limits = [case["limits"] for case in record["cases"] if "limits" in case]
    versions = record["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name))
    flags = ", ".join(record["flags"])
    threads = f"{record['threads']} thread" + "s" * (record["threads"] != 1)
    text = f"{record['processor']}, {threads} ({flags}); {named}"
    if limits:
        read, product = (
            sorted(limit[key]["p50"] for limit in limits)[len(limits) // 2] / 1e9
            for key in ("read_bytes_per_s", "matmul_flop_per_s")
        )
        text += f"; it reads {read:.1f} GB/s and multiplies {product:.0f} GFLOP/s in float32"
    noise = [case["noise"] for case in record["cases"] if "noise" in case]
    if noise:
        text += f"; the same program against itself differs by up to {max(noise):.0%}"
    noisy = sum("noisy" in case for case in record["cases"])
    if noisy:
        text += f"; the machine was noisy in {noisy} of {len(noise)} cases, whose bounds are wider"
    return text


_VERSIONS = (
    "torch",
    "transformers",
    "ctranslate2",
    "onnxruntime",
    "llama-cpp-python",
)
