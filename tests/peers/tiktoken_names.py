"""GPT2Tokenizer under the names of tiktoken's interface: names alone, nothing of its behaviour.

In a control run it is tiktoken itself, on GPT-2's vocabulary, which it would download otherwise.
"""

from functools import cache, cached_property
from typing import Any

import pytest

from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.tokenizer.pattern import GPT2_PATTERN
from tests.peers.outcomes import CONTROL

# Special tokens with which GPT-2's vocabulary stands in for another one; none skips the test.
OTHERS_TOKENS: tuple[str, ...] = ()
_END = "<|endoftext|>"


class Encoding:
    def __init__(self, name: str, tokenizer: GPT2Tokenizer | None = None, **parts: Any):
        if tokenizer is None:
            pytest.skip(f"a vocabulary is files here, not {' and '.join(parts)}")
        self.name = name
        self.tokenizer = tokenizer
        self._pat_str = GPT2_PATTERN
        self.decode_bytes = tokenizer.decode_bytes
        self.decode_batch = tokenizer.batch_decode
        self.encode_ordinary = tokenizer.encode
        self.encode_ordinary_batch = self.encode_batch = tokenizer.encode_batch
        self._encode_bytes = tokenizer.encode_bytes

    @property
    def n_vocab(self) -> int:
        return len(self.tokenizer)

    @property
    def max_token_value(self) -> int:
        return self.n_vocab - 1

    @property
    def eot_token(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def _special_tokens(self) -> dict[str, int]:
        return self.tokenizer.get_added_vocab()

    @cached_property
    def _mergeable_ranks(self) -> dict[bytes, int]:
        return {self.tokenizer.decode_bytes([i]): i for i in self.tokenizer.decoder}

    def encode(
        self, text: str, *, allowed_special: Any = (), disallowed_special: Any = "all"
    ) -> list[int]:
        ids: list[int] = self.tokenizer.encode(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        return ids

    def encode_single_token(self, token: str | bytes) -> int:
        data = token.encode() if isinstance(token, str) else token
        letters = self.tokenizer.byte_encoder
        name = "".join(letters[byte] for byte in data)
        found: int = self.tokenizer.convert_tokens_to_ids(name)
        return found

    def decode(self, tokens: list[int], errors: str = "replace") -> str:
        text: str = self.tokenizer.decode(tokens, errors=errors)
        return text

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])

    def decode_with_offsets(self, tokens: list[int]) -> tuple[str, list[int]]:
        # Offsets are of a text here; the tests' tokens are those of their text.
        text = self.decode(tokens)
        spans = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return text, [start for start, _ in spans]


@cache
def _build(name: str, special_tokens: tuple[str, ...]) -> Any:
    tokenizer = GPT2Tokenizer()
    tokenizer.set_special_tokens(special_tokens)
    if not CONTROL:
        return Encoding(name, tokenizer)
    import tiktoken

    special = tokenizer.get_added_vocab()
    ids = (i for i in tokenizer.decoder if i not in special.values())
    return tiktoken.Encoding(
        name=name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks={tokenizer.decode_bytes([i]): i for i in ids},
        special_tokens=special,
    )


def get_encoding(name: str) -> Any:
    if name in ("gpt2", "r50k_base"):
        return _build(name, ())
    if not OTHERS_TOKENS:
        pytest.skip(f"{name} is another vocabulary; what comes before it in the test passed")
    return _build(name, OTHERS_TOKENS)


def encoding_for_model(model: str) -> Any:
    if model != "gpt2":
        pytest.skip(f"{model} is another model; what comes before it in the test passed")
    return get_encoding("gpt2")


def list_encoding_names() -> list[str]:
    return ["gpt2", "r50k_base"]
