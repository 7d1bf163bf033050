"""The train command in processes of its own: signals, kills, and the files it leaves."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2LMHeadModel
from gpt2fast.training import add_arguments, run

_OPTIONS = [
    *("--n-positions", "16", "--n-embd", "8", "--n-layer", "1", "--n-head", "1"),
    *("--batch-tokens", "32", "--row-tokens", "8", "--sampled-head", "200", "--warmup", "3"),
    *("--dropout", "0.1", "--threads", "1", "--device", "cpu"),
    *("--log-every", "5", "--valid-every", "10", "--baselines"),
]


@pytest.fixture
def texts(tmp_path):
    sentences = ["The wind rose at dusk.", "An old house creaked.", "Nobody came to the moor."]
    rng = random.Random(0)
    for name, count in (("train.txt", 300), ("valid.txt", 20)):
        (tmp_path / name).write_text(" ".join(rng.choices(sentences, k=count)))
    return ["--data", str(tmp_path / "train.txt"), "--valid", str(tmp_path / "valid.txt"),
            "--cache-dir", str(tmp_path / "cache")]  # fmt: skip


def _command(texts: list[str], out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "gpt2fast",
        "train",
        *texts,
        *_OPTIONS,
        "--out",
        str(out),
        *options,
    ]


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _logged(folder: Path) -> list[tuple]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["tokens"], r.get("lr"), r.get("valid_loss")) for r in records]


def _start_and_wait_for_checkpoint(command: list[str], out: Path) -> subprocess.Popen:
    before = set(out.glob("checkpoints/*.pt"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while set(out.glob("checkpoints/*.pt")) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path, texts):
    whole = _run(_command(texts, tmp_path / "whole", "--steps", "40", "--save-every", "1"))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    command = _command(texts, out, "--steps", "40", "--save-every", "1", "--resume")
    rng = random.Random(1)
    for _ in range(3):
        process = _start_and_wait_for_checkpoint(command, out)
        time.sleep(rng.uniform(0, 0.1))  # most of a step's time goes into its checkpoint
        process.kill()
        process.communicate()
    last = _run(command)
    assert last.returncode == 0, last.stderr
    assert "resumed at step" in last.stdout
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert _logged(out) == _logged(tmp_path / "whole")
    assert len(list(out.glob("checkpoints/*"))) == 2


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_signal_saves_and_a_finished_run_leaves_everything(tmp_path, texts):
    out = tmp_path / "out"
    process = _start_and_wait_for_checkpoint(
        _command(texts, out, "--max-minutes", "60", "--save-every", "20"), out
    )
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "saved, go on with --resume" in printed
    stopped_at = int(max(out.glob("checkpoints/*.pt")).stem.removeprefix("step-"))
    assert f"stopped at step {stopped_at}:" in printed

    again = _run(_command(texts, out, "--steps", "5"))
    assert again.returncode == 1
    assert "error:" in again.stderr
    assert "add --resume" in again.stderr

    steps = str(stopped_at + 10)
    done = _run(_command(texts, out, "--steps", steps, "--resume"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == stopped_at + 10
    assert summary["tokens"] == summary["steps"] * 32
    assert 0 < summary["validation_loss_bigram"] < summary["validation_loss_unigram"] < 8
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = GPT2LMHeadModel.from_pretrained(out)
    assert model.num_parameters() == summary["parameters"]
    assert model.config.n_positions == 16

    tuned = tmp_path / "tuned"
    command = [sys.executable, "-m", "gpt2fast", "train", *texts, "--out", str(tuned)]
    command += ["--init-from", str(out), "--steps", "2", "--lr", "1e-6", "--device", "cpu"]
    fine_tuned = _run([*command, "--batch-tokens", "32", "--row-tokens", "16"])
    assert fine_tuned.returncode == 0, fine_tuned.stderr
    for ours, theirs in zip(
        GPT2LMHeadModel.from_pretrained(tuned).parameters(), model.parameters(), strict=True
    ):
        # Two steps of at most lr each, then the rounding of float16 on disk.
        torch.testing.assert_close(ours, theirs, rtol=2**-11, atol=3e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1", "--data", "/nothing/here.txt"], "no file matches '/nothing/here.txt'"),
        ([], "give the run a length"),
        (["--steps", "1", "--preset", "gpt3"], "got 'gpt3'"),
        (["--steps", "1", "--device", "foo"], "--device must be cpu, cuda or cuda:N; got 'foo'"),
        (["--steps", "1", "--seed", "-1"], "seed must be in [0, 2**31), got -1"),
        (["--steps", "1", "--init-from", "x", "--n-embd", "8"], "--init-from brings its own sizes"),
    ],
)
def test_errors_are_one_line(tmp_path, texts, options, message, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(
        [*texts, "--out", str(tmp_path / "out"), "--batch-tokens", "1024", *options]
    )
    assert run(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
