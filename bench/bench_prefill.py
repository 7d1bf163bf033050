"""From prompts to their first new tokens on the CPU, beside the peers.

    pytest bench/bench_prefill.py

Contenders take turns, a call each; environment and records as in ``bench_decode.py``.
"""

import sys
from collections.abc import Iterator

import pytest

from bench.report import missing, times_table
from gpt2fast.benchmark.companies import Companies
from gpt2fast.benchmark.contest import PrefillCase, prefill
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, Record
from gpt2fast.benchmark.table import PREFILL, PREFILL_BATCH, QUICK_COMPANY

UNTIL = 1.0  # of the minutes given
CASES = (
    [PrefillCase("gpt2", 1, 128, 3)]
    if QUICK
    else [  # of a model, what matters most first: time may end
        PrefillCase(model, batch, prompt, rounds)
        for model in ("gpt2", "gpt2-medium")
        for batch, prompt, rounds in (
            *((1, 512, 4), (1, 128, 6), (1, 1024, 3)),
            *((8, 128, 3), (8, 512, 2), (8, 1024, 2)),
        )
    ]
)


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("prefill", UNTIL, RESULTS if RECORD else None)


@pytest.fixture(scope="module")
def companies() -> Iterator[Companies]:
    with Companies() as companies:
        yield companies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(record: Record, companies: Companies, case: PrefillCase) -> None:
    if record.time_is_up():
        record.add({**vars(case), "not measured": "no time left"})
        pytest.skip("no time left")
    everybody = QUICK_COMPANY if QUICK else PREFILL
    names = everybody if case.batch == 1 else PREFILL_BATCH
    made = prefill(case, names, companies.of(case.model, everybody), record.time_is_up)
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith("gpt2fast") for name in wrong), wrong
