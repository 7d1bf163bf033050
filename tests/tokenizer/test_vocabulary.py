"""The 50,257 ids, and tokens with a role."""

import hashlib
import json
import logging
import pickle

import pytest
import tokenizers

from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.tokenizer.vocab import MERGES_FILE, byte_alphabet, derive_encoder, parse_merges

# Of OpenAI's own files.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def test_the_merges_are_openais() -> None:
    assert hashlib.sha256(MERGES_FILE.read_bytes()).hexdigest() == MERGES_SHA256


def test_the_derived_ids_are_openais_to_the_byte(tokenizer: GPT2Tokenizer) -> None:
    written = json.dumps(tokenizer.encoder).encode()
    assert hashlib.sha256(written).hexdigest() == ENCODER_SHA256


def test_known_ids(tokenizer: GPT2Tokenizer) -> None:
    known = {"!": 0, "a": 64, "\u0120t": 256, "\u0120the": 262, "\u0120gazed": 50255}
    assert {token: tokenizer.encoder[token] for token in known} == known
    assert tokenizer.encoder["<|endoftext|>"] == 50256
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 50257
    assert tokenizer.decoder[262] == "\u0120the"
    assert tokenizer.bpe_ranks["h", "e"] == 2


def test_the_licence_of_the_merges_is_beside_them() -> None:
    text = (MERGES_FILE.parent / "LICENSE").read_text("utf-8")
    assert "Modified MIT License" in text
    assert "Copyright (c) 2019 OpenAI" in text


def test_every_token_that_is_one_piece_encodes_to_itself(tokenizer: GPT2Tokenizer) -> None:
    """What the codec relies on where a piece is a token: BPE would give the same."""
    codec = tokenizer._codec
    for i in range(50256):
        assert codec.encode_raw(tokenizer.decode_bytes(i)) == [i]


def test_byte_alphabet() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert alphabet[ord("A")] == "A"
    assert [alphabet[b] for b in b"\0 \n\xad"] == ["\u0100", "\u0120", "\u010a", "\u0143"]


def test_merges_may_begin_with_a_hash_and_lack_the_last_newline() -> None:
    text = "#version: 0.2\na b\n# #\n## a"
    assert parse_merges(text) == [("a", "b"), ("#", "#"), ("##", "a")]
    assert parse_merges("# #\na b\n") == [("#", "#"), ("a", "b")]
    assert derive_encoder(parse_merges(text))["###"[:2]] == 257


@pytest.mark.parametrize("line", ["abc", "a b c", "a ", " b"])
def test_a_damaged_merge_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 3.*" + repr(line)):
        parse_merges(f"#version: 0.2\na b\n{line}\n")


