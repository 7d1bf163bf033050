"""From prompts to their first new tokens on the CPU, beside the peers.

    pytest bench/bench_prefill.py

Contenders take turns, a call each; environment and records as in ``bench_decode.py``.
"""

import sys
from functools import partial

import pytest

from bench.cpu.contest import PrefillCase, prefill
from bench.cpu.processes import Process
from bench.cpu.record import QUICK, RECORD, RESULTS, THREADS, Record
from bench.cpu.table import PREFILL, PREFILL_BATCH, QUICK_COMPANY
from bench.report import missing, times_table

SHARE = 0.4  # of the minutes given
CASES = (
    [PrefillCase("gpt2", 1, 128, 3)]
    if QUICK
    else [  # what matters most first: time may end
        PrefillCase("gpt2", 1, 512, 4),
        PrefillCase("gpt2", 1, 128, 6),
        PrefillCase("gpt2", 1, 1024, 3),
        PrefillCase("gpt2", 8, 128, 3),
        PrefillCase("gpt2-medium", 1, 512, 3),
        PrefillCase("gpt2-medium", 1, 128, 4),
        PrefillCase("gpt2", 8, 512, 3),
        PrefillCase("gpt2-medium", 1, 1024, 2),
        PrefillCase("gpt2", 8, 1024, 2),
        PrefillCase("gpt2-medium", 8, 128, 2),
        PrefillCase("gpt2-medium", 8, 512, 2),
        PrefillCase("gpt2-medium", 8, 1024, 2),
    ]
)


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("prefill", SHARE, RESULTS if RECORD else None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(record: Record, case: PrefillCase) -> None:
    if record.time_is_up():
        record.add({**vars(case), "not measured": "no time left"})
        pytest.skip("no time left")
    names = PREFILL if case.batch == 1 else PREFILL_BATCH
    start = partial(Process, model=case.model, threads=THREADS)
    made = prefill(
        case,
        QUICK_COMPANY if QUICK else names,
        start,
        lambda text: print(f"{case}: {text}", file=sys.stderr),
    )
    record.add(made)
    print("\n".join(["", times_table([made]), *missing([made])]), file=sys.stderr)
    wrong = {name: r["wrong"] for name, r in made["contenders"].items() if "wrong" in r}
    assert not any(name.startswith("gpt2fast") for name in wrong), wrong
