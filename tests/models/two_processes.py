"""A training step in two processes; they import neither the reference nor what tests need."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gpt2fast
from tests.interpreter import prepare_once_a_launch

KINDS = ("ddp", "fsdp2")


def gradients_of_rank(
    rank: int, port: int, fields: dict[str, Any], state: Any, ids: Tensor, result: Path
) -> None:
    """One of two processes, each with one row of ``ids`` ``[2, S]``, on the Triton kernels.

    The first saves to ``result``: ``{kind: {name: gradient}}``.
    """
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    prepare_once_a_launch()
    found = {}
    for kind in KINDS:
        model = gpt2fast.GPT2LMHeadModel(gpt2fast.GPT2Config(**fields)).eval()
        model.load_state_dict(state)
        wrapped, row = _wrapped(model, kind), ids[rank : rank + 1]  # kept: its hooks go with it
        with gpt2fast.backend("triton"):
            wrapped(row, labels=row).loss.backward()
        found[kind] = {
            name: parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
            for name, parameter in model.named_parameters()
        }
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


def _wrapped(model: Any, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    return model
