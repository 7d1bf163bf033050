"""What is wrong with a call is said before the model runs."""

import re
from typing import Any

import pytest
import torch

from gpt2fast import GPT2LMHeadModel

IDS = torch.tensor([[9, 10, 11], [12, 13, 14]])
NAN, INF = float("nan"), float("inf")
SAMPLE = {"do_sample": True}

CASES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": NAN, **SAMPLE}, "temperature must be a finite number above 0; got nan"),
    ({"temperature": -1.0, **SAMPLE}, "temperature must be a finite number above 0; got -1.0"),
    ({"temperature": 0.0, **SAMPLE}, "temperature must be a finite number above 0; got 0.0"),
    ({"temperature": INF, **SAMPLE}, "temperature must be a finite number above 0; got inf"),
    ({"temperature": NAN}, "temperature must be a finite number above 0; got nan"),
    ({"top_k": -1}, "top_k must be an integer of at least 0; got -1"),
    ({"top_k": 2.5}, "top_k must be an integer of at least 0; got 2.5"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
    ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
    ({"top_p": NAN}, "top_p must be above 0 and at most 1; got nan"),
    ({"min_p": -0.1}, "min_p must be between 0 and 1; got -0.1"),
    ({"min_p": 1.5}, "min_p must be between 0 and 1; got 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0; got 0.0"),
    ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size must be an integer of at least 0; got -2"),
    ({"num_beams": 0}, "num_beams must be an integer of at least 1; got 0"),
    ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1; got 0"),
    ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0; got -1"),
    ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0; got -1"),
    ({"max_length": "9"}, "max_length must be an integer of at least 0; got '9'"),
    (
        {"max_length": 3},
        "max_length must be more than the prompt's 3 tokens, which it counts; got 3 "
        "(max_new_tokens counts the new ones alone)",
    ),
    ({"length_penalty": NAN}, "length_penalty must be a finite number; got nan"),
    ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never'; got 'soon'"),
    ({"context_policy": "drop"}, "context_policy must be 'stop' or 'slide'; got 'drop'"),
    (
        {"num_return_sequences": 3, "num_beams": 2},
        "num_return_sequences must be at most num_beams without sampling; "
        "got num_return_sequences=3, num_beams=2",
    ),
    ({"num_beams": 2, **SAMPLE}, "do_sample=True cannot be combined with num_beams=2"),
    ({"eos_token_id": 97}, "eos_token_id must be in [0, 97); got 97"),
    ({"eos_token_id": [7, -1]}, "eos_token_id must be in [0, 97); got -1"),
    ({"pad_token_id": 97}, "pad_token_id must be in [0, 97); got 97"),
    ({"stop_strings": "x"}, "stop_strings need the tokenizer: pass tokenizer="),
    ({"stop_strings": [""]}, "stop_strings must be non-empty texts; got ['']"),
    ({"stop_strings": []}, "stop_strings must be non-empty texts; got []"),
    (
        {"seed": 1, "generator": torch.Generator(), **SAMPLE},
        "give either seed or generator, and not both",
    ),
    (
        {"seed": [1, 2, 3], **SAMPLE},
        "seed must be an integer, or a list of 2, one a prompt; got [1, 2, 3]",
    ),
    ({"seed": 1.5, **SAMPLE}, "seed must be an integer, or a list of 2, one a prompt; got 1.5"),
    (
        {"input_ids": torch.tensor([[9, 97]])},
        "input_ids must be in [0, 97); got 97",
    ),
    ({"input_ids": [[9], [-1]]}, "input_ids must be in [0, 97); got -1"),
    ({"input_ids": torch.tensor([[1.5]])}, "input_ids must be integers; got torch.float32"),
    (
        {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
        "input_ids must be [batch, time] with at least one token; got [2, 0]",
    ),
    (
        {"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)},
        "input_ids must be [batch, time] with at least one token; got [1, 2, 3]",
    ),
    ({"input_ids": []}, "input_ids holds no prompt"),
    ({"input_ids": [[9], []]}, "prompt 1 is empty"),
    ({"input_ids": [[9], [[8]]]}, "prompt 1 must be a flat list of token ids"),
    ({"input_ids": [torch.tensor(9)]}, "prompt 0 must be a flat list of token ids"),
    ({"input_ids": "text"}, "input_ids must be a tensor or a list of token ids; got str"),
    (
        {"inputs": IDS},
        "give either input_ids or inputs, which are the same, and not both",
    ),
    (
        {"attention_mask": torch.ones(2, 4)},
        "attention_mask must be [2, 3], as input_ids; got [2, 4]",
    ),
    (
        {"attention_mask": torch.ones(3, 2)},
        "attention_mask must be [2, 3], as input_ids; got [3, 2]",
    ),
    (
        {"attention_mask": torch.ones(2, 1, 1, 3)},
        "attention_mask must be [2, 3], as input_ids; got [2, 1, 1, 3]",
    ),
    (
        {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "attention_mask keeps no token of row 1",
    ),
    (
        {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        "pad on the left: the last token of row 0 is masked out",
    ),
    (
        {"input_ids": [[9], [8, 9]], "attention_mask": torch.ones(2, 2)},
        "attention_mask goes with prompts of one length; got lengths [1, 2]",
    ),
]


@pytest.mark.parametrize(("keywords", "message"), CASES, ids=[message for _, message in CASES])
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_value_errors(
    model: GPT2LMHeadModel, way: str, keywords: dict[str, Any], message: str
) -> None:
    def never(*_: object) -> None:
        pytest.fail("the model was run")

    model.transformer.register_forward_pre_hook(never)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(model, way)(**{"input_ids": IDS, **keywords})


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_unknown_keyword(model: GPT2LMHeadModel, way: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        getattr(model, way)(IDS, temprature=1.0)


@pytest.mark.parametrize("use_cache", [True, False, None])
def test_use_cache_changes_nothing(model: GPT2LMHeadModel, use_cache: bool | None) -> None:
    """Code for transformers passes it routinely."""
    assert torch.equal(model.generate(IDS, use_cache=use_cache), model.generate(IDS))


def test_beams_cannot_be_streamed(model: GPT2LMHeadModel) -> None:
    message = "^a beam search cannot be streamed: its tokens are known at the end$"
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, num_beams=2, streamer=object())
    with pytest.raises(ValueError, match=message):
        model.stream(IDS, num_beams=2)


@pytest.mark.parametrize("way", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_broken_logits(model: GPT2LMHeadModel, way: dict[str, Any]) -> None:
    def break_row(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[1] = -torch.inf
        return scores

    message = "row {} has no next token: its scores hold NaN or infinity, or are all ruled out"
    with pytest.raises(ValueError, match="^" + message.format(1)):
        model.generate(IDS, logits_processor=[break_row], **way)
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = NAN
    with pytest.raises(ValueError, match="^" + message.format(0)):
        model.generate(IDS, **way)


def test_zero_temperature_is_ignored_without_sampling(model: GPT2LMHeadModel) -> None:
    assert model.generate(IDS, temperature=0.0).equal(model.generate(IDS))


def test_none_is_the_default(model: GPT2LMHeadModel) -> None:
    keywords = dict.fromkeys(["temperature", "top_k", "top_p", "min_p", "num_beams", "seed"])
    assert model.generate(IDS, **keywords).equal(model.generate(IDS))
    assert model.generate(IDS, seed=1, do_sample=True, top_k=None).equal(
        model.generate(IDS, seed=1, do_sample=True, top_k=0)
    )


def test_configured_end_beyond_a_small_vocabulary_is_no_error(model: GPT2LMHeadModel) -> None:
    model.config.eos_token_id = 50256
    output = model.generate(IDS, max_new_tokens=5, return_dict_in_generate=True)
    assert output.finish_reasons == ("length", "length")


def test_prompt_is_missing_and_no_begin_token(model: GPT2LMHeadModel) -> None:
    model.config.bos_token_id = None
    message = (
        "without input_ids the prompt is config.bos_token_id, which must be in [0, 97); got None"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate()


def test_text_of_a_stream_needs_our_tokenizer(model: GPT2LMHeadModel) -> None:
    message = "the text of a stream needs a gpt2fast.tokenizer.GPT2Tokenizer; got builtins.object"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.stream(IDS, tokenizer=object())
