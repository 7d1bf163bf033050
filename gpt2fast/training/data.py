"""Text files to a memory-mapped stream of token ids, and the order in which training reads it.

Documents are separated by a line ``<|endoftext|>``; every document is tokenized on its own and
followed by that token. A byte order mark at the beginning of a file is no text. The ids are kept as
uint16 in a cache file named by the hash of what they were made from, so a second run starts at once
and an edited text is tokenized again.
"""

import contextlib
import glob
import hashlib
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gpt2fast.checkpoint.vocabulary import rules, tokenizer_of
from gpt2fast.files import replacing
from gpt2fast.tokenizer import GPT2Tokenizer

_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?$\n?", re.MULTILINE)
_CACHE_FORMAT = b"gpt2fast tokens 2\n"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Expand file names and globs, in the order given, each glob sorted; a name comes first.

    Raises ValueError where one matches no file, or has an ending other than .txt, .xz and .bin.
    """
    files: list[Path] = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        found = [path for path in map(Path, names) if path.is_file()]
        if not found:
            raise ValueError(f"no file matches {pattern!r}")
        files += found
    for path in files:
        if path.suffix not in (".txt", ".xz", ".bin"):
            raise ValueError(f"training data must be .txt, .xz or .bin (uint16 ids), got {path}")
    return files


def split_documents(text: str) -> list[str]:
    """The documents of ``text``: what stands between lines ``<|endoftext|>``; empty ones go."""
    return [document for document in _SEPARATOR.split(text) if document.strip()]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return text.removeprefix("\ufeff")


def own_tokenizer(checkpoint: str) -> GPT2Tokenizer | None:
    """The tokenizer that belongs to a checkpoint, by its name; None where that is GPT-2's.

    Raises ValueError where its ids do not fit, or no token ends a text.
    """
    tokenizer = tokenizer_of(checkpoint)
    if rules(tokenizer) == rules(GPT2Tokenizer()):
        return None
    if (size := len(tokenizer)) > 2**16:
        raise ValueError(f"the tokenizer of {checkpoint} has {size} tokens: too many for uint16")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {checkpoint} has no token that ends a text")
    return tokenizer


def _token_ids(path: Path, tokenizer: GPT2Tokenizer) -> Iterator[np.ndarray]:
    if path.suffix == ".bin":
        if (size := path.stat().st_size) % 2:
            raise ValueError(f"{path} has {size} bytes: not a whole number of uint16 ids")
        yield np.fromfile(path, dtype=np.uint16)
        return
    for document in split_documents(_read_text(path)):
        yield np.array([*tokenizer.encode(document), tokenizer.eos_token_id], dtype=np.uint16)


def load_tokens(
    files: Sequence[Path], cache_dir: Path, tokenizer: GPT2Tokenizer | None = None
) -> np.memmap:
    """The ids of ``files``, in order, as one read-only memory-mapped uint16 array.

    ``tokenizer`` is by default GPT-2's, which is loaded only if the cache lacks these files. Raises
    ValueError where they hold no text at all.
    """
    digest = hashlib.sha256(_CACHE_FORMAT)
    if tokenizer is not None:
        digest.update(repr(rules(tokenizer)).encode())
    for path in files:
        digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    cached = cache_dir / f"{digest.hexdigest()[:32]}.bin"
    if not cached.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir):
            if not cached.is_file():  # no other process was faster
                _write_tokens(files, cached, tokenizer)
    if cached.stat().st_size < 2:
        raise ValueError(f"no text in {', '.join(map(str, files))}")
    return np.memmap(cached, dtype=np.uint16, mode="r")


def _write_tokens(files: Sequence[Path], cached: Path, tokenizer: GPT2Tokenizer | None) -> None:
    if tokenizer is None:
        tokenizer = GPT2Tokenizer()
    with replacing(cached) as partial, partial.open("wb") as file:
        for path in files:
            for ids in _token_ids(path, tokenizer):
                file.write(ids.tobytes())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time in, where the system can: the others need not do its work again."""
    if os.name != "posix":
        yield
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # NFS has no locks on folders
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)  # gives the lock back


class BlockOrder:
    """A shuffled, endless order over fixed-size blocks of a token stream.

    The stream is cut into blocks of ``block_size`` ids. Every epoch visits each block once, in an
    order (and with a shift of the cuts) that is a function of ``(seed, epoch)`` alone: the number
    of blocks taken so far is all the state there is, so a resumed run continues exactly.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int) -> None:
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        # One block fewer than would fit leaves room for the shift.
        self.blocks_per_epoch = len(tokens) // block_size - 1
        if self.blocks_per_epoch < 1:
            raise ValueError(
                f"training data has {len(tokens)} tokens: too few, "
                f"two blocks of {block_size} are the least"
            )
        self._epoch = -1

    def blocks(self, start: int, count: int) -> torch.Tensor:
        """Blocks ``start`` to ``start + count`` of the order: int64 ``[count, block_size]``."""
        rows = []
        for position in range(start, start + count):
            epoch, index = divmod(position, self.blocks_per_epoch)
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._shift = int(rng.integers(self.block_size))
                self._order = rng.permutation(self.blocks_per_epoch)
                self._epoch = epoch
            first = self._shift + int(self._order[index]) * self.block_size
            rows.append(self.tokens[first : first + self.block_size])
        return torch.from_numpy(np.stack(rows).astype(np.int64))
