"""``gpt2fast bench``: the headline table of this machine, in three minutes.

Everybody who is installed loads the same weights (random ones, of a published size), must give the
same answers, and then takes turns with all others: greedy decoding first, then a prompt. What is
not installed, or for which no time is left, is named. The first run also writes the models in the
formats of those who are here, and keeps them.
"""

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

from gpt2fast.benchmark import models
from gpt2fast.benchmark.cases import DecodeCase, PrefillCase, quick_decode, quick_prefill
from gpt2fast.benchmark.companies import started
from gpt2fast.benchmark.contest import NOISY, Asked, Company, Report, decode, prefill
from gpt2fast.benchmark.environment import cores
from gpt2fast.benchmark.processes import Failed
from gpt2fast.benchmark.progress import Progress, minutes
from gpt2fast.benchmark.record import Record
from gpt2fast.benchmark.table import COMPANIES, OURS, installed
from gpt2fast.benchmark.tables import machine_line, missing, times_table

# Of the time given: nobody is loaded after this share, so that enough is left to measure.
_LOADING = 0.5


def run(args: argparse.Namespace) -> int:
    """Measure and print; the table goes to stdout, what happens meanwhile to stderr.

    Returns:
        0; 1 where an answer of ours was wrong.

    Raises:
        ValueError: nobody could be measured.
        OSError: the record cannot be written.
    """
    begun, seconds = time.monotonic(), 60 * args.minutes
    threads = args.threads or cores()
    record = Record("bench", None, path=Path(args.json) if args.json else None, threads=threads)
    names = COMPANIES["quick"]
    cases = (quick_decode(args.model), quick_prefill(args.model))
    steps = sum(map(installed, names)) + sum(case.turns for case in cases)
    progress = Progress(steps, seconds)
    print(f"models: {models.ROOT}; at most {minutes(seconds)}", file=sys.stderr)

    def start(name: str) -> Asked:
        if installed(name) and time.monotonic() - begun > _LOADING * seconds:
            raise Failed("no time left")
        return started(name, args.model, threads)

    try:
        company = Company(names, start, progress)
    except Failed as error:
        raise ValueError(f"nothing was measured: {error}") from error
    with closing(company):
        for case in cases:
            record.add(_measured(case, company, begun + seconds))
    print(report(record.content))
    ours = (made.get("contenders", {}).get(OURS, {}) for made in record.content["cases"])
    return int(any("wrong" in found for found in ours))


def _measured(case: DecodeCase | PrefillCase, company: Company, ends: float) -> Report:
    """The record of a case, or why there is none."""
    if time.monotonic() > ends:
        return {**vars(case), "not measured": "no time left"}
    try:
        if isinstance(case, DecodeCase):
            return decode(case, company, lambda: time.monotonic() > ends)
        names = COMPANIES[case.company]
        return prefill(case, names, company, lambda: time.monotonic() > ends)
    except Failed as error:
        return {**vars(case), "not measured": str(error)}


def report(content: Report) -> str:
    """The table, who is not in it and why, and the machine with its limits."""
    measured = [case for case in content["cases"] if "contenders" in case]
    lines = []
    if measured:
        base = measured[0]["base"]
        lines += [
            "Milliseconds, of a token (prompt + new tokens) and of a prompt (batch x prompt); then "
            f"how many times as fast as {base}, median (p20 to p80).",
            "",
            times_table(measured, fastest_first=True),
            "",
        ]
    lines += [f"- {line}" for line in missing(content["cases"])]
    lines += ["", f"On {machine_line(content)}."]
    noise = max((case.get("noise", 0.0) for case in measured), default=0.0)
    if noise > NOISY:
        lines.append(
            f"This machine is noisy: the same program against itself differs by {noise:.0%}. "
            "The bounds are wider by that; run it again when nothing else runs."
        )
    return "\n".join(lines)
