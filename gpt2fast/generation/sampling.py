"""From logits to the next token: processors of scores, and a stream of random numbers a row.

Scores are ``[B, V]`` in float32, ids ``[B, T]`` all tokens so far. Processors return new scores and
come in the order of transformers: penalties and constraints, then temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2fast.generation.options import GenerationOptions, ScoresProcessor

_LIKELIEST = 1024  # candidates among which a nucleus is looked for first
_BLOCK = 64  # random numbers drawn at once for each row
_UINT64 = 2**64


def penalize_repetition(
    ids: Tensor, scores: Tensor, penalty: float, leading: Tensor | None = None
) -> Tensor:
    """Divide positive and multiply negative scores of tokens seen before (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1).

    Args:
        leading: ``[B]``, how many tokens of padding stand before each row.
    """
    if leading is not None:
        # A token that is there anyway takes the place of the padding.
        padding = torch.arange(ids.shape[1], device=ids.device) < leading[:, None]
        ids = torch.where(padding, ids.gather(1, leading[:, None]), ids)
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def ban_repeated_ngrams(
    ids: Tensor, scores: Tensor, size: int, leading: Tensor | None = None
) -> Tensor:
    """Rule out every token that would complete an n-gram of ``size`` tokens seen before.

    Args:
        leading: as in `penalize_repetition`.
    """
    length = ids.shape[1]
    if length < size:
        return scores
    ngrams = ids.unfold(1, size, 1)  # [B, T - size + 1, size]
    repeats = (ngrams[:, :, :-1] == ids[:, None, length - size + 1 :]).all(-1)
    if leading is not None:
        repeats &= torch.arange(ngrams.shape[1], device=ids.device) >= leading[:, None]
    banned = torch.zeros_like(scores).scatter_add_(1, ngrams[:, :, -1], repeats.to(scores.dtype))
    return scores.masked_fill(banned > 0, -torch.inf)


def forbid(scores: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Rule out tokens."""
    return scores.index_fill(1, torch.tensor(token_ids, device=scores.device), -torch.inf)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the ``k`` best scores of each row, and those equal to the k-th."""
    threshold = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the likeliest tokens up to the first that brings their sum to ``p``
    (Holtzman et al. 2020, arXiv:1904.09751, section 3.1)."""
    probabilities = scores.softmax(-1)
    size = scores.shape[1]
    # To sort a whole vocabulary takes longer than to select; a nucleus is mostly small.
    for candidates in (min(_LIKELIEST, size), size):
        best, ids = probabilities.topk(candidates)
        dropped = best.cumsum(-1) - best >= p
        if candidates == size or dropped[:, -1].all():
            break
    dropped[:, 0] = False
    return scores.masked_fill(
        torch.ones_like(scores, dtype=torch.bool).scatter(1, ids, dropped), -torch.inf
    )


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Keep tokens at least ``p`` times as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def build_processors(
    options: GenerationOptions, eos: Sequence[int], prompt_length: int, leading: Tensor | None
) -> list[ScoresProcessor]:
    """The processors that ``options`` ask for, in order.

    Args:
        eos: the ids that end a row.
        prompt_length: T of the padded prompts.
        leading: as in `penalize_repetition`.
    """
    processors: list[ScoresProcessor] = []
    penalty, size = options.repetition_penalty, options.no_repeat_ngram_size
    if penalty != 1:
        processors.append(lambda ids, scores: penalize_repetition(ids, scores, penalty, leading))
    if size:
        processors.append(lambda ids, scores: ban_repeated_ngrams(ids, scores, size, leading))
    least = options.least_length(prompt_length)
    if least > prompt_length and eos:
        processors.append(
            lambda ids, scores: forbid(scores, eos) if ids.shape[1] < least else scores
        )
    processors.extend(options.logits_processor or ())
    if options.do_sample:
        temperature, k, p, min_p = options.temperature, options.top_k, options.top_p, options.min_p
        processors.append(lambda _, scores: warp(scores, temperature, k, p, min_p))
    return processors


