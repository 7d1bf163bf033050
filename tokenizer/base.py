"""The tokenizer without its text: tokens and ids, special tokens, folders."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gpt2fast.tokenizer import files
from gpt2fast.tokenizer.batch import check_side
from gpt2fast.tokenizer.codec import Codec, gpt2_codec, token_bytes
from gpt2fast.tokenizer.special import SpecialToken, SpecialTokenId, text_of
from gpt2fast.tokenizer.vocab import END_OF_TEXT, byte_alphabet

_Self = TypeVar("_Self", bound="TokenizerBase")

NO_LIMIT = int(1e30)
_PRESET_LENGTH = 1024
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
PRESETS = frozenset(
    name
    for short in ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    for name in (short, f"{_OWNERS[short.partition('-')[0]]}/{short}")
) | {"bundled"}


def id_list(ids: Any) -> list[Any]:
    """``ids``, one or several, from any sequence, array or tensor, as a list."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    return [ids] if isinstance(ids, int) else list(ids)


class TokenizerBase:
    """Tokens and ids; the base of GPT2Tokenizer, which see for the arguments."""

    bos_token, eos_token, unk_token, pad_token = (SpecialToken() for _ in range(4))
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = (SpecialTokenId() for _ in range(4))

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        errors: str = "replace",
        unk_token: str | None = END_OF_TEXT,
        bos_token: str | None = END_OF_TEXT,
        eos_token: str | None = END_OF_TEXT,
        pad_token: str | None = None,
        add_prefix_space: bool = False,
        model_max_length: int = NO_LIMIT,
        padding_side: str = "right",
        truncation_side: str = "right",
        *,
        saved: files.SavedTokenizer | None = None,
    ):
        if (vocab_file is None) != (merges_file is None):
            raise ValueError(
                f"vocab_file and merges_file go together, found {vocab_file!r} and {merges_file!r}"
            )
        if vocab_file is not None and merges_file is not None:
            saved = files.read_vocabulary(Path(vocab_file), Path(merges_file))
        self.errors = errors
        self.add_prefix_space = add_prefix_space
        self.model_max_length = int(model_max_length)
        self.padding_side = check_side("padding_side", padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side)
        self._warned = False
        self._added: dict[str, int] = {}
        self._special: set[str] = set()
        self._set_by_user: dict[str, int] = {}
        roles = zip(files.ROLES, (bos_token, eos_token, unk_token, pad_token), strict=True)
        self._roles = {role: text_of(token) for role, token in roles if token is not None}
        shipped = gpt2_codec()
        if saved is None or (saved.encoder, saved.merges) == (shipped.encoder, shipped.merges):
            self._codec = shipped
        else:
            self._codec = self._foreign_codec(saved)
        if saved is not None:
            self._check_added(saved.added)
            self._added.update(saved.added)
        for token in (*self._roles.values(), *(sorted(saved.special) if saved else ())):
            self._add(token, special=True)
        if saved is not None and saved.legacy_special:
            self.set_special_tokens(saved.legacy_special)
        self._make_table()

    def _foreign_codec(self, saved: files.SavedTokenizer) -> Codec:
        unk_id = None
        if "unk_token" in self._roles:
            ids = {**saved.encoder, **saved.added}
            unk_id = ids.get(self._roles["unk_token"], max(ids.values()) + 1)
            saved.added.setdefault(self._roles["unk_token"], unk_id)
        return Codec(saved.encoder, saved.merges, unk_id)

    def _check_added(self, added: Mapping[str, int]) -> None:
        owners: dict[int, str] = {}
        for token, i in added.items():
            if owners.setdefault(i, token) != token:
                raise ValueError(f"{owners[i]!r} and {token!r}, both added, have the same id {i}")
            known = self._codec.encoder.get(token, self._codec.decoder.get(i, token))
            if known not in (token, i):
                raise ValueError(
                    f"the added token {token!r} with the id {i} clashes with {known!r}"
                )

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> _Self:
        """The tokenizer of a preset, a folder or a repository of the Hub.

        A preset (``gpt2``, ``distilgpt2``, ..., ``bundled``) is GPT-2's own vocabulary, from this
        package, with 1,024 as ``model_max_length``; a folder of that name comes first.

        Args:
            name_or_path: which.
            revision, token, cache_dir, local_files_only: for the Hub alone.
            settings: arguments of the class, over those the folder holds.

        Raises:
            FileNotFoundError: no such folder, or no tokenizer in it.
            ValueError: a damaged file, or a tokenizer of another kind.
        """
        folder = Path(name_or_path)
        if not folder.is_dir() and str(name_or_path) in PRESETS:
            return cls(**{"model_max_length": _PRESET_LENGTH, **settings})
        if not folder.is_dir():
            if folder.exists() or not files.HUB_NAME.fullmatch(str(name_or_path)):
                raise FileNotFoundError(f"{folder} is neither a folder nor a name on the Hub")
            folder = files.download(
                str(name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        saved = files.read_folder(folder)
        return cls(saved=saved, **{**saved.settings, **settings})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the folder that ``from_pretrained``, here and in transformers, reads.

        Returns the paths of ``tokenizer_config.json``, ``tokenizer.json``, ``vocab.json`` and
        ``merges.txt``.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "add_prefix_space": self.add_prefix_space,
            "errors": self.errors,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            **{role: self._roles.get(role) for role in files.ROLES},
        }
        saved = files.SavedTokenizer(self._codec.encoder, self._codec.merges)
        saved.added, saved.special, saved.settings = self._added, self._special, settings
        return files.write_folder(folder, saved)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write ``vocab.json`` and ``merges.txt`` to a folder; returns their paths."""
        folder = Path(save_directory)
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        return files.write_vocabulary(folder, self._codec.encoder, self._codec.merges, prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_table()

    def __len__(self) -> int:
        """The number of tokens, added ones included."""
        return len(self._codec.encoder.keys() | self._added.keys())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, special: {self.special_tokens_map})"

    @property
    def vocab_size(self) -> int:
        """The number of tokens without those added: 50,257 for GPT-2."""
        return len(self._codec.encoder)

    @property
    def max_len(self) -> int:
        """The older name of ``model_max_length``."""
        return self.model_max_length

    @property
    def encoder(self) -> dict[str, int]:
        """token -> id, without added tokens. Shared: do not change it."""
        return self._codec.encoder

    @property
    def decoder(self) -> dict[int, str]:
        """id -> token, without added tokens. Shared: do not change it."""
        return self._codec.decoder

    @property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        """Each merge with its rank."""
        return {pair: rank for rank, pair in enumerate(self._codec.merges)}

    @property
    def byte_encoder(self) -> dict[int, str]:
        """byte -> the character that stands for it in tokens."""
        return byte_alphabet().copy()

    def get_vocab(self) -> dict[str, int]:
        """token -> id, added tokens included."""
        return {**self._codec.encoder, **self._added}

    def get_added_vocab(self) -> dict[str, int]:
        """token -> id of the tokens that are not the work of BPE."""
        return self._added.copy()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens that have a role, such as ``eos_token``."""
        return self._roles.copy()

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens in the order of their ids."""
        return sorted(self._special, key=self._added.__getitem__)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of ``all_special_tokens``."""
        return [self._added[token] for token in self.all_special_tokens]

    @property
    def special_tokens(self) -> dict[str, int]:
        """What ``set_special_tokens`` set, with the ids."""
        return self._set_by_user.copy()

    def set_special_tokens(self, special_tokens: Iterable[str] | None) -> None:
        """Make ``special_tokens`` the special tokens after the vocabulary's own.

        They are numbered from ``len(encoder)`` in their order, and replace those set before.

        Raises:
            ValueError: one is in the vocabulary, or an added token has such an id already.
        """
        first = len(self._codec.encoder)
        chosen = {token: first + n for n, token in enumerate(special_tokens or ())}
        others = {t: i for t, i in self._added.items() if t not in self._set_by_user}
        self._check_added({**others, **chosen})
        self._added = {**others, **chosen}
        self._special = self._special - self._set_by_user.keys() | chosen.keys()
        self._set_by_user = chosen
        self._make_table()

    def add_tokens(self, new_tokens: str | Iterable[str], special_tokens: bool = False) -> int:
        """Add tokens that BPE does not know; returns how many were new.

        Grow the model's embedding to ``len(tokenizer)`` afterwards. Ordinary ones are recognised in
        every text, special ones only where special tokens are.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        before = len(self)
        for token in tokens:
            self._add(text_of(token), special_tokens)
        self._make_table()
        return len(self) - before

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Give tokens a role, e.g. ``{"pad_token": "<pad>"}``; returns how many were new.

        Besides roles, ``additional_special_tokens`` takes a list of tokens without one.
        """
        before = len(self)
        for role, token in special_tokens_dict.items():
            if role in ("additional_special_tokens", "extra_special_tokens"):
                self.add_tokens(token, special_tokens=True)
            elif role in files.ROLES:
                self.add_tokens(text_of(token), special_tokens=True)
                self._roles[role] = text_of(token)
            else:
                raise ValueError(f"{role!r} is none of the roles {', '.join(files.ROLES)}")
        return len(self) - before

    def _add(self, token: str, special: bool) -> None:
        if not token:
            raise ValueError("a token cannot be the empty string")
        if token not in self._added:
            ids = self._codec.encoder
            last = max(len(ids) - 1, *ids.values(), *self._added.values())
            self._added[token] = ids.get(token, last + 1)
        if special:
            self._special.add(token)

    def _set_role(self, role: str, token: str | None) -> None:
        if token is None:
            self._roles.pop(role, None)
            return
        token = text_of(token)
        if self._token_id(token) is None:
            raise ValueError(
                f"{role} {token!r} is not in the vocabulary; "
                f"add_special_tokens({{{role!r}: {token!r}}}) adds it"
            )
        self._add(token, special=True)
        self._roles[role] = token

    def _make_table(self) -> None:
        self._table = self._codec.id_bytes
        if not self._added.items() <= self._codec.encoder.items():
            extra = {i: token.encode("utf-8", "replace") for token, i in self._added.items()}
            self._table = {**self._table, **extra}

    def _token_id(self, token: str) -> int | None:
        return self._added.get(token, self._codec.encoder.get(token))

    def _unknown_id(self, token: str) -> int:
        if self.unk_token_id is None:
            raise ValueError(f"{token!r} is not in the vocabulary, and there is no unk_token")
        return self.unk_token_id

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or the ids of several; an unknown token has that of ``unk_token``.

        Raises:
            ValueError: an unknown token where there is no ``unk_token``.
        """
        if isinstance(tokens, str):
            found = self._token_id(tokens)
            return self._unknown_id(tokens) if found is None else found
        ids = [self.convert_tokens_to_ids(token) for token in tokens]
        if len(ids) > self.model_max_length:
            self._warn_of_length(len(ids))
        return ids

    def _warn_of_length(self, length: int) -> None:
        import logging  # 6 ms, which most users of this module never need

        logging.getLogger(__name__).warning(
            "%d tokens, but the model takes no more than %d", length, self.model_max_length
        )

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> Any:
        """The token of an id, or the tokens of several.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        one = isinstance(ids, int)
        added = {i: token for token, i in self._added.items()}
        tokens = []
        for i in map(int, id_list(ids)):
            token = added.get(i, self._codec.decoder.get(i))
            if token is None:
                raise ValueError(f"id {i} is not in the vocabulary of {len(self)} tokens")
            if one or not (skip_special_tokens and token in self._special):
                tokens.append(token)
        return tokens[0] if one else tokens

    def decode_bytes(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes that ``ids``, one or several, stand for.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = id_list(ids)
        if skip_special_tokens:
            special = {self._added[token] for token in self._special}
            ids = [i for i in ids if int(i) not in special]
        try:
            return b"".join(map(self._table.__getitem__, ids))
        except (KeyError, TypeError):
            ids = list(map(int, ids))  # numbers of other types, unless one is wrong
            wrong = next((i for i in ids if i not in self._table), None)
            if wrong is not None:
                raise ValueError(
                    f"id {wrong} is not in the vocabulary of {len(self)} tokens"
                ) from None
            return b"".join(map(self._table.__getitem__, ids))

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text that ``tokens`` stand for."""
        return b"".join(
            token.encode() if token in self._added else token_bytes(token) for token in tokens
        ).decode("utf-8", self.errors)
