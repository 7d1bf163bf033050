"""What `test_train_distributed.py` has `torchrun` start twice.

Goes on with the run that the test has left in a folder, and writes ``rank-<n>.json`` there.
"""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from gpt2fast.cli import main
from gpt2fast.training import distributed
from gpt2fast.training.distributed import Workers, start_workers
from gpt2fast.training.trainer import Trainer, TrainingError
from tests.training.chain import IN_PARTS, chain_trainer


def before_step(trainer: Trainer, step: int, act) -> None:
    """Have ``act`` called before the ``step``-th step, counted from 0."""
    take_step = trainer._train_step

    def act_and_take_step(progress):
        if trainer.step == step:
            act()
        return take_step(progress)

    trainer._train_step = act_and_take_step


def signal_own_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def go_on(folder: Path, workers: Workers, stop_at: int) -> dict:
    """Resume, and stop after the ``stop_at``-th step because one process has got a signal."""
    # Half the parts of one process: there are two.
    settings = replace(IN_PARTS, accumulate=2)
    trainer = chain_trainer(folder, settings, workers=workers)
    assert trainer.resume()
    resumed_at, calls = trainer.step, []
    if workers.parallel == "ddp":

        def count_and_reduce(state, bucket):
            calls.append(bucket.index())
            return default_hooks.allreduce_hook(state, bucket)

        trainer.loss.register_comm_hook(dist.group.WORLD, count_and_reduce)
    if workers.rank == 1:
        before_step(trainer, stop_at - 1, signal_own_process)
    # FSDP's, which has two names in the versions of PyTorch.
    name = "reduce_scatter_single"
    if not hasattr(dist, name):
        name = "reduce_scatter_tensor"
    scatter = getattr(dist, name)

    def count_and_scatter(*arguments, **options):
        calls.append(arguments)
        return scatter(*arguments, **options)

    with mock.patch.object(dist, name, count_and_scatter):
        stopped_by = trainer.run()
    return {
        "steps": [resumed_at, trainer.step],
        "stopped_by": stopped_by,
        "valid_loss": trainer.evaluate(32),
        "gradients_sent_a_step": len(calls) / (trainer.step - resumed_at),
        "held": sum(
            (p.to_local() if workers.parallel == "fsdp" else p).numel()
            for p in trainer.model.parameters()
        ),
    }


def poisoned_on_one(folder: Path, workers: Workers) -> str:
    """The message of a run whose loss is NaN in one process only."""
    trainer = chain_trainer(folder, replace(IN_PARTS, accumulate=2), workers=workers)
    if workers.rank == 1:
        trainer.loss.module.register_forward_hook(lambda module, given, loss: loss * float("nan"))
    try:
        trainer.run()
    except TrainingError as error:
        return str(error)
    raise AssertionError("it went on")


def run_scenarios(folder: Path) -> dict:
    results = {}
    with start_workers("fsdp", torch.device("cpu")) as workers:
        fsdp, ddp = workers, replace(workers, parallel="ddp")
        results["fsdp"] = go_on(folder / "chain", fsdp, stop_at=13)
        results["ddp"] = go_on(folder / "chain", ddp, stop_at=25)
        results["nan"] = poisoned_on_one(folder / "poisoned", ddp)
        arguments = json.loads((folder / "command.json").read_text())
        met = contextlib.nullcontext(fsdp)  # processes meet once
        with mock.patch.object(distributed, "start_workers", return_value=met):
            results["command"] = main(arguments)
    return results


if __name__ == "__main__":
    given = Path(sys.argv[1])
    rank = os.environ["RANK"]
    (given / f"rank-{rank}.json").write_text(json.dumps(run_scenarios(given)))
