"""Import, loading, the first token, and memory, each in processes of its own.

    pytest bench/bench_loading.py

The checkpoints are in the system's cache of files. Environment and records as in
``bench_decode.py``.
"""

import sys
from functools import partial

import pytest

from gpt2fast.benchmark.loading import imports, loading
from gpt2fast.benchmark.processes import Process
from gpt2fast.benchmark.record import QUICK, RECORD, RESULTS, THREADS, Record
from gpt2fast.benchmark.table import BASE, LOADING
from gpt2fast.benchmark.tables import loading_table, missing

ROUNDS = 1 if QUICK else 2
MODELS = ["gpt2"] if QUICK else ["gpt2", "gpt2-medium"]


@pytest.fixture(scope="module")
def record() -> Record:
    return Record("loading", RESULTS if RECORD else None, cases=len(MODELS))


def test_imports(record: Record) -> None:
    found = imports(3 if QUICK else 5)
    record.put("imports", found)
    print(
        "".join(f"\nimport {kind}: {p['p50']:.3f} s" for kind, p in found.items()), file=sys.stderr
    )


@pytest.mark.parametrize("model", MODELS)
def test_loading(record: Record, model: str) -> None:
    if record.time_is_up():
        record.add({"model": model, "not measured": "no time left"})
        pytest.skip("no time left")
    made = loading(
        model,
        LOADING,
        BASE,
        ROUNDS,
        partial(Process, model=model, threads=THREADS),
        lambda text: print(f"{model}: {text}", file=sys.stderr),
    )
    record.add(made)
    print("\n".join(["", loading_table([made]), *missing([made])]), file=sys.stderr)
