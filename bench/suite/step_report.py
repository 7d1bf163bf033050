"""From a record of whole models to rates, and the table that the suite prints."""

from typing import Any


def add_rates(case: dict[str, Any], limits: dict[str, Any] | None) -> None:
    """Add to a case's times the tokens and operations a second, and the share that these are of the
    matrix product's rate: the MFU, by the peak that was measured instead of the one advertised."""
    for times in case.get("times", {}).values():
        seconds = max(times["device"]["p50"], 1e-9)
        times["tokens_per_s"] = case["work"]["tokens"] / seconds
        times["flop_per_s"] = case["work"]["flops"] / seconds
        if limits is not None:
            peak = limits["matmul_flop_per_s"][case["dtype"]]["p50"]
            times["mfu"] = times["flop_per_s"] / peak


HEAD = (
    "| step | ms | tokens/s | MFU | peak GB | their time over the first, peak GB | not measured |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def rows(cases: list[dict[str, Any]]) -> list[str]:
    """A Markdown row for every case that was timed."""
    return [_row(case) for case in cases if case.get("times")]


def _row(case: dict[str, Any]) -> str:
    (name, times), *others = case["times"].items()

    def peak(name: str) -> str:
        return f"{case['providers'][name]['peak_bytes'] / 1e9:.2f}"

    ratios = [
        f"{other} {theirs['device_ratio']['p50']:.2f}, {peak(other)}"
        for other, theirs in others
        if "device_ratio" in theirs
    ]
    missing = [other for other in case["providers"] if other not in case["times"]]
    cells = [
        f"{case['case']}: {name}",
        f"{1e3 * times['device']['p50']:.2f}",
        f"{times['tokens_per_s']:.3g}",
        f"{times['mfu']:.0%}" if "mfu" in times else "-",
        peak(name),
        "; ".join(ratios) or "-",
        ", ".join(missing) or "-",
    ]
    return "| " + " | ".join(cells) + " |"