def warp(
    scores: Tensor, temperature: float, k: int | None, p: float | None, min_p: float | None
) -> Tensor:
    """Scores to draw from: divided by the temperature, then filtered.

    Args:
        temperature: above 0.
        k, p, min_p: of `keep_top_k`, `keep_top_p` and `keep_min_p`; None, or 0, 1 and 0, for off.
    """
    if temperature != 1:
        scores = scores / temperature
    if k:
        scores = keep_top_k(scores, k)
    if p is not None and p < 1:
        scores = keep_top_p(scores, p)
    return keep_min_p(scores, min_p) if min_p else scores


def sample(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row by inverting the distribution function of ``softmax(scores)``.

    Args:
        scores: ``[B, V]``, as `check_scores` wants them.
        uniform: ``[B]`` float64 in [0, 1); on the CPU where the scores' device has no float64.

    Returns:
        ``[B]``, int64; a token of probability 0 is never drawn.
    """
    # float64, where the device has it: rare tokens vanish from a float32 sum.
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = scores.softmax(-1).cumsum(-1, dtype=dtype)
    total = cumulative[:, -1]
    # Strictly below the total, so that the search ends on a token of positive probability.
    below = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(uniform.to(dtype).to(total.device) * total, below)
    return torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1)


def check_scores(scores: Tensor) -> None:
    """Raise unless every row of scores ``[B, V]`` has a best token.

    Raises:
        ValueError: naming the first row that has none: it holds a NaN, or nothing is left of it.
    """
    bad = ~scores.amax(-1).isfinite()
    if bad.any():
        raise no_next_token(int(bad.nonzero()[0]))


def no_next_token(row: int) -> ValueError:
    """The error for a row whose scores have no finite best."""
    return ValueError(
        f"row {row} has no next token: its scores hold NaN or infinity, or are all ruled out "
        "(broken weights, overflow in float16, or a logits_processor)"
    )


def random_numbers(seed: int, index: int) -> np.random.Generator:
    """The stream (seed, index) of random numbers: see `RandomRows`."""
    key = np.array([seed % _UINT64, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class RandomRows:
    """One stream of uniform numbers a row, independent of the rows beside it.

    Philox, a counter-based generator (Salmon et al. 2011): a stream is a pair (seed, index).
    """

    def __init__(self, streams: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._rows = [random_numbers(*stream) for stream in streams]
        self._device = device
        self._drawn = torch.empty(len(streams), 0, dtype=torch.float64)
        self._next = 0

    def draw(self) -> Tensor:
        """The next number of every row, ``[B]`` float64 in [0, 1)."""
        if self._next == self._drawn.shape[1]:
            numbers = np.stack([row.random(_BLOCK) for row in self._rows])
            self._drawn, self._next = torch.from_numpy(numbers), 0
            if self._device.type != "mps":
                self._drawn = self._drawn.to(self._device)
        self._next += 1
        return self._drawn[:, self._next - 1]


def row_streams(options: GenerationOptions, prompts: int) -> list[tuple[int, int]]:
    """(seed, index) of each returned row, ``num_return_sequences`` for each prompt.

    An integer seed, or one drawn from ``generator`` or torch's global one, numbers the rows of
    the whole batch; a list holds one seed a prompt, and numbers the rows of each prompt.

    Raises:
        ValueError: the seed is not an integer, or not one a prompt.
    """
    copies, seed = options.num_return_sequences, options.seed
    if seed is None:
        source = options.generator
        device = "cpu" if source is None else source.device
        seed = int(torch.randint(2**63 - 1, (1,), generator=source, device=device))
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [(seed, i) for i in range(prompts * copies)]
    if (
        not isinstance(seed, Sequence)
        or len(seed) != prompts
        or not all(isinstance(s, int) for s in seed)
    ):
        raise ValueError(
            f"seed must be an integer, or a list of {prompts}, one a prompt; got {seed!r}"
        )
    return [(s, i) for s in seed for i in range(copies)]
