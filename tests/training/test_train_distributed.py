"""Two processes train what one would, whatever happens to them on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel
from gpt2fast.cli import main
from gpt2fast.training.distributed import own_device
from gpt2fast.training.state import checkpoint_folders
from gpt2fast.training.trainer import Trainer
from tests.training.chain import IN_PARTS, chain_tokens, chain_trainer

_ROOT = Path(__file__).parents[2]
# What the order of additions costs in float32, grown over the steps.
_CURVE, _WEIGHTS = 1e-4, 2e-3


def torchrun(*arguments: str) -> list[str]:
    """The command of two processes on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launcher, *arguments]


def _curve(folder: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "lr", "valid_loss")
    curve = {name: [r[name] for r in records if name in r] for name in names}
    return {**curve, "step": [r["step"] for r in records], "tokens": [r["tokens"] for r in records]}


def _assert_same_curve(folder: Path, expected: Path) -> None:
    got, want = _curve(folder), _curve(expected)
    for name, values in want.items():
        assert got[name] == pytest.approx(values, rel=_CURVE), name


def _stop_before(trainer, step):
    """Train until ``step``, and leave the checkpoint of that step."""
    while trainer.step < step:
        progress = trainer.settings.progress(trainer.step, 0)
        trainer._losses.append(trainer._train_step(progress))
    trainer.save()


def test_a_run_goes_on_in_other_processes_and_stays_the_same(tmp_path):
    """One process, then two with FSDP, two with DDP, and one again: the curve is that of one."""
    reference = chain_trainer(tmp_path / "whole", IN_PARTS)
    assert reference.run() == 0
    _stop_before(chain_trainer(tmp_path / "chain", IN_PARTS), 6)

    (tmp_path / "tokens.bin").write_bytes(chain_tokens().tobytes())
    (tmp_path / "valid.bin").write_bytes(chain_tokens(400, 1).tobytes())
    reference.model.save_pretrained(tmp_path / "model")
    command = ["train", "--data", str(tmp_path / "tokens.bin"), "--cache-dir", str(tmp_path)]
    command += ["--valid", str(tmp_path / "valid.bin"), "--init-from", str(tmp_path / "model")]
    command += ["--batch-tokens", "128", "--row-tokens", "16", "--steps", "5", "--device", "cpu"]
    as_shards = ["--parallel", "fsdp", "--out", str(tmp_path / "sharded")]
    (tmp_path / "command.json").write_text(json.dumps([*command, *as_shards]))

    done = subprocess.run(
        torchrun("-m", "tests.training.two_processes", str(tmp_path)),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in (0, 1))
    parameters = reference.model.num_parameters()
    for results in (first, second):
        # Only the second had the signal.
        assert results["fsdp"]["stopped_by"] == results["ddp"]["stopped_by"] == signal.SIGTERM
        assert (results["fsdp"]["steps"], results["ddp"]["steps"]) == ([6, 13], [13, 25])
        # Two parts a step, and one exchange: of each of the two layers and the rest, or in all.
        assert results["fsdp"]["gradients_sent_a_step"] == 3
        assert results["ddp"]["gradients_sent_a_step"] == 1
        assert results["ddp"]["held"] == parameters
        assert "step 1: the loss is nan" in results["nan"]
    assert first["fsdp"]["held"] + second["fsdp"]["held"] == parameters
    assert first["fsdp"]["valid_loss"] == second["fsdp"]["valid_loss"]

    last = chain_trainer(tmp_path / "chain", IN_PARTS)
    assert last.resume()
    assert last.step == 25
    assert last.evaluate(32) == pytest.approx(first["ddp"]["valid_loss"], rel=1e-6)
    assert last.run() == 0
    _assert_same_curve(tmp_path / "chain", tmp_path / "whole")
    expected = dict(reference.model.named_parameters())
    for name, got in last.model.named_parameters():
        torch.testing.assert_close(got, expected[name], rtol=_WEIGHTS, atol=_WEIGHTS)

    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    assert first["command"] == second["command"] == 0
    _assert_same_curve(tmp_path / "sharded", tmp_path / "alone")
    sharded, alone = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("sharded", "alone")
    )
    assert sharded["settings"] == alone["settings"]
    for rows in (16, 32):
        name = f"validation_loss_rows_of_{rows}"
        assert sharded[name] == pytest.approx(alone[name], abs=2e-4)  # printed with four places
    models = [GPT2LMHeadModel.from_pretrained(tmp_path / name) for name in ("sharded", "alone")]
    for got, want in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-10, atol=1e-4)  # float16 on disk


def _children(process: int) -> list[int]:
    return [
        int(number)
        for path in Path(f"/proc/{process}/task").glob("*/children")
        for number in path.read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in Linux's /proc")
def test_a_killed_process_ends_the_job_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "tokens.bin").write_bytes(chain_tokens().tobytes())
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    command = ["train", "--data", str(tmp_path / "tokens.bin"), "--cache-dir", str(tmp_path)]
    command += ["--init-from", str(tmp_path / "model"), "--row-tokens", "16", "--device", "cpu"]
    command += ["--batch-tokens", "64", "--warmup", "3", "--dropout", "0.1", "--log-every", "1"]
    command += ["--resume"]
    out, checkpoints = tmp_path / "out", tmp_path / "out" / "checkpoints"

    job = subprocess.Popen(
        torchrun(
            "-m",
            "gpt2fast",
            *command,
            "--out",
            str(out),
            *("--steps", "100000", "--save-every", "2"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not checkpoint_folders(checkpoints):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = _children(job.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        printed = job.communicate(timeout=90)[0]
    finally:
        job.kill()
    assert job.returncode not in (0, None), printed
    assert "exitcode  : -9" in printed
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    # The same parts in one process, from the last checkpoint and from nothing.
    until = int(checkpoint_folders(checkpoints)[-1].name.removeprefix("step-")) + 3
    take_step = Trainer._train_step

    def take_steps_until(trainer, progress):
        if trainer.step == until - 1:
            signal.raise_signal(signal.SIGTERM)
        return take_step(trainer, progress)

    monkeypatch.setattr(Trainer, "_train_step", take_steps_until)
    alone = [*command, "--accumulate", "2", "--steps", "100000"]
    for folder in (out, tmp_path / "whole"):
        assert main([*alone, "--out", str(folder)]) == 128 + signal.SIGTERM
    assert "resumed at step" in capsys.readouterr().out
    _assert_same_curve(out, tmp_path / "whole")


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    wanted = torch.device("cuda")
    assert own_device(wanted) == wanted  # not under torchrun
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(wanted) == torch.device("cuda", 1)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="a GPU of its own, got --device cuda:0"):
        own_device(torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 on this machine has no GPU: PyTorch sees 2"):
        own_device(wanted)


def test_an_error_names_its_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--data", "/nothing.txt", "--out", str(tmp_path), "--steps", "1"]) == 1
    assert capsys.readouterr().err == "error: process 1: no file matches '/nothing.txt'\n"
