"""`generate` and `stream` on the engine give what they give without it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer, release
from gpt2fast.engine import kept
from gpt2fast.generation.decoding import Decoder
from tests.engine.conftest import engine_of, general

FULL: dict[str, Any] = {"return_dict_in_generate": True, "output_logprobs": True}
ENDS = {"eos_token_id": [11, 12, 13, 14, 15, 16, 17, 18], "pad_token_id": 0}
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 6}
WAYS: list[dict[str, Any]] = [
    {"max_new_tokens": 30},
    {"max_new_tokens": 60, **ENDS},
    {"max_length": 30, **ENDS, "repetition_penalty": 1.4},
    {"max_new_tokens": 30, **ENDS, "min_new_tokens": 12},
    {"max_new_tokens": 30, **ENDS, "min_length": 16},
    {"max_new_tokens": 9, **ENDS, "min_new_tokens": 2**31 - 1},
    {"max_new_tokens": 25, **ENDS, **SAMPLED},
    {"max_new_tokens": 25, **ENDS, **SAMPLED, "num_return_sequences": 3, "temperature": 1.4},
    {"max_new_tokens": 25, **SAMPLED, "top_k": 0, "top_p": 0.8, "seed": [4, 5, 6]},
    {"max_new_tokens": 25, **ENDS, **SAMPLED, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.fixture(autouse=True)
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches were run the general way."""
    decoders: list[int] = []
    original = Decoder.__init__

    def counting(self: Decoder, *args: Any) -> None:
        decoders.append(1)
        original(self, *args)

    monkeypatch.setattr(Decoder, "__init__", counting)
    return decoders


@pytest.fixture
def prompts() -> list[list[int]]:
    first = torch.randint(20, 97, (9,)).tolist()
    return [first, first[:4], [*first[:3], 50, 51]]


def assert_same(ours: Any, expected: Any, model: GPT2LMHeadModel, prompts: list[list[int]]) -> None:
    assert ours.sequences.equal(expected.sequences)
    assert ours.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    past, other = ours.past_key_values, expected.past_key_values
    assert past.get_seq_length() == other.get_seq_length() == ours.sequences.shape[1] - 1
    width = max(map(len, prompts))
    for layer, wanted in zip(past, other, strict=True):
        for row in range(layer.shape[1]):
            prompt = prompts[row * len(prompts) // layer.shape[1]]
            pad, end = width - len(prompt), width - len(prompt) + model.config.n_positions
            torch.testing.assert_close(
                layer[:, row, :, pad:end], wanted[:, row, :, pad:end], rtol=1e-4, atol=1e-4
            )
            assert layer.isfinite().all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_same_as_the_general_way(
    model: GPT2LMHeadModel, prompts: list[list[int]], way: dict[str, Any], count: list[int]
) -> None:
    expected = general(model).generate(prompts, **way, **FULL)
    assert len(count) == 1
    output = model.generate(prompts, **way, **FULL)
    assert len(count) == 1
    assert_same(output, expected, model, prompts)
    assert model.generate(prompts, **way).equal(expected.sequences)
    steps = list(model.stream(prompts, **way, output_logprobs=True))
    others = list(general(model).stream(prompts, **way, output_logprobs=True))
    for step, other in zip(steps, others, strict=True):
        assert step.token_ids == other.token_ids
        assert step.finish_reasons == other.finish_reasons
        assert step.logprobs == pytest.approx(other.logprobs, rel=1e-4, abs=1e-4)
    assert len(count) == 2


def test_rows_end_as_soon_as_they_may(model: GPT2LMHeadModel, prompts: list[list[int]]) -> None:
    """The least length counts each row's own tokens, whatever padding stands before it."""
    free = general(model).generate(prompts, max_new_tokens=7, eos_token_id=[])
    keywords = {"max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": free[:, -1].tolist()}
    for least in ({"min_new_tokens": 6}, {"min_length": 15}):
        expected = general(model).generate(prompts, **keywords, **least, **FULL)
        output = model.generate(prompts, **keywords, **least, **FULL)
        assert_same(output, expected, model, prompts)
        assert "eos" in output.finish_reasons


def test_log_probabilities_are_float32(
    model: GPT2LMHeadModel, prompts: list[list[int]], float64_by_default: None
) -> None:
    for m in (model, general(model)):
        assert m.generate(prompts, max_new_tokens=2, **FULL).logprobs.dtype == torch.float32


def test_streams_of_text(model: GPT2LMHeadModel, prompts: list[list[int]]) -> None:
    tokenizer = GPT2Tokenizer()
    text = general(model).generate(prompts, max_new_tokens=15, eos_token_id=[])
    stops = [tokenizer.decode(text[0, 14:16].tolist()), tokenizer.decode(text[2, 20:21].tolist())]
    keywords = {"tokenizer": tokenizer, "stop_strings": stops, "max_new_tokens": 15, **ENDS}
    steps = list(model.stream(prompts, **keywords))
    assert steps == list(general(model).stream(prompts, **keywords))
    assert "stop_string" in steps[-1].finish_reasons


def test_going_on_from_the_past_of_a_batch(
    model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    """Rows that had ended go on behind their padding, as without the engine."""
    keywords = {**ENDS, "max_new_tokens": 12}
    outputs = [m.generate(prompts, **keywords, **FULL) for m in (model, general(model))]
    more = torch.randint(20, 97, (3, 3))
    longer: list[Tensor] = []
    for output in outputs:
        ids = torch.cat((output.sequences, more), dim=1)
        mask = torch.ones_like(ids)
        mask[1, :5] = mask[2, :4] = 0
        past = output.past_key_values
        keywords = {"attention_mask": mask, "past_key_values": past, "max_new_tokens": 5}
        longer.append(model.generate(ids, eos_token_id=[], **keywords))
    assert longer[0].equal(longer[1])


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 2},
        {"logits_processor": [lambda ids, scores: scores]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"no_repeat_ngram_size": 2},
        {"context_policy": "slide"},
        {"eos_token_id": list(range(8, 17))},
        {"max_new_tokens": 0},
        {"do_sample": True, "num_return_sequences": 200},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])},
    ],
    ids=lambda way: next(iter(way)),
)
def test_what_the_engine_cannot_do(
    model: GPT2LMHeadModel, way: dict[str, Any], count: list[int]
) -> None:
    model.generate(torch.tensor([[9, 10, 11, 12, 13]]), **{"max_new_tokens": 2, **way})
    assert len(count) == 1


