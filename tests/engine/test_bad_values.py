"""What the engine refuses, with the value in the message."""

from typing import Any

import pytest

from gpt2fast import Engine, GPT2LMHeadModel
from tests.engine.conftest import IDS, general

BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": []}, "input_ids holds no prompt"),
    ({"input_ids": [9, 97]}, r"input_ids must be in \[0, 97\); got 97"),
    ({"input_ids": [[9], [10]]}, "submit takes one prompt; got 2"),
    ({"input_ids": [9] * 21}, "the prompt has 21 tokens; a slot of this engine holds 20"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to 2147483647; got 0"),
    ({"temperature": -1.0}, "temperature must be a finite number above 0; got -1.0"),
    ({"temperature": float("nan")}, "temperature must be a finite number above 0; got nan"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
    ({"top_k": -1}, "top_k must be an integer of at least 0; got -1"),
    ({"min_p": 1.5}, "min_p must be between 0 and 1; got 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0; got 0"),
    ({"eos_token_id": 97}, r"eos_token_id must be in \[0, 97\); got 97"),
    ({"eos_token_id": list(range(9))}, "at most 8 ids may end a sequence; got 9"),
    ({"seed": 0.5, "temperature": 1.0}, "seed must be an integer, or a list of 1, one a prompt"),
    ({"stop_strings": "a"}, "stop_strings need the tokenizer: pass tokenizer="),
    (
        {"prompt_lookup_num_tokens": 0},
        "prompt_lookup_num_tokens must be an integer of at least 1; got 0",
    ),
    (
        {"max_matching_ngram_size": 0},
        "max_matching_ngram_size must be an integer of at least 1; got 0",
    ),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_values(model: GPT2LMHeadModel, keywords: dict[str, Any], message: str) -> None:
    engine = Engine(model, 1, 20)
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.submit(**{"input_ids": [9, 10], **keywords})
    assert engine.unfinished == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"slots": 0}, "slots must be an integer from 1 to 256; got 0"),
        ({"slots": True}, "slots must be an integer from 1 to 256; got True"),
        ({"slots": 257}, "slots must be an integer from 1 to 256; got 257"),
        ({"capacity": 49}, "capacity must be an integer from 1 to 48; got 49"),
        ({"prefill_tokens": 0}, "prefill_tokens must be an integer from 1 to 2147483647; got 0"),
    ],
    ids=str,
)
def test_bad_sizes(model: GPT2LMHeadModel, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Engine(model, **keywords)


def test_a_model_that_cannot_be_served(model: GPT2LMHeadModel) -> None:
    message = r"^the engine cannot serve this model: transformer has a hook or was replaced$"
    with pytest.raises(ValueError, match=message):
        Engine(general(model))


def test_speculation_with_beams_is_refused(model: GPT2LMHeadModel) -> None:
    message = "^prompt_lookup_num_tokens=3 cannot be combined with num_beams=2$"
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, prompt_lookup_num_tokens=3, num_beams=2)
