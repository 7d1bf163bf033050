"""What only a process of its own can show: imports, signals, closed pipes; and `train`."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2LMHeadModel, __version__
from gpt2fast.cli import main
from gpt2fast.training.trainer import Trainer

TIMEOUT = 120  # seconds; the machine may be busy

# As `python -m gpt2fast`, but listening to Ctrl-C even where the test run was started in the
# background by a shell that turns it off.
LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("gpt2fast", run_name="__main__")
"""


@contextlib.contextmanager
def endless(model: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that generates far more than anybody waits for, some text of it read already."""
    words = ("generate", "Once upon a time", "--slide", "--max-new-tokens", "1000000")
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, *words, "--model", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        # More than the prompt, while the process goes on: the text is streamed, not kept.
        assert process.stdout.read(20).startswith(b"Once upon a time")
        yield process
    finally:
        process.kill()
        process.wait()


def test_help_version_and_mistakes_load_no_torch() -> None:
    code = """
import contextlib, sys
from gpt2fast.cli import main
for words in (["--help"], ["--version"], ["generate", "--help"], ["train", "--help"], ["tell"],
              ["generate", "--top-k", "x"], ["score", "--help"],
              ["score", "--stride", "0", "a.txt"]):
    with contextlib.suppress(SystemExit):
        main(words)
main(["generate", ""])
main(["score", "absent.txt"])
print(*sorted({"torch", "numpy", "transformers", "huggingface_hub", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"gpt2fast {__version__}" in done.stdout
    assert "invalid choice: 'tell'" in done.stderr
    assert "the prompt is empty" in done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_a_reader_that_leaves_ends_it_quietly(tiny: Path) -> None:
    with endless(tiny) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_an_interrupt_ends_it_with_what_was_printed(tiny: Path) -> None:
    with endless(tiny) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 130
        assert out.endswith(b"\n")
        assert b"ended by interrupted" in err
        assert b"Traceback" not in err


def test_train_then_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 40)
    folder = tmp_path / "model"
    sizes = "--n-positions 32 --n-embd 16 --n-layer 1 --n-head 2 --row-tokens 32 --batch-tokens 64"
    words = ["train", "--data", str(text), "--out", str(folder), "--steps", "3", *sizes.split()]
    assert main([*words, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert GPT2LMHeadModel.from_pretrained(folder).config.n_positions == 32
    capsys.readouterr()
    assert main(["generate", "the cat", "--model", str(folder), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def test_fine_tuning_a_float16_checkpoint_keeps_float32_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT2LMHeadModel.from_pretrained(tiny, dtype="float16").save_pretrained(tmp_path / "half")
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 40)
    seen = []
    monkeypatch.setattr(Trainer, "run", lambda self: seen.append(self.model.dtype) or signal.SIGINT)
    words = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--steps", "1"]
    words += ["--init-from", str(tmp_path / "half"), "--row-tokens", "32", "--batch-tokens", "32"]
    assert main(["train", *words, "--cache-dir", str(tmp_path / "cache")]) == 130
    assert seen == [torch.float32]


def test_train_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, out = str(tmp_path / "gone.txt"), str(tmp_path / "out")
    assert main(["train", "--data", gone, "--out", out, "--steps", "1"]) == 1
    err = capsys.readouterr().err
    assert "no file matches" in err
    assert gone in err
    assert err.count("\n") == 1