def test_models_that_the_engine_cannot_serve(model: GPT2LMHeadModel, count: list[int]) -> None:
    ids = [[9, 10, 11]]
    model.train()
    model.generate(ids, max_new_tokens=2)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ids, max_new_tokens=2)
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    model.generate(ids, max_new_tokens=2)
    assert len(count) == 3
    handle.remove()
    model.generate(ids, max_new_tokens=2)
    assert len(count) == 3


def test_the_engine_is_kept_and_grows(model: GPT2LMHeadModel) -> None:
    """Built once; again for more rows; and smaller requests use the larger one."""
    keywords = {"max_new_tokens": 2, "eos_token_id": []}
    model.generate([[9, 10]], **keywords)
    first = kept._KEPT[model].engine
    assert first is not None
    model.generate([[9, 10]] * 3, **keywords)
    assert kept._KEPT[model].engine is first
    model.generate([[9, 10]] * 9, **keywords)
    second = kept._KEPT[model].engine
    assert second is not None
    assert second.slots >= 9
    assert first.closed
    model.generate([[9, 10]], **keywords)
    assert kept._KEPT[model].engine is second
    release(model)
    assert second.closed
    assert model not in kept._KEPT
    release(model)
    model.generate([[9, 10]], **keywords)
    assert kept._KEPT[model].engine is not second


def test_a_stream_in_the_way_of_a_larger_engine(model: GPT2LMHeadModel, count: list[int]) -> None:
    """Then the larger request goes the general way, and neither waits for the other."""
    keywords = {"max_new_tokens": 6, "eos_token_id": []}
    stream = model.stream([[9, 10]], **keywords)
    tokens = [next(stream).token_ids]
    rows = model.generate([[9, 10]] * 30, **keywords)
    assert len(count) == 1
    tokens += [step.token_ids for step in stream]
    assert [[9, 10, *(token for [token] in tokens)]] * 30 == rows.tolist()


def test_streams_in_all_slots(model: GPT2LMHeadModel, count: list[int]) -> None:
    """Others do not wait for them, as their reader may be the one who waits; nor are they run
    further than they are read."""
    keywords = {"max_new_tokens": 6, "eos_token_id": []}
    expected = model.generate([[9, 10]], **keywords)
    slots = engine_of(model).slots
    streams = [model.stream([[9, 10]], **keywords) for _ in range(slots)]
    tokens = [[9, 10, next(stream).token_ids[0]] for stream in streams]
    assert model.generate([[9, 10]], **keywords).equal(expected)
    assert len(count) == 1
    streams.pop().close()  # type: ignore[attr-defined]
    assert model.generate([[9, 10]], **keywords).equal(expected)
    assert len(count) == 1
    runner = engine_of(model)._runner
    assert sorted(runner.state.lengths.tolist()) == [2] * (slots - 1) + [7]
    for stream, row in zip(streams, tokens, strict=False):
        assert [*row, *(step.token_ids[0] for step in stream)] == expected[0].tolist()


def test_seeds_are_drawn_once(model: GPT2LMHeadModel) -> None:
    """The global generator moves as far as without the engine."""
    keywords = {"do_sample": True, "max_new_tokens": 4, "eos_token_id": []}
    outputs = []
    for m in (model, general(model)):
        torch.manual_seed(8)
        outputs.append([m.generate([[9, 10]], **keywords).tolist() for _ in range(3)])
        outputs[-1].append(torch.rand(1).tolist())
    assert outputs[0] == outputs[1]
