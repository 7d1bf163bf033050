"""Decode tokens as they come, without ever printing part of a character."""

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2fast.tokenizer.tokenizer import GPT2Tokenizer


class StreamDecoder:
    """Turns ids into text one push at a time.

    A token may end inside a character: its bytes wait for the rest. All that ``push`` and the last
    ``flush`` return, joined, is what ``tokenizer.decode`` gives for all the ids at once.

        decoder = StreamDecoder(tokenizer)
        for token in generated:
            print(decoder.push(token), end="", flush=True)
        print(decoder.flush())

    Args:
        skip_special_tokens: leave special tokens out of the text.
        errors: what becomes of bytes that are not UTF-8, as in ``bytes.decode``; by default the
            tokenizer's ``errors``.
    """

    def __init__(
        self,
        tokenizer: "GPT2Tokenizer",
        skip_special_tokens: bool = False,
        errors: str | None = None,
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors or tokenizer.errors)

    def push(self, ids: int | Iterable[int]) -> str:
        """Take one id or several; returns the text that is complete by now and new."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip))

    def flush(self) -> str:
        """End the text: returns what an unfinished character stands for, and starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
