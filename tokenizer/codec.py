"""The codec between text and ids: what tokenizers share, without special tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from gpt2fast.tokenizer.bpe import Merges, merge
from gpt2fast.tokenizer.pattern import CHUNK, is_plain, split_pieces, split_plain, windows
from gpt2fast.tokenizer.vocab import byte_alphabet, read_gpt2_vocabulary

PACKED = "I"  # typecode of arrays of ids
_WINDOW = 1 << 13  # characters cut into chunks at a time, which stay in the processor's cache
_MEMO_ENTRIES = 1 << 17
_MEMO_LENGTH = 64  # characters; longer chunks are too rare to remember


class _Memo(dict[str, bytes]):
    """text -> what ``encode`` gives for it, computed on first use and remembered.

    At most ``_MEMO_ENTRIES`` texts of at most ``_MEMO_LENGTH`` characters; when full it starts
    again. Threads may share it: each operation on a dictionary is atomic, and an entry that
    another thread has just dropped is only computed once more.
    """

    def __init__(self, encode: Callable[[str], bytes]):
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> bytes:
        packed = self._encode(text)
        if len(text) <= _MEMO_LENGTH:
            if len(self) >= _MEMO_ENTRIES:
                self.clear()
            self[text] = packed
        return packed


class _NotPlain(Exception):
    """Found a part of a text that is not plain."""


class _PlainMemo(_Memo):
    """A memory for the parts that ``split_plain`` gives; one that is not plain is an exception."""

    def __missing__(self, text: str) -> bytes:
        if not is_plain(text):
            raise _NotPlain
        return super().__missing__(text)


def repair_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    UTF-8 has no form for a surrogate; tiktoken does the same.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in byte_alphabet().items()}


def token_bytes(token: str) -> bytes:
    """The bytes that ``token`` stands for; one outside the alphabet stands for its own text."""
    try:
        return bytes(map(_byte_of().__getitem__, token))
    except KeyError:
        return token.encode("utf-8", "replace")


class Codec:
    """Byte-level BPE between text and ids.

    Ids are held as packed machine words: to encode a text is to look up each of its chunks and
    join what is found.

    Args:
        encoder: token -> id, in the alphabet of ``byte_alphabet``.
        merges: pairs of tokens, most frequent first.
        unk_id: what tokens that ``encoder`` lacks become; None if it must lack none.
        whole_tokens: that every token encodes to itself, which is known of GPT-2's vocabulary,
            so that a piece which is a token needs no merging.

    Raises:
        ValueError: a merge of tokens that neither are bytes nor come from earlier merges, or a
            token without an id.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        merges: list[tuple[str, str]],
        unk_id: int | None,
        whole_tokens: bool = False,
    ):
        self.encoder = encoder
        self.merges = merges
        self.unk_id = unk_id
        self.decoder = {i: token for token, i in encoder.items()}
        self.id_bytes = {i: token_bytes(token) for token, i in encoder.items()}
        alphabet = byte_alphabet()
        symbols = _byte_of().copy()
        self._pairs: Merges = {}
        for rank, (left, right) in enumerate(merges):
            if left not in symbols or right not in symbols:
                raise ValueError(
                    f"merge {rank}, {left!r} with {right!r}: neither bytes nor made by earlier ones"
                )
            merged = symbols.setdefault(left + right, len(symbols))
            self._pairs.setdefault((symbols[left], symbols[right]), rank << 32 | merged)
        # The first 256 symbols are the bytes' values, so a piece's UTF-8 is its symbols.
        self._tokens = [alphabet[byte] for byte in range(256)] + list(symbols)[256:]
        lacking = [token for token in self._tokens if token not in encoder]
        if lacking and unk_id is None:
            raise ValueError(f"no unk_token, and {len(lacking)} without an id: {lacking[0]!r}")
        self._id_of = {token: encoder.get(token, unk_id or 0) for token in self._tokens}
        self._ids = list(self._id_of.values())
        self._whole: dict[bytes, bytes] = {}
        if whole_tokens:
            for i in self._ids:
                self._whole[self.id_bytes[i]] = array(PACKED, [i]).tobytes()
        self._chunks = _Memo(self._encode_chunk)
        self._plain = _PlainMemo(self._encode_chunk)

    def __reduce__(self) -> tuple[Any, ...]:
        if self is gpt2_codec():
            return gpt2_codec, ()
        return Codec, (self.encoder, self.merges, self.unk_id, bool(self._whole))

    def _encode_chunk(self, chunk: str) -> bytes:
        pieces = split_pieces(chunk)
        if len(pieces) > 1:
            return b"".join(map(self._chunks.__getitem__, pieces))
        try:
            data = chunk.encode()
        except UnicodeEncodeError:
            repaired = repair_surrogates(chunk)
            return b"".join(map(self._chunks.__getitem__, split_pieces(repaired)))
        whole = self._whole.get(data)
        if whole is not None:
            return whole
        ids = self._ids
        symbols = merge(list(data), self._pairs)
        return array(PACKED, [ids[symbol] for symbol in symbols]).tobytes()

    def encode(self, text: str) -> array[int]:
        """The ids of ``text``, packed."""
        ids: array[int] = array(PACKED)
        for window in windows(text, _WINDOW):
            ids.frombytes(self._encode_window(window))
        return ids

    def _encode_window(self, window: str) -> bytes:
        parts = split_plain(window)
        if parts is not None:
            with suppress(_NotPlain):
                return b"".join(map(self._plain.__getitem__, parts))
        return b"".join(map(self._chunks.__getitem__, CHUNK.findall(window)))

    def encode_raw(self, data: bytes) -> list[int]:
        """The ids of ``data`` as one piece, which need not be UTF-8."""
        return [self._ids[symbol] for symbol in merge(list(data), self._pairs)]

    def id_of(self, token: str) -> int:
        """The id of a token that ``pieces`` gave."""
        return self._id_of[token]

    def pieces(self, text: str) -> Iterator[tuple[str, list[str]]]:
        """Each piece of ``text``, surrogates repaired, with its tokens."""
        for piece in split_pieces(repair_surrogates(text)):
            yield piece, [self._tokens[s] for s in merge(list(piece.encode()), self._pairs)]


@cache
def gpt2_codec() -> Codec:
    """The codec of GPT-2's own vocabulary, read from the package on first use."""
    encoder, merges = read_gpt2_vocabulary()
    return Codec(encoder, merges, unk_id=50256, whole_tokens=True)
