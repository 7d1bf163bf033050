"""Encode many texts in several processes.

The workers are plain processes that speak over pipes. They neither fork the caller, which may run
threads, nor import its main module again, so a script needs no ``__main__`` guard.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_LOG = logging.getLogger(__name__)

Encode = Callable[[str], "array[int]"]


def split_evenly(texts: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Cut ``texts`` into at most ``parts`` runs of about the same number of characters."""
    total = sum(map(len, texts))
    runs: list[Sequence[str]] = []
    start = seen = 0
    for i, text in enumerate(texts):
        seen += len(text)
        if seen * parts >= total * (len(runs) + 1) and len(runs) < parts - 1:
            runs.append(texts[start : i + 1])
            start = i + 1
    runs.append(texts[start:])
    return [run for run in runs if run]


def encode_parallel(encode: Encode, texts: Sequence[str], workers: int) -> list[array[int]]:
    """``[encode(text) for text in texts]`` with ``workers`` processes, this one included.

    A run of texts whose worker fails is encoded here.
    """
    runs = split_evenly(texts, workers)
    if len(runs) < 2:
        return [encode(text) for text in texts]
    own, *others = runs
    with ThreadPoolExecutor(len(others)) as pool:
        jobs = [pool.submit(_encode_elsewhere, encode, run) for run in others]
        results = [encode(text) for text in own]
        for job in jobs:
            results += job.result()
    return results


def _encode_elsewhere(encode: Encode, texts: Sequence[str]) -> list[array[int]]:
    try:
        return _run_worker(encode, texts)
    except (OSError, subprocess.SubprocessError, EOFError, pickle.UnpicklingError) as error:
        _LOG.warning("a worker failed (%s); its texts are encoded here", error)
        return [encode(text) for text in texts]


def _run_worker(encode: Encode, texts: Sequence[str]) -> list[array[int]]:
    start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    done = subprocess.run(
        [sys.executable, "-c", start],
        input=pickle.dumps((encode, list(texts)), protocol=pickle.HIGHEST_PROTOCOL),
        stdout=subprocess.PIPE,
        check=True,
    )
    results: list[array[int]] = pickle.loads(done.stdout)
    return results


def serve() -> None:
    """What a worker does: one job from standard input to standard output."""
    encode, texts = pickle.load(sys.stdin.buffer)
    results = [encode(text) for text in texts]
    pickle.dump(results, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
