"""What happens at the end of the context: 48 positions here."""

import re
from typing import Any

import pytest
import torch

from gpt2fast import GPT2LMHeadModel


def test_stop_uses_every_position(model: GPT2LMHeadModel) -> None:
    """The last token is the one predicted at the last position."""
    ids = torch.randint(8, 97, (1, 40))
    output = model.generate(ids, max_new_tokens=30, eos_token_id=[], return_dict_in_generate=True)
    assert output.finish_reasons == ("context",)
    assert output.sequences.shape == (1, 49)
    assert output.past_key_values.get_seq_length() == 48
    with torch.no_grad():
        logits = model(output.sequences[:, :-1]).logits
    assert output.sequences[0, 40:].tolist() == logits[0, 39:].argmax(-1).tolist()


def test_reason_is_length_where_both_end_together(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (1, 40))
    output = model.generate(ids, max_new_tokens=9, eos_token_id=[], return_dict_in_generate=True)
    assert output.sequences.shape == (1, 49)
    assert output.finish_reasons == ("length",)


def test_a_full_prompt_still_gets_its_next_token(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 48))
    with torch.no_grad():
        expected = model(ids).logits[:, -1].argmax(-1)
    tokens = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert tokens.shape == (2, 49)
    assert tokens[:, -1].tolist() == expected.tolist()


@pytest.mark.parametrize("policy", ["stop", "slide"])
def test_prompt_longer_than_the_context(model: GPT2LMHeadModel, policy: str) -> None:
    prompts = [[9] * 3, torch.randint(8, 97, (49,)).tolist()]
    if policy == "slide":
        short = model.generate(prompts[1][-24:], max_new_tokens=5, eos_token_id=[])
        tokens = model.generate(prompts, max_new_tokens=5, eos_token_id=[], context_policy="slide")
        assert tokens[1, -5:].tolist() == short[0, -5:].tolist()
        assert tokens[1, :49].tolist() == prompts[1]
        return
    message = (
        "prompt 1 has 49 tokens; the context holds 48 "
        "(context_policy='slide' keeps the last of them)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate(prompts, max_new_tokens=5)


def test_slide_keeps_the_last_half(model: GPT2LMHeadModel) -> None:
    """Against a loop that evaluates the whole window anew for every token."""
    ids = torch.randint(8, 97, (1, 30))
    output = model.generate(
        ids,
        max_new_tokens=100,
        eos_token_id=[],
        context_policy="slide",
        return_dict_in_generate=True,
    )
    tokens = ids[0].tolist()
    window = 30
    for _ in range(100):
        if window > 48:
            window = 24
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-window:]])).logits
        tokens.append(int(logits[0, -1].argmax()))
        window += 1
    assert output.sequences[0].tolist() == tokens
    assert output.finish_reasons == ("length",)
    assert output.past_key_values is None


def test_slide_in_a_context_of_one(make_pair: Any) -> None:
    """The smallest context: each token is predicted from the last one alone."""
    model, _ = make_pair(n_positions=1)
    widths = []
    model.transformer.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    tokens = model.generate([[9]], max_new_tokens=6, eos_token_id=[], context_policy="slide")[0]
    with torch.no_grad():
        expected = model(tokens[:-1, None]).logits[:, -1].argmax(-1)
    assert tokens[1:].tolist() == expected.tolist()
    assert set(widths) == {1}


def test_beams_slide(model: GPT2LMHeadModel) -> None:
    """The log-probabilities of the result, against one window after the other."""
    ids = torch.randint(8, 97, (1, 45))
    keywords = {"max_new_tokens": 40, "eos_token_id": [], "context_policy": "slide"}
    beams = model.generate(
        ids,
        num_beams=2,
        return_dict_in_generate=True,
        output_logprobs=True,
        length_penalty=0.0,
        **keywords,
    )
    window, expected = 45, []
    tokens = beams.sequences[0].tolist()
    for end in range(45, 85):
        window = 24 if window > 48 else window
        with torch.no_grad():
            logits = model(torch.tensor([tokens[end - window : end]])).logits
        expected.append(float(logits[0, -1].log_softmax(-1)[tokens[end]]))
        window += 1
    torch.testing.assert_close(beams.logprobs[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beams.sequences_scores[0], torch.tensor(expected).sum())


def test_default_length_stays_in_the_context(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (1, 40))
    assert model.generate(ids, eos_token_id=[]).shape == (1, 48)
    slid = model.generate(ids, eos_token_id=[], context_policy="slide")
    assert slid.shape == (1, 60)
