r"""How GPT-2 cuts a text into pieces before byte-pair encoding.

GPT-2's pattern is

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

with the ``\s`` of the ``regex`` package, which is Unicode's White_Space. Running it over a whole
text is the slowest part of encoding, so a text is cut twice. The first cut, into chunks, looks at
white space alone:

    " ?" then a run of other characters  |  a run of white space

where a run of white space before another character leaves its last character to what follows. No
alternative of GPT-2's pattern crosses the border of two chunks, and within a chunk none looks at
what stands around it; so cutting each chunk with GPT-2's pattern gives exactly the pieces of the
whole text, and what a chunk encodes to can be remembered.

The standard library's ``\s`` has U+001C to U+001F as well, therefore the class is spelt out.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

SPACES = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
CHUNK = re.compile(rf" ?[^{SPACES}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-2's pattern where every character is ASCII.
_ASCII_PIECE = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+"
    r"|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)

_BORDER = re.compile(rf"[^{SPACES}](?=[{SPACES}])")


@cache
def _unicode_piece() -> Any:
    import regex  # 12 ms, which text in ASCII never needs

    return regex.compile(GPT2_PATTERN)


def split_pieces(text: str) -> list[str]:
    """The pieces of ``text`` under GPT-2's pattern, in order; joined they give ``text``."""
    pattern = _ASCII_PIECE if text.isascii() else _unicode_piece()
    return pattern.findall(text)


_PLAIN = re.compile(rf"\n?| ?[^{SPACES}]+")


def is_plain(part: str) -> bool:
    """Whether a part that ``split_plain`` gave is empty, a line end, or a word and its space."""
    return _PLAIN.fullmatch(part) is not None


def split_plain(text: str) -> list[str] | None:
    r"""Cut ``text`` at its spaces and line ends, much faster than by any pattern.

    The parts, of which some are empty, are chunks if all of them are plain (``is_plain``), as they
    are in prose: then white space is nothing but single spaces and line ends, the latter single,
    in pairs, or before a space. All of these are pieces by themselves, or part of the next word.
    Returns None if that cannot be so, or cannot be told from the parts: ``\n\n`` is one piece at
    the end, before a space or before another ``\n``.
    """
    if "\0" in text or "\n\n\n" in text or "\n\n " in text or text.endswith("\n"):
        return None
    return text.replace(" ", "\0 ").replace("\n", "\0\n\0").split("\0")


def windows(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` into parts of at least ``size`` characters that encode independently.

    A part ends only where white space begins, which is the border of two chunks.
    """
    start = 0
    while start < len(text):
        border = _BORDER.search(text, start + size)
        end = border.end() if border else len(text)
        yield text[start:end]
        start = end
