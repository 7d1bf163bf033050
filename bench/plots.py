"""Plots of records as SVG, small ones: text stays text. Each for a light and for a dark page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.compare import OF_OURS
from bench.suite.work import AGAIN as SUITE_AGAIN
from gpt2fast.benchmark.models import weight_bytes
from gpt2fast.benchmark.table import BARE, BASE, OURS
from gpt2fast.benchmark.tables import MODELS, by_contender, column

THEMES = {"light": ("#1f2328", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}  # text, lines
_OURS, _THEIRS = "#e0862e", "#7f9bb8"
_LINES = ("#7f9bb8", "#8a77c4", "#4f9d69", "#c2636f", "#9a8c57", "#6b7785")

Cases = list[dict[str, Any]]


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """Where and with what a record was made; the suite's has it in a part of its own."""
    found: dict[str, Any] = record.get("environment", record)
    return found


def is_ours(name: str) -> bool:
    """Whether a contender of any record is one of ours."""
    return name.startswith(OF_OURS)


@contextmanager
def _figure(path: Path, record: dict[str, Any], panels: int, theme: str, height: float) -> Any:
    """Axes of a figure that is saved when they are drawn; it names the run that it shows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, lines = THEMES[theme]
    style = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), text
    )
    style |= {"axes.edgecolor": lines, "grid.color": lines, "svg.hashsalt": "gpt2fast"}
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, height), squeeze=False)
        yield axes[0]
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        shown = {"Date": None, "Description": f"recorded {facts(record)['date']}"}
        figure.savefig(path, transparent=True, metadata=shown)
        plt.close(figure)


def _shortest(cases: Cases) -> Cases:
    """The measured cases of the shortest prompt, of companies that are asked for no compiler."""
    measured = [c for c in cases if "contenders" in c and c.get("company") != "compiled"]
    shortest = min((case["prompt"] for case in measured), default=0)
    return [case for case in measured if case["prompt"] == shortest]


def decode_bars(record: dict[str, Any], path: Path, theme: str) -> bool:
    """Tokens a second on a CPU, against the bounds of the same run; False where nothing was."""
    cases = _shortest(record["cases"])
    columns = list(dict.fromkeys(map(column, cases)))
    if not columns:
        return False
    contenders = by_contender(cases)
    with _figure(path, record, len(columns), theme, 4.2) as axes:
        for axis, key in zip(axes, columns, strict=True):
            case = next(case for case in cases if column(case) == key)
            speeds = {
                name: (1 / reports[key]["p"]["p50"], _spread(reports[key]["p"]))
                for name, reports in contenders.items()
                if "p" in reports.get(key, {})
            }
            bound = speeds.pop(BARE, None)
            names = sorted(speeds, key=lambda name: speeds[name][0])
            axis.barh(
                names,
                [speeds[name][0] for name in names],
                xerr=[[speeds[name][1][side] for name in names] for side in (0, 1)],
                color=[_OURS if is_ours(name) else _THEIRS for name in names],
                error_kw={"ecolor": THEMES[theme][0], "elinewidth": 0.8},
            )
            read = case["limits"]["read_bytes_per_s"]["p50"]
            lines = {"float32 products alone": bound[0]} if bound else {}
            lines["reading float32 weights"] = read / weight_bytes(case["model"], 32)
            if any("int8" in name or "Q8" in name for name in names):
                lines["reading int8 weights"] = read / weight_bytes(case["model"], 8)
            for (label, speed), dashes in zip(lines.items(), ("--", "-.", ":"), strict=False):
                axis.axvline(speed, color=THEMES[theme][0], linestyle=dashes, lw=0.9, label=label)
            axis.set_title(key)
            axis.set_xlabel("tokens a second")
            axis.legend(frameon=False, loc="lower right")
    return True


def _spread(p: dict[str, float]) -> tuple[float, float]:
    """Of speeds: how far below and above the median p80 and p20 of the time lie."""
    return 1 / p["p50"] - 1 / p["p80"], 1 / p["p20"] - 1 / p["p50"]


def prefill_lines(record: dict[str, Any], path: Path, theme: str) -> bool:
    """Prompt tokens a second on a CPU by the prompt's length, a panel a model and batch."""
    cases = [c for c in record["cases"] if "contenders" in c and c.get("company") != "compiled"]
    groups: dict[tuple[str, int], Cases] = {}
    for case in cases:
        groups.setdefault((case["model"], case["batch"]), []).append(case)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return False
    with _figure(path, record, len(groups), theme, 3.8) as axes:
        for axis, ((model, batch), group) in zip(axes, groups.items(), strict=True):
            series = {
                name: [
                    (case["prompt"], case["prompt"] * batch / case["contenders"][name]["p"]["p50"])
                    for case in sorted(group, key=lambda case: case["prompt"])
                    if "p" in case["contenders"].get(name, {})
                ]
                for name in (BASE, "CTranslate2", "ONNX Runtime", BARE, OURS, "gpt2fast int8")
            }
            _draw_lines(axis, series)
            axis.set_title(f"{MODELS.get(model, model)}, batch {batch}")
            axis.set_xlabel("prompt, tokens")
            axis.set_ylabel("tokens a second")
    return True


