"""Special tokens: their roles, and how they are found in a text."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any


def text_of(token: Any) -> str:
    """The string that ``token`` is, or that it has as transformers' ``AddedToken`` does.

    Raises:
        ValueError: it is neither.
    """
    text = getattr(token, "content", token)
    if not isinstance(text, str):
        raise ValueError(f"a token must be a string, found {token!r}")
    return text


class SpecialToken:
    """An attribute such as ``pad_token``: a token that stands in the vocabulary, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        return self if tokenizer is None else tokenizer._roles.get(self._name)

    def __set__(self, tokenizer: Any, token: str | None) -> None:
        tokenizer._set_role(self._name, token)


class SpecialTokenId:
    """An attribute such as ``pad_token_id``: the id of a role's token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._roles.get(self._role)
        return None if token is None else tokenizer._token_id(token)

    def __set__(self, tokenizer: Any, i: int | None) -> None:
        token = None if i is None else tokenizer.convert_ids_to_tokens(i)
        tokenizer._set_role(self._role, token)


@lru_cache(maxsize=64)
def _finder(tokens: frozenset[str]) -> re.Pattern[str]:
    # The longest of several tokens that begin at one place.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def choose(asked: str | Iterable[str], tokens: Iterable[str], name: str) -> frozenset[str]:
    """The tokens that ``allowed_special`` or ``disallowed_special`` means: "all", or a set.

    Raises:
        ValueError: another string, or a token that is not special.
    """
    known = frozenset(tokens)
    if asked == "all":
        return known
    if isinstance(asked, str):
        raise ValueError(f"{name} must be 'all' or a set of tokens, found {asked!r}")
    chosen = frozenset(asked)
    if not chosen <= known:
        raise ValueError(f"{name}: {sorted(chosen - known)} are not special: {sorted(known)}")
    return chosen


def find_first(text: str, tokens: frozenset[str]) -> str | None:
    """The first of ``tokens`` that stands in ``text``."""
    found = _finder(tokens).search(text) if tokens else None
    return found[0] if found else None


def split_at(text: str, tokens: frozenset[str]) -> list[tuple[int, str, bool]]:
    """Cut ``text`` at ``tokens``: (start, part, whether the part is one of them), in order."""
    parts, start = [], 0
    for found in _finder(tokens).finditer(text) if tokens else ():
        if found.start() > start:
            parts.append((start, text[start : found.start()], False))
        parts.append((found.start(), found[0], True))
        start = found.end()
    if start < len(text):
        parts.append((start, text[start:], False))
    return parts
