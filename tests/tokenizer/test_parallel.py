"""Encoding in several processes gives the same, from any script, and never hangs."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast.tokenizer import GPT2Tokenizer, parallel

TIMEOUT = 120  # of a test that would otherwise hang


def test_same_as_one_process(samples: str) -> None:
    tokenizer = GPT2Tokenizer(pad_token="<pad>", add_prefix_space=True)
    texts = [*samples.splitlines(), "", "\ud800", "<pad>x<|endoftext|>"]
    expected = [tokenizer.encode(text, allowed_special={"<pad>"}) for text in texts]
    for workers in (1, 2, 3):
        got = tokenizer.encode_batch(texts, num_workers=workers, allowed_special={"<pad>"})
        assert got == expected
    assert tokenizer.encode_batch(["one text"], num_workers=8) == [tokenizer.encode("one text")]
    assert tokenizer.encode_batch([], num_workers=8) == []


def test_own_vocabulary_reaches_the_workers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode_batch(["ab", "ba", "abab"], num_workers=3) == [[2], [1, 0], [2, 2]]


def test_one_process_unless_asked(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert tokenizer.encode_batch(["a", "b"]) == [[64], [65]]


def test_as_many_processes_as_asked(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    run = parallel._run_worker
    monkeypatch.setattr(parallel, "_run_worker", lambda *job: started.append(1) or run(*job))
    texts = ["a" * 200] * 3
    assert tokenizer.encode_batch(texts, num_workers=3) == [tokenizer.encode("a" * 200)] * 3
    assert started == [1, 1]


def test_a_worker_that_fails_is_replaced(tokenizer, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert tokenizer.encode_batch(["a", "b"], num_workers=2) == [[64], [65]]
    assert "a worker failed" in caplog.text


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, threading\n"
        "multiprocessing.set_start_method('spawn')\n"
        "from gpt2fast.tokenizer import GPT2Tokenizer\n"
        "print('once')\n"
        "results = []\n"
        "def run():\n"
        "    results.append(GPT2Tokenizer().encode_batch(['a b'] * 9, num_workers=2))\n"
        "threads = [threading.Thread(target=run) for _ in range(2)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "assert results == [[[64, 275]] * 9] * 2\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")


def test_inside_a_spawned_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # A method of the package's: the new process cannot import the tests.
        job = pool.apply_async(GPT2Tokenizer().encode_batch, (["a", "b"],), {"num_workers": 2})
        assert job.get(timeout=TIMEOUT) == [[64], [65]]


@given(st.lists(st.text(max_size=5)), st.integers(1, 6))
def test_split_evenly(texts: list[str], parts: int) -> None:
    runs = parallel.split_evenly(texts, parts)
    assert [text for run in runs for text in run] == texts
    assert len(runs) <= parts
    assert all(runs)
    if runs:
        mean = sum(map(len, texts)) / parts
        assert max(sum(map(len, run)) for run in runs) <= mean + max(map(len, texts)) * 2
