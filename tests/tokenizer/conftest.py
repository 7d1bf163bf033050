"""The tokenizer under test, and the others built from the same vocabulary without any network."""

from pathlib import Path
from typing import Any

import pytest
import tiktoken
import transformers

from gpt2fast.tokenizer import GPT2Tokenizer
from gpt2fast.tokenizer.pattern import GPT2_PATTERN


@pytest.fixture(scope="session")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="session")
def openai(tokenizer: GPT2Tokenizer) -> tiktoken.Encoding:
    ranks = {tokenizer.decode_bytes(i): i for i in range(50256)}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


@pytest.fixture(scope="session")
def hugging_face(tokenizer: GPT2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer from nothing but vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer.save_vocabulary(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    assert len(theirs) == 50257
    return theirs


@pytest.fixture(scope="session")
def samples() -> str:
    """Prose in English and other languages and scripts, emoji, code, odd white space."""
    return (Path(__file__).parent / "samples.txt").read_bytes().decode()
