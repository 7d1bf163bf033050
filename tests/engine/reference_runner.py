"""The runner that the others are checked against: the model's own forward pass, slot by slot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt2fast import GPT2LMHeadModel, KVCache
from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.engine.speculation import PromptLookup
from gpt2fast.kernels.decode_state import RUNNING, DecodeState


class ReferenceRunner:
    """Nothing is fast here. What was never written is NaN, so that reading it shows.

    Args:
        shares: whether shared prefixes are read from their owner's slot.
        look_every: as a GPU's runner has it, above 1.
        proposes: whether it finds drafts by itself.

    Attributes:
        calls: what was asked for, in order.
        at_work: whether somebody is within `working`; the state is not to be touched elsewhere.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        slots: int,
        capacity: int,
        shares: bool = False,
        look_every: int = 1,
        proposes: bool = False,
    ) -> None:
        config = model.config
        self.slots, self.capacity = slots, capacity
        self.shares_prefix, self.look_every, self.proposes = shares, look_every, proposes
        self.calls: list[tuple[Any, ...]] = []
        self.closed, self.at_work = False, False
        self.state = DecodeState.empty(slots, capacity, config.vocab_size, model.device)
        self._model = model
        size = (config.n_layer, 2, slots, config.n_head, capacity, config.head_size)
        self._cache = torch.full(size, torch.nan, dtype=model.dtype, device=model.device)

    @contextmanager
    def working(self) -> Iterator[None]:
        outer, self.at_work = self.at_work, True
        try:
            yield
        finally:
            self.at_work = outer

    def prefill(self, slot: int, start: int, end: int) -> None:
        self.calls.append(("prefill", slot, start, end))
        logits = self._evaluate(slot, start, end)
        if self.state.status[slot] == RUNNING:
            self.state.lengths[slot] = end - 1
            select_and_commit(self.state, [slot], 0, logits[-1:])
        else:
            self.state.lengths[slot] = end

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
        self.calls.append(("advance", tuple(slots), steps, drafts))
        assert len(set(slots)) == len(slots)
        assert steps == 1 or self.proposes or not drafts
        state = self.state
        assert context == max(int(state.lengths[s]) for s in slots)
        for slot in slots:
            greedy = state.temperature[slot] == 0 and state.penalty[slot] == 1
            free = state.least[slot] <= state.lengths[slot] + 1
            assert not plain or (greedy and free)
        if drafts:
            needed = max(int(state.limits[s]) - 2 - int(state.lengths[s]) for s in slots)
            assert self.proposes or drafts <= needed
            assert context + steps * (drafts + 1) <= self.capacity
        for _ in range(steps):
            rows = []
            for slot in slots:
                start = int(state.lengths[slot])
                if self.proposes and drafts:
                    tokens = state.tokens[slot, : start + 1].tolist()
                    proposed = torch.tensor(PromptLookup(tokens, drafts, ngram).propose(drafts))
                    state.tokens[slot, start + 1 : start + 1 + len(proposed)] = proposed
                if state.status[slot] == RUNNING:
                    rows.append(self._evaluate(slot, start, start + drafts + 1))
                else:
                    rows.append(torch.full((drafts + 1, state.seen.shape[1]), torch.nan))
            select_and_commit(state, slots, drafts, torch.cat(rows))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        assert not self.shares_prefix
        self.calls.append(("copy", source, target, length))
        self._cache[:, :, target, :, :length] = self._cache[:, :, source, :, :length]

    def keys_values(self, slot: int, length: int) -> list[Tensor]:
        return [layer.clone() for layer in self._read(slot, length)]

    def close(self) -> None:
        self.closed = True

    def _read(self, slot: int, length: int) -> Tensor:
        """``[L, 2, H, length, D]``, a shared prefix included."""
        own = self._cache[:, :, slot, :, :length].clone()
        shared = min(int(self.state.prefix_lengths[slot]), length)
        source = int(self.state.prefix_slots[slot])
        own[..., :shared, :] = self._cache[:, :, source, :, :shared]
        return own

    def _evaluate(self, slot: int, start: int, end: int) -> Tensor:
        """Logits ``[end - start, V]``, and the cache filled."""
        assert 0 <= start < end <= self.capacity
        ids = self.state.tokens[slot, start:end].clone()[None]
        past = None
        if start:
            past = KVCache([layer[:, None] for layer in self._read(slot, start)])
            assert not any(layer.isnan().any() for layer in past), "unwritten cache is read"
        with torch.no_grad():
            out = self._model(ids, past_key_values=past, use_cache=True)
        for i, layer in enumerate(out.past_key_values):
            self._cache[i, :, slot, :, start:end] = layer[:, 0, :, start:end]
        return out.logits[0].float()
