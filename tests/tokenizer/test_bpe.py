"""Both ways to merge against the algorithm as it is told: merge the best pair, then look again."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast.tokenizer import bpe
from gpt2fast.tokenizer.bpe import Merges

MERGE_FUNCTIONS = [bpe.merge, bpe._merge_short, bpe._merge_long]


def naive(symbols: list[int], merges: Merges) -> list[int]:
    while True:
        ranked = [merges[p] for p in pairwise(symbols) if p in merges]
        if not ranked:
            return symbols
        best = min(ranked)
        merged, i = [], 0
        while i < len(symbols):
            if merges.get(tuple(symbols[i : i + 2])) == best:
                merged.append(best & (1 << 32) - 1)
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged


@st.composite
def merge_tables(draw: st.DrawFn) -> Merges:
    """Merges of 3 bytes and of what earlier merges made; the ranks in any order."""
    count = draw(st.integers(0, 12))
    ranks = draw(st.permutations(range(count)))
    merges: Merges = {}
    for n, rank in enumerate(ranks):
        symbol = st.integers(0, 2 + n)
        merges.setdefault((draw(symbol), draw(symbol)), rank << 32 | (3 + n))
    return merges


@pytest.mark.parametrize("merge", MERGE_FUNCTIONS)
@given(st.lists(st.integers(0, 2), max_size=80), merge_tables())
def test_same_as_naive(merge, symbols: list[int], merges: Merges) -> None:
    assert merge(symbols.copy(), merges) == naive(symbols, merges)


@pytest.mark.parametrize("merge", MERGE_FUNCTIONS)
def test_gpt2_merges_on_words_of_every_length(merge, tokenizer) -> None:
    merges = tokenizer._codec._pairs
    for length in [0, 1, 2, 3, 63, 64, 65, 66, 200, 700]:
        for alphabet in (b"a", b"ab", b"etaoin shrdlu", bytes(range(256))):
            word = list(random.Random(length).choices(alphabet, k=length))
            assert merge(word.copy(), merges) == naive(word, merges)


def test_a_million_letters_make_few_steps(tokenizer) -> None:
    """A quadratic merge would look up about 10^12 pairs here, and never come back."""
    lookups = 0

    class Counting(dict):
        def get(self, key, default=None):
            nonlocal lookups
            lookups += 1
            return dict.get(self, key, default)

    merges = Counting(tokenizer._codec._pairs)
    symbols = bpe.merge([ord("a")] * 1_000_000, merges)
    assert lookups < 6_000_000
    assert len(symbols) == 250_000  # "aaaa"


def test_long_words_round_trip(tokenizer) -> None:
    for unit in ("ab", "é", "中", "👍", "1", "!", " ", "\n"):
        text = unit * 50_000
        assert tokenizer.decode(tokenizer.encode(text)) == text
