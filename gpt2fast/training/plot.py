"""The loss curve of a run, drawn from its log."""

import json
from pathlib import Path
from typing import Any


def plot_loss(log: Path, image: Path, summary: dict[str, Any]) -> bool:
    """Draw training and validation loss over tokens seen to ``image`` (PNG).

    Baselines in ``summary`` become horizontal lines. Returns False, having drawn nothing, where
    matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        points = [(r["tokens"] / 1e6, r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
    levels = []
    for name, color in (("unigram", "0.6"), ("bigram", "0.3")):
        if (level := summary.get(f"validation_loss_{name}")) is not None:
            levels.append(level)
            axes.axhline(level, color=color, linestyle="--", label=f"{name} baseline {level:.2f}")
    losses = sorted(r["loss"] for r in records if "loss" in r)
    if losses:
        # The first steps, far above all else, would flatten the rest.
        top = max(losses[int(0.97 * (len(losses) - 1))], *levels, losses[0])
        axes.set_ylim(losses[0] - 0.3, top + 0.3)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image)
    return True
