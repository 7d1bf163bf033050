"""What a decoding step reads and writes besides weights and cache: all of it on the device.

A *slot* is a row of the cache, owned by one sequence. A step evaluates *token rows*: row i is the
token at position ``lengths[slot] + offset`` of ``slots[i]``, where offset 0 is the slot's newest
token and 1, 2, ... are drafts that stand behind it in ``tokens``. Nothing of this is read on the
host between steps, so one CUDA graph serves every step; the host looks every few steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_EOS = 8  # ids that may end a sequence

# `DecodeState.status`
IDLE, RUNNING, EOS, LIMIT, BROKEN = -1, 0, 1, 2, 3


@dataclass(frozen=True)
class DecodeState:
    """State of S slots; ``capacity`` is how many positions the cache holds.

    int32 where nothing else is said. A position's entry in ``tokens``, ``uniforms`` and
    ``log_probs`` belongs to the token at that position; there is one more than the cache's
    positions, for the token predicted at the last one.

    Attributes:
        tokens: ``[S, capacity + 1]``, prompt and generated tokens; int64.
        lengths: ``[S]``, tokens whose keys are cached; ``tokens[s, lengths[s]]`` is the newest.
        limits: ``[S]``, how many tokens, with the prompt, the sequence may have.
        least: ``[S]``, how many it must have before an id of ``eos`` may be chosen.
        eos: ``[S, MAX_EOS]``, filled up with -1.
        status: ``[S]`` int8: IDLE, RUNNING, EOS, LIMIT (ended by that), BROKEN (no finite score).
        temperature: ``[S]`` float32; 0 chooses the largest score.
        top_k: ``[S]``; 0 for off.
        top_p: ``[S]`` float32; 1 for off.
        min_p: ``[S]`` float32; 0 for off.
        penalty: ``[S]`` float32, of repetition; 1 for off.
        uniforms: ``[S, capacity + 1]`` float64 in [0, 1): the random number of each position, so
            that a token depends on its sequence's seed alone, and not on what else ran.
        seen: ``[S, V]`` uint8, 1 for tokens that occur in the sequence up to its newest.
        log_probs: ``[S, capacity + 1]`` float32, of the generated tokens under the model, before
            all processors.
        scored: ``[S]`` uint8, 1 where somebody reads ``log_probs``; elsewhere they need not be
            written.
        prefix_slots, prefix_lengths: ``[S]``: the slot's first ``prefix_lengths`` positions are
            read from the cache of slot ``prefix_slots``; 0 where nothing is shared.
    """

    tokens: Tensor
    lengths: Tensor
    limits: Tensor
    least: Tensor
    eos: Tensor
    status: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    uniforms: Tensor
    seen: Tensor
    log_probs: Tensor
    scored: Tensor
    prefix_slots: Tensor
    prefix_lengths: Tensor

    @classmethod
    def empty(
        cls, slots: int, capacity: int, vocab_size: int, device: torch.device
    ) -> "DecodeState":
        """All slots idle."""

        def full(value: float, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        f32 = torch.float32
        return cls(
            tokens=full(0, capacity + 1, dtype=torch.int64),
            lengths=full(0),
            limits=full(0),
            least=full(0),
            eos=full(-1, MAX_EOS),
            status=full(IDLE, dtype=torch.int8),
            temperature=full(0, dtype=f32),
            top_k=full(0),
            top_p=full(1, dtype=f32),
            min_p=full(0, dtype=f32),
            penalty=full(1, dtype=f32),
            uniforms=full(0, capacity + 1, dtype=torch.float64),
            seen=full(0, vocab_size, dtype=torch.uint8),
            log_probs=full(0, capacity + 1, dtype=f32),
            scored=full(0, dtype=torch.uint8),
            prefix_slots=full(0),
            prefix_lengths=full(0),
        )