def _draw_lines(axis: Any, series: dict[str, list[tuple[float, float]]]) -> None:
    colours: Iterator[str] = iter(_LINES * 3)
    for name, points in series.items():
        if points:
            ours = is_ours(name)
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color=_OURS if ours else next(colours),
                linestyle="-" if name in (OURS, "graph", "persistent") or not ours else "--",
                label=name,
            )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


def op_bars(record: dict[str, Any], path: Path, theme: str) -> bool:
    """How many times as fast as plain PyTorch every op is, of a CPU's record or the suite's."""
    rows = _op_ratios(record)
    if not rows:
        return False
    with _figure(path, record, 1, theme, 1.2 + 0.19 * len(rows)) as (axis,):
        names = list(rows)[::-1]
        errors = [[rows[n]["p50"] - rows[n]["p20"], rows[n]["p80"] - rows[n]["p50"]] for n in names]
        axis.barh(
            names,
            [rows[name]["p50"] for name in names],
            xerr=[list(side) for side in zip(*errors, strict=True)],
            color=_OURS,
            error_kw={"ecolor": THEMES[theme][0], "elinewidth": 0.8},
        )
        axis.axvline(1, color=THEMES[theme][0], lw=0.9)
        axis.set_xlabel("plain PyTorch's time over ours")
        axis.tick_params(axis="y", labelsize=7)
    return True


_PLAIN = ("eager", "flash", "math")  # what is plain PyTorch, the first that was timed


def _op_ratios(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    if "cases" in record:
        return {
            case["name"]: case["contenders"][OURS]["times_base"]
            for case in record["cases"]
            if "times_base" in case.get("contenders", {}).get(OURS, {})
        }
    rows = {}
    for case in record.get("parts", {}).get("ops", {}).get("cases", []):
        for direction, times in case.get("times", {}).items():
            plain = next((times[name] for name in _PLAIN if name in times), {})
            if ratio := plain.get("device_ratio", plain.get("host_ratio")):
                rows[f"{case['case']} {direction}"] = ratio
    return rows


def ladder(record: dict[str, Any], path: Path, theme: str) -> bool:
    """A GPU's decoding: the time of a token by context against the roofline, and speed by batch."""
    parts = record.get("parts", {})
    cases = [case for case in parts.get("decode", {}).get("cases", []) if case.get("times")]
    model = cases[0]["model"] if cases else None
    cases = [case for case in cases if case["model"] == model]
    if not cases:
        return False
    with _figure(path, record, 2, theme, 4.2) as (by_context, by_batch):
        single = sorted((c for c in cases if c["batch"] == 1), key=lambda case: case["context"])
        series = _token_series(single, "context", lambda case, seconds: 1e6 * seconds)
        _draw_lines(by_context, series)
        read = parts.get("limits", {}).get("limits", {}).get("read_bytes_per_s")
        floor = [
            (case["context"], 1e6 * min(sizes) / read["p50"])
            for case in single
            if read and (sizes := [t["bytes"] for t in case["times"].values() if "bytes" in t])
        ]
        if floor:
            colour = THEMES[theme][0]
            by_context.plot(*zip(*floor, strict=True), color=colour, ls=":", label="roofline")
            by_context.legend(frameon=False, fontsize=8)
        by_context.set_xlabel("context, tokens")
        by_context.set_ylabel("us a token")
        by_context.set_title(f"{MODELS.get(str(model), model)}, batch 1")
        most = max(cases, key=lambda c: len([d for d in cases if d["context"] == c["context"]]))
        batches = [case for case in cases if case["context"] == most["context"]]
        batches.sort(key=lambda case: case["batch"])
        _draw_lines(
            by_batch, _token_series(batches, "batch", lambda case, seconds: case["batch"] / seconds)
        )
        by_batch.set_xlabel("batch")
        by_batch.set_ylabel("tokens a second")
        by_batch.set_title(f"context {most['context']}")
    return True


def _token_series(cases: Cases, key: str, value: Any) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, times in case["times"].items():
            if "token" in times and name != SUITE_AGAIN:
                point = (case[key], value(case, times["token"]["p50"]))
                series.setdefault(name, []).append(point)
    return series


# Plot -> how it is drawn: of a record on a CPU that has its name, and of any record of the suite.
CPU = {"decode": decode_bars, "prefill": prefill_lines, "ops": op_bars}
GPU = {"ladder": ladder, "ops": op_bars}


def named(stem: str, record: dict[str, Any]) -> dict[str, Any]:
    """The plots of a record in a file of this name, by the names of their own files."""
    if "parts" in record:
        return {f"{stem}-{name}": make for name, make in GPU.items()}
    return {stem: CPU[stem]} if stem in CPU else {}


def draw(record: dict[str, Any], plots: dict[str, Any], folder: Path) -> list[str]:
    """Draw plots of a record into a folder, for both themes; the names of those that it has."""
    drawn = []
    for name, make in plots.items():
        done = [make(record, folder / f"{name}-{theme}.svg", theme) for theme in THEMES]
        if all(done):
            drawn.append(name)
    return drawn


def picture(name: str, folder: str, words: str) -> str:
    """HTML that shows a plot in the theme of the page."""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" '
        f'srcset="{folder}/{name}-dark.svg">\n  <img alt="{words}" '
        f'src="{folder}/{name}-light.svg">\n</picture>'
    )
