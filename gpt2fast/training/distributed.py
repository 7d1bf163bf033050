"""The processes of a run: how they share the model, and what they agree on.

``torchrun`` starts them and names them in the environment. Without it a run is one process, and
nothing here reaches torch.distributed.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

# A process that waits longer for the others fails, and torchrun ends the run.
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Workers:
    """The processes that train one model: by default this one alone.

    Attributes:
        rank: which of them this is; 0 writes and prints.
        count: how many there are.
        parallel: "ddp", every process holds the whole model (DistributedDataParallel), or "fsdp",
            parameters, gradients and optimizer state are sharded over them (FSDP2).
    """

    rank: int = 0
    count: int = 1
    parallel: str = "ddp"

    def share(self, module: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """``module`` as it is to be called, so that gradients are means over all processes.

        Parameters must be equal everywhere. For FSDP they are sharded in place, those of each of
        ``layers`` on their own, so that one layer at a time is whole.
        """
        if self.count == 1:
            return module
        if self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            device = next(module.parameters()).device
            mesh = init_device_mesh(device.type, (self.count,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def part(self, shared: nn.Module, last: bool) -> Iterator[None]:
        """Around one of the parts of a step: gradients travel after the last only."""
        if self.count > 1 and self.parallel == "fsdp":
            shared.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(shared, nn.parallel.DistributedDataParallel) and not last:
            with shared.no_sync():
                yield
        else:
            yield

    def release(self, shared: nn.Module) -> None:
        """After forward passes without backward ones: have parameters sharded again."""
        if self.count > 1 and self.parallel == "fsdp":
            shared.reshard()  # type: ignore[operator]

    def sum(self, *values: float) -> list[float]:
        """Each of ``values``, summed over all processes, in float64; all wait for each other."""
        if self.count == 1:
            return list(values)
        # On the CPU, where it does not wait for a GPU's queue.
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, gathered from all processes if it is sharded; detached."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor, whose class takes seconds to import
        return tensor.full_tensor()
    return tensor


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def own_device(device: torch.device) -> torch.device:
    """The device of this process, where ``device`` says what kind is wanted.

    Raises:
        ValueError: the machine has fewer GPUs than processes, or ``device`` is a certain GPU.
    """
    if not launched() or device.type != "cuda":
        return device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(
            f"under torchrun every process has a GPU of its own, got --device {device}"
        )
    if local >= count:
        raise ValueError(f"process {local} on this machine has no GPU: PyTorch sees {count}")
    return torch.device("cuda", local)


@contextlib.contextmanager
def start_workers(parallel: str, device: torch.device) -> Iterator[Workers]:
    """Meet the other processes that ``torchrun`` started; this one alone without it."""
    if not launched():
        yield Workers(parallel=parallel)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Host values travel by gloo, so that they do not wait for a GPU's queue.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    yield Workers(dist.get_rank(), dist.get_world_size(), parallel)
    # Not after an error: others may be gone, and would be waited for. torchrun ends them all.
    dist.destroy_process_group()
