"""Greedy decoding on the CPU beside the peers, token by token.

    pytest bench/bench_decode.py
    GPT2FAST_BENCH_QUICK=1 pytest bench/bench_decode.py

Contenders take turns within one text, sixteen tokens each, so that every one meets the same lengths
and the same disturbances; ratios are of such turns. The method is that of `gpt2fast.benchmark`. Of
the environment: ``GPT2FAST_BENCH_RECORD=1`` writes ``results/cpu/decode.json``, after every case;
``GPT2FAST_BENCH_MINUTES`` bounds the run (what it left out is named as not measured),
``GPT2FAST_BENCH_THREADS`` sets threads (all cores), ``GPT2FAST_BENCH_MODELS`` the folder in which
models are built and kept (``build/bench``).
"""

import sys
from collections.abc import Iterator

import pytest

from bench.report import missing, times_table
from gpt2fast.benchmark.companies import Companies
from gpt2fast.benchmark.contest import DecodeCase, decode
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, Record
from gpt2fast.benchmark.table import COMPANIES

UNTIL = 0.65  # of the minutes given
CASES = (
    [DecodeCase("gpt2", "quick", 32, 33)]
    if QUICK
    else [
        DecodeCase(model, company, prompt, new)
        for model in ("gpt2", "gpt2-medium")
        for company in ("float32", "smaller")
        for prompt, new in ((32, 129), (512, 65))
    ]
)


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("decode", UNTIL, RESULTS if RECORD else None)


@pytest.fixture(scope="module")
def companies() -> Iterator[Companies]:
    with Companies() as companies:
        yield companies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(record: Record, companies: Companies, case: DecodeCase) -> None:
    if record.time_is_up():
        record.add({**vars(case), "not measured": "no time left"})
        pytest.skip("no time left")
    made = decode(case, companies.of(case.model, COMPANIES[case.company]))
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith("gpt2fast") for name in wrong), wrong
