import math
from collections import Counter

import numpy as np
import pytest

from gpt2fast.training.baselines import bigram_nats, unigram_nats


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    return rng.zipf(1.5, size=2000).clip(max=19).astype(np.uint16) - 1


def test_unigram(tokens):
    counts = Counter(tokens.tolist())
    expected = -sum(math.log((counts[w] + 1) / 2020) for w in (3, 19)) / 2
    assert unigram_nats(tokens, np.array([0, 3, 19], np.uint16), 20) == pytest.approx(expected)


def test_bigram_against_the_formula_in_plain_python(tokens):
    pairs = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    seen = Counter(pairs.values())
    discount = seen[1] / (seen[1] + 2 * seen[2])
    predecessors = Counter(w for _, w in pairs)

    def probability(u, w):
        total = sum(n for (first, _), n in pairs.items() if first == u)
        lower = (predecessors[w] + 1) / (len(pairs) + 20)
        if not total:
            return lower
        successors = sum(first == u for first, _ in pairs)
        return (max(pairs[u, w] - discount, 0) + discount * successors * lower) / total

    for u in (0, 5, 19):  # 19 never occurs
        nats = [bigram_nats(tokens, np.array([u, w], np.uint16), 20) for w in range(20)]
        assert nats == pytest.approx([-math.log(probability(u, w)) for w in range(20)])
        assert sum(math.exp(-x) for x in nats) == pytest.approx(1)
