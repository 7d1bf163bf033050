"""Folders: ours read by transformers, theirs by ours, and what must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from gpt2fast.tokenizer import GPT2Tokenizer, LegacyGPT2Tokenizer
from gpt2fast.tokenizer.base import PRESETS

TEXT = "Hello<|endoftext|> wörld<pad>, said <b>, '88  \n\n <cls>"


@pytest.fixture
def extended() -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer(
        pad_token="<pad>", padding_side="left", truncation_side="left", model_max_length=77
    )
    tokenizer.add_tokens(["<b>"])
    tokenizer.add_tokens(["<cls>"], special_tokens=True)
    return tokenizer


def test_presets_are_the_vocabulary_of_the_package() -> None:
    assert {"gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2-medium"} < PRESETS
    for name in PRESETS:
        tokenizer = GPT2Tokenizer.from_pretrained(name)
        assert (len(tokenizer), tokenizer.max_len) == (50257, 1024)
    assert GPT2Tokenizer.from_pretrained("gpt2", padding_side="left").padding_side == "left"


@pytest.mark.parametrize("loader", ["AutoTokenizer", "GPT2Tokenizer"])
def test_transformers_reads_ours(extended: GPT2Tokenizer, tmp_path: Path, loader: str) -> None:
    paths = extended.save_pretrained(tmp_path / "new" / "folder")
    assert all(Path(path).is_file() for path in paths)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path / "new" / "folder")
    assert theirs(TEXT).input_ids == extended(TEXT).input_ids
    assert theirs.pad_token == "<pad>"
    assert (len(theirs), theirs.model_max_length) == (len(extended), 77)
    assert (theirs.padding_side, theirs.truncation_side) == ("left", "left")
    assert set(theirs.all_special_ids) <= set(extended.all_special_ids)
    assert theirs.decode(extended(TEXT).input_ids) == TEXT


@pytest.mark.parametrize("without", [None, "tokenizer.json"])
def test_ours_reads_ours(extended: GPT2Tokenizer, tmp_path: Path, without: str | None) -> None:
    extended.save_pretrained(tmp_path)
    if without:
        (tmp_path / without).unlink()
        assert GPT2Tokenizer.from_pretrained(tmp_path)("a b").input_ids == [64, 275]
        return
    again = GPT2Tokenizer.from_pretrained(tmp_path)
    assert again._codec is extended._codec  # GPT-2's own vocabulary is recognised
    assert again(TEXT).input_ids == extended(TEXT).input_ids
    assert again.get_added_vocab() == extended.get_added_vocab()
    assert again.special_tokens_map == extended.special_tokens_map
    assert again.all_special_tokens == extended.all_special_tokens
    assert (again.padding_side, again.truncation_side, again.max_len) == ("left", "left", 77)
    assert GPT2Tokenizer.from_pretrained(tmp_path, padding_side="right").padding_side == "right"


def test_ours_reads_theirs(tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_vocabulary(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(
        tmp_path, pad_token="<pad>", add_prefix_space=True, padding_side="left"
    )
    theirs.add_tokens(["<b>"])
    theirs.add_tokens(["<cls>"], special_tokens=True)
    theirs.save_pretrained(tmp_path / "saved")
    ours = GPT2Tokenizer.from_pretrained(tmp_path / "saved")
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.pad_token == "<pad>"
    assert ours.add_prefix_space is True
    assert ours.padding_side == "left"
    assert len(ours) == len(theirs)


def test_files_of_transformers_4(extended: GPT2Tokenizer, tmp_path: Path) -> None:
    extended.save_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 50257, "<b>": 50258}')
    special = {"pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<more>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"added_tokens_decoder": {"50259": {"content": "<cls>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours(TEXT).input_ids == extended(TEXT).input_ids
    assert ours.pad_token_id == 50257
    assert ours.all_special_tokens == ["<|endoftext|>", "<pad>", "<cls>", "<more>"]


def test_a_small_vocabulary_of_ones_own(tmp_path: Path) -> None:
    vocab = {"l": 0, "o": 1, "w": 2, "\u0120": 3, "lo": 4, "\u0120lo": 5, "<|endoftext|>": 70000}
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nl o\n\u0120 lo")
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("low lol") == ["lo", "w", "\u0120lo", "l"]
    assert tokenizer.encode("low lol") == [4, 2, 5, 0]
    assert tokenizer.encode("lox") == [4, 70000]  # x is unknown
    assert tokenizer("low<|endoftext|>").input_ids == [4, 2, 70000]
    assert tokenizer.decode([4, 2, 5]) == "low lo"
    copy = GPT2Tokenizer(tmp_path / "encoder.json", tmp_path / "vocab.bpe")
    assert copy.encode("low lol") == [4, 2, 5, 0]
    legacy = LegacyGPT2Tokenizer(tmp_path / "encoder.json", tmp_path / "vocab.bpe")
    assert legacy.encode("lox") == [4, 0]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither tokenizer"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    for name in (tmp_path / "absent", "./absent", "a/b/c", "../absent"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a name"):
            GPT2Tokenizer.from_pretrained(name)
    with pytest.raises(ValueError, match=r"vocab\.json.*None"):
        GPT2Tokenizer("vocab.json")
    with pytest.raises(NotADirectoryError, match="absent"):
        GPT2Tokenizer().save_vocabulary(tmp_path / "absent")


def test_the_hub_is_not_reached_offline() -> None:
    with pytest.raises(OSError, match="nothing"):
        GPT2Tokenizer.from_pretrained("nobody/nothing", local_files_only=True)


VOCAB_TROUBLE = [
    ("not JSON", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "an object"),
    ("{}", "an object"),
    ('{"a": 0, "b": 0}', "same id 0"),
    ('{"a": -1}', "'a' has the id -1"),
    ('{"a": 1.5}', "the id 1.5"),
    ('{"a": 1e400}', "the id inf"),
    ('{"a": true}', "the id True"),
    ('{"a": 99999999999}', "the id 99999999999"),
    ('{"a": "0"}', "the id '0'"),
]


@pytest.mark.parametrize(("content", "message"), VOCAB_TROUBLE, ids=lambda text: text[:20])
def test_damaged_vocabulary(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=message) as caught:
        GPT2Tokenizer.from_pretrained(tmp_path)
    assert "vocab.json" in str(caught.value)


def test_merges_of_unknown_symbols(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\nabc a\n")
    with pytest.raises(ValueError, match="merge 1, 'abc' with 'a'"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        data = data[name]
    data[last] = value


TOKENIZER_JSON_TROUBLE = [
    ("model/type", "WordPiece", "byte-level BPE"),
    ("model/ignore_merges", True, "byte-level BPE"),
    ("pre_tokenizer", {"type": "Whitespace"}, "byte-level BPE"),
    ("pre_tokenizer/use_regex", False, "byte-level BPE"),
    ("pre_tokenizer", None, "form"),
    ("normalizer", {"type": "NFC"}, "byte-level BPE"),
    ("model/merges", ["a b c"], "not a pair"),
    ("model/merges", [["a"]], "not a pair"),
    ("model/merges", 3, "form"),
    ("model/merges", [3], "form"),
    ("model/vocab", {"a": "x"}, "'x'"),
    ("model", [], "form"),
    ("added_tokens", [{"id": 50257, "content": "<m>", "lstrip": True}], "not supported"),
    ("added_tokens", [{"id": "7", "content": "<m>"}], "'7'"),
    ("added_tokens", [{"id": -7, "content": "<m>"}], "-7"),
    ("added_tokens", [{"id": 5, "content": "<m>"}], "clashes"),
    ("added_tokens", [{"id": 5, "content": ""}], "''"),
    ("added_tokens", [{"id": 60000, "content": c} for c in "<>"], "clashes"),
    ("added_tokens", [{"id": 60000, "content": c * 5} for c in "<>"], "same id 60000"),
    ("added_tokens", ["x"], "form"),
]


@pytest.mark.parametrize(("path", "value", "message"), TOKENIZER_JSON_TROUBLE, ids=str)
def test_tokenizer_json_of_another_kind(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    # Of bytes alone, which is written and read in no time.
    encoder = {token: i for i, token in enumerate(list(GPT2Tokenizer().encoder)[:256])}
    (tmp_path / "vocab.json").write_text(json.dumps({**encoder, "<|endoftext|>": 256}), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    GPT2Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    GPT2Tokenizer.from_pretrained(tmp_path)
    _set(data, path, value)
    file.write_text(json.dumps(data), "utf-8")
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "an object"),
        ("nonsense", "not JSON"),
        ('{"add_bos_token": true}', "add_bos_token"),
        ('{"padding_side": "up"}', "'up'"),
    ],
)
def test_damaged_configuration(tmp_path: Path, content: str, message: str) -> None:
    GPT2Tokenizer().save_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer.from_pretrained(tmp_path)
