"""The table of what came of others' tests: compared with a run, and written as a page."""

import json
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

from tests.peers.outcomes import kind
from tests.peers.reasons import REASONS

Outcomes = dict[str, dict[str, str]]

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).with_name("README.md")
_RANKS = {"missing": -1, "failed": 0, "skipped": 1, "passed": 2}
_TITLES = {
    "models": "common tests of models, on accelerated GPT-2",
    "tokenizer": "common tests of tokenizers, on `GPT2Tokenizer`",
    "tiktoken": "all its tests, on `GPT2Tokenizer`",
}


def changes(table: Outcomes, run: Outcomes) -> tuple[list[str], list[str]]:
    """What is worse in ``run`` than in ``table`` and what is better, a line each.

    Worse is a test that passed and is skipped, failed or missing now, or was skipped and is failed
    or missing. A test that the table does not have is better, or worse if it fails.
    """
    worse, better = [], []
    for suite in sorted(table.keys() | run.keys()):
        old, new = table.get(suite, {}), run.get(suite, {})
        for test in sorted(old.keys() | new.keys()):
            before, now = old.get(test, "missing"), new.get(test, "missing")
            line = f"{suite} {test}: {before} -> {now}"
            difference = _RANKS[kind(now)] - _RANKS[kind(before)]
            if difference < 0 or (before == "missing" and kind(now) == "failed"):
                worse.append(line)
            elif difference > 0:
                better.append(line)
    return worse, better


def reason_for(suite: str, test: str) -> str:
    """Why ``test`` fails.

    Raises:
        LookupError: ``reasons.py`` does not say.
    """
    for of_suite, pattern, reason in REASONS:
        if of_suite == suite and fnmatchcase(test, pattern):
            return reason
    raise LookupError(f"reasons.py has no reason for {suite} {test}")


def page(ours: Outcomes, control: Outcomes, versions: dict[str, str]) -> str:
    """The table as Markdown.

    Raises:
        LookupError: a failure without a reason.
    """
    lines = [
        "# What peers test themselves with",
        "",
        "`python -m tests.peers --write` writes this page; `make peers` compares a run with it.",
        f"The tests are those in the source distributions of transformers "
        f"{versions['transformers']} and tiktoken {versions['tiktoken']}.",
        "The control runs them on transformers' own models and tokenizer and on tiktoken itself.",
        "",
        "Of its tests transformers' distribution carries the files at the top: not those of",
        "generation, of GPT-2 itself, of pipelines and of export, nor what they need. Earlier ones",
        "carry no more; pytorch-transformers 1.2.0 and pytorch-pretrained-bert 0.6.2 carry none.",
        "Slow tests and those for several devices are skipped, as their authors do.",
        "",
        "|  | passed | skipped | failed | control: passed | skipped | failed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for suite, title in _TITLES.items():
        cells = [
            str(Counter(map(kind, run[suite].values()))[outcome])
            for run in (ours, control)
            for outcome in ("passed", "skipped", "failed")
        ]
        owner = "tiktoken" if suite == "tiktoken" else "transformers"
        lines.append(f"| {owner}: {title} | {' | '.join(cells)} |")
    for suite in _TITLES:
        failed = {t: o for t, o in ours[suite].items() if kind(o) == "failed"}
        by_reason: dict[str, list[str]] = {}
        for test in sorted(failed):
            by_reason.setdefault(reason_for(suite, test), []).append(test)
        skipped = Counter(o for o in ours[suite].values() if kind(o) == "skipped")
        lines += ["", f"## {suite}", ""]
        for reason, tests in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            # Of tests that two classes have, the name once.
            names = dict.fromkeys(t.rpartition("::")[2].removeprefix("test_") for t in tests)
            quoted = ", ".join(f"`{name}`" for name in names)
            lines += [f"- {len(tests)} failed, {reason}: {quoted}"]
        for outcome, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
            lines += [f"- {count} skipped: {outcome.partition(': ')[2]}"]
        both = [t for t in sorted(failed) if kind(control[suite].get(t, "missing")) == "failed"]
        if both:
            lines += [f"- of the failures {len(both)} are the control's as well: {', '.join(both)}"]
    return "\n".join(lines) + "\n"


def read() -> dict[str, Outcomes]:
    """The committed results: ``ours`` and ``control``."""
    stored: dict[str, Outcomes] = json.loads(RESULTS.read_text())
    return stored
