"""Greedy decoding: token for token what transformers generates, in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast import GPT2DoubleHeadsModel, GPT2LMHeadModel

Pair = tuple[GPT2LMHeadModel, Any]
VOCAB_SIZE, EOS = 97, 7


def assert_same(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == torch.int64
    assert ours.tolist() == reference.tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_layer": 1, "n_head": 1, "n_embd": 24},
        {"n_head": 8, "n_layer": 3, "n_inner": 40},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "n_embd": 16},
        {"tie_word_embeddings": False},
    ],
    ids=lambda overrides: "-".join(overrides) or "default",
)
@pytest.mark.parametrize("batch", [1, 4])
def test_same_tokens(make_pair: Callable[..., Pair], overrides: dict[str, Any], batch: int) -> None:
    ours, reference = make_pair(**overrides)
    ids = torch.randint(8, VOCAB_SIZE, (batch, 6))
    mask = torch.ones_like(ids)
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=35, pad_token_id=0)
    assert_same(ours.generate(ids, max_new_tokens=35, pad_token_id=0), expected)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": 30},
        {"max_length": 25},
        {"max_new_tokens": 1},
        {},  # 20 new tokens
        {"max_new_tokens": 30, "pad_token_id": None},
        {"max_new_tokens": 30, "eos_token_id": [7, 20, 33, 45]},
        {"max_new_tokens": 30, "eos_token_id": list(range(8, 60)), "min_new_tokens": 12},
        {"max_new_tokens": 30, "eos_token_id": list(range(8, 60)), "min_length": 15},
        {"max_new_tokens": 30, "min_new_tokens": 10, "min_length": 30, "eos_token_id": [40, 41]},
    ],
    ids=str,
)
def test_same_tokens_with_left_padding(
    pair: Pair, padded: tuple[Tensor, Tensor], keywords: dict[str, Any]
) -> None:
    ours, reference = pair
    ids, mask = padded
    keywords = {"pad_token_id": 0, **keywords}
    expected = reference.generate(ids, attention_mask=mask, **keywords)
    assert_same(ours.generate(ids, attention_mask=mask, **keywords), expected)


def test_rows_end_at_their_own_time(pair: Pair) -> None:
    """Without this the parity above might never meet an early end."""
    ours, reference = pair
    ids = torch.randint(8, VOCAB_SIZE, (12, 5))
    ends = list(range(10, 25))
    expected = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=25,
        eos_token_id=ends,
        pad_token_id=3,
    )
    tokens = ours.generate(ids, max_new_tokens=25, eos_token_id=ends, pad_token_id=3)
    assert_same(tokens, expected)
    new = tokens[:, 5:]
    lengths = [min([i for i, t in enumerate(row) if t in ends], default=25) for row in new.tolist()]
    assert len(set(lengths)) > 3
    for row, length in zip(new, lengths, strict=True):
        assert (row[length + 1 :] == 3).all()


@pytest.mark.parametrize(
    "keywords",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_new_tokens": 20},
    ],
    ids=str,
)
def test_same_tokens_with_penalties(pair: Pair, keywords: dict[str, Any]) -> None:
    ours, reference = pair
    ids = torch.randint(8, VOCAB_SIZE, (4, 6))
    keywords = {"max_new_tokens": 35, "pad_token_id": 0, **keywords}
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **keywords)
    plain = ours.generate(ids, max_new_tokens=35, pad_token_id=0)
    tokens = ours.generate(ids, **keywords)
    assert_same(tokens, expected)
    assert tokens.tolist() != plain.tolist()


def test_padding_is_found_without_a_mask(pair: Pair, padded: tuple[Tensor, Tensor]) -> None:
    """A padding token of its own tells where the padding is, as in transformers."""
    ours, reference = pair
    ids, mask = padded
    expected = reference.generate(ids, pad_token_id=0, max_new_tokens=10)
    assert_same(ours.generate(ids, pad_token_id=0, max_new_tokens=10), expected)
    assert_same(ours.generate(ids, attention_mask=mask, max_new_tokens=10)[:, 9:], expected[:, 9:])


def test_end_tokens_in_prompts_are_text(pair: Pair) -> None:
    ours, reference = pair
    ids = torch.tensor([[7, 7, 12, 30], [9, 7, 50, 51]])
    expected = reference.generate(ids, pad_token_id=7, max_new_tokens=10)
    assert_same(ours.generate(ids, pad_token_id=7, max_new_tokens=10), expected)


def test_double_heads_model_generates(pair: Pair) -> None:
    ours, _ = pair
    double = GPT2DoubleHeadsModel(ours.config).eval()
    double.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.randint(8, VOCAB_SIZE, (2, 5))
    assert_same(double.generate(ids, max_new_tokens=8), ours.generate(ids, max_new_tokens=8))


def test_forms_of_input_ids(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, VOCAB_SIZE, (1, 5))
    expected = model.generate(ids, max_new_tokens=6)
    for form in (ids[0], ids.int(), ids[0].tolist(), ids.tolist(), [ids[0]]):
        assert_same(model.generate(form, max_new_tokens=6), expected)
    assert_same(model.generate(inputs=ids, max_new_tokens=6), expected)


def test_without_prompts_it_begins_a_text(pair: Pair) -> None:
    ours, reference = pair
    expected = reference.generate(max_new_tokens=6, pad_token_id=0)
    assert_same(ours.generate(max_new_tokens=6, pad_token_id=0), expected)


def test_no_new_tokens(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, VOCAB_SIZE, (2, 5))
    output = model.generate(
        ids, max_new_tokens=0, return_dict_in_generate=True, output_logprobs=True
    )
    assert_same(output.sequences, ids)
    assert output.finish_reasons == ("length", "length")
    assert output.logprobs.shape == (2, 0)


def test_empty_list_of_end_tokens_switches_them_off(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, VOCAB_SIZE, (6, 5))
    with torch.no_grad():
        first = model(ids).logits[:, -1].argmax(-1)
    end = int(first[0])
    model.config.eos_token_id = end
    assert model.generate(ids[:1], max_new_tokens=9).shape == (1, 6)
    assert model.generate(ids[:1], max_new_tokens=9, eos_token_id=[]).shape == (1, 14)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_and_logits(pair: Pair, padded: tuple[Tensor, Tensor], sample: bool) -> None:
    """Also the order of the processors: scores after all of them are transformers'."""
    ours, reference = pair
    ids, mask = padded
    keywords: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 1 if sample else 8,  # later steps depend on what was drawn
        "min_new_tokens": 3,
        "pad_token_id": 0,
        "do_sample": sample,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    if sample:
        keywords |= {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02}
    expected = reference.generate(ids, **keywords)
    output = ours.generate(ids, **keywords)
    assert list(output.keys())[:3] == ["sequences", "scores", "logits"]
    for ours_steps, expected_steps in (
        (output.scores, expected.scores),
        (output.logits, expected.logits),
    ):
        assert len(ours_steps) == len(expected_steps)
        for step, expected_step in zip(ours_steps, expected_steps, strict=True):
            assert step.dtype == torch.float32
            torch.testing.assert_close(step, expected_step, rtol=1e-5, atol=1e-5)


