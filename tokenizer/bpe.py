"""Byte-pair encoding of one piece, and the codec that remembers what pieces encode to."""

from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from gpt2fast.tokenizer.pattern import CHUNK, split_pieces, windows
from gpt2fast.tokenizer.vocab import byte_alphabet

_WINDOW = 1 << 20  # characters encoded at once; bounds the memory of a long text
_CACHE_ENTRIES = 1 << 18
_CACHED_LENGTH = 64  # characters; longer chunks are too rare to remember

Merges = dict[tuple[int, int], tuple[int, int]]


def merge(symbols: list[int], merges: Merges) -> list[int]:
    """Apply byte-pair merges to ``symbols``: always the pair of lowest rank, all its occurrences
    from left to right, until no pair is left (Sennrich et al. 2016, arXiv:1508.07909).

    The symbols form a linked list. The positions of each pair that can merge wait in a bucket by
    rank, and a heap gives the lowest rank; a position is skipped if its pair has changed since. So
    n symbols take O(n log n), where searching again after each merge takes O(n^2).

    Args:
        symbols: ids of the initial symbols; not changed.
        merges: ``(left, right) -> (rank, merged)``.
    """
    n = len(symbols)
    symbols = symbols.copy()
    following = list(range(1, n + 1))
    previous = list(range(-1, n - 1))
    buckets: dict[int, list[int]] = {}
    for i in range(n - 1):
        found = merges.get((symbols[i], symbols[i + 1]))
        if found is not None:
            buckets.setdefault(found[0], []).append(i)
    heap = sorted(buckets)
    while heap:
        rank = heappop(heap)
        for i in sorted(buckets.pop(rank)):
            j = following[i]
            if symbols[i] < 0 or j >= n:
                continue
            found = merges.get((symbols[i], symbols[j]))
            if found is None or found[0] != rank:
                continue
            symbols[i] = found[1]
            symbols[j] = -1
            following[i] = after = following[j]
            before = previous[i]
            if after < n:
                previous[after] = i
            for left, right in ((before, i), (i, after)):
                if left < 0 or right >= n:
                    continue
                found = merges.get((symbols[left], symbols[right]))
                if found is not None:
                    if found[0] not in buckets:
                        buckets[found[0]] = []
                        heappush(heap, found[0])
                    buckets[found[0]].append(left)
    return [symbol for symbol in symbols if symbol >= 0]


class Codec(dict[str, bytes]):
    """Byte-level BPE between text and ids, without special tokens.

    As a dictionary it maps a chunk of text to its ids as packed machine words, and fills itself:
    encoding a text is then one lookup a chunk and one join. It never holds more than
    ``_CACHE_ENTRIES`` chunks; when full it starts again.
    """

    def __init__(self, encoder: dict[str, int], merges: Sequence[tuple[str, str]], unk_id: int):
        super().__init__()
        alphabet = byte_alphabet()
        self._typecode = "H" if max(encoder.values()) < 1 << 16 else "I"
        tokens = {token: i for i, token in enumerate(alphabet.values())}
        self._byte_symbols = [tokens[alphabet[byte]] for byte in range(256)]
        self._merges: Merges = {}
        for rank, (left, right) in enumerate(merges):
            symbol = tokens.setdefault(left + right, len(tokens))
            self._merges.setdefault((tokens[left], tokens[right]), (rank, symbol))
        self._ids = [encoder.get(token, unk_id) for token in tokens]
        to_byte = {character: byte for byte, character in alphabet.items()}
        self._bytes = {i: bytes(map(to_byte.__getitem__, token)) for token, i in encoder.items()}

    def __missing__(self, chunk: str) -> bytes:
        pieces = split_pieces(chunk)
        if len(pieces) > 1:
            packed = b"".join(map(self.__getitem__, pieces))
        else:
            packed = self._encode_piece(chunk)
        if len(chunk) <= _CACHED_LENGTH:
            if len(self) >= _CACHE_ENTRIES:
                self.clear()
            self[chunk] = packed
        return packed

    def _encode_piece(self, piece: str) -> bytes:
        try:
            data = piece.encode()
        except UnicodeEncodeError:
            data = piece.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        symbols = merge([self._byte_symbols[byte] for byte in data], self._merges)
        return array(self._typecode, [self._ids[symbol] for symbol in symbols]).tobytes()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        ids = array(self._typecode)
        for window in windows(text, _WINDOW):
            ids.frombytes(b"".join(map(self.__getitem__, CHUNK.findall(window))))
        return ids.tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for."""
        return b"".join(map(self._bytes.__getitem__, ids))
