"""Requests that the decode engine serves, which are most."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2fast.cache import KVCache
from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.generation.decoding import Line, Request
from gpt2fast.generation.stopping import StopStrings
from gpt2fast.kernels.decode_state import MAX_EOS

if TYPE_CHECKING:
    from gpt2fast.engine.engine import Engine
    from gpt2fast.generation.decoding import LanguageModel

_ALL = 2**62


class Served:
    """A request in its model's engine. Close it, whatever happens: its rows hold slots."""

    @classmethod
    def of(cls, model: "LanguageModel", request: Request) -> "Served | None":
        """The request taken in, or None where the model has to be run the general way."""
        if not _can_be_served(request):
            return None
        # Not at the top: the engine imports this package's other modules.
        from gpt2fast.engine.kept import engine_for

        prompts = request.prompts
        rows = len(prompts.lengths) * request.options.num_return_sequences
        lengths = zip(prompts.lengths, request.allowed, strict=True)
        positions = max(length + allowed - 1 for length, allowed in lengths)
        engine = engine_for(model, rows, positions)
        if engine is None:
            return None
        served = cls(engine, request)
        try:
            return served if engine.enter(served._rows) else None
        except BaseException:  # an interrupt, say: nobody else knows of rows that are in already
            served.close()
            raise

    def __init__(self, engine: "Engine", request: Request) -> None:
        from gpt2fast.engine.scheduler import Sequence

        options, prompts, eos = request.options, request.prompts, list(request.eos)
        self._engine, self._request = engine, request
        self._leading = [prompts.ids.shape[1] - length for length in prompts.lengths]
        least = options.least_length(prompts.ids.shape[1])
        least = least if eos and least > prompts.ids.shape[1] else 0
        stops = StopStrings(options.stops, options.tokenizer).ends if options.stops else None
        self._rows: list[Sequence] = []
        for i, ids in enumerate(prompts.ids.tolist()):
            length, allowed = prompts.lengths[i], request.allowed[i]
            for _ in range(options.num_return_sequences):
                row = len(self._rows)
                self._rows.append(
                    Sequence(
                        ids[self._leading[i] :],
                        options,
                        eos,
                        limit=length + allowed,
                        least=max(0, least - self._leading[i]),
                        at_limit="length" if allowed == request.requested else "context",
                        stream=None if request.streams is None else request.streams[row],
                        # The past is read after the end.
                        keeps_slot=options.return_dict_in_generate,
                        stops=stops,
                        row=row,
                    )
                )

    def close(self) -> None:
        """Give the slots back."""
        for row in self._rows:
            row.cancel()

    def give_up(self, model: "LanguageModel", error: OutOfMemory) -> None:
        """Have the model's next requests do without the engine."""
        from gpt2fast.engine.kept import give_up

        give_up(model, self._engine, error)

    def run(self) -> None:
        """Generate to the end."""
        self._engine.pull(self._rows, _ALL)
        self._raise(_ALL)

    def lines(self) -> Iterator[Line]:
        """Generate, pausing after each token."""
        for count in itertools.count(1):
            self._engine.pull(self._rows, count)
            self._raise(count)
            rows = self._rows
            reasons = [r.finish_reason if len(r.token_ids) <= count else None for r in rows]
            there = [len(r.token_ids) >= count for r in rows]
            logprobs = None
            if self._request.options.output_logprobs:
                logprobs = [
                    r.logprobs[count - 1] if is_there else 0.0
                    for r, is_there in zip(rows, there, strict=True)
                ]
            yield Line(
                [
                    r.token_ids[count - 1] if is_there else None
                    for r, is_there in zip(rows, there, strict=True)
                ],
                reasons,
                logprobs,
            )
            if all(reason is not None for reason in reasons):
                return

    def _raise(self, count: int) -> None:
        """Raise what broke a row before its token ``count``, as soon as that is reached."""
        broken = [row for row in self._rows if row.error is not None and len(row.token_ids) < count]
        if broken:
            error = min(broken, key=lambda row: (len(row.token_ids), row.row)).error
            assert error is not None
            raise error

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Of the rows, which have all ended."""
        return tuple(str(row.finish_reason) for row in self._rows)

    @property
    def new_tokens(self) -> int:
        """S, of the longest row."""
        return max(len(row.token_ids) for row in self._rows)

    def sequences(self) -> Tensor:
        """``[R, T + S]``."""
        ids = self._request.prompts.ids
        new = self._filled([row.token_ids for row in self._rows], self._request.pad)
        prompts = ids.repeat_interleave(self._request.options.num_return_sequences, 0)
        return torch.cat((prompts, torch.tensor(new, device=ids.device)), dim=1)

    def logprobs(self) -> Tensor:
        """``[R, S]``, 0 after the end."""
        values = self._filled([row.logprobs for row in self._rows], 0.0)
        return torch.tensor(values, dtype=torch.float32, device=self._request.prompts.ids.device)

    def _filled(self, rows: list[Any], value: float) -> list[Any]:
        width = self.new_tokens
        return [row + [value] * (width - len(row)) for row in rows]

    def past(self) -> KVCache:
        """Keys and values of every token but the last of each row, ``T + S - 1`` columns; zeros
        stand at padding."""
        request, engine = self._request, self._engine
        width = request.prompts.ids.shape[1] + self.new_tokens - 1
        columns = []
        for row in self._rows:
            leading = self._leading[row.row // request.options.num_return_sequences]
            layers = engine.keys_values(row, width - leading, request.pad)
            columns.append([torch.nn.functional.pad(kv, (0, 0, leading, 0)) for kv in layers])
        return KVCache([torch.stack(layer, dim=1) for layer in zip(*columns, strict=True)])


def _can_be_served(request: Request) -> bool:
    """Whether the engine can do what is asked for; whatever the model is."""
    options, prompts = request.options, request.prompts
    if (
        options.num_beams > 1
        or options.no_repeat_ngram_size
        or options.logits_processor
        or options.output_scores
        or options.output_logits
        or options.context_policy != "stop"
        or request.past is not None
        or len(request.eos) > MAX_EOS
        or min(request.allowed) < 1
    ):
        return False
    if prompts.mask is None:
        return True
    # Padding in front alone: holes in a prompt keep their columns in the past.
    width = prompts.ids.shape[1]
    leading = prompts.mask.int().argmax(1).tolist()
    return all(width - first == n for first, n in zip(leading, prompts.lengths, strict=True))
