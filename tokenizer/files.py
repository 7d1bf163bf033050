"""Tokenizer folders, as Hugging Face's libraries and the legacy one write them.

Read: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt`` (OpenAI's names ``encoder.json`` and
``vocab.bpe`` as well); beside them ``tokenizer_config.json``, ``special_tokens_map.json``,
``added_tokens.json`` and the legacy ``special_tokens.txt``. Files are data: nothing is executed,
and what this tokenizer could not reproduce is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

from gpt2fast.tokenizer.vocab import parse_merges

VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
OTHER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "special_tokens.txt",
)
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = (
    "add_prefix_space",
    "errors",
    "model_max_length",
    "padding_side",
    "truncation_side",
)


class SavedTokenizer:
    """What a folder holds.

    ``added`` maps tokens beyond BPE to ids; those of them in ``special`` are special tokens.
    ``legacy_special`` are the tokens of ``special_tokens.txt``, which have no ids yet.
    ``settings`` are arguments of the tokenizer's class.
    """

    def __init__(self, encoder: dict[str, int], merges: list[tuple[str, str]]):
        self.encoder = encoder
        self.merges = merges
        self.added: dict[str, int] = {}
        self.special: set[str] = set()
        self.legacy_special: list[str] = []
        self.settings: dict[str, Any] = {}


def read_json(path: Path) -> Any:
    """The contents of a JSON file; a ValueError that names the file if it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def check_encoder(encoder: Any, source: str | Path) -> dict[str, int]:
    """``encoder`` if it maps strings to distinct ids from 0; else a ValueError."""
    if not isinstance(encoder, dict) or not encoder:
        raise ValueError(f"{source}: expected an object of tokens and ids, found {encoder!r:.80}")
    seen: dict[int, str] = {}
    for token, i in encoder.items():
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise ValueError(f"{source}: token {token!r} has the id {i!r}")
        if i in seen:
            raise ValueError(f"{source}: {seen[i]!r} and {token!r} have the same id {i}")
        seen[i] = token
    return encoder


def read_vocabulary(vocab_file: Path, merges_file: Path) -> SavedTokenizer:
    """A ``vocab.json`` and a ``merges.txt``."""
    return SavedTokenizer(
        check_encoder(read_json(vocab_file), vocab_file),
        parse_merges(merges_file.read_text("utf-8"), str(merges_file)),
    )


def read_folder(folder: Path) -> SavedTokenizer:
    """The tokenizer in ``folder``.

    Raises:
        FileNotFoundError: it holds no vocabulary.
        ValueError: a file is damaged, or of a tokenizer that is not GPT-2's.
    """
    if (folder / "tokenizer.json").is_file():
        saved = _read_tokenizer_json(folder / "tokenizer.json")
    else:
        for vocab, merges in VOCABULARY_FILES:
            if (folder / vocab).is_file() and (folder / merges).is_file():
                saved = read_vocabulary(folder / vocab, folder / merges)
                break
        else:
            raise FileNotFoundError(
                f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt"
            )
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _apply_settings(saved, read_json(folder / name), folder / name)
    if (folder / "added_tokens.json").is_file():
        added = check_encoder(read_json(folder / "added_tokens.json"), folder / "added_tokens.json")
        for token, i in added.items():
            saved.added.setdefault(token, i)
    if (folder / "special_tokens.txt").is_file():
        lines = (folder / "special_tokens.txt").read_text("utf-8").split("\n")
        saved.legacy_special = [line for line in lines if line]
    return saved


def download(name: str, **options: Any) -> Path:
    """The tokenizer files of the Hub's repository ``name``, as a folder in the Hub's cache.

    ``options`` are those of ``huggingface_hub.snapshot_download``: ``revision``, ``token``,
    ``cache_dir``, ``local_files_only``, ``force_download``.
    """
    from huggingface_hub import snapshot_download

    wanted = [*OTHER_FILES, *(file for pair in VOCABULARY_FILES for file in pair)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is not a folder, and its tokenizer is not in the Hub's cache: {error}"
        ) from error


def _read_tokenizer_json(path: Path) -> SavedTokenizer:
    data = read_json(path)
    try:
        model, before = data["model"], data["pre_tokenizer"]
        encoder, merges = model["vocab"], model["merges"]
        kind = (model["type"], before["type"], before.get("use_regex", True), data["normalizer"])
        if kind != ("BPE", "ByteLevel", True, None) or model.get("ignore_merges"):
            raise ValueError(f"{path}: not GPT-2's byte-level BPE: {kind}")
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"{path}: a merge is not a pair")
        saved = SavedTokenizer(check_encoder(encoder, path), pairs)
        saved.settings["add_prefix_space"] = bool(before.get("add_prefix_space", False))
        for token in data.get("added_tokens", []):
            _add_token(saved, token, token["id"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has not the form of a tokenizer.json: {error!r}") from None
    return saved


def _add_token(saved: SavedTokenizer, token: dict[str, Any], i: Any, path: Path) -> None:
    content = token["content"]
    if not isinstance(content, str) or not content or type(i) is not int or i < 0:
        raise ValueError(f"{path}: an added token is {content!r} with the id {i!r}")
    if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError(
            f"{path}: {content!r} strips or needs word borders, which is not supported"
        )
    saved.added[content] = i
    if token.get("special"):
        saved.special.add(content)


def _content(token: Any) -> Any:
    """A token, which may be written with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _apply_settings(saved: SavedTokenizer, config: Any, path: Path) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, found {config!r:.80}")
    if config.get("add_bos_token"):
        raise ValueError(f"{path}: add_bos_token is not supported")
    for name in (*ROLES, *_SETTINGS):
        value = _content(config.get(name))
        if value is not None:
            saved.settings[name] = value
    for name in ("additional_special_tokens", "extra_special_tokens"):
        saved.special.update(map(_content, config.get(name) or ()))
    for i, token in config.get("added_tokens_decoder", {}).items():
        _add_token(saved, token, int(i), path)


def write_folder(folder: Path, saved: SavedTokenizer) -> tuple[str, ...]:
    """Write what transformers reads, old and new; returns the paths of the files."""
    settings = {"tokenizer_class": "GPT2Tokenizer", **saved.settings}
    paths = [folder / "tokenizer_config.json", folder / "tokenizer.json"]
    paths[0].write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    paths[1].write_text(json.dumps(_tokenizer_json(saved), ensure_ascii=False), "utf-8")
    return (*map(str, paths), *write_vocabulary(folder, saved.encoder, saved.merges))


def write_vocabulary(
    folder: Path, encoder: dict[str, int], merges: list[tuple[str, str]], prefix: str = ""
) -> tuple[str, str]:
    """Write ``vocab.json`` and ``merges.txt``; returns their paths."""
    vocab_path, merges_path = folder / f"{prefix}vocab.json", folder / f"{prefix}merges.txt"
    vocab_path.write_text(json.dumps(encoder, ensure_ascii=False), "utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    merges_path.write_text(f"#version: 0.2\n{lines}", "utf-8")
    return str(vocab_path), str(merges_path)


def _tokenizer_json(saved: SavedTokenizer) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    prefix_space = saved.settings["add_prefix_space"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token not in saved.special,
                "special": token in saved.special,
            }
            for token, i in sorted(saved.added.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": prefix_space},
        "post_processor": {**byte_level, "add_prefix_space": True, "trim_offsets": False},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": saved.encoder,
            "merges": [list(pair) for pair in saved.merges],
        },
    }
