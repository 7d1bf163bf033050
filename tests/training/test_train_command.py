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

from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from gpt2fast.cli import main
from gpt2fast.training import add_arguments, run
from gpt2fast.training.state import checkpoint_folders

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


def _run_here(command: list[str]) -> int:
    """Run a command in this process: importing PyTorch is most of the time of another."""
    threads = torch.get_num_threads()
    try:
        return main(command[3:])
    finally:
        torch.set_num_threads(threads)


def _logged(folder: Path) -> list[tuple]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    names = ("step", "tokens", "lr", "loss", "valid_loss")
    return [tuple(record.get(name) for name in names) for record in records]


def _start_and_wait_for_checkpoint(command: list[str], out: Path) -> subprocess.Popen:
    before = set(checkpoint_folders(out / "checkpoints"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while set(checkpoint_folders(out / "checkpoints")) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path, texts, capsys):
    whole = _command(texts, tmp_path / "whole", "--steps", "40", "--save-every", "20")
    assert _run_here(whole) == 0
    out = tmp_path / "killed"
    command = _command(texts, out, "--steps", "40", "--save-every", "1", "--resume")
    rng = random.Random(1)
    for _ in range(2):
        process = _start_and_wait_for_checkpoint(command, out)
        time.sleep(rng.uniform(0, 0.1))  # most of a step's time goes into its checkpoint
        process.kill()
        process.communicate()
    assert _run_here(command) == 0
    assert "resumed at step" in capsys.readouterr().out
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert _logged(out) == _logged(tmp_path / "whole")
    assert len({path.name for path in (out / "checkpoints").iterdir()} - {".lock"}) == 2


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_signal_saves_and_a_finished_run_leaves_everything(tmp_path, texts, capsys):
    out = tmp_path / "out"
    process = _start_and_wait_for_checkpoint(
        _command(texts, out, "--max-minutes", "60", "--save-every", "20"), out
    )
    assert _run_here(_command(texts, out, "--max-minutes", "60", "--resume")) == 1
    error = f"error: {out}: another run is writing it, process {process.pid}\n"
    assert capsys.readouterr().err == error
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "saved, go on with --resume" in printed
    stopped_at = int(checkpoint_folders(out / "checkpoints")[-1].name.removeprefix("step-"))
    assert f"stopped at step {stopped_at}:" in printed

    assert _run_here(_command(texts, out, "--steps", "5")) == 1
    error = capsys.readouterr().err
    assert "error:" in error
    assert "add --resume" in error

    steps = str(stopped_at + 10)
    assert _run_here(_command(texts, out, "--steps", steps, "--resume")) == 0
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
    assert _run_here([*command, "--batch-tokens", "32", "--row-tokens", "16"]) == 0
    for ours, theirs in zip(
        GPT2LMHeadModel.from_pretrained(tuned).parameters(), model.parameters(), strict=True
    ):
        # Two steps of at most lr each, then the rounding of float16 on disk.
        torch.testing.assert_close(ours, theirs, rtol=2**-11, atol=3e-6)


def test_fine_tuning_reads_texts_as_the_model_does(tmp_path, texts, capsys):
    """With the tokenizer of its folder: here one of bytes alone, and an end."""
    folder, out = tmp_path / "model", tmp_path / "out"
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    alphabet = list(GPT2Tokenizer().encoder)[:256]
    encoder = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(encoder))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    command = ["train", *texts, "--init-from", str(folder), "--out", str(out), "--steps", "1"]
    command += ["--batch-tokens", "32", "--row-tokens", "16", "--device", "cpu"]
    assert main(command) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["training_tokens"] == (tmp_path / "train.txt").stat().st_size + 1
    assert GPT2Tokenizer.from_pretrained(out).encoder == encoder

    # One of a kind that is not here matters for texts alone.
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    command[command.index("--out") + 1] = str(tmp_path / "second")
    assert main(command) == 1
    assert "has not the form of a tokenizer.json" in capsys.readouterr().err
    (tmp_path / "ids.bin").write_bytes(bytes(400))
    command[1 : command.index("--cache-dir")] = ["--data", str(tmp_path / "ids.bin")]
    assert main(command) == 0


def test_models_that_cannot_be_trained_in_that_place(tmp_path, texts, capsys):
    """The folder that training begins from is not overwritten; low-bit weights stay as they are."""
    folder = tmp_path / "model"
    config = GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    GPT2LMHeadModel.from_pretrained(folder, quantize="int8").save_pretrained(tmp_path / "int8")
    command = ["train", *texts, "--steps", "1", "--batch-tokens", "32", "--row-tokens", "16"]
    for start, out, message in (
        (folder, folder / ".." / "model", "would replace the model of --init-from"),
        (tmp_path / "int8", tmp_path / "out", "int8: a quantised model cannot be trained"),
    ):
        assert main([*command, "--init-from", str(start), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
    assert not (folder / "checkpoints").exists()


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


def test_threads_are_counted_from_one(texts, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([*texts, "--out", "out", "--threads", "-1"])
    assert "must be from 1 to 2147483647; got -1" in capsys.readouterr().err
