"""From the records of the CPU benchmarks to Markdown tables, the README's among them, and a plot.

python -m bench.report            # print what the records hold
python -m bench.report --write    # put the tables into the README, and draw the plot
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gpt2fast.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
README = ROOT / "README.md"
PLOT = "decode.svg"

Cases = list[dict[str, Any]]
OURS = "gpt2fast"
AGAIN = "gpt2fast again"
BARE = "bare loop"
_MODELS = {"gpt2": "124M", "gpt2-medium": "355M"}


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def column(case: dict[str, Any]) -> str:
    """The name of a case's column."""
    model = _MODELS.get(case["model"], case["model"])
    if "new" in case:
        return f"{model}, {case['prompt']} + {case['new'] - 1}"
    if "batch" in case:
        return f"{model}, {case['batch']} x {case['prompt']}"
    return model


def by_contender(cases: Cases) -> dict[str, dict[str, dict[str, Any]]]:
    """Contender -> column -> report; where two companies have it, the first counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        for name, report in case.get("contenders", {}).items():
            if name != AGAIN:
                found.setdefault(name, {}).setdefault(column(case), report)
    return found


def _cell(report: dict[str, Any] | None) -> str:
    if report is None or "p" not in report:
        return "wrong" if report and "wrong" in report else ""
    times, milliseconds = report["times_base"], 1e3 * report["p"]["p50"]
    digits = 1 if milliseconds < 100 else 0
    return (
        f"{milliseconds:.{digits}f} ms, **{times['p50']:.2f}** "
        f"({times['p20']:.2f} to {times['p80']:.2f})"
    )


def times_table(cases: Cases) -> str:
    """Median milliseconds, then how many times as fast as transformers, with p20 and p80."""
    columns = list(dict.fromkeys(column(case) for case in cases if "contenders" in case))
    rows = [
        [name, *(_cell(reports.get(key)) for key in columns)]
        for name, reports in by_contender(cases).items()
    ]
    return _markdown(["", *columns], [row for row in rows if any(row[1:])])


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
    return _markdown(["", *head], [row for row in rows if any(row[1:])])


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
        weights = f", {case['company']} weights" if "company" in case else ""
        lines[f"{column(case)}{weights}: not measured: {case['not measured']}"] = None
    return list(lines)


def machine_line(record: dict[str, Any]) -> str:
    """Where, with what, and how still it was."""
    limits = [case["limits"] for case in record["cases"] if "limits" in case]
    versions = record["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name))
    flags = ", ".join(record["flags"])
    text = f"{record['processor']}, {record['threads']} threads ({flags}); {named}"
    if limits:
        read, product = (
            sorted(limit[key]["p50"] for limit in limits)[len(limits) // 2] / 1e9
            for key in ("read_bytes_per_s", "matmul_flop_per_s")
        )
        text += f"; it reads {read:.1f} GB/s and multiplies {product:.0f} GFLOP/s in float32"
    noise = [case["noise"] for case in record["cases"] if "noise" in case]
    if noise:
        text += f"; the same program against itself differs by up to {max(noise):.0%}"
    return text


_VERSIONS = (
    "torch",
    "transformers",
    "ctranslate2",
    "onnxruntime",
    "llama-cpp-python",
)


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A record, or None where none was written."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


_DECODE = """\
Greedy decoding on a CPU beside other runtimes: milliseconds a token, and how many times as fast as
transformers with SDPA (p20 to p80 of turns within one run). Columns are prompt + new tokens; the
bare loop is the float32 matrix products of a token and nothing else. Where float32 tokens are not
those of transformers, there is no time. Weights are random; [bench/NOTES.md](bench/NOTES.md) has
the method, [bench/results/cpu](bench/results/cpu) the records."""
_PREFILL = "From a prompt to its first new token; columns are batch x prompt:"
_LOADING = (
    "From the start of a process to its first token, and its largest memory after 512 + 64 tokens:"
)

_ACCURACY = """\
What fewer bits cost: perplexity of the bundled model on text that it never saw, and how far the
logits of 124M with random weights lie from float32's, of the largest. Forms of a GPU are emulated
in PyTorch; int8 is that of a CPU,"""


def section(folder: Path = RESULTS) -> str:
    """The README's part that the records make; empty where there are none."""
    lines: list[str] = []
    for name, words in (("decode", _DECODE), ("prefill", _PREFILL)):
        if (record := load(name, folder)) is not None:
            lines += [words, "", times_table(record["cases"]), ""]
            lines += [f"On {machine_line(record)}.", "", *bare_lines(record["cases"])]
            lines += _not_measured(record)
            if name == "decode" and _shortest(record["cases"]):
                lines += [f"![tokens a second](bench/results/cpu/{PLOT})", ""]
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
        f"{column(case)}: {share['p50']:.0%} ({share['p20']:.0%} to {share['p80']:.0%})"
        for case in cases
        if (share := case.get("contenders", {}).get(OURS, {}).get("share_of_bare"))
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
    return _markdown(head, rows)


