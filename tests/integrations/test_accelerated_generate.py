"""``generate`` of accelerated models: the engine where it serves, transformers elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import gpt2fast
from gpt2fast.engine import kept
from gpt2fast.integrations import decoding
from tests.integrations.conftest import plain
from tests.models.reference import tokens


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether the engine has served it."""
    calls: list[bool] = []
    serve = decoding._serve

    def spy(*args: Any) -> Any:
        result = serve(*args)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(decoding, "_serve", spy)
    return calls


def left_padded() -> dict[str, torch.Tensor]:
    ids = tokens(3, 8).clamp_min(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


SERVED: dict[str, dict[str, Any]] = {
    "new tokens": {"max_new_tokens": 12},
    "length": {"max_length": 15},
    "end": {"max_new_tokens": 20, "eos_token_id": [5, 17, 40, 60]},
    "least": {"max_new_tokens": 20, "eos_token_id": [5, 17, 40, 60], "min_new_tokens": 8},
    "least length": {"max_new_tokens": 20, "eos_token_id": list(range(2, 10)), "min_length": 14},
    "end that no token is": {"max_new_tokens": 5, "eos_token_id": [5, 5000], "pad_token_id": 2},
    "ends in a tuple": {"max_new_tokens": 20, "eos_token_id": (5, 17, 40, 60)},
    "ends in a tensor": {"max_new_tokens": 20, "eos_token_id": torch.tensor([5, 17, 40, 60])},
    "no past": {"max_new_tokens": 5, "use_cache": False},
    "configured": {
        "generation_config": transformers.GenerationConfig(max_new_tokens=6, eos_token_id=3)
    },
    "one": {"top_k": 1, "do_sample": True, "max_new_tokens": 6},
}
UNCHANGED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "max_new_tokens": 6},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 4},
    "n-grams": {"no_repeat_ngram_size": 2, "max_new_tokens": 8},
    "typical": {"do_sample": True, "typical_p": 0.9, "max_new_tokens": 4},
    "penalty of padding": {"repetition_penalty": 1.5, "max_new_tokens": 6},
    "all of the nucleus": {"do_sample": True, "top_p": 1.5, "max_new_tokens": 4},
    "first of the nucleus": {"do_sample": True, "top_p": 0.0, "max_new_tokens": 4},
    "static": {"cache_implementation": "static", "max_new_tokens": 4, "disable_compile": True},
    "processor": {
        "logits_processor": transformers.LogitsProcessorList(
            [transformers.MinLengthLogitsProcessor(12, 0)]
        ),
        "max_new_tokens": 6,
    },
}


@pytest.mark.parametrize("case", SERVED)
def test_greedy_tokens_are_the_same_on_the_engine(case: str, served: list[bool]) -> None:
    model, prompts = plain(n_layer=2), left_padded()
    wanted = model.generate(**prompts, **SERVED[case])
    got = gpt2fast.accelerate(model).generate(**prompts, **SERVED[case])
    assert torch.equal(got, wanted)
    assert served == [True]


@pytest.mark.parametrize("case", UNCHANGED)
def test_the_rest_is_left_to_transformers(case: str, served: list[bool]) -> None:
    model, prompts = plain(n_layer=2), left_padded()
    outputs = []
    for accelerated in (False, True):
        torch.manual_seed(3)
        if accelerated:
            gpt2fast.accelerate(model)
        outputs.append(model.generate(**prompts, **UNCHANGED[case]))
    wanted, got = outputs
    assert type(got) is type(wanted)
    if not isinstance(wanted, torch.Tensor):
        wanted, got = wanted.sequences, got.sequences
    assert torch.equal(got, wanted)
    assert served == [False]


@pytest.mark.parametrize(
    ("pad", "end", "serves"),
    [(1, 5, True), (1, None, True), (1, [1, 5], True), (None, 5, True), (None, [5000, 5], False)],
)
def test_padding_is_known_by_its_id_where_it_was(
    pad: Any, end: Any, serves: bool, served: list[bool]
) -> None:
    """Prompts without a mask; what fills up rows that end is no token for the next step."""
    model = plain(n_layer=2)
    model.generation_config.pad_token_id = pad
    model.generation_config.eos_token_id = end
    prompts = left_padded()["input_ids"]
    wanted = model.generate(prompts, max_new_tokens=4)
    assert torch.equal(gpt2fast.accelerate(model).generate(prompts, max_new_tokens=4), wanted)
    penalized = {"max_new_tokens": 4, "repetition_penalty": 1.5}
    got = model.generate(prompts, **penalized)
    assert torch.equal(got, gpt2fast.restore(model).generate(prompts, **penalized))
    # Known padding is penalized there, and not by the engine.
    known = pad is not None and end != [1, 5]
    assert served == [serves, serves and not known]


