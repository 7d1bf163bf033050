"""The tokenizer as pytorch-pretrained-BERT had it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpt2fast.tokenizer.base import NO_LIMIT
from gpt2fast.tokenizer.codec import Codec
from gpt2fast.tokenizer.files import SavedTokenizer
from gpt2fast.tokenizer.tokenizer import GPT2Tokenizer

SPECIAL_TOKENS_FILE = "special_tokens.txt"


class LegacyGPT2Tokenizer(GPT2Tokenizer):
    """GPT2Tokenizer with the defaults of 2019.

    ``<|endoftext|>`` in a text is ordinary text, an unknown token has the id 0, ``decode`` removes
    spaces before punctuation, and ``special_tokens`` are numbered after the vocabulary.

    Args:
        vocab_file, merges_file: None for GPT-2's own.
        errors: what ``decode`` makes of bytes that are not UTF-8.
        special_tokens: tokens to set with ``set_special_tokens``.
        max_len: longest input of the model in tokens; longer ones are warned of.
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        errors: str = "replace",
        special_tokens: Sequence[str] | None = None,
        max_len: int | None = None,
        **settings: Any,
    ):
        limit = settings.pop("model_max_length", NO_LIMIT)
        super().__init__(
            vocab_file,
            merges_file,
            errors,
            model_max_length=limit if max_len is None else min(max_len, limit),
            **settings,
        )
        if special_tokens is not None:
            self.set_special_tokens(special_tokens)

    def _foreign_codec(self, saved: SavedTokenizer) -> Codec:
        return Codec(saved.encoder, saved.merges, unk_id=0)

    def _unknown_id(self, token: str) -> int:
        return 0

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write ``vocab.json``, ``merges.txt`` and ``special_tokens.txt``; returns their paths."""
        paths = super().save_vocabulary(save_directory, filename_prefix)
        special = Path(paths[0]).with_name(SPECIAL_TOKENS_FILE)
        special.write_text("".join(f"{token}\n" for token in self.special_tokens), "utf-8")
        return (*paths, str(special))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = True,
        *,
        errors: str | None = None,
    ) -> Any:
        """The text of ids, by default without spaces before punctuation."""
        return super().decode(
            token_ids, skip_special_tokens, clean_up_tokenization_spaces, errors=errors
        )

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> Any:
        """The token of an id, or the tokens of several; ``<|endoftext|>`` is never skipped."""
        if not skip_special_tokens or isinstance(ids, int):
            return super().convert_ids_to_tokens(ids)
        special = set(self.special_tokens.values())
        return super().convert_ids_to_tokens([i for i in ids if i not in special])

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """As in 2019, when ``do not`` became ``don't`` as well."""
        text = text.replace("<unk>", "").replace(" do not", " don't")
        return GPT2Tokenizer.clean_up_tokenization(text)