def test_convert(tokenizer: GPT2Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    assert tokenizer.convert_tokens_to_ids("\u0120the") == 262
    assert tokenizer.convert_tokens_to_ids(["a", "no such token"]) == [64, 50256]
    assert tokenizer.convert_ids_to_tokens(262) == "\u0120the"
    assert tokenizer.convert_ids_to_tokens([64, 50256]) == ["a", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens([64, 50256], skip_special_tokens=True) == ["a"]
    assert tokenizer.convert_tokens_to_string(["H", "ello", "\u0120the"]) == "Hello the"
    for wrong in (-1, 50257, 10**12):
        with pytest.raises(ValueError, match=str(wrong)):
            tokenizer.convert_ids_to_tokens([0, wrong])
    short = GPT2Tokenizer(model_max_length=2)
    with caplog.at_level(logging.WARNING):
        short.convert_tokens_to_ids(["a", "a"])
        assert not caplog.records
        short.convert_tokens_to_ids(["a", "a", "a"])
    assert "3 tokens" in caplog.text


def test_no_unknown_token() -> None:
    tokenizer = GPT2Tokenizer(unk_token=None)
    assert tokenizer.unk_token_id is None
    assert tokenizer.encode("any text at all, 中") == GPT2Tokenizer().encode("any text at all, 中")
    with pytest.raises(ValueError, match="no such token"):
        tokenizer.convert_tokens_to_ids("no such token")


def test_roles() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 50256
    assert tokenizer.pad_token is tokenizer.pad_token_id is None
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == 50256
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "!"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(ValueError, match="pad_token '<pad>' is not in the vocabulary"):
        tokenizer.pad_token = "<pad>"
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }


def test_a_token_is_a_string_or_transformers_own_kind() -> None:
    padding = tokenizers.AddedToken("<pad>", special=True)
    tokenizer = GPT2Tokenizer(pad_token=padding)
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id == 50257
    assert tokenizer.add_special_tokens({"eos_token": tokenizers.AddedToken("<end>")}) == 1
    tokenizer.bos_token = padding
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<pad>", 50258)
    assert pickle.loads(pickle.dumps(tokenizer)).special_tokens_map == tokenizer.special_tokens_map
    for wrong in (5, b"<pad>"):
        with pytest.raises(ValueError, match=str(wrong)):
            GPT2Tokenizer(pad_token=wrong)
        with pytest.raises(ValueError, match=str(wrong)):
            tokenizer.add_tokens([wrong])


def test_added_tokens() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 1
    assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 0
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]}) == 2
    assert tokenizer.add_tokens(["gpt2fast", " the"]) == 2
    assert len(tokenizer) == 50262
    assert tokenizer.vocab_size == 50257
    assert tokenizer.pad_token_id == 50257
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<pad>", "<a>", "<b>"]
    assert tokenizer.all_special_ids == [50256, 50257, 50258, 50259]
    # Ordinary added tokens are found in every text, special ones only where asked for.
    assert tokenizer.encode("x gpt2fast<a>") == [87, 220, 50260, 27, 64, 29]
    assert tokenizer("x gpt2fast<a>").input_ids == [87, 220, 50260, 50258]
    assert tokenizer.decode([50260, 50258, 50261]) == "gpt2fast<a> the"
    assert tokenizer.decode([50260, 50258], skip_special_tokens=True) == "gpt2fast"
    with pytest.raises(ValueError, match="50262"):
        tokenizer.decode([50262])
    with pytest.raises(ValueError, match="mask_token"):
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    with pytest.raises(ValueError, match="empty"):
        tokenizer.add_tokens([""])
    # Another tokenizer with the same vocabulary has none of them.
    assert len(GPT2Tokenizer()) == 50257


def test_set_special_tokens_replaces_those_set_before() -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.set_special_tokens(["<a>", "<b>"])
    assert tokenizer.special_tokens == {"<a>": 50257, "<b>": 50258}
    assert tokenizer.convert_tokens_to_ids(["<b>", "a"]) == [50258, 64]
    tokenizer.set_special_tokens(["<c>"])
    assert tokenizer.special_tokens == {"<c>": 50257}
    assert tokenizer.decode([50257]) == "<c>"
    assert len(tokenizer) == 50258
    for tokens, message in [(["<d>", "<|endoftext|>"], "clashes"), (["a"], "clashes")]:
        with pytest.raises(ValueError, match=message):
            tokenizer.set_special_tokens(tokens)
        assert tokenizer.special_tokens == {"<c>": 50257}
    tokenizer.set_special_tokens(None)
    assert len(tokenizer) == 50257
    tokenizer.add_tokens(["<d>"])
    with pytest.raises(ValueError, match="same id 50257"):
        tokenizer.set_special_tokens(["<a>"])


def test_pickled_as_a_whole(samples: str) -> None:
    tokenizer = GPT2Tokenizer(padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    data = pickle.dumps(tokenizer)
    assert len(data) < 2000  # GPT-2's own vocabulary is not written out
    copy = pickle.loads(data)
    assert copy._codec is tokenizer._codec
    assert copy.padding_side == "left"
    assert copy(samples + "<pad>").input_ids == tokenizer(samples + "<pad>").input_ids
    assert copy.decode([50257]) == "<pad>"


@pytest.mark.parametrize("name", ["padding_side", "truncation_side"])
def test_a_side_is_left_or_right(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*'top'"):
        GPT2Tokenizer(**{name: "top"})
