"""The configuration under its old names."""

import os
from collections.abc import Mapping
from typing import Any

from gpt2fast.config import GPT2Config as ModernConfig


class GPT2Config(ModernConfig):
    """Configuration with the old names, order and defaults; `gpt2fast.GPT2Config` has the rest.

    Args:
        vocab_size_or_config_json_file: rows of the vocabulary, or the path of a JSON file, which
            then holds all the fields.
        n_positions: rows of the position embedding.
        n_ctx: longest context, past included.
        n_embd, n_layer, n_head, layer_norm_epsilon, initializer_range, resid_pdrop, embd_pdrop,
            attn_pdrop: as there.
        n_special: rows of the token embedding for special tokens, behind the vocabulary's.
        predict_special_tokens: whether the language-model head scores those too.
        **fields: further fields of `gpt2fast.GPT2Config`.

    Raises:
        ValueError: a size is impossible or a value is unknown.
        OSError: the file cannot be read.
    """

    n_ctx: int
    n_special: int
    predict_special_tokens: bool

    def __init__(
        self,
        vocab_size_or_config_json_file: int | str | os.PathLike[str] = 50257,
        n_positions: int = 1024,
        n_ctx: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        n_special: int = 0,
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        predict_special_tokens: bool = True,
        **fields: Any,
    ) -> None:
        if isinstance(vocab_size_or_config_json_file, str | os.PathLike):
            path = os.fspath(vocab_size_or_config_json_file)
            vars(self).update(vars(self.from_json_file(path)))
            return
        super().__init__(
            vocab_size_or_config_json_file,
            n_positions=n_positions,
            n_ctx=n_ctx,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            layer_norm_epsilon=layer_norm_epsilon,
            initializer_range=initializer_range,
            n_special=n_special,
            resid_pdrop=resid_pdrop,
            embd_pdrop=embd_pdrop,
            attn_pdrop=attn_pdrop,
            predict_special_tokens=predict_special_tokens,
            **fields,
        )

    def _validate(self) -> None:
        super()._validate()
        for name, least in (("n_ctx", 1), ("n_special", 0)):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {size!r}")
        if not isinstance(self.predict_special_tokens, bool):
            raise ValueError(
                f"predict_special_tokens must be true or false; got {self.predict_special_tokens!r}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **overrides: Any) -> "GPT2Config":
        """Build from the contents of a ``config.json``, of either generation.

        Raises:
            ValueError: it is not a mapping, or describes another kind of model.
        """
        known = ModernConfig.from_dict(fields, **overrides).to_dict()
        known.setdefault("n_ctx", known["n_positions"])
        return cls(known.pop("vocab_size"), **known)

    @property
    def total_tokens_embeddings(self) -> int:
        """Rows of the token embedding: the vocabulary's and the special tokens'."""
        return self.vocab_size + self.n_special

    @property
    def embedding_rows(self) -> int:
        return self.total_tokens_embeddings
