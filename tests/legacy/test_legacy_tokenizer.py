"""The legacy tokenizer against pytorch-pretrained-BERT 0.6.2's, where that one works: on ASCII.

Under Python 3 the release fails, or gives wrong pieces, on anything else.
"""

from pathlib import Path

import pytest
import pytorch_pretrained_bert as reference
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast import legacy

SPECIAL = ["<cls>", "<sep>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = legacy.GPT2Tokenizer.from_pretrained("gpt2", special_tokens=SPECIAL)
    paths = tokenizer.save_vocabulary(str(folder))
    assert [Path(path).name for path in paths] == ["vocab.json", "merges.txt", "special_tokens.txt"]
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> reference.GPT2Tokenizer:
    return reference.GPT2Tokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def ours(folder: Path) -> legacy.GPT2Tokenizer:
    return legacy.GPT2Tokenizer.from_pretrained(str(folder))


def test_the_reference_reads_what_we_write(
    ours: legacy.GPT2Tokenizer, theirs: reference.GPT2Tokenizer
) -> None:
    assert ours.encoder == theirs.encoder
    assert ours.decoder == theirs.decoder
    assert ours.bpe_ranks == theirs.bpe_ranks
    assert ours.special_tokens == theirs.special_tokens == {"<cls>": 50257, "<sep>": 50258}
    assert len(ours) == len(theirs) == 50259


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(max_codepoint=127), max_size=20),
            st.sampled_from(
                [" the", "n't", "<|endoftext|>", "<sep>", "\n\n", "    ", " 1999", "?!"]
            ),
        )
    ).map("".join)
)
def test_same_pieces_ids_and_text(
    ours: legacy.GPT2Tokenizer, theirs: reference.GPT2Tokenizer, text: str
) -> None:
    tokens = theirs.tokenize(text)
    ids = theirs.convert_tokens_to_ids(tokens)
    assert ours.tokenize(text) == tokens
    assert ours.convert_tokens_to_ids(tokens) == ids
    assert ours.encode(text) == ids
    assert ours.convert_ids_to_tokens(ids) == tokens
    # The clean-up came after the release.
    assert ours.decode(ids, clean_up_tokenization_spaces=False) == theirs.decode(ids) == text


def test_special_and_unknown_tokens(
    ours: legacy.GPT2Tokenizer, theirs: reference.GPT2Tokenizer
) -> None:
    tokens = ["<cls>", "Who", "\u0120was", "<sep>", "no such token"]
    for tokenizer in (ours, theirs):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        assert ids == [50257, 8241, 373, 50258, 0]
        assert tokenizer.convert_tokens_to_ids("<sep>") == 50258
        assert tokenizer.convert_tokens_to_ids("no such token") == 0
        assert tokenizer.convert_ids_to_tokens(ids[:4]) == tokens[:4]
        assert tokenizer.convert_ids_to_tokens(ids[:4], skip_special_tokens=True) == tokens[1:3]


def test_max_len_warns(ours: legacy.GPT2Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = legacy.GPT2Tokenizer.from_pretrained("gpt2", max_len=3)
    assert tokenizer.max_len == 3
    assert legacy.GPT2Tokenizer.from_pretrained("gpt2").max_len == 1024
    tokenizer.convert_tokens_to_ids(["a"] * 3)
    assert not caplog.records
    assert tokenizer.convert_tokens_to_ids(["a"] * 4) == [64] * 4
    assert "4" in caplog.text