def test_logprobs_are_the_models(model: GPT2LMHeadModel, padded: tuple[Tensor, Tensor]) -> None:
    ids, mask = padded
    ends = list(range(10, 14))
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        eos_token_id=ends,
        repetition_penalty=1.5,
        return_dict_in_generate=True,
        output_logprobs=True,
    )
    sequences, logprobs = output.sequences, output.logprobs
    assert len(set(output.finish_reasons)) == 2  # "eos" and "length"
    assert logprobs.shape == (3, sequences.shape[1] - 9)
    full_mask = torch.cat((mask, torch.ones_like(sequences[:, 9:])), dim=1)
    with torch.no_grad():
        logits = model(sequences, attention_mask=full_mask).logits[:, 8:-1]
    expected = logits.log_softmax(-1).gather(2, sequences[:, 9:, None]).squeeze(2)
    for row in range(3):
        new = sequences[row, 9:].tolist()
        length = next((i + 1 for i, t in enumerate(new) if t in ends), len(new))
        torch.testing.assert_close(
            logprobs[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5
        )
        assert (logprobs[row, length:] == 0).all()


@pytest.mark.parametrize("keywords", [{}, {"max_new_tokens": 4}], ids=["config", "keyword wins"])
def test_generation_config(pair: Pair, keywords: dict[str, Any]) -> None:
    ours, reference = pair
    ids = torch.randint(8, VOCAB_SIZE, (2, 6))
    config = transformers.GenerationConfig(
        max_new_tokens=9, repetition_penalty=1.4, eos_token_id=EOS, pad_token_id=0
    )
    expected = reference.generate(ids, generation_config=config, **keywords)
    assert_same(ours.generate(ids, generation_config=config, **keywords), expected)
    plain = ours.generate(ids, generation_config=reference.generation_config, max_new_tokens=5)
    assert_same(plain, ours.generate(ids, max_new_tokens=5))
