"""From a record of the suite to rates, shares of the limits, and the table it prints."""

from typing import Any

from bench.suite import decode_report, step_report
from bench.suite.step_cases import STEP_PARTS
from bench.suite.work import AGAIN, OURS, Work

# The end of a long output is what is sure to be seen, so the closing table has a length.
MOST_CHARACTERS = 10_500


def limits_for(limits: dict[str, Any], dtype: str) -> tuple[float, float]:
    """(bytes/s, FLOP/s) that the device reached in this run for a dtype."""
    bandwidth = max(limits[kind]["p50"] for kind in ("copy_bytes_per_s", "read_bytes_per_s"))
    return bandwidth, limits["matmul_flop_per_s"][dtype]["p50"]


def add_rates(case: dict[str, Any], limits: dict[str, Any] | None) -> None:
    """Add to every device time of a case what it comes to: bytes/s, FLOP/s, share of the limit."""
    for direction, times in case.get("times", {}).items():
        work = Work(**case["work"][direction])
        for time in times.values():
            if "device" not in time:
                continue
            seconds = max(time["device"]["p50"], 1e-9)
            time["bytes_per_s"] = work.bytes / seconds
            time["flop_per_s"] = work.flops / seconds
            if limits is not None:
                floor = work.seconds(*limits_for(limits, case["dtype"]))
                time["share_of_limit"] = floor / seconds


def _microseconds(times: dict[str, float] | None) -> str:
    return f"{1e6 * times['p50']:.1f}" if times else "-"


def _row(case: dict[str, Any], direction: str, times: dict[str, Any]) -> str:
    ours = times[OURS]
    rate = (
        f"{ours['flop_per_s'] / 1e12:.0f} TFLOP/s"
        if case["work"][direction]["flops"] > 200 * case["work"][direction]["bytes"]
        else f"{ours['bytes_per_s'] / 1e9:.0f} GB/s"
    )
    ratios = [
        f"{name} {time.get('device_ratio', time.get('host_ratio', {})).get('p50', 0):.2f}"
        + ("" if "device_ratio" in time else " (host)")
        for name, time in times.items()
        if name not in (OURS, AGAIN) and "host_ratio" in time
    ]
    error = max(case["providers"][OURS]["error"].values())
    share = f"{ours['share_of_limit']:.0%}" if "share_of_limit" in ours else "-"
    cells = [
        case["case"],
        direction,
        _microseconds(ours["device"]) + ("" if ours["device_source"] == "graph" else "*"),
        _microseconds(ours["host"]),
        rate,
        share,
        f"{error:.0e}",
        ", ".join(ratios) or "-",
    ]
    return "| " + " | ".join(cells) + " |"


op_head = (
    "| case | direction | device us | host us | rate | of limit | error | peers' time over ours |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def op_rows(cases: list[dict[str, Any]]) -> list[str]:
    """A Markdown row for every case and direction that was timed."""
    return [
        _row(case, direction, times)
        for case in cases
        for direction, times in case.get("times", {}).items()
        if "device" in times[OURS]
    ]


def limit_lines(limits: dict[str, Any]) -> list[str]:
    products = ", ".join(
        f"{name} {rate['p50'] / 1e12:.1f}" for name, rate in limits["matmul_flop_per_s"].items()
    )
    launch = limits["empty_launch_s"]
    return [
        f"limits: copy {limits['copy_bytes_per_s']['p50'] / 1e9:.0f} GB/s, "
        f"read {limits['read_bytes_per_s']['p50'] / 1e9:.0f} GB/s; TFLOP/s: {products}; "
        f"an empty launch: {_microseconds(launch['issue'])} us of the host, "
        f"{_microseconds(launch['device'])} us replayed"
    ]


def probe_lines(probes: dict[str, Any]) -> list[str]:
    """A line a probe: medians in microseconds or GB/s, by what was varied."""
    lines = []
    for name, result in probes.items():
        if not isinstance(result, dict) or "error" in result:
            reason = result if isinstance(result, str) else result["error"]
            lines.append(f"probe {name}: {reason[:150]}")
            continue
        unit, scale = ("us", 1e6) if name.endswith("_s") and "_per_" not in name else ("GB/s", 1e-9)
        varied = {"": result} if "p50" in result else result
        values = (f"{label} {scale * value['p50']:.2f}".strip() for label, value in varied.items())
        lines.append(f"probe {name}: {', '.join(values)} {unit}")
    return lines


def summary(record: dict[str, Any]) -> str:
    """What the suite prints when it ends: states, limits, the op table, failures last."""
    parts = record["parts"]
    lines = ["DRY RUN: the times mean nothing"] if record["dry_run"] else []
    for name, part in parts.items():
        detail = part.get("reason") or ", ".join(
            f"{count} {outcome}" for outcome, count in part.get("counts", {}).items()
        )
        lines.append(f"{name}: {part['status']}{f' ({detail})' if detail else ''}")
    if "limits" in parts.get("limits", {}):
        lines += limit_lines(parts["limits"]["limits"])
        lines += probe_lines(parts["limits"].get("probes", {}))
    failures = [f"FAILED {failure[:400]}" for failure in record["failures"]]
    if len(failures) > 10:
        failures[10:] = [f"and {len(failures) - 10} more failures, in the record"]
    closing = [*failures, f"{record['status']} after {record['seconds']:.0f} s"]
    room = MOST_CHARACTERS - sum(len(line) + 1 for line in (*lines, *closing))
    steps = [case for name in STEP_PARTS for case in parts.get(name, {}).get("cases", [])]
    for head, rows in (
        (decode_report.HEAD, decode_report.rows(parts.get("decode", {}).get("cases", []))),
        (step_report.HEAD, step_report.rows(steps)),
        (op_head, op_rows(parts.get("ops", {}).get("cases", []))),
    ):
        table = _table(head, rows, room)
        room -= sum(len(line) + 1 for line in table)
        lines += table
    return "\n".join([*lines, *closing])


def _table(head: str, rows: list[str], room: int) -> list[str]:
    """The first rows, of which so many characters may be printed."""
    if not rows:
        return []
    kept = [head]
    for row in rows:
        if sum(len(line) + 1 for line in (*kept, row)) > room:
            break
        kept.append(row)
    if len(kept) <= len(rows):
        kept.append(f"{len(rows) + 1 - len(kept)} more rows in the record")
    return kept
