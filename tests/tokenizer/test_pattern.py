"""The cut into chunks, and the pattern for ASCII, give exactly the pieces of GPT-2's pattern."""

import itertools
import re
import sys

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast.tokenizer.pattern import (
    CHUNK,
    GPT2_PATTERN,
    SPACES,
    is_plain,
    split_pieces,
    split_plain,
    windows,
)

REFERENCE = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)

# Every kind of character the pattern tells apart, and those that other definitions of white space
# or letters would count differently.
TELLING = (
    " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u180e\u200b\u2028\u3000\ufeff'sSlLevdmtr1²½٣aéЖ中.-_#\0\x7f"
)
telling_text = st.text(st.sampled_from(TELLING), max_size=40)
any_text = st.text(st.characters(), max_size=60)


def by_chunks(text: str) -> list[str]:
    return [piece for chunk in CHUNK.findall(text) for piece in split_pieces(chunk)]


def test_the_pattern_is_gpt2s() -> None:
    assert REFERENCE.pattern == GPT2_PATTERN


def test_white_space_is_that_of_the_regex_package() -> None:
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    assert set(SPACES) == set(regex.findall(r"\s", characters))
    # The standard library's is another, which is why the class is spelt out.
    assert set(re.findall(r"\s", characters)) - set(SPACES) == set("\x1c\x1d\x1e\x1f")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_short_text_of_telling_characters(length: int) -> None:
    for characters in itertools.product(TELLING, repeat=length):
        text = "".join(characters)
        assert by_chunks(text) == REFERENCE.findall(text)


def plain_or_chunks(text: str) -> list[str]:
    parts = split_plain(text)
    if parts is None or not all(map(is_plain, parts)):
        return by_chunks(text)
    return [piece for part in parts for piece in split_pieces(part)]


@pytest.mark.parametrize(("alphabet", "longest"), [(" \na", 9), (" \n\t\0é", 6)])
def test_plain_parts_of_every_short_text(alphabet: str, longest: int) -> None:
    for length in range(longest + 1):
        for characters in itertools.product(alphabet, repeat=length):
            text = "".join(characters)
            assert plain_or_chunks(text) == REFERENCE.findall(text)


@given(st.one_of(telling_text, any_text, st.text(st.sampled_from(" \nab.'s1"))))
def test_plain_parts_are_chunks(text: str) -> None:
    assert plain_or_chunks(text) == REFERENCE.findall(text)


def test_prose_is_plain() -> None:
    prose = "One line,\nanother.\n\n“A new paragraph,” she said. It's\n indented: 12 of them"
    parts = split_plain(prose)
    assert parts is not None
    assert all(map(is_plain, parts))
    for text in ("two  spaces", "a\tb", "a \nb", "\n\n\n", "end\n", "nul\0", "a\n\n b", "a\xa0b"):
        parts = split_plain(text)
        assert parts is None or not all(map(is_plain, parts))


@given(st.one_of(telling_text, any_text))
def test_chunks_then_pieces_are_the_pieces(text: str) -> None:
    assert by_chunks(text) == split_pieces(text) == REFERENCE.findall(text)


def test_every_pair_of_ascii_characters_in_context() -> None:
    for pair in itertools.product(map(chr, range(128)), repeat=2):
        text = "x {}{} 7".format(*pair)
        assert split_pieces(text) == by_chunks(text) == REFERENCE.findall(text)


@given(st.one_of(telling_text, any_text), st.integers(0, 8))
def test_windows_encode_independently(text: str, size: int) -> None:
    parts = list(windows(text, size))
    assert "".join(parts) == text
    for cut in (by_chunks, plain_or_chunks):
        assert [piece for part in parts for piece in cut(part)] == REFERENCE.findall(text)


def test_windows_bound_what_is_held_at_once() -> None:
    parts = list(windows("word " * 10_000, 100))
    assert max(map(len, parts)) < 110
