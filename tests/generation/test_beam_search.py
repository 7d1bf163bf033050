"""Beam search: the sequences, scores and origins of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2LMHeadModel

Pair = tuple[GPT2LMHeadModel, Any]
ENDS = list(range(20, 26))
MOST = list(range(8, 92))  # more ends than beams among the best candidates


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 5, "num_return_sequences": 5, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
        {"num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 2},
        {"num_beams": 3, "min_new_tokens": 6, "num_return_sequences": 3},
        {"num_beams": 4, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("ends", [[7], [20, 21, 22], MOST], ids=["one", "three", "most"])
def test_same_beams(
    pair: Pair, padded: tuple[Tensor, Tensor], keywords: dict[str, Any], ends: list[int]
) -> None:
    ours, reference = pair
    ids, mask = padded
    keywords = {
        "attention_mask": mask,
        "max_new_tokens": 15,
        "eos_token_id": ends,
        "pad_token_id": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **keywords,
    }
    expected = reference.generate(ids, **keywords)
    output = ours.generate(ids, **keywords)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.beam_indices.tolist() == expected.beam_indices.tolist()
    torch.testing.assert_close(
        output.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5
    )
    for ours_steps, expected_steps in (
        (output.scores, expected.scores),
        (output.logits, expected.logits),
    ):
        assert len(ours_steps) == len(expected_steps)
        # Without the padding's token, 0: some releases of transformers count it as repeated.
        torch.testing.assert_close(
            ours_steps[0][:, 1:], expected_steps[0][:, 1:], rtol=1e-5, atol=1e-5
        )


def test_beams_find_likelier_text_than_greedy(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (1, 5))
    keywords: dict[str, Any] = {
        "max_new_tokens": 6,
        "eos_token_id": [],
        "return_dict_in_generate": True,
        "output_logprobs": True,
    }
    greedy = model.generate(ids, **keywords).logprobs.sum(1)
    beams = model.generate(ids, num_beams=8, num_return_sequences=8, length_penalty=0.0, **keywords)
    assert beams.logprobs.sum(1).max() > greedy
    torch.testing.assert_close(beams.logprobs.sum(1), beams.sequences_scores)
    assert len({tuple(row) for row in beams.sequences.tolist()}) == 8


def test_logprobs_and_reasons_of_beams(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (3, 5))
    output = model.generate(
        ids,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=10,
        eos_token_id=ENDS,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_logprobs=True,
    )
    assert set(output.finish_reasons) == {"eos", "length"}
    sequences = output.sequences
    with torch.no_grad():
        logits = model(sequences).logits[:, 4:-1]
    expected = logits.log_softmax(-1).gather(2, sequences[:, 5:, None]).squeeze(2)
    for row, reason in enumerate(output.finish_reasons):
        length = int((output.beam_indices[row] >= 0).sum())
        assert (int(sequences[row, 4 + length]) in ENDS) == (reason == "eos")
        torch.testing.assert_close(
            output.logprobs[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5
        )
        assert (output.logprobs[row, length:] == 0).all()
        assert (sequences[row, 5 + length :] == 1).all()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_each_prompt_as_alone(
    make_pair: Callable[..., Pair], prompts: list[Tensor], early_stopping: bool | str
) -> None:
    """Other prompts may search on: what is settled stays."""
    ours, _ = make_pair(n_positions=24)
    keywords: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "early_stopping": early_stopping,
        "max_new_tokens": 30,
        "eos_token_id": [30, 31, 32],
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    together = ours.generate(prompts, **keywords)
    for i, prompt in enumerate(prompts):
        alone = ours.generate(prompt, **keywords)
        rows = slice(2 * i, 2 * i + 2)
        new = alone.sequences[:, len(prompt) :]
        assert together.sequences[rows, 9 : 9 + new.shape[1]].tolist() == new.tolist()
        assert (together.sequences[rows, 9 + new.shape[1] :] == 0).all()
        torch.testing.assert_close(together.sequences_scores[rows], alone.sequences_scores)
        assert together.finish_reasons[rows] == alone.finish_reasons


def test_never_stopping_early_finds_what_stopping_misses(pair: Pair) -> None:
    """With long text favoured, ended hypotheses are beaten only much later."""
    ours, reference = pair
    keywords: dict[str, Any] = {
        "num_beams": 3,
        "max_new_tokens": 30,
        "eos_token_id": list(range(8, 60)),
        "length_penalty": 3.0,
        "pad_token_id": 1,
    }
    differing = 0
    for ids in torch.randint(8, 97, (6, 1, 4)):
        tokens = ours.generate(ids, early_stopping="never", **keywords)
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), early_stopping="never", **keywords
        )
        assert tokens.tolist() == expected.tolist()
        early = ours.generate(ids, early_stopping=False, **keywords)
        differing += early.tolist() != tokens.tolist()
    assert differing
