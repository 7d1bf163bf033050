"""What a document is evaluated in, and which pieces of many documents are evaluated together.

A document longer than the context is cut into overlapping windows of ``max_length`` tokens that
begin every ``stride`` tokens. Each window scores the tokens that no earlier one held:

    window 0   [0 ............ L)          scores 1 ..... L - 1
    window 1         [S ............ S + L)       scores L .. S + L - 1
    window 2               [2S ............ 2S + L)      scores S + L .. 2S + L - 1

so every token but a document's first is scored once, and from the second window on with at least
``L - S`` tokens before it. With S = L the windows do not overlap, and the first token of each has
nothing before it: it is not scored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a document, of which those from ``first`` on are scored.

    Its last token is scored, but need not be read: the model evaluates ``inputs`` tokens.
    """

    begin: int
    end: int
    first: int

    @property
    def inputs(self) -> int:
        return self.end - self.begin - 1


def windows(length: int, max_length: int, stride: int) -> Iterator[Window]:
    """The windows of a document of ``length`` tokens that score any; see the module.

    ``max_length`` is at least 2 and ``stride`` from 1 to ``max_length``.
    """
    scored = 0  # what earlier windows held
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        first = max(scored, begin + 1)
        if first < end:
            yield Window(begin, end, first)
        scored = end
        if end == length:
            return


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group sequences of these lengths for evaluation as padded rectangles, longest first.

    Those of a group are neighbours in length, so next to nothing is padded; rows times the longest
    is at most ``batch_tokens``, or one sequence.

    Yields:
        Indices into ``lengths``; each once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + rows]
        start += rows
