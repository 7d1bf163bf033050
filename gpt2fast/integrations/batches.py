"""Batch generation and scoring over many processes: what runs in each of them.

`GenerateBatch` and `ScoreBatch` load a model once and then take batch after batch. Ray Data builds
one in every actor:

    ds.map_batches(
        GenerateBatch,
        fn_constructor_kwargs={"model": "gpt2", "id_column": "id", "temperature": 0.8},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=64,
    )

An actor runs on the GPU that Ray gave it, otherwise on as many threads as it has CPUs. Under
torchrun each process takes the GPU of its local rank. What a row gets does not depend on the
batches, actors or processes that the rows are divided into: random numbers follow from the seed
and the row's id.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gpt2fast.checkpoint.vocabulary import tokenizer_of
from gpt2fast.engine import Engine
from gpt2fast.engine.scheduler import Sequence
from gpt2fast.model import GPT2LMHeadModel
from gpt2fast.scoring.scorer import Scorer, checked_ids

__all__ = ["GenerateBatch", "ScoreBatch"]

Columns = Mapping[str, Any]  # names to lists or arrays of one length


class GenerateBatch:
    """Continues the prompts of a batch, in one running batch of the decode engine.

    Adds the columns ``generated_text``, ``generated_ids`` and ``finish_reason`` ("eos", "length",
    "stop_string", or "context" where the model has no more positions).

    Args:
        model: a name or folder, as `GPT2LMHeadModel.from_pretrained` takes it.
        column: of the prompts: strings, or lists of token ids.
        id_column: of what tells rows apart, numbers or strings. Sampling needs it.
        seed: of random numbers; a row draws the same for the same seed and id.
        slots: how many rows run at once, 1 to 256; others wait for one that ends.
        dtype, quantize: of the weights, as for `from_pretrained`.
        **options: as `Engine.submit` takes them: ``max_new_tokens``, ``temperature``, ...; with
            ``output_logprobs`` there is a column ``logprobs``, of each new token.

    Raises:
        TypeError: an unknown option.
        ValueError: a value out of range; sampling without an id_column.
        (others): as `from_pretrained`.

    Attributes:
        model: the model, which a `ScoreBatch` in the same process may share.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "gpt2",
        *,
        column: str = "prompt",
        id_column: str | None = None,
        seed: int = 0,
        slots: int = 16,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> None:
        if options.get("temperature", 0) and id_column is None:
            raise ValueError(
                f"temperature={options['temperature']} draws tokens: give id_column, by which a "
                "row draws the same wherever it comes to lie"
            )
        self._column, self._id_column = column, id_column
        self._seed, self._slots, self._options = seed, slots, options
        self._tokenizer = tokenizer_of(model)
        self.model = GPT2LMHeadModel.from_pretrained(
            model, dtype=dtype, device=place(), quantize=quantize
        ).eval()
        self._engine = Engine(self.model, slots)
        self._enter([0], 0).cancel()  # what is wrong with the options is no row's fault

    def __call__(self, batch: Columns) -> dict[str, Any]:
        """The batch with new columns.

        Args:
            batch: names to columns, lists or arrays of one length.

        Raises:
            ValueError: a column is missing; a prompt is empty, longer than the context or no text,
                or the model's scores of it are not finite: the message names the row by its id,
                without an id_column by its place in the batch.
        """
        ids = _ids(batch, self._column, self._id_column)
        if self._engine.closed:  # an earlier batch ended in the middle of a step
            self._engine = Engine(self.model, self._slots)
        sequences: list[Sequence] = []
        try:
            for row, prompt in zip(ids, batch[self._column], strict=True):
                sequences.append(self._submit(prompt, row))
            while self._engine.unfinished:
                self._engine.step()
        finally:
            for sequence in sequences:
                sequence.cancel()
        for row, sequence in zip(ids, sequences, strict=True):
            if sequence.error is not None:
                raise ValueError(f"row {row!r}: {sequence.error}") from sequence.error
        columns = {
            **batch,
            "generated_text": [self._text(sequence) for sequence in sequences],
            "generated_ids": [sequence.token_ids for sequence in sequences],
            "finish_reason": [sequence.finish_reason for sequence in sequences],
        }
        if self._options.get("output_logprobs"):
            columns["logprobs"] = [sequence.logprobs for sequence in sequences]
        return columns

    def _encode(self, prompt: Any) -> list[int]:
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = checked_ids("the prompt", ids, self.model.config.vocab_size)
        if not ids:
            raise ValueError("the prompt is empty")
        return ids

    def _submit(self, prompt: Any, row: Any) -> Sequence:
        try:
            return self._enter(self._encode(prompt), row)
        except ValueError as error:
            raise ValueError(f"row {row!r}: {error}") from error

    def _enter(self, prompt_ids: list[int], row: Any) -> Sequence:
        digest = hashlib.sha256(f"{self._seed} {row!r}".encode()).digest()
        return self._engine.submit(
            prompt_ids,
            tokenizer=self._tokenizer,
            seed=int.from_bytes(digest[:7], "big"),
            **self._options,
        )

    def _text(self, sequence: Sequence) -> str:
        """What it has generated, without the token that ended it."""
        ids = sequence.token_ids
        return self._tokenizer.decode(ids[:-1] if sequence.finish_reason == "eos" else ids)


