"""What the engine asks of whatever evaluates the model: one interface for CPU and GPU."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from gpt2fast.kernels.decode_state import DecodeState

# How PyTorch says it: where CUDA itself has none, for a module or a graph say, and on a CPU.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(RuntimeError):
    """There is no memory for what a runner was to do. Nothing of it was done."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever kind, says that there is no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """Of the message; the error's kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Runner(Protocol):
    """A model with a cache of S slots.

    Attributes:
        state: what the steps read and write; the engine fills a slot of it before `prefill`.
        slots: S.
        capacity: positions of a slot.
        shares_prefix: whether a slot may read its first positions from another one's cache
            (``prefix_slots``); otherwise `copy_prefix` copies them.
        look_every: after how many steps of `advance` at most the engine should look at the state.
        proposes: whether `advance` proposes drafts by itself, from what the sequence holds already.
    """

    state: DecodeState
    slots: int
    capacity: int
    shares_prefix: bool
    look_every: int
    proposes: bool

    def working(self) -> AbstractContextManager[None]:
        """Within, what is done to the state is in order with what the runner does.

        A runner may do its work on a stream of its own, which the caller's current stream waits for
        when the block is left, and which has waited for that when it is entered.
        """

    def prefill(self, slot: int, start: int, end: int) -> None:
        """Evaluate ``state.tokens[slot, start:end]``; positions before ``start`` are in the cache.

        Fills the cache up to ``end``, sets ``lengths[slot]``. Where ``end`` is all of the prompt
        (the engine has set the status RUNNING), chooses the next token and commits it: see
        `gpt2fast.engine.sampling.select_and_commit`.

        A runner that reads the weights less often for several prompts together has a
        ``prefill_many(pieces)`` too, of (slot, start, end) of different slots.
        """

    def advance(
        self,
        slots: Sequence[int],
        steps: int,
        drafts: int = 0,
        ngram: int = 0,
        *,
        plain: bool = False,
        context: int = 0,
    ) -> None:
        """Evaluate and commit ``steps`` times the newest token of each of ``slots``, with the
        ``drafts`` tokens behind it, of which as many are kept as equal what would have been chosen.

        The drafts stand in ``tokens``, and ``steps`` is 1; or, where the runner `proposes`, it
        writes them before each step: what followed the last ``ngram`` tokens earlier. Every slot
        has room: ``length + steps * (drafts + 1) <= capacity``.

        ``plain`` promises that every slot is greedy, without penalty, and free to end; ``context``
        is an upper bound of their ``lengths`` before the call. Neither changes a token.

        A slot whose status is no longer RUNNING is left alone. May return before it is done; what
        is read of the state afterwards is then waited for by the reading.
        """

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first ``length`` positions."""

    def keys_values(self, slot: int, length: int) -> list[Tensor]:
        """A copy of the slot's cache, for each layer ``[2, H, length, D]``."""

    def close(self) -> None:
        """Free the memory; nothing may be called afterwards."""
