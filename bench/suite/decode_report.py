"""From a record of the decode ladder to shares of the bandwidth, and the table it prints."""

from typing import Any


def add_rates(case: dict[str, Any], limits: dict[str, Any] | None) -> None:
    """Add to a case's times the rate at which a step reads, and its share of the device's."""
    for times in case.get("times", {}).values():
        if "bytes" not in times or "token" not in times:
            continue
        times["bytes_per_s"] = times["bytes"] / times["token"]["p50"]
        if limits is not None:
            times["share_of_read"] = times["bytes_per_s"] / limits["read_bytes_per_s"]["p50"]


HEAD = (
    "| generate | us a token (share of the read bandwidth; a step on the device alone) | "
    "their time over the first: a token, all | not measured |\n| --- | --- | --- | --- |"
)


def rows(cases: list[dict[str, Any]]) -> list[str]:
    """A Markdown row for every case that was timed."""
    return [_row(case) for case in cases if case.get("times")]


def _row(case: dict[str, Any]) -> str:
    absolute, ratios = [], []
    for name, times in case["times"].items():
        notes = [f"{times['share_of_read']:.0%}"] if "share_of_read" in times else []
        if "device" in times:
            notes.append(f"{1e6 * times['device']['p50']:.0f}")
        note = f" ({'; '.join(notes)})" if notes else ""
        absolute.append(f"{name} {_microseconds(times)}{note}")
        if "all_ratio" in times:
            token = f"{times['token_ratio']['p50']:.2f}" if "token_ratio" in times else "noise"
            ratios.append(f"{name} {token}, {times['all_ratio']['p50']:.2f}")
    missing = [name for name in case["providers"] if name not in case["times"]]
    cells = [case["case"], ", ".join(absolute), "; ".join(ratios) or "-", ", ".join(missing) or "-"]
    return "| " + " | ".join(cells) + " |"


def _microseconds(times: dict[str, Any]) -> str:
    """Of a token; where no round gave it, the whole took no longer than its first token."""
    return f"{1e6 * times['token']['p50']:.0f}" if "token" in times else "noise"