class ScoreBatch:
    """Scores the texts of a batch.

    Adds the columns ``log_prob`` (nats, the sum over the scored tokens), ``n_scored`` and
    ``perplexity`` (NaN where no token is scored).

    Args:
        model: a name or folder, as `GPT2LMHeadModel.from_pretrained` takes it; or such a model,
            which stays on the device where it is.
        column: of the texts: strings, or lists of token ids.
        id_column: of what errors call a row by.
        **options: as `gpt2fast.Scorer` takes them: ``add_bos``, ``stride``, ``dtype``, ...

    Raises:
        (all): as `gpt2fast.Scorer`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "gpt2",
        *,
        column: str = "text",
        id_column: str | None = None,
        **options: Any,
    ) -> None:
        self._column, self._id_column = column, id_column
        device = None if isinstance(model, nn.Module) else place()
        self._scorer = Scorer(model, device=device, **options)

    def __call__(self, batch: Columns) -> dict[str, Any]:
        """The batch with new columns.

        Args:
            batch: names to columns, lists or arrays of one length.

        Raises:
            ValueError: a column is missing, a text is none, or an id is not in the vocabulary: the
                message names the row by its id.
        """
        ids = _ids(batch, self._column, self._id_column)
        named = zip((f"row {row!r}" for row in ids), batch[self._column], strict=True)
        scores = [score for group in self._scorer.groups(named) for score in group]
        return {
            **batch,
            "log_prob": [score.log_prob for score in scores],
            "n_scored": [score.n_scored for score in scores],
            "perplexity": [score.perplexity for score in scores],
        }


def place() -> torch.device:
    """The device of this process, made its current one; in an actor its threads are set as well.

    In a Ray actor the GPU that Ray gave it, otherwise the CPU with as many threads as it has CPUs;
    under torchrun the GPU of the local rank, where there is one; otherwise the first GPU or the
    CPU.
    """
    # Nobody is in a Ray actor without having imported Ray.
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        if context.get_actor_id() is not None:
            if context.get_accelerator_ids().get("GPU"):
                return torch.device("cuda")  # Ray hides the others
            torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))
            return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
    torch.cuda.set_device(device)
    return device


def _ids(batch: Columns, column: str, id_column: str | None) -> list[Any]:
    """What tells the rows apart: their ids, or their places in the batch."""
    for wanted in (column, id_column):
        if wanted is not None and wanted not in batch:
            raise ValueError(f"the batch has no column {wanted!r}; it has {sorted(batch)}")
    if id_column is None:
        return [*range(len(batch[column]))]
    # Numbers of numpy look the same as Python's, whatever their width.
    return [value.item() if hasattr(value, "item") else value for value in batch[id_column]]
