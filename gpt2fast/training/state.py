"""Training state on disk: whole or absent, whatever moment the process dies at."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_KEEP = 2


def checkpoint_files(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary neighbour, sync it, and rename it to ``path``."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-<step>.pt`` atomically, then drop all but the two newest.

    What a save that was cut short left behind goes as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    for old in checkpoint_files(folder)[:-_KEEP]:
        old.unlink()
    for partial in folder.glob("step-*.pt.tmp"):
        partial.unlink()
    return path


def load_newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where the folder has none.

    Files are tensors and plain values (``weights_only``). A damaged file is passed over with a
    warning; ValueError where every file is damaged.
    """
    files = checkpoint_files(folder)
    for path in reversed(files):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: PERF203 (a damaged archive raises many types)
            warnings.warn(f"cannot read {path}, trying an older one: {error}", stacklevel=2)
    if files:
        raise ValueError(f"none of the checkpoints in {folder} can be read")
    return None
