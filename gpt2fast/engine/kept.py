"""The engines behind `generate`: built when they are first of use, one a model, and kept.

An engine lives as long as its model, which it does not keep alive: it hangs on a table beside it,
so copies, pickles and state dicts of the model know nothing of it.
"""

import contextlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpt2fast import replay
from gpt2fast.engine.engine import MAX_SLOTS, Engine
from gpt2fast.engine.graphs import empty_cache
from gpt2fast.engine.runner import OutOfMemory, is_out_of_memory
from gpt2fast.engine.weights import fingerprint, why_not
from gpt2fast.kernels.backend import serves

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

_LEAST_SLOTS = 4  # so that a few calls at once find room
_LEAST_CAPACITY = 1024
_CPU_SLOTS = 64  # attention goes slot by slot there: more rows are better evaluated as one batch


class _Kept:
    """What is kept for a model.

    Attributes:
        engine, mark: the engine, and what it was built from.
        refused: a mark, slots and capacity for which there was no memory.
    """

    def __init__(self) -> None:
        # Reentrant: while an engine is built the garbage collector may run what calls `release`.
        self.lock = threading.RLock()
        self.engine: Engine | None = None
        self.mark: Hashable = None
        self.refused: tuple[Hashable, int, int] | None = None

    def refuses(self, mark: Hashable, slots: int, capacity: int) -> bool:
        """Whether there was no memory for as much, or less."""
        if self.refused is None:
            return False
        refused_mark, least_slots, least_capacity = self.refused
        return refused_mark == mark and slots >= least_slots and capacity >= least_capacity


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_TABLE = threading.RLock()  # reentrant for the same reason
# Models of other libraries, and the one of ours that generates for each from the same parameters.
STAND_INS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
_INHERITED: list[_Kept] = []


def _start_anew() -> None:
    """In a forked process: other threads, which are not in it, may have held any of the locks."""
    global _KEPT, _TABLE
    # Not freed: a forked process cannot free what is on a GPU, and the rest it has not copied.
    _INHERITED.extend(_KEPT.values())
    _KEPT, _TABLE = weakref.WeakKeyDictionary(), threading.RLock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_start_anew)


def why_not_on(device: torch.device) -> str | None:
    """Why `generate` uses no engine on a device; None where it does.

    Raises:
        RuntimeError: the triton backend is selected by hand and cannot run there.
    """
    if device.type == "cpu":
        return "the kernels are selected by hand, in the interpreter" if serves(device) else None
    if device.type == "cuda":
        return None if serves(device) else "our kernels do not run on it"
    return f"there is none for {device.type!r}"


def why_not_kept(model: "LanguageModel") -> str | None:
    """Why `generate` does not use an engine for this model as it is now; None if it does."""
    device = model.device
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    reason = why_not_on(device)
    if reason is not None or device.type != "cuda":
        return reason or why_not(model)
    from gpt2fast.engine.triton_runner import unsupported

    return unsupported(model)


def engine_for(model: "LanguageModel", rows: int, positions: int) -> Engine | None:
    """The model's engine, of at least ``rows`` slots and ``positions`` positions.

    Returns:
        None where the model or so many rows cannot be served, a smaller engine is in use, or there
        is no memory for one, of which a warning tells the first time.
    """
    most = _CPU_SLOTS if model.device.type == "cpu" else MAX_SLOTS
    if rows > most or why_not_kept(model) is not None:
        return None
    mark = fingerprint(model)
    with _TABLE:
        kept = _KEPT.setdefault(model, _Kept())
    with kept.lock:
        engine = kept.engine
        if engine is not None and (engine.closed or kept.mark != mark):
            engine = kept.engine = None  # whoever still reads from it keeps it
        if engine is not None and engine.slots >= rows and engine.capacity >= positions:
            return engine
        slots = max(_LEAST_SLOTS, _power_of_two(rows), 0 if engine is None else engine.slots)
        capacity = min(
            model.config.n_positions,
            max(
                _LEAST_CAPACITY, _power_of_two(positions), 0 if engine is None else engine.capacity
            ),
        )
        slots = min(slots, most)
        if kept.refuses(mark, slots, capacity):
            return None
        if engine is not None and not engine.close_if_idle():
            return None
        engine = kept.engine = None  # its memory is free before the new one takes some
        kept.engine, kept.mark = _build(model, kept, mark, slots, capacity), mark
        return kept.engine


def release(model: nn.Module) -> None:
    """Free the memory that is held for a model: its engine, which the next call builds anew, and
    what a GPU has recorded of its forward passes.

    What is being generated by other threads, or is read from an open stream, ends with a
    RuntimeError.

    Args:
        model: this package's, or one of transformers that was accelerated.
    """
    model = STAND_INS.get(model, model)
    with _TABLE:
        kept = _KEPT.pop(model, None)
    if kept is not None:
        with kept.lock:
            if kept.engine is not None:
                kept.engine.close()
    for module in model.modules():
        replay.forget(module)


def _build(
    model: "LanguageModel", kept: _Kept, mark: Hashable, slots: int, capacity: int
) -> Engine | None:
    try:
        return Engine(model, slots, capacity, prefill_tokens=None)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
    _refuse(kept, mark, slots, capacity, message)
    return None


def give_up(model: nn.Module, engine: Engine, error: OutOfMemory) -> None:
    """Do without an engine that has run out of memory at work."""
    with _TABLE:
        kept = _KEPT.get(model)
    if kept is None:
        return
    with kept.lock:
        if kept.engine is engine:
            kept.engine = None
            _refuse(kept, kept.mark, engine.slots, engine.capacity, str(error))


def _refuse(kept: _Kept, mark: Hashable, slots: int, capacity: int, message: str) -> None:
    kept.refused = mark, slots, capacity
    with contextlib.suppress(RuntimeError):
        empty_cache()
    warnings.warn(
        f"there is no memory for a decode engine of {slots} x {capacity} positions; generate goes "
        f"on without it ({message})",
        stacklevel=2,
    )


def _power_of_two(count: int) -> int:
    """``count`` rounded up."""
    return 1 << (count - 1).bit_length()
