"""Each row of a batch comes out as it does alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2LMHeadModel

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "sampled": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["stop", "slide"])
def test_rows_as_alone(
    model: GPT2LMHeadModel, prompts: list[Tensor], way: str, policy: str
) -> None:
    """Long enough for every row to come to the context's end, each at its own time."""
    keywords = {
        "max_new_tokens": 80,
        "eos_token_id": [],
        "context_policy": policy,
        "return_dict_in_generate": True,
        "output_logprobs": True,
        **WAYS[way],
    }
    sampled = "do_sample" in keywords
    together = model.generate(prompts, seed=[11, 12, 13] if sampled else None, **keywords)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, seed=[11 + i] if sampled else None, **keywords)
        new = alone.sequences[0, len(prompt) :]
        assert len(new) == (80 if policy == "slide" else 49 - len(prompt))
        assert together.sequences[i, 9 : 9 + len(new)].tolist() == new.tolist()
        assert together.finish_reasons[i] == alone.finish_reasons[0]
        torch.testing.assert_close(
            together.logprobs[i, : len(new)], alone.logprobs[0], rtol=1e-4, atol=1e-4
        )


def test_rows_as_alone_with_ends(model: GPT2LMHeadModel) -> None:
    prompts = [torch.randint(8, 97, (n,)).tolist() for n in (3, 7, 1, 5, 4, 6)]
    ends = list(range(10, 22))
    together = model.generate(prompts, max_new_tokens=40, eos_token_id=ends, pad_token_id=2)
    lengths = set()
    for prompt, row in zip(prompts, together[:, 7:], strict=True):
        alone = model.generate(prompt, max_new_tokens=40, eos_token_id=ends, pad_token_id=2)
        new = alone[0, len(prompt) :]
        lengths.add(len(new))
        assert row[: len(new)].tolist() == new.tolist()
        assert (row[len(new) :] == 2).all()
    assert len(lengths) > 2


def test_lists_are_padded_on_the_left(model: GPT2LMHeadModel, padded: Any, prompts: Any) -> None:
    ids, mask = padded
    expected = model.generate(ids, attention_mask=mask, pad_token_id=0, max_new_tokens=9)
    for form in (prompts, [prompt.tolist() for prompt in prompts]):
        tokens = model.generate(form, pad_token_id=0, max_new_tokens=9)
        assert tokens.tolist() == expected.tolist()


def test_tokens_under_the_mask_count_for_nothing(model: GPT2LMHeadModel, padded: Any) -> None:
    ids, mask = padded
    keywords = {"attention_mask": mask, "max_new_tokens": 9, "repetition_penalty": 1.5}
    expected = model.generate(ids, **keywords)[:, 9:]
    others = torch.where(mask.bool(), ids, torch.randint(8, 97, ids.shape))
    assert model.generate(others, **keywords)[:, 9:].tolist() == expected.tolist()


def test_several_sequences_of_a_prompt_stand_together(
    model: GPT2LMHeadModel, prompts: list[Tensor]
) -> None:
    keywords = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
    together = model.generate(prompts, seed=[5, 6, 7], pad_token_id=0, **keywords)
    assert together.shape[0] == 9
    assert len({tuple(row) for row in together[:, 9:].tolist()}) == 9
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt, seed=[5 + i], pad_token_id=0, **keywords)[:, len(prompt) :]
        rows = together[3 * i : 3 * i + 3, 9:]
        assert rows[:, : alone.shape[1]].tolist() == alone.tolist()
        for row, prompt_end in zip(together[3 * i : 3 * i + 3], [prompt] * 3, strict=True):
            assert row[9 - len(prompt) : 9].tolist() == prompt_end.tolist()


def test_holes_in_the_mask(model: GPT2LMHeadModel) -> None:
    """Masked tokens inside a prompt are skipped: positions, attention and sliding."""
    ids = torch.randint(8, 97, (1, 50))
    mask = torch.ones_like(ids)
    mask[0, [0, 3, 4, 40, 41, 45]] = 0
    for keywords in ({"max_new_tokens": 4}, {"max_new_tokens": 60, "context_policy": "slide"}):
        expected = model.generate(ids[mask.bool()], eos_token_id=[], **keywords)[:, 44:]
        tokens = model.generate(ids, attention_mask=mask, eos_token_id=[], **keywords)[:, 50:]
        assert tokens.tolist() == expected.tolist()
