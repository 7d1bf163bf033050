"""When a row has ended, and why."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Why a row ended, by the code that the decoding loops keep for it.
FINISH_REASONS = ("running", "eos", "stop_string", "context", "length")
RUNNING, EOS, STOP_STRING, CONTEXT, LENGTH = range(5)


class StopStrings:
    """Whether a row's text has just come to one of the stop strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        # A token stands for at least a byte, so this many reach back to where a string begins.
        self._reach = max(len(string.encode()) for string in strings)

    def __call__(self, sequences: Tensor) -> Tensor:
        """``[B]`` boolean for ``[B, T]``: a stop string ends in the row's last token."""
        tails = sequences[:, -self._reach :].tolist()
        return torch.tensor([self.ends(tail) for tail in tails], device=sequences.device)

    def ends(self, ids: list[int]) -> bool:
        """Whether a stop string ends in the last of ``ids``."""
        tail = ids[-self._reach :]
        text = self._tokenizer.decode(tail)
        before = self._tokenizer.decode(tail[:-1]) if len(tail) > 1 else ""
        # A character that the last token completes reads as U+FFFD before it.
        known = len(before.rstrip("\ufffd"))
        return any(text.find(s, max(0, known - len(s) + 1)) >= 0 for s in self._strings)


class Stopping:
    """The conditions that end a row.

    Args:
        eos: ids that end a row.
        strings: texts that end a row, or None.
        allowed: how many new tokens each prompt's row may have.
        requested: how many were asked for; a row that may have fewer is at the context's end.
    """

    def __init__(
        self,
        eos: Sequence[int],
        strings: StopStrings | None,
        allowed: Sequence[int],
        requested: int,
        device: torch.device,
    ) -> None:
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._strings = strings
        self._allowed = torch.tensor(allowed, device=device)
        self._at_limit = torch.where(self._allowed < requested, CONTEXT, LENGTH).to(torch.int8)
        self._soonest = min(allowed)
        self._never_early = not eos and strings is None

    def __call__(self, sequences: Tensor, new_tokens: int) -> Tensor:
        """Codes of `FINISH_REASONS`, ``[B]`` int8.

        Args:
            sequences: ``[B, T]``; B is a multiple of the number of prompts, grouped by prompt.
            new_tokens: how many of the T are new.
        """
        reasons = torch.isin(sequences[:, -1], self._eos).to(torch.int8) * EOS
        if self._strings is not None:
            stopped = self._strings(sequences) & (reasons == RUNNING)
            reasons = reasons.masked_fill(stopped, STOP_STRING)
        if new_tokens >= self._soonest:
            rows = len(reasons) // len(self._allowed)
            full = (self._allowed <= new_tokens).repeat_interleave(rows)
            at_limit = self._at_limit.repeat_interleave(rows)
            reasons = torch.where(full & (reasons == RUNNING), at_limit, reasons)
        return reasons

    def all_ended(self, reasons: Tensor, new_tokens: int) -> bool:
        """Whether no row goes on; asks the device only where the answer may be yes."""
        if self._never_early and new_tokens < self._soonest:
            return False
        return bool((reasons != RUNNING).all())
