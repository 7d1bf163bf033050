"""GPT-2's tokenizer."""

from collections.abc import Iterable
from functools import cache

from gpt2fast.tokenizer.bpe import Codec
from gpt2fast.tokenizer.vocab import END_OF_TEXT, MERGES_FILE, derive_encoder, parse_merges


@cache
def _gpt2_codec() -> Codec:
    merges = parse_merges(MERGES_FILE.read_text("utf-8"), MERGES_FILE.name)
    encoder = derive_encoder(merges)
    return Codec(encoder, merges, encoder[END_OF_TEXT])


class GPT2Tokenizer:
    """Text to ids and back with GPT-2's vocabulary, which comes with the package."""

    eos_token_id = bos_token_id = 50256

    def __len__(self) -> int:
        return 50257

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens in it are ordinary text."""
        return _gpt2_codec().encode(text)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of ``ids``."""
        return _gpt2_codec().decode_bytes(ids).decode("utf-8", errors)
