"""Streams and streamers: each token when it is known, and what happens when somebody stops."""

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 4, "max_new_tokens": 15}


class Recorder:
    """What a streamer receives."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.received: list[Tensor] = []
        self.ended = 0
        self._fail_at = fail_at

    def put(self, value: Tensor) -> None:
        if len(self.received) == self._fail_at:
            raise KeyError("streamer")
        self.received.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("keywords", [{"max_new_tokens": 15}, SAMPLED], ids=["greedy", "sampled"])
def test_stream_gives_what_generate_gives(
    model: GPT2LMHeadModel, prompts: list[Tensor], keywords: dict[str, Any]
) -> None:
    keywords = {**keywords, "eos_token_id": list(range(8, 18)), "output_logprobs": True}
    output = model.generate(prompts, pad_token_id=0, return_dict_in_generate=True, **keywords)
    steps = list(model.stream(prompts, pad_token_id=0, **keywords))
    new = output.sequences[:, 9:]
    assert len(steps) == new.shape[1]
    for i, step in enumerate(steps):
        for row in range(3):
            ended = i > 0 and steps[i - 1].finish_reasons[row] is not None
            assert step.token_ids[row] == (None if ended else int(new[row, i]))
        assert step.logprobs == output.logprobs[:, i].tolist()
        assert step.text is None
    assert tuple(steps[-1].finish_reasons) == output.finish_reasons


def test_stream_runs_the_model_only_as_far_as_it_is_read(model: GPT2LMHeadModel) -> None:
    calls = []
    model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = model.stream([[9, 10]], max_new_tokens=10, eos_token_id=[])
    assert not calls
    for count in (1, 2, 3):
        next(stream)
        assert len(calls) == count
    stream.close()
    assert list(stream) == []
    assert len(calls) == 3
    expected = model.generate([[9, 10]], max_new_tokens=10, eos_token_id=[])
    again = [
        step.token_ids[0] for step in model.stream([[9, 10]], max_new_tokens=10, eos_token_id=[])
    ]
    assert again == expected[0, 2:].tolist()


def test_stream_does_not_switch_gradients_off_for_its_reader(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(8, 97, (1, 5))
    for _ in model.stream(ids, max_new_tokens=2, eos_token_id=[]):
        assert torch.is_grad_enabled()
        assert model(ids, labels=ids).loss.requires_grad
    assert torch.is_grad_enabled()


def test_two_streams_at_once(model: GPT2LMHeadModel) -> None:
    keywords = {"max_new_tokens": 12, "eos_token_id": []}
    first, second = [[9, 10, 11]], [[20, 21]]
    pairs = zip(model.stream(first, **keywords), model.stream(second, **keywords), strict=True)
    tokens = [(a.token_ids[0], b.token_ids[0]) for a, b in pairs]
    assert [a for a, _ in tokens] == model.generate(first, **keywords)[0, 3:].tolist()
    assert [b for _, b in tokens] == model.generate(second, **keywords)[0, 2:].tolist()


def test_streamer_protocol(pair: Any) -> None:
    """The same calls as transformers makes."""
    ours, reference = pair
    ids = torch.randint(8, 97, (1, 4))
    keywords = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": list(range(10, 16))}
    expected, recorder = Recorder(), Recorder()
    reference.generate(ids, attention_mask=torch.ones_like(ids), streamer=expected, **keywords)
    tokens = ours.generate(ids, streamer=recorder, **keywords)
    assert recorder.ended == 1
    assert [v.shape for v in recorder.received] == [v.shape for v in expected.received]
    assert [v.tolist() for v in recorder.received] == [v.tolist() for v in expected.received]
    assert torch.cat([v.flatten() for v in recorder.received]).tolist() == tokens[0].tolist()


def test_exceptions_pass_through(model: GPT2LMHeadModel) -> None:
    """From a streamer, a processor and the reader of a stream; the next call is as ever."""
    ids = torch.randint(8, 97, (1, 4))
    keywords = {"max_new_tokens": 9, "eos_token_id": []}
    expected = model.generate(ids, **keywords)
    recorder = Recorder(fail_at=3)
    with pytest.raises(KeyError, match="streamer"):
        model.generate(ids, streamer=recorder, **keywords)
    assert recorder.ended == 0

    def fail(tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] == 6:
            raise KeyError("processor")
        return scores

    with pytest.raises(KeyError, match="processor"):
        model.generate(ids, logits_processor=[fail], **keywords)
    stream = model.stream(ids, **keywords)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()
    assert model.generate(ids, **keywords).equal(expected)


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture
def speaker() -> GPT2LMHeadModel:
    """A model with the whole vocabulary, so that its tokens have a text."""
    config = GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=1)
    return GPT2LMHeadModel(config).eval()


class Script:
    """A processor that makes each row say its tokens, then end."""

    def __init__(self, tokenizer: GPT2Tokenizer, prompt_length: int, *texts: str) -> None:
        self.rows = [[*tokenizer.encode(text), 50256] for text in texts]
        self._prompt_length = prompt_length

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.rows):
            at = min(ids.shape[1] - self._prompt_length, len(tokens) - 1)
            said[row, tokens[at]] = 0
        return said


def test_stream_of_text(speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    texts = ["Grüße aus 東京 👩‍💻!", "short", "naïve café"]
    script = Script(tokenizer, 2, *texts)
    steps = list(
        speaker.stream(
            [tokenizer.encode("One two")] * 3,
            tokenizer=tokenizer,
            logits_processor=[script],
            max_new_tokens=60,
        )
    )
    assert len(steps) == max(map(len, script.rows))
    for row, text in enumerate(texts):
        pieces = [step.text[row] for step in steps if step.text]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert steps[-1].finish_reasons[row] == "eos"
        tokens = [t for step in steps if (t := step.token_ids[row]) is not None]
        assert tokens == script.rows[row]
    pieces = [step.text[0] for step in steps if step.text]
    assert "" in pieces[:-1]  # a character of several tokens came as one


def test_half_a_character_at_the_end(speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    script = Script(tokenizer, 1, "👩")
    stream = speaker.stream(
        [[464]], tokenizer=tokenizer, logits_processor=[script], max_new_tokens=1
    )
    (step,) = stream
    assert step.text == ["\ufffd"]
    assert step.finish_reasons == ["length"]


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        ("wor", "Hello world"),  # completed within a token
        (["nothing", "ld, he"], "Hello world, hello"),  # over three tokens
        ("京", "Hello world, hello 東京"),  # within a character
        ("never", "Hello world, hello 東京, and more"),
        ("two Hello", "Hello"),  # begun in the prompt
    ],
)
@pytest.mark.parametrize("ours", [True, False], ids=["our tokenizer", "any tokenizer"])
def test_stop_strings(
    speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, stops: Any, kept: str, ours: bool
) -> None:
    text = " Hello world, hello 東京, and more"
    prompt = tokenizer.encode("One two")
    script = Script(tokenizer, len(prompt), text, " and another line.")

    class Other:
        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids)

    output = speaker.generate(
        [prompt, prompt],
        stop_strings=stops,
        tokenizer=tokenizer if ours else Other(),
        logits_processor=[script],
        max_new_tokens=30,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, len(prompt) :].tolist()
    new = new[: new.index(50256)] if 50256 in new else new
    assert tokenizer.decode(new).strip() == kept
    assert output.finish_reasons == ("eos" if stops == "never" else "stop_string", "eos")


def test_stop_string_of_the_prompt_alone_does_not_stop(
    speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer
) -> None:
    prompt = tokenizer.encode("Stop here. Stop")
    output = speaker.generate(
        [prompt],
        stop_strings=["Stop"],
        tokenizer=tokenizer,
        logits_processor=[Script(tokenizer, len(prompt), " go on")],
        max_new_tokens=30,
        return_dict_in_generate=True,
    )
    assert output.finish_reasons == ("eos",)


def test_stop_strings_end_beams(speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    prompt = tokenizer.encode("One two")
    output = speaker.generate(
        [prompt],
        num_beams=2,
        stop_strings=" c",
        tokenizer=tokenizer,
        logits_processor=[Script(tokenizer, 2, *[" a b c d"] * 2)],
        max_new_tokens=8,
        early_stopping=True,
        return_dict_in_generate=True,
    )
    assert output.finish_reasons[0] == "stop_string"
    assert tokenizer.decode(output.sequences[0].tolist()).startswith("One two a b c")


def test_text_streamer_of_transformers(
    speaker: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = transformers.TextStreamer(tokenizer)
    speaker.generate(
        [tokenizer.encode("One two")],
        streamer=streamer,
        logits_processor=[Script(tokenizer, 2, " three four")],
        max_new_tokens=30,
        eos_token_id=tokenizer.encode(" four"),
    )
    sys.stdout.flush()
    assert capsys.readouterr().out == "One two three four\n"
