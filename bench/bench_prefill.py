"""From prompts to their first new tokens on the CPU, beside the peers.

    pytest bench/bench_prefill.py

Contenders take turns, a call each; environment and records as in ``bench_decode.py``.
"""

import os
import sys
from collections.abc import Iterator

import pytest

from gpt2fast.benchmark.cases import COMPILED_PREFILL, PREFILL, PrefillCase, quick_prefill
from gpt2fast.benchmark.companies import Companies
from gpt2fast.benchmark.contest import prefill
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, Record
from gpt2fast.benchmark.table import COMPANIES
from gpt2fast.benchmark.tables import missing, times_table

COMPILED = COMPILED_PREFILL if os.environ.get("GPT2FAST_BENCH_COMPILED") else []
CASES = [quick_prefill("gpt2")] if QUICK else [*PREFILL, *COMPILED]


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("prefill", RESULTS if RECORD else None, cases=len(CASES))


@pytest.fixture(scope="module")
def companies() -> Iterator[Companies]:
    with Companies() as companies:
        yield companies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(record: Record, companies: Companies, case: PrefillCase) -> None:
    if record.time_is_up():
        record.add({**vars(case), "not measured": "no time left"})
        pytest.skip("no time left")
    # Batches are measured between some of those who are there anyway.
    loaded = COMPANIES["prefill" if case.company == "batches" else case.company]
    with record.naming_failure(vars(case)):
        company = companies.of(case.model, loaded)
        made = prefill(case, COMPANIES[case.company], company, record.time_is_up)
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith("gpt2fast") for name in wrong), wrong
