"""Training state on disk: whole or absent, whatever moment the process dies at."""

import warnings
from pathlib import Path
from typing import Any

import torch

from gpt2fast.files import replacing

_KEEP = 2


def checkpoint_files(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-<step>.pt`` atomically, then drop all but the two newest.

    What a save that was cut short left behind goes as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as partial:
        torch.save(state, partial)
    for old in checkpoint_files(folder)[:-_KEEP]:
        old.unlink()
    for partial in folder.glob(".step-*.pt.*"):
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
