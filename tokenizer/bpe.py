"""Byte-pair encoding of one piece of text (Sennrich et al. 2016, arXiv:1508.07909).

Merges are kept as ``(left, right) -> rank << 32 | merged``: the smallest value is the pair to merge
next, and its low half is the symbol it becomes. Both functions apply the pair of lowest rank to all
its occurrences from left to right, until no pair can merge.
"""

from heapq import heappop, heappush
from itertools import pairwise

Merges = dict[tuple[int, int], int]

_MERGED = (1 << 32) - 1
_NO_MERGE = 1 << 63
_LONG = 64  # symbols; from about here on the linked list is the faster of the two


def merge(symbols: list[int], merges: Merges) -> list[int]:
    """The symbols that ``symbols``, which may be changed, become by byte-pair merges."""
    return (_merge_long if len(symbols) > _LONG else _merge_short)(symbols, merges)


def _merge_short(symbols: list[int], merges: Merges) -> list[int]:
    """Search all pairs again after each merge: O(n^2), but nearly all words are short."""
    get = merges.get
    pairs = [get(pair, _NO_MERGE) for pair in pairwise(symbols)]
    while pairs:
        best = min(pairs)
        if best == _NO_MERGE:
            break
        merged = best & _MERGED
        while best in pairs:
            i = pairs.index(best)
            symbols[i : i + 2] = (merged,)
            del pairs[i]
            if i > 0:
                pairs[i - 1] = get((symbols[i - 1], merged), _NO_MERGE)
            if i < len(pairs):
                pairs[i] = get((merged, symbols[i + 1]), _NO_MERGE)
    return symbols


def _merge_long(symbols: list[int], merges: Merges) -> list[int]:
    """Keep the symbols in a linked list: O(n log n), for a word of any length.

    The positions at which a pair can merge wait in a bucket, one for each pair, and a heap gives
    the bucket of lowest rank. A position counts only if it still holds that pair.
    """
    n = len(symbols)
    following = list(range(1, n + 1))
    previous = list(range(-1, n - 1))
    buckets: dict[int, list[int]] = {}
    for i, pair in enumerate(pairwise(symbols)):
        found = merges.get(pair)
        if found is not None:
            buckets.setdefault(found, []).append(i)
    heap = sorted(buckets)
    while heap:
        best = heappop(heap)
        for i in sorted(buckets.pop(best)):
            j = following[i]
            if j == n or merges.get((symbols[i], symbols[j])) != best:
                continue
            after = following[j]
            symbols[i] = best & _MERGED
            symbols[j] = -1
            following[i] = after
            if after < n:
                previous[after] = i
            for left, right in ((previous[i], i), (i, after)):
                if left < 0 or right == n:
                    continue
                found = merges.get((symbols[left], symbols[right]))
                if found is None:
                    continue
                if found not in buckets:
                    buckets[found] = []
                    heappush(heap, found)
                buckets[found].append(left)
    return [symbol for symbol in symbols if symbol >= 0]
