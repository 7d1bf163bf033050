"""GPT-2's vocabulary, derived from its merges.

A token is written as a string in which each character stands for one byte. The 50,257 ids are the
256 bytes in the order of that alphabet, the 50,000 merges in order, and ``<|endoftext|>``.
"""

from functools import cache
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
MERGES_FILE = Path(__file__).parent / "data" / "vocab.bpe"


@cache
def byte_alphabet() -> dict[int, str]:
    """byte -> the character that stands for it, in the order of GPT-2's first 256 ids.

    Bytes that print stand for themselves; the others take the characters from U+0100 upward.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet.update((byte, chr(256 + n)) for n, byte in enumerate(others))
    return alphabet


def parse_merges(text: str, source: str = "merges") -> list[tuple[str, str]]:
    """The merges of a ``vocab.bpe`` or ``merges.txt``, most frequent first.

    Only a first line that starts with ``#version`` is a comment: some merges start with ``#``.

    Raises:
        ValueError: a line is not two symbols separated by a space.
    """
    lines = text.split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], first + 1):
        if not line:
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{source}, line {number}: expected two symbols, found {line!r}")
        merges.append(pair)
    return merges


def derive_encoder(merges: list[tuple[str, str]]) -> dict[str, int]:
    """token -> id for the 256 bytes, the merges in order, and ``<|endoftext|>``."""
    tokens = [*byte_alphabet().values(), *(left + right for left, right in merges), END_OF_TEXT]
    return {token: i for i, token in enumerate(tokens)}


def read_gpt2_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's own encoder and merges, from the file in this package."""
    merges = parse_merges(MERGES_FILE.read_text("utf-8"), MERGES_FILE.name)
    return derive_encoder(merges), merges
