"""Windows: every token once, with the context that was promised. Batches: hardly any padding."""

import random
from collections.abc import Iterable
from itertools import pairwise

import pytest

from gpt2fast.scoring.windows import batches, windows


def test_every_token_once_with_its_context() -> None:
    rng = random.Random(0)
    for _ in range(500):
        length, max_length = rng.choice([rng.randrange(4), rng.randrange(200)]), rng.randint(2, 60)
        stride = rng.choice([1, max_length, rng.randint(1, max_length)])
        scored: list[int] = []
        for window in windows(length, max_length, stride):
            assert 0 <= window.begin < window.first < window.end <= length
            assert window.end - window.begin <= max_length
            assert 1 <= window.inputs < max_length
            for token in range(window.first, window.end):
                assert token - window.begin >= min(token, max_length - stride)
            scored += range(window.first, window.end)
        expected = range(1, length)
        if stride == max_length:  # the first of each window has nothing before it
            expected = [token for token in expected if token % max_length]
        assert scored == [*expected]


def test_windows_of_the_docstring() -> None:
    assert [*windows(10, 6, 2)] == [(0, 6, 1), (2, 8, 6), (4, 10, 8)]
    assert [*windows(7, 6, 6)] == [(0, 6, 1)]  # the last token would stand alone
    assert [*windows(1, 6, 3)] == [*windows(0, 6, 3)] == []


def test_batches_hold_everything_once_within_their_bound() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 50) for _ in range(rng.randrange(60))]
        batch_tokens = rng.randint(1, 200)
        found = [*batches(lengths, batch_tokens)]
        assert sorted(i for batch in found for i in batch) == [*range(len(lengths))]
        for batch in found:
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        # Nothing that would have fitted is left to the next batch.
        for batch, following in pairwise(found):
            longest = max(lengths[i] for i in batch)
            assert (len(batch) + 1) * longest > batch_tokens
            assert longest >= max(lengths[i] for i in following)


@pytest.mark.parametrize("batch_tokens", [512, 16384])
def test_padding_is_a_small_part(batch_tokens: int) -> None:
    """Lengths of texts as they come, most short and a few long, as many as are sorted together."""
    rng = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < 64 * batch_tokens:
        lengths.append(min(1023, int(rng.lognormvariate(4.8, 0.9)) + 1))

    def padding(groups: Iterable[list[int]]) -> float:
        evaluated = sum(len(group) * max(lengths[i] for i in group) for group in groups)
        return 1 - sum(lengths) / evaluated

    assert padding(batches(lengths, batch_tokens)) < 0.04
    rows = len(lengths) // 64
    order = range(len(lengths))
    assert padding([*order[i : i + rows]] for i in order[::rows]) > 0.2  # of batches as they come
