"""Decoding token by token: a checked request, and the model's state on its batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.cache import KVCache, is_foreign
from gpt2fast.generation.options import GenerationOptions, ScoresProcessor
from gpt2fast.generation.prompts import Prompts, prepare_prompts
from gpt2fast.generation.sampling import (
    RandomRows,
    build_processors,
    check_scores,
    row_streams,
    sample,
)
from gpt2fast.generation.stopping import FINISH_REASONS, RUNNING, Stopping, StopStrings
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
        streams: of random numbers, (seed, index) for each row; None where nothing is drawn.
    """

    options: GenerationOptions
    prompts: Prompts
    past: KVCache | None
    eos: Sequence[int]
    pad: int
    allowed: Sequence[int]
    requested: int
    streams: Sequence[tuple[int, int]] | None

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
        streams = row_streams(options, len(prompts.lengths)) if options.do_sample else None
        return cls(options, prompts, past, eos, pad, allowed, requested, streams)

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


class Decoding:
    """Greedy decoding or sampling of a request.

    Attributes:
        sequences: ``[R, T]``, prompts and everything generated so far.
        reasons: ``[R]``, codes of `gpt2fast.generation.stopping.FINISH_REASONS`.
    """

    def __init__(self, decoder: Decoder, request: Request) -> None:
        options = request.options
        copies, prompts = options.num_return_sequences, request.prompts
        self._decoder = decoder
        self._request = request
        self.sequences = prompts.ids.repeat_interleave(copies, 0)
        self.reasons = torch.zeros(len(self.sequences), dtype=torch.int8, device=prompts.ids.device)
        self._random: RandomRows | None = None
        if request.streams is not None:
            self._random = RandomRows(request.streams, prompts.ids.device)

    @property
    def past(self) -> KVCache | None:
        """Keys and values of every token but the last of each row; None once a row has slid."""
        return None if self._decoder.slid else self._decoder.past

    def lines(self) -> Iterator["Line"]:
        """Generate, pausing after each token, with everything on the host."""
        for step in self.steps():
            before, codes = step.ended.tolist(), self.reasons.tolist()
            tokens = step.tokens.tolist()
            yield Line(
                [None if end else t for t, end in zip(tokens, before, strict=True)],
                [None if code == RUNNING else FINISH_REASONS[code] for code in codes],
                step.logprobs().tolist() if self._request.options.output_logprobs else None,
            )

    @torch.no_grad()
    def steps(self) -> Iterator["Step"]:
        """Generate, pausing after each token."""
        request, copies = self._request, self._request.options.num_return_sequences
        stopping, processors = request.stopping(), request.processors(copies)
        for count in range(1, request.new_tokens + 1):
            ended = self.reasons != RUNNING
            if count == 1:
                logits = self._decoder.prefill(request.prompts.ids).repeat_interleave(copies, 0)
                self._decoder.expand(copies)
            else:
                logits = self._decoder.step(self.sequences, ended)
            scores = logits
            for process in processors:
                scores = process(self.sequences, scores)
            check_scores(scores)
            if self._random is None:
                tokens = scores.argmax(-1)
            else:
                tokens = sample(scores, self._random.draw())
            tokens = tokens.masked_fill(ended, request.pad)
            self.sequences = torch.cat((self.sequences, tokens[:, None]), dim=1)
            self.reasons = torch.where(ended, self.reasons, stopping(self.sequences, count))
            yield Step(tokens, ended, logits, scores)
            if stopping.all_ended(self.reasons, count):
                break


class Step(NamedTuple):
    """``[R]`` new tokens, ``[R]`` rows that had ended before, ``[R, V]`` logits and scores."""

    tokens: Tensor
    ended: Tensor
    logits: Tensor
    scores: Tensor

    def logprobs(self) -> Tensor:
        """``[R]``, of the tokens under the model; 0 for rows that had ended."""
        logprobs = self.logits.log_softmax(-1).gather(1, self.tokens[:, None]).squeeze(1)
        return logprobs.masked_fill(self.ended, 0)


class Line(NamedTuple):
    """A step's new token of each row (None after its end), why it has ended, and log-probabilities
    where they are asked for."""

    token_ids: list[int | None]
    finish_reasons: list[str | None]
    logprobs: list[float] | None
