"""Batches for a model: padding, truncation, masks, offsets, against transformers."""

import logging

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast.tokenizer import BatchEncoding, GPT2Tokenizer

TEXTS = ["Hello world", "", "a much longer text, with é and \U0001f600", "x<|endoftext|>"]
any_texts = st.lists(st.text(max_size=20), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def padding(tokenizer, hugging_face, tmp_path_factory):
    """Ours and theirs with a pad token of its own."""
    folder = tmp_path_factory.mktemp("padding")
    ours = GPT2Tokenizer(pad_token="<pad>")
    ours.save_pretrained(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    assert ours.pad_token_id == theirs.pad_token_id == 50257
    return ours, theirs


CALLS = [
    {},
    {"padding": True},
    {"padding": "longest", "padding_side": "left"},
    {"padding": "max_length", "max_length": 30},
    {"padding": "max_length", "max_length": 3, "truncation": True},
    {"padding": "max_length", "max_length": 3},
    {"padding": True, "max_length": 4, "truncation": True, "padding_side": "left"},
    {"padding": True, "pad_to_multiple_of": 8},
    {"max_length": 2},
    {"max_length": 2, "truncation": False},
    {"return_attention_mask": False},
    {"padding": True, "return_offsets_mapping": True},
    {"add_special_tokens": False},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_a_call_returns_what_transformers_returns(padding, options) -> None:
    ours, theirs = padding
    for text in (TEXTS, TEXTS[:1], *TEXTS):
        got, expected = ours(text, **options), theirs(text, **options)
        assert dict(got) == {**expected}
        assert got.input_ids is got["input_ids"]


@given(any_texts.filter(any), st.sampled_from(CALLS[1:3] + CALLS[4:5]))
def test_tensors_are_those_of_transformers(padding, texts, options) -> None:
    ours, theirs = padding
    got = ours(texts, return_tensors="pt", **options)
    expected = theirs(texts, return_tensors="pt", **options)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype == torch.int64
        assert torch.equal(got[name], tensor)


def test_a_tensor_of_one_text_has_a_batch_axis(tokenizer) -> None:
    encoding = tokenizer("Hello world", return_tensors="pt")
    assert encoding.input_ids.tolist() == [[15496, 995]]
    assert encoding.attention_mask.tolist() == [[1, 1]]
    assert tokenizer("", return_tensors="pt").input_ids.shape == (1, 0)
    assert tokenizer.encode("Hello world", return_tensors="pt").tolist() == [[15496, 995]]
    array = tokenizer(["Hello world"], return_tensors="np").input_ids
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.int64


def test_left_padding_by_the_tokenizers_own_side() -> None:
    tokenizer = GPT2Tokenizer(padding_side="left", truncation_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    encoding = tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert encoding.input_ids == [[50256, 64], [275, 269]]
    assert encoding.attention_mask == [[0, 1], [1, 1]]


@given(any_texts)
def test_the_mask_marks_exactly_the_text(padding, texts: list[str]) -> None:
    ours, _ = padding
    encoding = ours(texts, padding=True, padding_side="left", return_tensors="np")
    for text, ids, mask in zip(texts, encoding.input_ids, encoding.attention_mask, strict=True):
        assert ours.decode(ids[mask == 1]) == text
        assert (ids[mask == 0] == 50257).all()
        assert (np.diff(mask) >= 0).all()
    decoded = ours.batch_decode(encoding.input_ids, skip_special_tokens=True)
    assert decoded == texts


@given(st.text() | st.text(st.sampled_from("é\U0001f469\u200d \n中a'sß")))
def test_offsets_are_those_of_transformers(tokenizer, hugging_face, text: str) -> None:
    got = tokenizer(text, return_offsets_mapping=True)
    expected = hugging_face(text, return_offsets_mapping=True)
    assert got.input_ids == expected.input_ids
    assert got.offset_mapping == expected.offset_mapping


def test_offsets_count_characters_of_the_text_given(tokenizer) -> None:
    text = "a \U0001f600<|endoftext|>b"
    encoding = tokenizer(text, return_offsets_mapping=True)
    parts = [text[start:end] for start, end in encoding.offset_mapping]
    assert parts[0] == "a"
    assert set(parts[1:-2]) <= {" \U0001f600", "\U0001f600"}
    assert parts[-2:] == ["<|endoftext|>", "b"]
    # A pair of surrogates is two characters of a Python string.
    split = tokenizer("a\ud83d\ude00b\ud800", return_offsets_mapping=True)
    assert split.offset_mapping == [(0, 1), (1, 3), (1, 3), (3, 4), (4, 5)]


def test_padding_needs_a_pad_token(tokenizer) -> None:
    with pytest.raises(ValueError, match="pad_token is None"):
        tokenizer(TEXTS, padding=True)
    with pytest.raises(ValueError, match="pad_token is None"):
        tokenizer.pad({"input_ids": [[1], [1, 2]]})


def test_wrong_arguments_are_named(padding) -> None:
    ours, _ = padding
    with pytest.raises(ValueError, match="0 to 10 tokens"):
        ours(TEXTS, return_tensors="pt")
    for options, found in [
        ({"padding": "widest"}, "'widest'"),
        ({"return_tensors": "tf"}, "'tf'"),
        ({"padding": True, "padding_side": "top"}, "'top'"),
        ({"truncation": True, "max_length": -1}, "-1"),
        ({"padding": "max_length"}, "found None"),
    ]:
        with pytest.raises(ValueError, match=found):
            ours(TEXTS, **options)
    for wrong in (3, None, [3], [["a"]], b"bytes"):
        with pytest.raises(TypeError):
            ours(wrong)
    with pytest.raises(AttributeError, match="token_type_ids"):
        _ = ours("a").token_type_ids


def test_rows_cut_to_no_multiple_cannot_be_padded_to_one(padding) -> None:
    for tokenizer in padding:
        options = {"truncation": True, "max_length": 12, "pad_to_multiple_of": 8}
        assert len(tokenizer("a", padding=False, **options)["input_ids"]) == 1
        with pytest.raises(ValueError, match="12"):
            tokenizer("a", padding=True, **options)


def test_length_warning_and_truncation_to_the_models_length(caplog) -> None:
    tokenizer = GPT2Tokenizer(model_max_length=3)
    assert tokenizer.max_len == 3
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer("a b c d e", truncation=True).input_ids) == 3
        assert not caplog.records
        assert len(tokenizer("a b c d e").input_ids) == 5
        assert "5 tokens" in caplog.text
        assert "3" in caplog.text
        tokenizer.encode("a b c d e")
    assert len(caplog.records) == 1


def test_pad_takes_what_calls_gave(padding) -> None:
    ours, theirs = padding
    rows = [dict(ours(text)) for text in TEXTS]
    for options in ({}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 20}):
        got = ours.pad(rows, return_tensors="pt", **options)
        expected = theirs.pad(rows, return_tensors="pt", **options)
        assert set(got) == set(expected) == {"input_ids", "attention_mask"}
        assert all(torch.equal(got[name], expected[name]) for name in got)
    tensors = [{"input_ids": torch.tensor(ours.encode(text or "x"))} for text in TEXTS]
    assert ours.pad(tensors, return_tensors="pt").input_ids.shape == (4, 10)
    assert ours.pad({"input_ids": [1, 2]}, padding="max_length", max_length=3) == {
        "input_ids": [1, 2, 50257],
        "attention_mask": [1, 1, 0],
    }


def test_the_collator_of_transformers_takes_it(padding) -> None:
    ours, theirs = padding
    rows = [ours(text) for text in TEXTS]
    got, expected = (
        transformers.DataCollatorForLanguageModeling(t, mlm=False)(rows) for t in (ours, theirs)
    )
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_an_encoding_moves_to_a_device(tokenizer) -> None:
    encoding = tokenizer("Hello", return_tensors="pt")
    assert encoding.to("meta", non_blocking=True) is encoding
    assert encoding.input_ids.device.type == "meta"
    assert isinstance(tokenizer("Hello").to("cpu"), BatchEncoding)
    assert {**encoding}.keys() == {"input_ids", "attention_mask"}


def test_clean_up(tokenizer, hugging_face) -> None:
    """As the function of transformers; its decode of late leaves it out even where asked for."""
    text = "He said , do n't ! I 'm here . It 's ' fine ' , we 've , we 're ?"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    expected = hugging_face.clean_up_tokenization(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == expected
    assert expected != text
