"""`score` and `Scorer`: texts in, the log-probability of each of their tokens out."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpt2fast.checkpoint.vocabulary import tokenizer_of
from gpt2fast.scoring.model import load
from gpt2fast.scoring.windows import Window, batches, windows

Text = str | Sequence[int] | Tensor
_Item = TypeVar("_Item")

# Positions that are evaluated at once. A CPU takes longer a token for more (a fifth at 2048): their
# activations leave the caches. A GPU needs many to be busy (predicted).
_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
# Batches that are sorted by length together. With more, less is padded and results come later.
_LOOK_AHEAD = 64


@dataclass(frozen=True)
class Score:
    """A text under a language model.

    Attributes:
        token_ids: its tokens.
        log_probs: log p(token | those before it) for each, in nats; None where nothing stands
            before it: at the beginning, unless ``add_bos`` puts a token there.
        text: the text itself, where it was not given as ids.
    """

    token_ids: list[int]
    log_probs: list[float | None]
    text: str | None = None

    @property
    def n_scored(self) -> int:
        """How many tokens have a log-probability."""
        return len(self.log_probs) - self.log_probs.count(None)

    @property
    def log_prob(self) -> float:
        """log p(text): the sum over the scored tokens, in nats; 0 where there is none."""
        return math.fsum(value for value in self.log_probs if value is not None)

    @property
    def perplexity(self) -> float:
        """``exp(-log_prob / n_scored)``; NaN where no token is scored."""
        return perplexity(self.log_prob, self.n_scored)


def perplexity(log_prob: float, n_scored: int) -> float:
    """``exp(-log_prob / n_scored)``: NaN of nothing, infinite where it is beyond a float."""
    if not n_scored:
        return math.nan
    try:
        return math.exp(-log_prob / n_scored)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class _Scoring:
    """A text on its way: ``tokens`` is int64 ``[n]`` with the prefix, as are the log_probs."""

    score: Score
    tokens: Tensor
    windows: list[Window]


_Part = tuple[_Scoring, Window]


class Scorer:
    """Scores texts with a model; a text longer than the context in overlapping windows.

    Windows of many texts are sorted by length and evaluated together, and of every token only the
    log-probability is kept: the ``[tokens, vocabulary]`` logits never exist. A text's scores do not
    depend on what is scored beside it, except for the last bits of a sum.

    Args:
        model: a name or folder, as `GPT2LMHeadModel.from_pretrained` takes it; or such a model, or
            transformers' (plain ones are used where they lie, on this package's ops; those with
            hooks or adapters by their own forward pass). It must be in evaluation mode.
        tokenizer: anything with ``encode(text) -> list[int]``; by default that of the name or
            folder, and GPT-2's where it has none or a model is given. Special tokens in a text are
            ordinary text to it.
        stride: tokens from one window to the next, at most max_length. Every token of a long text
            is scored with at least ``max_length - stride`` tokens before it. By default half of
            max_length.
        max_length: tokens of a window, from 2 to the model's context; by default that.
        batch_tokens: positions that are evaluated at once, padding included (one window at the
            least); by default 512, on a GPU 16384.
        add_bos: put the model's beginning-of-text token before each text, so that its first token
            is scored too. Ids that begin with it already get another.
        dtype: of the weights; None for the checkpoint's. Like the next two only for a name.
        device: by default the first GPU, where there is one, else the CPU.
        quantize: "int8", "fp16" or "int4"; see `gpt2fast.quantize`.

    Raises:
        ValueError: a value out of range; dtype, device or quantize with a model object; a model in
            training mode.
        TypeError: the model is no language model.
        (others): as `from_pretrained`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "gpt2",
        tokenizer: Any = None,
        *,
        stride: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        add_bos: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantize: str | None = None,
    ) -> None:
        self._model = load(model, dtype, device, quantize)
        self._model.check_mode()
        config, kind = self._model.config, self._model.device.type
        self.vocab_size: int = config.vocab_size
        if tokenizer is None:
            tokenizer = tokenizer_of("gpt2" if isinstance(model, nn.Module) else model)
        self._tokenizer = tokenizer
        context = config.n_positions
        self.max_length = _checked("max_length", max_length, context, 2, context)
        half = max(self.max_length // 2, 1)
        self.stride = _checked("stride", stride, half, 1, self.max_length)
        usual = _BATCH_TOKENS.get(kind, _BATCH_TOKENS["cpu"])
        self.batch_tokens = _checked("batch_tokens", batch_tokens, usual, 1, 2**31 - 1)
        self._prefix: list[int] = []
        if add_bos:
            bos = config.bos_token_id
            if not isinstance(bos, int) or not 0 <= bos < self.vocab_size:
                raise ValueError(
                    f"add_bos needs a bos_token_id in [0, {self.vocab_size}) in the model's "
                    f"configuration; got {bos}"
                )
            self._prefix = [bos]

    def __call__(self, inputs: str | Iterable[Text]) -> list[Score]:
        """The scores of a text or of several, each a string or token ids, in their order.

        A text without tokens has no log-probabilities, and the perplexity NaN; nor has one of a
        single token, unless ``add_bos``. What the model computes as NaN stays NaN.

        Raises:
            ValueError: a text is neither, or an id is not in the model's vocabulary; says which.
        """
        return list(self.stream([inputs] if isinstance(inputs, str) else inputs))

    def stream(self, inputs: Iterable[Text]) -> Iterator[Score]:
        """The same one by one, in order, of inputs that may be endless.

        About `batch_tokens` times 64 tokens are read ahead, to be sorted.
        """
        named = ((f"text {i}", text) for i, text in enumerate(inputs))
        return chain.from_iterable(self.groups(named))

    def fingerprint(self) -> str:
        """A hash of the model: of what its configuration computes, and a sample of each weight."""
        return self._model.fingerprint()

    def groups(
        self,
        named: Iterable[tuple[str, Text]],
        progress: Callable[[float, int], object] | None = None,
    ) -> Iterator[list[Score]]:
        """The scores of texts, each with the name that errors call it by, as they are finished.

        Where groups end depends on the texts since the last end, not on those before: a run that
        goes on after some group makes the same groups, and so the same numbers, as one that was
        never interrupted.

        Args:
            named: pairs (name, text).
            progress: called after every batch with the texts, in fractions, and the tokens that it
                finished.

        Yields:
            Lists of scores; together they are those of all texts, in order.
        """
        group: list[_Scoring] = []
        tokens = 0
        for name, text in named:
            scoring = self._prepare(name, text)
            group.append(scoring)
            # One more, so that texts with nothing to score fill a group too.
            tokens += 1 + sum(window.inputs for window in scoring.windows)
            if tokens >= _LOOK_AHEAD * self.batch_tokens:
                yield self._finish(group, progress)
                group, tokens = [], 0
        if group:
            yield self._finish(group, progress)

    def _prepare(self, name: str, text: Text) -> _Scoring:
        given = self._tokenizer.encode(text) if isinstance(text, str) else text
        ids = checked_ids(name, given, self.vocab_size)
        tokens = torch.tensor([*self._prefix, *ids], dtype=torch.int64)
        values: list[float | None] = [None] * len(tokens)
        parts = list(windows(len(tokens), self.max_length, self.stride))
        return _Scoring(Score(ids, values, text if isinstance(text, str) else None), tokens, parts)

    def _finish(
        self, group: list[_Scoring], progress: Callable[[float, int], object] | None
    ) -> list[Score]:
        self._model.check_mode()
        parts = [(scoring, window) for scoring in group for window in scoring.windows]
        lengths = [window.inputs for _, window in parts]
        done, share = 0.0, len(group) / max(sum(lengths), 1)
        launched = (
            self._launch([parts[i] for i in batch]) for batch in batches(lengths, self.batch_tokens)
        )
        for chosen, log_probs in _one_behind(launched):
            counts = [window.end - window.first for _, window in chosen]
            found = log_probs.cpu().split(counts)
            for (scoring, window), values in zip(chosen, found, strict=True):
                scoring.score.log_probs[window.first : window.end] = values.tolist()
            if progress is not None:
                texts = share * sum(window.inputs for _, window in chosen)
                done += texts
                progress(texts, sum(counts))
        if progress is not None:
            progress(len(group) - done, 0)  # texts that had nothing to score, and rounding
        for scoring in group:
            del scoring.score.log_probs[: len(self._prefix)]
        return [scoring.score for scoring in group]

    def _launch(self, chosen: list[_Part]) -> tuple[list[_Part], Tensor]:
        rows = [scoring.tokens[window.begin : window.end] for scoring, window in chosen]
        firsts = [window.first - window.begin for _, window in chosen]
        return chosen, self._model.log_probs(rows, firsts)


def score(
    inputs: str | Iterable[Text],
    *,
    model: str | os.PathLike[str] | nn.Module = "gpt2",
    tokenizer: Any = None,
    progress: bool = False,
    **options: Any,
) -> list[Score]:
    """How likely a model finds texts: the log-probability of every token, and perplexity.

    Args:
        inputs: a text, or several: each a string, or a list (or 1-D tensor) of token ids.
        model, tokenizer, **options: as `Scorer`. To score again and again, keep one of those.
        progress: show a bar on standard error.

    Returns:
        A `Score` for each, in order.

    Raises:
        ValueError, TypeError: as `Scorer`, and as calling it.
    """
    scorer = Scorer(model, tokenizer, **options)
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    named = ((f"text {i}", text) for i, text in enumerate(texts))
    with ProgressBar(len(texts), hidden=not progress) as shown:
        return list(chain.from_iterable(scorer.groups(named, shown.advance)))


class ProgressBar:
    """A progress bar of texts on standard error, with the speed in tokens."""

    def __init__(self, texts: int, hidden: bool | None, done: int = 0) -> None:
        """``hidden=None`` shows it on terminals alone."""
        # Texts come in fractions: a long one moves the bar too.
        shape = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} texts [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=texts, initial=done, disable=hidden, bar_format=shape)
        self._tokens = 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, texts: float, tokens: int) -> None:
        self._tokens += tokens
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed:
            self._bar.set_postfix_str(f"{self._tokens / elapsed:,.0f} tokens/s", refresh=False)
        self._bar.update(texts)


def _one_behind(items: Iterator[_Item]) -> Iterator[_Item]:
    """Each once the next is under way: a GPU is given work before its last results are read."""
    previous = next(items, None)
    for item in items:
        assert previous is not None
        yield previous
        previous = item
    if previous is not None:
        yield previous


def checked_ids(name: str, text: Any, vocab_size: int) -> list[int]:
    """A text that is given as ids: a sequence, a tensor or an array of them.

    Raises:
        ValueError: it is none, or an id is no integer in ``[0, vocab_size)``; begins with ``name``.
    """
    ids = text.tolist() if hasattr(text, "tolist") else text
    if not isinstance(ids, Sequence) or isinstance(ids, bytes | bytearray):
        raise ValueError(
            f"{name}: expected a string or a list of token ids; got {type(text).__name__} "
            "(a single text of ids is [[...]])"
        )
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return list(ids)
    place = next(
        i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < vocab_size
    )
    raise ValueError(
        f"{name}: token ids must be integers in [0, {vocab_size}); got {ids[place]!r} at position "
        f"{place}"
    )


def _checked(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}; got {value!r}")
    return value
