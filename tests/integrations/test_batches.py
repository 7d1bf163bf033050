"""Batches for Ray Data and torchrun: rows come out alike however divided, and errors name them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, Scorer
from gpt2fast.integrations.batches import GenerateBatch, ScoreBatch, place

PROMPTS = ["The captain", "She closed the door, and", "It", "In the morning the", "He said"]
IDS = [7, 3, 0, 12, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def drawing(folder: Path) -> GenerateBatch:
    return GenerateBatch(folder, id_column="id", slots=2, temperature=1.0, max_new_tokens=6)


def batch(order: Any = range(5), **columns: Any) -> dict[str, Any]:
    chosen = [*order]
    return {
        "id": np.array([IDS[i] for i in chosen]),
        "prompt": np.array([PROMPTS[i] for i in chosen], dtype=object),
        **columns,
    }


def test_greedy_tokens_are_those_of_generate(folder: Path) -> None:
    tokenizer, model = GPT2Tokenizer(), GPT2LMHeadModel.from_pretrained(folder).eval()
    found = GenerateBatch(folder, slots=2, max_new_tokens=6, output_logprobs=True)(batch())
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        expected = model.generate(
            [ids], max_new_tokens=6, output_logprobs=True, return_dict_in_generate=True
        )
        assert found["generated_ids"][i] == expected.sequences[0, len(ids) :].tolist()
        assert found["generated_text"][i] == tokenizer.decode(found["generated_ids"][i])
        assert found["logprobs"][i] == pytest.approx(expected.logprobs[0].tolist(), abs=1e-4)
    assert found["finish_reason"] == ["length"] * 5
    assert found["id"].tolist() == IDS


def test_drawn_tokens_follow_from_seed_and_id(folder: Path, drawing: GenerateBatch) -> None:
    whole = dict(zip(IDS, drawing(batch())["generated_ids"], strict=True))
    assert len({tuple(ids) for ids in whole.values()}) == 5
    for order in ([4, 2], [0], [1, 3]):
        part = drawing(batch(order))
        assert part["generated_ids"] == [whole[IDS[i]] for i in order]
    # An id is the same as a Python integer, in a list; the same prompt under another id is another.
    as_lists = {"id": [12, 13], "prompt": [PROMPTS[3]] * 2}
    same, other = drawing(as_lists)["generated_ids"]
    assert same == whole[12] != other
    options = {"id_column": "id", "temperature": 1.0, "max_new_tokens": 6}
    assert GenerateBatch(folder, seed=1, **options)(batch([0]))["generated_ids"] != [whole[7]]


def test_prompts_may_be_ids_and_the_end_is_not_in_the_text(folder: Path) -> None:
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode(PROMPTS[0])
    (first, *_) = GenerateBatch(folder, max_new_tokens=3)(batch([0]))["generated_ids"][0]
    run = GenerateBatch(folder, max_new_tokens=3, eos_token_id=first, column="ids")
    found = run({"ids": [np.array(ids), ids]})
    assert found["generated_ids"] == [[first]] * 2
    assert found["generated_text"] == ["", ""]
    assert found["finish_reason"] == ["eos"] * 2
    assert run({"ids": []})["generated_text"] == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "row 99: the prompt is empty"),
        ([], "row 99: the prompt is empty"),
        ("word " * 40, "row 99: the prompt has 41 tokens; a slot of this engine holds 32"),
        (None, "row 99: the prompt: expected a string or a list of token ids; got NoneType"),
        ([1, 50257], r"row 99: the prompt: token ids must be .* got 50257 at position 1"),
    ],
)
def test_a_bad_prompt_is_named(drawing: GenerateBatch, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawing({"id": [1, 99], "prompt": ["fine", prompt]})
    assert len(drawing(batch([0]))["generated_ids"][0]) == 6  # and the next batch is served


def test_scores_that_are_not_finite_name_the_row(folder: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wpe.weight[8] = torch.nan  # shorter rows never see it
    model.save_pretrained(tmp_path)
    run = GenerateBatch(tmp_path, max_new_tokens=2, id_column="id")
    with pytest.raises(ValueError, match="row 'long': "):
        run({"id": ["short", "long"], "prompt": ["It", "word " * 8]})
    assert len(run({"id": ["short"], "prompt": ["It"]})["generated_ids"][0]) == 2


def test_mistakes_in_the_options(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"temperature=0.7 draws tokens: give id_column"):
        GenerateBatch(folder, temperature=0.7)
    with pytest.raises(ValueError, match=r"^top_p must be above 0"):
        GenerateBatch(folder, top_p=7)
    with pytest.raises(TypeError, match="num_beams"):
        GenerateBatch(folder, num_beams=2)
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['id', 'prompt'\]"):
        ScoreBatch(folder)(batch())
    with pytest.raises(ValueError, match="no column 'key'"):
        ScoreBatch(folder, column="prompt", id_column="key")(batch())


def test_an_engine_that_was_closed_is_built_again(drawing: GenerateBatch) -> None:
    before = drawing(batch())["generated_ids"]
    drawing._engine.close()
    assert drawing(batch())["generated_ids"] == before


def test_scores_are_those_of_the_scorer(folder: Path, drawing: GenerateBatch) -> None:
    texts = [*PROMPTS, "", "word " * 50]
    columns = {"text": texts, "name": [f"t{i}" for i in range(7)]}
    found = ScoreBatch(folder, id_column="name")(columns)
    expected = Scorer(folder, device="cpu")(texts)
    assert found["n_scored"] == [score.n_scored for score in expected]
    assert found["log_prob"] == pytest.approx([score.log_prob for score in expected], rel=1e-6)
    assert np.isnan(found["perplexity"][5])
    shared = ScoreBatch(drawing.model, id_column="name")(columns)
    assert shared["log_prob"] == found["log_prob"]
    with pytest.raises(ValueError, match="row 't9': expected a string"):
        ScoreBatch(folder, id_column="name")({"text": ["a", 5], "name": ["t8", "t9"]})
    with pytest.raises(ValueError, match="row 1: expected a string"):
        ScoreBatch(folder)({"text": ["a", 5]})


@pytest.mark.parametrize(("count", "rank", "expected"), [(0, 3, "cpu"), (4, 3, "cuda:3")])
def test_a_rank_of_torchrun_gets_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, count: int, rank: int, expected: str
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert str(place()) == expected
    assert [str(device) for device in chosen] == [expected] * (count > 0)


def test_an_actor_with_a_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(
        get_actor_id=lambda: "an actor", get_accelerator_ids=lambda: {"GPU": ["3"]}
    )
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert str(place()) == "cuda"  # the only one it sees
