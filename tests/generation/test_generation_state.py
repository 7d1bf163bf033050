"""What a call leaves behind: nothing, but a past to go on from."""

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast import GPT2LMHeadModel, KVCache
from gpt2fast.cache import _Storage

PLAIN: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}


def test_two_threads_on_one_model(model: GPT2LMHeadModel) -> None:
    prompts = [torch.randint(8, 97, (2, 3 + n)) for n in range(4)]
    ways = [PLAIN, {**PLAIN, "do_sample": True, "seed": 1}, {**PLAIN, "num_beams": 2}, PLAIN]
    expected = [model.generate(p, **way) for p, way in zip(prompts, ways, strict=True)]
    results: dict[tuple[int, int], Tensor] = {}
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        for repeat in range(3):
            results[i, repeat] = model.generate(prompts[i], **ways[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for (i, _), result in results.items():
        assert result.equal(expected[i])


def test_training_between_two_calls(pair: Any) -> None:
    """The second call sees the new weights."""
    ours, reference = pair
    ids = torch.randint(8, 97, (2, 6))
    keywords = {**PLAIN, "eos_token_id": None, "pad_token_id": 0}
    before = ours.generate(ids, **keywords)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    ours.train()
    for _ in range(3):
        optimizer.zero_grad()
        # What was generated is fit to be trained on.
        ours(before, labels=before).loss.backward()
        optimizer.step()
    ours.eval()
    reference.load_state_dict(ours.state_dict())
    after = ours.generate(ids, **keywords)
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **keywords)
    assert after.tolist() == expected.tolist()
    assert after.tolist() != before.tolist()


def test_outputs_can_take_part_in_training(model: GPT2LMHeadModel) -> None:
    """No tensor is an inference tensor, and none drags a graph along."""
    ids = torch.randint(8, 97, (2, 6))
    output = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_logprobs=True,
        **PLAIN,
    )
    tensors = [output.sequences, output.logprobs, *output.scores, *output.logits]
    for tensor in [*tensors, *output.past_key_values]:
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    past = output.past_key_values
    loss = model(output.sequences[:, -1:], past_key_values=past).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_mode_is_left_alone(model: GPT2LMHeadModel) -> None:
    """In training mode dropout acts, as in transformers."""
    ids = torch.randint(8, 97, (1, 6))
    expected = model.generate(ids, output_logprobs=True, return_dict_in_generate=True, **PLAIN)
    model.train()
    output = model.generate(ids, output_logprobs=True, return_dict_in_generate=True, **PLAIN)
    assert model.training
    assert not torch.allclose(output.logprobs, expected.logprobs)
    model.gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match="gradient checkpointing drops in training mode; call eval"
    ):
        model.generate(ids, **PLAIN)
    model.eval()
    assert model.generate(ids, **PLAIN).equal(expected.sequences)


@pytest.mark.parametrize("form", ["ours", "theirs", "tensors"])
def test_going_on_from_a_past(pair: Any, form: str) -> None:
    ours, reference = pair
    ids = torch.randint(8, 97, (2, 10))
    expected = ours.generate(ids, **PLAIN)
    with torch.no_grad():
        past: Any = ours(ids[:, :7]).past_key_values
        if form == "theirs":
            past = transformers.DynamicCache()
            reference(ids[:, :7], past_key_values=past)
        elif form == "tensors":
            past = [layer.clone() for layer in past]
    before = [layer.clone() for layer in KVCache.from_past(past)]
    calls = []
    ours.transformer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    for _ in range(2):
        assert ours.generate(ids, past_key_values=past, **PLAIN).equal(expected)
    assert calls == 2 * [3, *[1] * 11]
    for layer, kept in zip(KVCache.from_past(past), before, strict=True):
        assert layer.equal(kept)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"do_sample": True, "seed": 2}], ids=str)
def test_going_on_with_several_rows(model: GPT2LMHeadModel, padded: Any, way: Any) -> None:
    ids, mask = padded
    keywords = {**PLAIN, "attention_mask": mask, "num_return_sequences": 2, **way}
    with torch.no_grad():
        past = model(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
    expected = model.generate(ids, **keywords)
    assert model.generate(ids, past_key_values=past, **keywords).equal(expected)


def test_a_chat(model: GPT2LMHeadModel) -> None:
    """Each turn goes on from the past of the one before, which is as good as starting anew."""
    ids, past = torch.randint(8, 97, (1, 5)), None
    for _ in range(3):
        output = model.generate(
            ids,
            past_key_values=past,
            max_new_tokens=6,
            eos_token_id=[],
            return_dict_in_generate=True,
        )
        assert output.sequences.equal(model.generate(ids, max_new_tokens=6, eos_token_id=[]))
        past = output.past_key_values
        assert past.get_seq_length() == output.sequences.shape[1] - 1
        ids = torch.cat((output.sequences, torch.randint(8, 97, (1, 3))), dim=1)


def test_past_without_anything_new(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 7))
    with torch.no_grad():
        past = model(ids).past_key_values
    message = (
        "^input_ids must hold the tokens of the past and at least one more; "
        "got 7 tokens and a past of 7$"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(ids, past_key_values=past)
    with pytest.raises(ValueError, match=r"^the past must be 2 layers of \[2, 1, 4, 7, 8\]"):
        model.generate(torch.randint(8, 97, (1, 9)), past_key_values=past)


@pytest.mark.parametrize("way", [{}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_cache_is_allocated_once(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """No step copies the past, where the model's forward pass generates, as for logits: one storage
    for the prompts, one more for their copies."""
    model, _ = make_pair(n_positions=256)
    storages = []
    original = _Storage.__init__

    def count(self: _Storage, *args: Any) -> None:
        storages.append(self)
        original(self, *args)

    monkeypatch.setattr(_Storage, "__init__", count)
    ids = torch.randint(8, 97, (1, 5))
    keywords = {"output_logits": True, "return_dict_in_generate": True, **way}
    model.generate(ids, max_new_tokens=200, eos_token_id=[], **keywords)
    assert len(storages) == (2 if way else 1)


def test_under_autocast(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **PLAIN)
    assert output.past_key_values[0].dtype == torch.bfloat16
    assert output.logits[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: GPT2LMHeadModel, dtype: torch.dtype) -> None:
    """The tokens are the likeliest by the model's own forward pass in that precision."""
    model.to(dtype)
    ids = torch.randint(8, 97, (1, 6))
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **PLAIN)
    with torch.no_grad():
        logits = model(output.sequences[:, :-1]).logits[0, 5:].float()
    # One row or many take different sums through two layers: a few roundings of the largest logit.
    bound = 4 * torch.finfo(dtype).eps * float(logits.abs().max())
    torch.testing.assert_close(torch.cat(output.logits), logits, rtol=0, atol=bound)
    assert torch.cat(output.logits).argmax(-1).tolist() == output.sequences[0, 6:].tolist()


def test_inside_inference_mode(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (2, 6))
    expected = model.generate(ids, **PLAIN)
    with torch.inference_mode():
        assert model.generate(ids, **PLAIN).equal(expected)
        stream = model.stream(ids, **PLAIN)
        first = next(stream)
    # Read on outside: the past refuses in-place writes there, and is copied.
    tokens = [first.token_ids, *(step.token_ids for step in stream)]
    assert torch.tensor(tokens).T.tolist() == expected[:, 6:].tolist()
