"""The ids of tiktoken and transformers on any text, and texts that come back as they were."""

import string
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2fast.tokenizer import GPT2Tokenizer, StreamDecoder, codec

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
emoji = st.text(
    st.sampled_from("\u200d\ufe0f\u20e3\U0001f3ff\U0001f469\U0001f466\U0001f1e9\U0001f1ea\u2764 1")
)
white_space = st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000a."))
code = st.lists(
    st.sampled_from(
        ["def f(x):", "\n", "    ", "\t", "x += 1", "''", "'re", "))", "0x7F", "<|", "é"]
    )
).map("".join)
ascii_text = st.text(st.characters(max_codepoint=127))
any_text = st.text(st.characters(exclude_categories=["Cs"]))
texts = st.one_of(
    any_text,
    ascii_text,
    emoji,
    white_space,
    code,
    st.lists(st.one_of(any_text, ascii_text, white_space, emoji, code)).map("".join),
)
ids_of_any_bytes = st.lists(st.integers(0, 50256))


@given(texts)
@example("")
@example("\ufeff")
@example("a\0b\0 c")
@example(FAMILY * 3)
@example("<|endoftext|>")
def test_same_ids_as_tiktoken_and_transformers(tokenizer, openai, hugging_face, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert ids == hugging_face(text, split_special_tokens=True).input_ids
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    assert tokenizer.decode(ids) == openai.decode(ids) == text


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "\n" * 9_999, "!" * 5_000 + "x"])
def test_many_equal_characters(tokenizer, openai, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_real_text(tokenizer, openai, hugging_face, samples: str) -> None:
    for text in [samples, samples * 20, *samples.splitlines(keepends=True)]:
        ids = tokenizer.encode(text)
        assert ids == openai.encode_ordinary(text)
        assert ids == hugging_face(text, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == text


def test_characters_of_every_block(tokenizer, openai) -> None:
    """All below U+3000 and, to save time, every 17th above."""
    points = [*range(0x3000), *range(0x3000, sys.maxunicode + 1, 17)]
    characters = [chr(i) for i in points if not 0xD800 <= i < 0xE000]
    text = " x".join(characters)
    ids = tokenizer.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_known_ids(tokenizer) -> None:
    """Published ids, so that a change of all implementations at once would show."""
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" Hello world") == [18435, 995]
    assert tokenizer.encode("Who was Jim Henson ? Jim Henson was a puppeteer") == [
        *[8241, 373, 5395, 367, 19069, 5633, 5395, 367, 19069, 373, 257, 13595, 14471, 263]
    ]


@given(st.text(st.characters(categories=["Cs", "Lu", "Zs"], include_characters="a \U0001f600")))
@example("\ud83d\ude00 \ude00\ud83d \ud83d")
@example("\ud835\udd18x")
def test_surrogates(tokenizer, openai, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == openai.encode_ordinary(text)
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids) == repaired
    assert tokenizer.encode(repaired) == ids
    assert tokenizer.tokenize(text) == tokenizer.tokenize(repaired)


def test_a_lone_surrogate_is_the_replacement_character(tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


@given(st.binary())
@example(bytes(range(256)))
@example("naïve".encode("latin-1"))
def test_every_byte_sequence(tokenizer, data: bytes) -> None:
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    single = [tokenizer.encoder[tokenizer.byte_encoder[byte]] for byte in data]
    assert tokenizer.decode_bytes(single) == data
    assert tokenizer.decode(single) == data.decode("utf-8", "replace")
    assert tokenizer.decode(single, errors="ignore") == data.decode("utf-8", "ignore")


@given(any_text)
def test_bytes_of_a_text_have_its_ids(tokenizer, text: str) -> None:
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


@given(ids_of_any_bytes)
def test_decode_of_any_ids(tokenizer, openai, ids: list[int]) -> None:
    assert tokenizer.decode_bytes(ids) == openai.decode_bytes(ids)
    assert tokenizer.decode(ids) == openai.decode(ids)


def test_decode_errors(tokenizer) -> None:
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else [127]
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(half, errors="strict")
    with pytest.raises(UnicodeDecodeError):
        GPT2Tokenizer(errors="strict").decode(half)
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode(half, errors="ignore") == ""
    for wrong in (-1, 50257, 1 << 70):
        with pytest.raises(ValueError, match=str(wrong)):
            tokenizer.decode([262, wrong])
    with pytest.raises(TypeError, match="3"):
        tokenizer.encode(3)


def test_decode_takes_arrays_tensors_and_batches(tokenizer) -> None:
    import numpy as np
    import torch

    ids = tokenizer.encode("Hello world")
    for form in (tuple(ids), iter(ids), np.array(ids), torch.tensor(ids), list(torch.tensor(ids))):
        assert tokenizer.decode(form) == "Hello world"
    assert tokenizer.decode(15496) == tokenizer.decode(torch.tensor(15496)) == "Hello"
    assert tokenizer.decode([]) == ""
    for batch in ([ids, ids], torch.tensor([ids, ids])):
        assert tokenizer.decode(batch) == tokenizer.batch_decode(batch) == ["Hello world"] * 2
    assert tokenizer.batch_decode([]) == []


@given(st.lists(st.one_of(ids_of_any_bytes, texts.map(GPT2Tokenizer().encode))))
def test_a_stream_prints_whole_characters_and_in_the_end_all(tokenizer, pushes) -> None:
    decoder = StreamDecoder(tokenizer)
    printed = [decoder.push(ids) for ids in pushes] + [decoder.flush()]
    assert "".join(printed) == tokenizer.decode([i for ids in pushes for i in ids])


@given(texts)
def test_a_stream_never_prints_half_a_character(tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    printed = ""
    for i in tokenizer.encode(text):
        printed += decoder.push(i)
        assert text.startswith(printed)
    assert printed == text
    assert decoder.flush() == ""


def test_a_stream_waits_for_the_rest_of_a_character(tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.push(ids[-1]) == "\U0001f9ff"
    decoder.push(ids[0])
    assert decoder.flush() == "\ufffd"
    assert decoder.push(15496) == "Hello"  # flush began a new text
    skipping = StreamDecoder(tokenizer, skip_special_tokens=True)
    assert skipping.push([50256, 15496]) == "Hello"
    assert decoder.push(50256) == "<|endoftext|>"


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    monkeypatch.setattr(codec, "_MEMO_ENTRIES", 50)
    fresh = codec.Codec(*codec.read_gpt2_vocabulary(), unk_id=50256, whole_tokens=True)
    words = " ".join(samples.split())
    for text in [samples, words] * 2:
        assert fresh.encode(text) == codec.gpt2_codec().encode(text)
        assert 0 < len(fresh._chunks) <= 50
        assert len(fresh._plain) <= 50
    assert fresh._plain
    fresh.encode("x" * 1000 + " " + "y" * 1000)
    assert max(map(len, [*fresh._chunks, *fresh._plain])) <= codec._MEMO_LENGTH


def test_threads_share_a_small_memory(monkeypatch: pytest.MonkeyPatch, samples: str) -> None:
    monkeypatch.setattr(codec, "_MEMO_ENTRIES", 100)
    fresh = codec.Codec(*codec.read_gpt2_vocabulary(), unk_id=50256)
    lines = [line + letter for letter in string.ascii_letters for line in samples.splitlines()]
    expected = [codec.gpt2_codec().encode(line) for line in lines]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(fresh.encode, lines)) == expected


@given(st.lists(st.sampled_from(["the", " the", "'s", "\n", " ", "x1", "é", "!"])).map("".join))
def test_what_is_remembered_changes_nothing(tokenizer, text: str) -> None:
    warm = tokenizer.encode(text)
    tokenizer._codec._chunks.clear()
    tokenizer._codec._plain.clear()
    assert tokenizer.encode(text) == warm


END = "<|endoftext|>"
end_or_text = st.lists(st.one_of(st.just(END), texts)).map("".join)


@given(end_or_text)
def test_special_tokens_only_where_asked_for(tokenizer, openai, hugging_face, text: str) -> None:
    asked = openai.encode(text, allowed_special="all")
    ordinary = openai.encode_ordinary(text)
    assert tokenizer.encode(text) == ordinary
    assert tokenizer.encode(text, allowed_special="all") == asked
    assert tokenizer.encode(text, allowed_special={END}) == asked
    assert tokenizer(text).input_ids == hugging_face(text).input_ids == asked
    assert tokenizer(text, split_special_tokens=True).input_ids == ordinary
    assert tokenizer.tokenize(text, allowed_special="all") == hugging_face.tokenize(text)
    assert tokenizer.encode_batch([text], allowed_special="all") == [asked]
    assert tokenizer.decode(asked) == text
    skipped = hugging_face.decode(asked, skip_special_tokens=True)
    assert tokenizer.decode(asked, skip_special_tokens=True) == skipped


def test_disallowed_special_tokens(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
        tokenizer.encode(f"a{END}", disallowed_special="all")
    assert tokenizer.encode("plain", disallowed_special="all") == tokenizer.encode("plain")
    asked = tokenizer.encode(f"a{END}", allowed_special="all", disallowed_special="all")
    assert asked == [64, 50256]
    for wrong in ({"<s>"}, END):
        with pytest.raises(ValueError, match=r"allowed_special.*<"):
            tokenizer.encode("a", allowed_special=wrong)


def test_the_longest_special_token_wins() -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens(["<a", "<a>", "<a>>"], special_tokens=True)
    assert tokenizer("<a<a>>>").input_ids == [50257, 50259, 29]


@given(st.lists(st.sampled_from([END, " ", "\n", "a", " b", "\xa0", "é"])).map("".join))
def test_prefix_space(prefixing, text: str) -> None:
    ours, theirs = prefixing
    encoded = theirs(text, return_offsets_mapping=True)
    assert ours(text).input_ids == encoded.input_ids
    assert ours(text, return_offsets_mapping=True).offset_mapping == encoded.offset_mapping
    assert ours.tokenize(text, allowed_special="all") == theirs.tokenize(text)


@pytest.fixture(scope="module")
def prefixing(tokenizer, tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("prefix")
    tokenizer.save_vocabulary(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, add_prefix_space=True)
    return GPT2Tokenizer(add_prefix_space=True), theirs
