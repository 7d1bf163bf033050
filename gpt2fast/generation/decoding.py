"""Decoding token by token: a checked request, and the model's state on its batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.cache import KVCache, is_foreign
from gpt2fast.generation.options import GenerationOptions, ScoresProcessor
from gpt2fast.generation.prompts import Prompts, prepare_prompts
from gpt2fast.generation.sampling import build_processors
from gpt2fast.generation.stopping import Stopping, StopStrings
from gpt2fast.transformer import compute_dtype

if TYPE_CHECKING:
    from gpt2fast.model import GPT2DoubleHeadsModel, GPT2LMHeadModel

    LanguageModel: TypeAlias = GPT2LMHeadModel | GPT2DoubleHeadsModel


@dataclass(frozen=True)
class Request:
    """What to generate, checked.

    Attributes:
        past: keys and values of the prompts' first tokens, or None.
        eos, pad: ids that end a row, and the one that fills it up afterwards.
        allowed: how many new tokens each prompt's row may have.
        requested: how many were asked for.
    """

    options: GenerationOptions
    prompts: Prompts
    past: KVCache | None
    eos: Sequence[int]
    pad: int
    allowed: Sequence[int]
    requested: int

    @classmethod
    def prepare(
        cls,
        model: "LanguageModel",
        input_ids: Any,
        attention_mask: Tensor | None,
        past_key_values: Any,
        options: GenerationOptions,
    ) -> "Request":
        """Check everything that can be checked before the model runs.

        Raises:
            ValueError: `gpt2fast.generation.GenerationMixin.generate` lists the reasons.
        """
        if model.training and model.transformer.gradient_checkpointing:
            raise ValueError(
                "generate needs the past, which gradient checkpointing drops in training mode; "
                "call eval() first"
            )
        config = model.config
        eos, pad = options.special_tokens(config)
        chosen = options.pad_token_id is not None or config.pad_token_id is not None
        prompts = prepare_prompts(
            input_ids,
            attention_mask,
            config,
            model.device,
            pad,
            infer_mask=chosen and pad not in eos,
        )
        requested = options.new_tokens(prompts.ids.shape[1], config.n_positions)
        allowed = [requested] * len(prompts.lengths)
        if options.context_policy == "stop":
            for i, length in enumerate(prompts.lengths):
                if length > config.n_positions:
                    raise ValueError(
                        f"prompt {i} has {length} tokens; the context holds {config.n_positions} "
                        "(context_policy='slide' keeps the last of them)"
                    )
                # The last position's prediction is one token more than the context.
                allowed[i] = min(requested, config.n_positions + 1 - length)
        past = _check_past(past_key_values, prompts.ids.shape[1])
        return cls(options, prompts, past, eos, pad, allowed, requested)

    @property
    def new_tokens(self) -> int:
        """The most new tokens of any row."""
        return max(self.allowed)

    def stopping(self) -> Stopping:
        stops, device = self.options.stops, self.prompts.ids.device
        strings = StopStrings(stops, self.options.tokenizer) if stops else None
        return Stopping(self.eos, strings, self.allowed, self.requested, device)

    def processors(self, copies: int) -> list[ScoresProcessor]:
        """The processors of scores for ``copies`` rows a prompt."""
        leading = self.prompts.leading
        if leading is not None:
            leading = leading.repeat_interleave(copies)
        return build_processors(self.options, self.eos, self.prompts.ids.shape[1], leading)


def _check_past(past: Any, prompt_length: int) -> KVCache | None:
    if past is None or (is_foreign(past) and past.get_seq_length() == 0):
        return None
    cache = KVCache.from_past(past)
    length = cache.get_seq_length()
    if length >= prompt_length:
        raise ValueError(
            "input_ids must hold the tokens of the past and at least one more; "
            f"got {prompt_length} tokens and a past of {length}"
        )
    return cache


class Decoder:
    """The model on one batch: logits after the prompts, then after one more token at a time.

    Rows keep to themselves: each has its own positions and, under the policy "slide", its own
    moment to fall back to the last half of its context.

    Attributes:
        past: keys and values of every token evaluated; None before the first.
        slid: whether a row has lost the beginning of its context.
    """

    def __init__(self, model: "LanguageModel", request: Request) -> None:
        prompts = request.prompts
        self.past = request.past
        self.slid = False
        self._model = model
        self._limit = model.config.n_positions
        self._slides = request.options.context_policy == "slide"
        self._room = request.new_tokens
        self._prompt_mask = prompts.mask
        # Tokens of each row that the cache holds, padding aside; and the most of any row.
        self._lengths = torch.tensor(prompts.lengths, device=prompts.ids.device)
        self._longest = max(prompts.lengths)
        # [B, 1, 1, capacity], the columns of the cache that count; None where all do.
        self._keys: Tensor | None = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits ``[B, V]`` after the prompts ``[B, T]``."""
        if self._longest > self._limit:
            return self._restart(ids, self._lengths)
        return self._evaluate(ids, self._prompt_mask)

    def step(self, sequences: Tensor, finished: Tensor | None = None) -> Tensor:
        """Logits ``[B, V]`` after the last token of ``sequences`` ``[B, T]``, which is new.

        Args:
            finished: ``[B]`` boolean, rows whose logits nobody reads.
        """
        assert self.past is not None
        self._lengths = self._lengths + 1
        self._longest += 1
        if self._slides and self._longest > self._limit:
            lengths = self._lengths
            return self._restart(
                sequences, lengths if finished is None else lengths.masked_fill(finished, 1)
            )
        keys, positions = self._keys, None
        if keys is not None:
            keys = keys[..., : self.past.get_seq_length() + 1]
            # A finished row may go on beyond the context.
            positions = (self._lengths - 1).clamp(max=self._limit - 1)[:, None]
        return self._forward(sequences[:, -1:], keys, positions)

    def expand(self, copies: int) -> None:
        """Repeat every row ``copies`` times, side by side."""
        if copies == 1:
            return
        assert self.past is not None
        rows = torch.arange(len(self._lengths), device=self._lengths.device)
        self.reorder(rows.repeat_interleave(copies))
        self._lengths = self._lengths.repeat_interleave(copies)
        if self._prompt_mask is not None:
            self._prompt_mask = self._prompt_mask.repeat_interleave(copies, 0)
        if self._keys is not None:
            self._keys = self._keys.repeat_interleave(copies, 0)

    def reorder(self, rows: Tensor) -> None:
        """Go on in row i with the past of row ``rows[i]``, which has the same prompt."""
        assert self.past is not None
        self.past = self.past.select(rows)

    def _restart(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Evaluate again, from position 0, the end of every row of ``[B, T]``: half the context of
        a row that is longer than it, ``lengths`` ``[B]`` tokens of any other."""
        lengths = torch.where(lengths > self._limit, max(1, self._limit // 2), lengths)
        counts = torch.ones_like(sequences, dtype=torch.bool)
        if self._prompt_mask is not None:
            counts[:, : self._prompt_mask.shape[1]] = self._prompt_mask
        counts &= counts.flip(1).cumsum(1).flip(1) <= lengths[:, None]
        first = int(counts.any(0).int().argmax())
        mask = counts[:, first:]
        self._lengths, self._longest = lengths, int(lengths.max())
        self.slid, self.past = True, None
        return self._evaluate(sequences[:, first:], None if mask.all() else mask)

    def _evaluate(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits after ``[B, T]``, of which ``self.past`` may hold the beginning."""
        batch, length = ids.shape
        room = min(self._room, self._limit - self._longest) if self._slides else self._room
        if self.past is None:
            self.past = self._empty_cache(batch, length + room)
        self._keys = None if mask is None else F.pad(mask, (0, room), value=True)[:, None, None]
        return self._forward(ids[:, self.past.get_seq_length() :], mask, None)

    def _empty_cache(self, batch: int, capacity: int) -> KVCache:
        config, device = self._model.config, self._model.device
        dtype = compute_dtype(self._model.dtype, device)
        shape = (batch, config.n_head, config.head_size)
        return KVCache.empty(config.n_layer, shape, dtype, device, capacity)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        body = self._model.transformer(
            ids,
            past_key_values=self.past,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
        )
        self.past = body.past_key_values
        logits: Tensor = self._model.lm_head(body.last_hidden_state[:, -1])
        return logits.float()
