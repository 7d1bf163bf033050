"""GPT-2's tokenizer."""

from collections.abc import Iterable

from gpt2fast.tokenizer.codec import gpt2_codec


class GPT2Tokenizer:
    """Text to ids and back with GPT-2's vocabulary, which comes with the package."""

    eos_token_id = bos_token_id = 50256

    def __len__(self) -> int:
        return 50257

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens in it are ordinary text."""
        return gpt2_codec().encode(text).tolist()

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of ``ids``."""
        c = gpt2_codec()
        return b"".join(c.token_bytes(c.decoder[i]) for i in ids).decode("utf-8", errors)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT2Tokenizer":
        """The tokenizer of a preset, which all share."""
        return cls()
