"""Training state on disk, through torch.distributed.checkpoint: whole or absent at any moment.

A checkpoint is a folder ``step-<step>`` with the tensors in safetensors files, one a process, each
with the parts that this process held, and ``run.json`` with all else. Any number of processes reads
what any other number wrote. It holds no pickle.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpt2fast.files import try_lock
from gpt2fast.training.distributed import Workers

_KEEP = 2
_RUN_FILE = "run.json"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within, other runs are kept out of ``folder``, which is made if need be.

    The lock goes with the process, however that ends. Raises ValueError where another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        if not try_lock(file):
            file.seek(0)
            raise ValueError(f"{folder.parent}: another run is writing it, process {file.read()}")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def checkpoint_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*"))


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    run: dict[str, Any],
    workers: Workers,
) -> Path:
    """Write ``step-<step>``, then drop all but the two newest checkpoints.

    All processes call it together, on one file system. ``tensors`` are plain, equal everywhere, or
    DTensors; ``run`` is what JSON holds. The folder gets its name when everything is on the disk;
    what a save that was cut short left behind goes. Raises OSError where it cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    if workers.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir()
    workers.sum(0.0)  # nobody writes before the folder is there
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        with _one_process_is_meant():
            save(tensors, storage_writer=writer, no_dist=workers.count == 1)
    except CheckpointException as error:  # in every process, and no Exception
        raise OSError(f"cannot write {path}: {_reason(error)}") from error
    if workers.rank == 0:
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        with (partial / _RUN_FILE).open("w") as file:
            json.dump({**run, "files": sizes}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        if path.exists():  # it could not be read, or another run would have gone on from it
            _drop(path)
        partial.rename(path)
        _sync_folder(folder)
        for old in checkpoint_folders(folder)[:-_KEEP]:
            _drop(old)
    return path


def load_newest_checkpoint(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    check: Callable[[dict[str, Any]], None],
    workers: Workers,
) -> dict[str, Any] | None:
    """Read the newest checkpoint that can be read into ``tensors``, and return its ``run``.

    ``check`` gets a ``run`` before its tensors are read, and raises where it does not fit. None
    where the folder has no checkpoint. A damaged one is passed over with a warning; ValueError
    where every one is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    paths = checkpoint_folders(folder)
    for path in reversed(paths):
        try:
            run = _read_run(path)
        except (OSError, ValueError) as error:
            _warn_damaged(path, error)
            continue
        check(run)
        try:
            reader = HuggingFaceStorageReader(str(path))
            with _one_process_is_meant():
                load(tensors, storage_reader=reader, no_dist=workers.count == 1)
        except CheckpointException as error:  # in every process, wherever it was raised
            _warn_damaged(path, error)
            continue
        return run
    if paths:
        raise ValueError(f"none of the checkpoints in {folder} can be read")
    return None


def _read_run(path: Path) -> dict[str, Any]:
    """The ``run`` of a checkpoint whose files are all there in full length."""
    run: dict[str, Any] = json.loads((path / _RUN_FILE).read_text())
    for name, size in run.pop("files").items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, it had {size}")
    return run


def _warn_damaged(path: Path, error: BaseException) -> None:
    warnings.warn(f"cannot read {path}, trying an older one: {_reason(error)}", stacklevel=3)


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or unini")
        yield


def _drop(path: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)
