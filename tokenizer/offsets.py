"""Where in the text each token stands."""

from gpt2fast.tokenizer.codec import Codec, repair_surrogates

Span = tuple[int, int]


def encode_with_offsets(codec: Codec, text: str) -> tuple[list[int], list[Span]]:
    """The ids of ``text`` and for each the span ``text[start:end]`` of the characters it is from.

    A token that holds only some of a character's bytes has the whole character in its span.
    """
    ids: list[int] = []
    spans: list[Span] = []
    base = 0
    for piece, tokens in codec.pieces(text):
        ids += map(codec.id_of, tokens)
        sizes = [len(character.encode()) for character in piece]
        character_of = [i for i, size in enumerate(sizes, base) for _ in range(size)]
        start = 0
        for token in tokens:
            end = start + len(token)
            spans.append((character_of[start], character_of[end - 1] + 1))
            start = end
        base += len(piece)
    if base != len(text):
        borders = _original_positions(text)
        spans = [(borders[start], borders[end]) for start, end in spans]
    return ids, spans


def _original_positions(text: str) -> list[int]:
    """Where the characters of the repaired ``text`` begin in it: surrogate pairs became one."""
    positions, i = [], 0
    while i < len(text):
        positions.append(i)
        i += 2 if len(repair_surrogates(text[i : i + 2])) < len(text[i : i + 2]) else 1
    return [*positions, len(text)]
