"""Greedy decoding on the CPU beside the peers, token by token.

    pytest bench/bench_decode.py
    GPT2FAST_BENCH_QUICK=1 pytest bench/bench_decode.py

Contenders take turns within one text, sixteen tokens each, so that every one meets the same lengths
and the same disturbances; ratios are of such turns. The method is that of `gpt2fast.benchmark`. Of
the environment: ``GPT2FAST_BENCH_RECORD=1`` writes ``results/cpu/decode.json``, after every case;
``GPT2FAST_BENCH_MINUTES`` bounds the run (what it left out is named as not measured),
``GPT2FAST_BENCH_THREADS`` sets threads (all cores), ``GPT2FAST_BENCH_MODELS`` the folder in which
models are built and kept (``build/bench``). ``GPT2FAST_BENCH_COMPILED=1`` adds contenders under
`torch.compile`, which takes minutes.
"""

import os
import sys
from collections.abc import Iterator

import pytest

from gpt2fast.benchmark.cases import COMPILED_DECODE, DECODE, DecodeCase, quick_decode
from gpt2fast.benchmark.companies import Companies
from gpt2fast.benchmark.contest import decode
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, Record
from gpt2fast.benchmark.table import COMPANIES
from gpt2fast.benchmark.tables import missing, times_table

COMPILED = COMPILED_DECODE if os.environ.get("GPT2FAST_BENCH_COMPILED") else []
CASES = [quick_decode("gpt2")] if QUICK else [*DECODE, *COMPILED]


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("decode", RESULTS if RECORD else None, cases=len(CASES))


@pytest.fixture(scope="module")
def companies() -> Iterator[Companies]:
    with Companies() as companies:
        yield companies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(record: Record, companies: Companies, case: DecodeCase) -> None:
    if record.time_is_up():
        record.add({**vars(case), "not measured": "no time left"})
        pytest.skip("no time left")
    with record.naming_failure(vars(case)):
        made = decode(case, companies.of(case.model, COMPANIES[case.company]))
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith("gpt2fast") for name in wrong), wrong