def test_a_penalty_without_padding_is_served(served: list[bool]) -> None:
    model, ids = plain(n_layer=2), tokens(2, 6).clamp_min(2)
    options = {"repetition_penalty": 1.7, "max_new_tokens": 10}
    wanted = model.generate(ids, **options)
    assert torch.equal(gpt2fast.accelerate(model).generate(ids, **options), wanted)
    assert served == [True]


def test_prompts_beyond_the_context_and_on_the_right_are_left(served: list[bool]) -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    with pytest.raises(IndexError):
        model.generate(tokens(1, 39), max_new_tokens=5)
    mask = torch.tensor([[1, 1, 1, 0]])
    model.generate(tokens(1, 4), attention_mask=mask, max_new_tokens=2)
    model.generate(tokens(1, 37), max_new_tokens=4)  # the last token is not evaluated
    assert served == [False, False, True]


def test_sampling_repeats_under_a_seed(served: list[bool]) -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    ids = tokens(2, 4)
    rows = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        rows.append(
            model.generate(
                ids, do_sample=True, temperature=0.9, num_return_sequences=3, max_new_tokens=9
            )
        )
    assert rows[0].shape == (6, 13)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert served == [True] * 3


def test_sampling_draws_from_the_distribution_of_transformers(served: list[bool]) -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    ids = tokens(1, 5)
    probabilities = model(ids).logits[0, -1].detach().div(0.7).topk(4).values.softmax(-1)
    best = model(ids).logits[0, -1].topk(4).indices
    options = {"do_sample": True, "top_k": 4, "temperature": 0.7, "max_new_tokens": 1}
    drawn = model.generate(ids.expand(4000, -1)[:50], num_return_sequences=40, **options)[:, -1]
    shares = torch.stack([(drawn == token).float().mean() for token in best])
    assert shares.sum() == pytest.approx(1.0)
    assert (shares - probabilities).abs().max() < 0.05
    assert len(served) == 1


def test_weights_are_shared_and_changes_seen(served: list[bool]) -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    ids = tokens(1, 5)
    before = model.generate(ids, max_new_tokens=8)
    ours = decoding.stand_in(model)
    assert ours is not None
    assert ours is decoding.stand_in(model)
    assert ours.transformer.wte.weight is model.transformer.wte.weight
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(-3)
    after = model.generate(ids, max_new_tokens=8)
    assert torch.equal(after, gpt2fast.restore(model).generate(ids, max_new_tokens=8))
    assert not torch.equal(after, before)
    assert served == [True, True]


def test_anything_changed_is_left_to_transformers(served: list[bool]) -> None:
    ids = tokens(1, 5)
    model = gpt2fast.accelerate(plain(n_layer=1, resid_pdrop=0.5))
    handle = model.transformer.h[0].register_forward_hook(lambda *args: None)
    model.generate(ids, max_new_tokens=2)
    handle.remove()
    model.train()
    model.generate(ids, max_new_tokens=2)
    model.eval()
    model(
        ids, output_hidden_states=True
    )  # installs hooks of transformers' own, which change nothing
    model.generate(ids, max_new_tokens=2)
    gpt2fast.accelerate(model, generate=False)
    model.generate(ids, max_new_tokens=2)
    assert served == [False, False, True]


CHANGES: dict[str, Callable[[Any], None]] = {
    "epsilon": lambda model: setattr(model.transformer.h[0].ln_1, "eps", 0.5),
    "scale": lambda model: setattr(model.transformer.h[0].attn, "scaling", 0.9),
    "direction": lambda model: setattr(model.transformer.h[0].attn, "is_causal", False),
    "norm": lambda model: setattr(model.transformer.wte, "max_norm", 0.2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_of_modules_count(change: str, served: list[bool]) -> None:
    """In the forward pass and in what is generated."""
    models = [plain(n_layer=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    gpt2fast.accelerate(models[1])
    outputs, ids = [], tokens(1, 9)
    for model in models:
        CHANGES[change](model)
        with torch.no_grad():
            logits = model(ids).logits
        outputs.append((logits, model.generate(ids, max_new_tokens=8)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert served == [False]


def test_streamers_get_every_token(served: list[bool]) -> None:
    class Collects:
        def __init__(self) -> None:
            self.parts: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.tolist())

        def end(self) -> None:
            self.parts.append("end")

    model, ids = plain(n_layer=1), tokens(1, 5)
    streams = [Collects(), Collects()]
    model.generate(ids, max_new_tokens=4, streamer=streams[0])
    gpt2fast.accelerate(model).generate(ids, max_new_tokens=4, streamer=streams[1])
    assert streams[0].parts == streams[1].parts
    assert served == [True]


def test_release_and_restore_free_the_engine() -> None:
    model = gpt2fast.accelerate(plain(n_layer=1))
    ids = tokens(1, 5)
    for free in (gpt2fast.release, gpt2fast.restore):
        model.generate(ids, max_new_tokens=2)
        ours = decoding.stand_in(model)
        assert ours in kept._KEPT
        free(model)
        assert ours not in kept._KEPT
    assert model not in kept.STAND_INS
