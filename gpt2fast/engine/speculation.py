"""Prompt lookup: drafts from what the sequence itself holds already.

The last few tokens have often occurred before, in a text that repeats names, quotes its prompt or
goes round in circles; what followed them then is proposed to follow now (Saxena 2023, "Prompt
Lookup Decoding"). Evaluating a few tokens at once reads the weights once. Nothing is lost where a
proposal is wrong but the time of its evaluation: see `gpt2fast.engine.sampling`.
"""

from collections.abc import Sequence

_MISSES = 4  # steps in a row without an accepted draft, after which a pause comes
_PAUSE = 16  # steps without a proposal
# Each length of match costs an entry for every token of the sequence, and the entry holds that many
# tokens: memory goes by the square of this. Longer matches would hardly change what is proposed.
_MOST_NGRAM = 32


class PromptLookup:
    """The proposals for one sequence.

    Args:
        tokens: the sequence, which grows behind this object's back.
        drafts: how many tokens to propose at most, at least 1.
        ngram: how many tokens have to match at most, at least 1; longer matches go first. Above 32
            it counts as 32.
    """

    def __init__(self, tokens: Sequence[int], drafts: int, ngram: int) -> None:
        self.ngram = min(ngram, _MOST_NGRAM)
        self._tokens = tokens
        self._most = drafts
        self._drafts = drafts
        self._misses = 0
        self._pause = 0
        self._indexed = 0
        # For each length, n-gram -> where its last occurrence ends, that of the end aside.
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(self.ngram)]

    def propose(self, room: int) -> list[int]:
        """At most ``room`` tokens that may come next; often none."""
        if self._pause:
            self._pause -= 1
            return []
        tokens, count = self._tokens, min(self._drafts, room)
        length = len(tokens)
        if count < 1:
            return []
        self._index(length - 1)
        for size in range(len(self._ends), 0, -1):
            start = self._ends[size - 1].get(tuple(tokens[-size:])) if size <= length else None
            if start is None:
                continue
            drafts: list[int] = []
            for place in range(start, start + count):
                # A repetition that overlaps the end goes on with what it has just proposed.
                drafts.append(tokens[place] if place < length else drafts[place - length])
            return drafts
        return []

    def record(self, proposed: int, accepted: int) -> None:
        """Tell how many of the drafts have been accepted: many lengthen the next ones, few shorten
        them, and where none are, time after time, nothing is proposed for a while."""
        if not proposed:
            return
        if accepted:
            self._misses, self._drafts = 0, min(self._most, 2 * accepted)
            return
        self._drafts = max(1, self._drafts // 2)
        self._misses += 1
        if self._misses == _MISSES:
            self._misses, self._pause = 0, _PAUSE

    def _index(self, end: int) -> None:
        """Enter the n-grams that end at or before ``end``."""
        tokens = self._tokens
        for at in range(self._indexed + 1, end + 1):
            for size, ends in enumerate(self._ends, 1):
                if size <= at:
                    ends[tuple(tokens[at - size : at])] = at
        self._indexed = max(self._indexed, end)