def _not_measured(record: dict[str, Any]) -> list[str]:
    lines = missing(record["cases"])
    return [*(f"- {line}" for line in lines), ""] if lines else []


def filled(page: str, part: str) -> str:
    """A page with a part between its marks, ``<!-- cpu -->`` and ``<!-- /cpu -->``."""
    start, end = "<!-- cpu -->\n", "<!-- /cpu -->\n"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"expected one {start.strip()} and one {end.strip()} on the page")
    before, _, rest = page.partition(start)
    return before + start + (f"\n{part}\n" if part else "") + end + rest.partition(end)[2]


def weight_bytes(model: str, bits: int) -> int:
    """What a token's matrix products read: the blocks' matrices and the head."""
    sizes = {"n_layer": 12, "n_embd": 768, **PRESETS[model]}
    return (12 * sizes["n_layer"] * sizes["n_embd"] ** 2 + 50257 * sizes["n_embd"]) * bits // 8


def _shortest(cases: Cases) -> Cases:
    """The measured cases of the shortest prompt."""
    measured = [case for case in cases if "contenders" in case]
    shortest = min((case["prompt"] for case in measured), default=0)
    return [case for case in measured if case["prompt"] == shortest]


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second after the short prompt, against the bounds of the same run."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Legible on white and on black: no background, grey text, colours of middle brightness.
    grey, theirs, ours = "#808890", "#7f9bb8", "#e0862e"
    style = {"text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey}
    style |= {"xtick.color": grey, "ytick.color": grey, "svg.hashsalt": "gpt2fast"}
    cases = _shortest(record["cases"])
    columns = list(dict.fromkeys(map(column, cases)))
    table = by_contender(cases)
    with plt.rc_context({**style, "font.size": 9}):
        figure, axes = plt.subplots(1, len(columns), figsize=(5.2 * len(columns), 4), squeeze=False)
        for axis, key in zip(axes[0], columns, strict=True):
            case = next(case for case in cases if column(case) == key)
            speeds = {n: 1 / r[key]["p"]["p50"] for n, r in table.items() if "p" in r.get(key, {})}
            bound = speeds.pop(BARE, None)
            names = sorted(speeds, key=speeds.__getitem__)
            colours = [ours if name.startswith("gpt2fast") else theirs for name in names]
            axis.barh(names, [speeds[name] for name in names], color=colours)
            lines = {"float32 products alone": bound} if bound else {}
            read = case["limits"]["read_bytes_per_s"]["p50"]
            lines["reading int8 weights"] = read / weight_bytes(case["model"], 8)
            for (label, speed), dashes in zip(lines.items(), ("--", ":"), strict=False):
                axis.axvline(speed, color=grey, linestyle=dashes, label=label)
            axis.set_title(key)
            axis.set_xlabel("tokens a second")
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, loc="lower right")
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the README, and draw the plot")
    write = parser.parse_args().write
    part = section()
    print(part)
    if write:
        README.write_text(filled(README.read_text(encoding="utf-8"), part), encoding="utf-8")
        record = load("decode")
        if record is not None and _shortest(record["cases"]):
            draw(record, RESULTS / PLOT)


if __name__ == "__main__":
    main()
