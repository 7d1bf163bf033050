"""The tokenizer beside tiktoken and Hugging Face's tokenizers, one thread, on one text.

    pytest bench/bench_tokenizer.py
    GPT2FAST_BENCH_TEXT=novels.txt pytest bench/bench_tokenizer.py

The text is the first 10 MB of the file, or made up from words and names if none is given. First the
ids must be equal. The ratios come from interleaved runs: every round times each implementation
once, so that a change in the machine's load meets all of them, and medians are compared. Times are
of the processor, which other programs disturb less; for batches, which run in parallel, they are
of the clock.

With ``GPT2FAST_BENCH_RECORD=1`` the ratios are written to ``bench/results/cpu/tokenizer.json``.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tiktoken
import transformers

from gpt2fast.benchmark.environment import environment
from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.tokenizer.pattern import GPT2_PATTERN
from gpt2fast.version import __version__

SIZE = 10_000_000  # bytes
ROUNDS = 5
CORES = os.cpu_count() or 1
BATCH_COPIES = 4  # of the text, so that starting processes may pay
RESULTS = Path(__file__).parent / "results" / "cpu" / "tokenizer.json"

Functions = dict[str, Callable[[], Any]]


def _made_up_text() -> str:
    """Words in the proportions of Zipf's law, half of them made of two tokens."""
    random.seed(0)
    tokens = [token[1:] for token in GPT2Tokenizer().encoder if token[0] == "\u0120"]
    known = [token.lower() for token in tokens if token.isalpha()][:20_000]
    words = [word for pair in pairwise(known) for word in (pair[0], "".join(pair))]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    marks = [" "] * 20 + [", ", ". ", ".\n", "; ", "'s ", "? “", "” "]
    count = SIZE // 8
    text = zip(random.choices(words, weights, k=count), random.choices(marks, k=count), strict=True)
    return "".join(map("".join, text))


@pytest.fixture(scope="module")
def text() -> str:
    path = os.environ.get("GPT2FAST_BENCH_TEXT")
    data = Path(path).read_bytes() if path else _made_up_text().encode()
    # tokenizers always takes this mark for a token, the others here never.
    return data[:SIZE].decode("utf-8", "ignore").replace("<|endoftext|>", "")


@pytest.fixture(scope="module")
def implementations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ours = GPT2Tokenizer()
    openai = tiktoken.Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={ours.decode_bytes(i): i for i in range(50256)},
        special_tokens={"<|endoftext|>": 50256},
    )
    folder = tmp_path_factory.mktemp("vocabulary")
    ours.save_vocabulary(folder)
    hugging_face = transformers.GPT2Tokenizer.from_pretrained(folder).backend_tokenizer
    return {"ours": ours, "tiktoken": openai, "tokenizers": hugging_face}


def _encoders(implementations: dict[str, Any], text: str) -> Functions:
    ours, openai, hugging_face = implementations.values()

    def cold() -> list[int]:
        ours._codec._chunks.clear()
        ours._codec._plain.clear()
        return ours.encode(text)

    return {
        "ours": lambda: ours.encode(text),
        "ours, nothing remembered": cold,
        "tiktoken": lambda: openai.encode_ordinary(text),
        "tokenizers": lambda: hugging_face.encode(text).ids,
    }


def _decoders(implementations: dict[str, Any], ids: list[int]) -> Functions:
    ours, openai, hugging_face = implementations.values()
    return {
        "ours": lambda: ours.decode(ids),
        "tiktoken": lambda: openai.decode(ids),
        "tokenizers": lambda: hugging_face.decode(ids, skip_special_tokens=False),
    }


def _interleaved(functions: Functions, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each function in each of ``ROUNDS`` rounds, every one run once before."""
    results = {name: function() for name, function in functions.items()}
    first, *others = results.values()
    assert all(other == first for other in others), "the implementations disagree"
    del results, first, others
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def _rows(seconds: dict[str, list[float]], size: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name, times in seconds.items():
        p20, p50, p80 = (sorted(times)[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        rows[name] = {
            "p20_s": round(p20, 4),
            "p50_s": round(p50, 4),
            "p80_s": round(p80, 4),
            "MB_per_s": round(size / 1e6 / p50, 2),
            "ours_is_faster_by": round(median(times) / median(seconds["ours"]), 3),
        }
    return rows


@pytest.mark.parametrize("name", ["ours", "ours, nothing remembered", "tiktoken", "tokenizers"])
def test_encode(benchmark: Any, implementations: dict[str, Any], text: str, name: str) -> None:
    part = text[: SIZE // 10]
    benchmark.group = "encode 1 MB"
    benchmark.extra_info["bytes"] = len(part.encode())
    ids = benchmark.pedantic(_encoders(implementations, part)[name], rounds=ROUNDS, warmup_rounds=1)
    assert ids == implementations["tiktoken"].encode_ordinary(part)


@pytest.mark.parametrize("name", ["ours", "tiktoken", "tokenizers"])
def test_decode(benchmark: Any, implementations: dict[str, Any], text: str, name: str) -> None:
    part = text[: SIZE // 10]
    ids = implementations["tiktoken"].encode_ordinary(part)
    benchmark.group = "decode 1 MB"
    benchmark.extra_info["bytes"] = len(part.encode())
    decode = _decoders(implementations, ids)[name]
    assert benchmark.pedantic(decode, rounds=ROUNDS, warmup_rounds=1) == part


def test_ratios(implementations: dict[str, Any], text: str) -> None:
    """The comparison in one run, printed, and recorded where that is asked for."""
    size = len(text.encode())
    ours = implementations["ours"]
    encode = _interleaved(_encoders(implementations, text), time.process_time)
    decode = _interleaved(_decoders(implementations, ours.encode(text)), time.process_time)
    lines = text.splitlines(keepends=True) * BATCH_COPIES
    batch = _interleaved(
        {
            "ours": lambda: ours.encode_batch(lines),
            "ours, a process a core": lambda: ours.encode_batch(lines, num_workers=CORES),
            "tiktoken": lambda: implementations["tiktoken"].encode_ordinary_batch(
                lines, num_threads=CORES
            ),
        },
        time.perf_counter,
    )
    facts = environment()
    facts["versions"] |= {name: version(name) for name in ("tiktoken", "tokenizers")}
    facts["versions"]["gpt2fast"] = __version__
    million = "a" * 1_000_000
    start = time.process_time()
    ours.encode(million)
    word = time.process_time() - start
    record = {
        **facts,
        "text": {
            "bytes": size,
            "tokens": len(ours.encode(text)),
            "kind": "file" if os.environ.get("GPT2FAST_BENCH_TEXT") else "made up",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "rounds": ROUNDS,
        "clock": {"encode, decode": "processor time", "encode_batch": "wall clock"},
        "encode": _rows(encode, size),
        "decode": _rows(decode, size),
        f"encode_batch of {len(lines)} texts": _rows(batch, size * BATCH_COPIES),
        "one word of a million letters, s": round(word, 3),
    }
    written = json.dumps(record, indent=2, ensure_ascii=False)
    print(f"\n{written}", file=sys.stderr)
    if os.environ.get("GPT2FAST_BENCH_RECORD"):
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(written + "\n", "utf-8")
