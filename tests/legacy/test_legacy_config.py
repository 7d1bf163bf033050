"""The old configuration, special tokens, and bad input."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_pretrained_bert as reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import legacy

Pair = tuple[nn.Module, nn.Module]
CLASSES = [legacy.GPT2Model, legacy.GPT2LMHeadModel, legacy.GPT2DoubleHeadsModel]


def ids_of(*shape: int, below: int = 211) -> Tensor:
    return torch.randint(below, shape)


def test_signature_of_the_configuration() -> None:
    """The reference's, in its order, then the fields that its later master had."""
    theirs = list(inspect.signature(reference.GPT2Config.__init__).parameters.values())
    ours = list(inspect.signature(legacy.GPT2Config.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    config = legacy.GPT2Config()
    later = {"n_special": 0, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    assert {**later, "predict_special_tokens": True}.items() <= config.to_dict().items()
    assert config.total_tokens_embeddings == config.vocab_size == 50257


@pytest.mark.parametrize("name", [cls.__name__ for cls in CLASSES])
def test_signatures_of_the_models(name: str) -> None:
    theirs = inspect.signature(getattr(reference, name).forward).parameters
    ours = inspect.signature(getattr(legacy, name).forward).parameters
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in theirs.values()
    ]
    theirs = inspect.signature(getattr(reference, name).from_pretrained).parameters
    ours = inspect.signature(getattr(legacy, name).from_pretrained).parameters
    assert list(ours)[:4] == list(theirs)[:4]


def test_configuration_of_either_generation() -> None:
    config = legacy.GPT2Config.from_dict(
        {"vocab_size": 30, "max_position_embeddings": 2048, "n_special": 3, "task": "x"}, n_layer=2
    )
    assert (config.vocab_size, config.total_tokens_embeddings) == (30, 33)
    assert (config.n_positions, config.n_ctx, config.n_layer, config.task) == (2048, 2048, 2, "x")
    assert legacy.GPT2Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_ctx": 0}, "n_ctx must be an integer of at least 1; got 0"),
        ({"n_special": -1}, "n_special must be an integer of at least 0; got -1"),
        ({"n_special": 1.5}, "n_special must be an integer of at least 0; got 1.5"),
        ({"predict_special_tokens": 1}, "predict_special_tokens must be true or false; got 1"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head; got n_embd=768, n_head=5"),
        (
            {"vocab_size_or_config_json_file": None},
            "vocab_size must be a positive integer; got None",
        ),
    ],
)
def test_impossible_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        legacy.GPT2Config(**fields)


def test_configuration_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        legacy.GPT2Config(str(path))
    path.write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match="is not a JSON configuration"):
        legacy.GPT2Config(str(path))


@pytest.mark.parametrize("cls", CLASSES)
def test_special_tokens_get_rows_of_their_own(
    cls: type[nn.Module], make_pair: Callable[..., Pair]
) -> None:
    ours, theirs = make_pair(cls.__name__)
    words = dict(ours.named_parameters())[
        "transformer.wte.weight" if cls is not CLASSES[0] else "wte.weight"
    ]
    words = words.detach().clone()
    ours.set_num_special_tokens(3)
    body = getattr(ours, "transformer", ours)
    assert (ours.config.vocab_size, ours.config.n_special) == (211, 3)
    assert body.wte.weight.shape == (214, 64)
    assert torch.equal(body.wte.weight[:211], words)
    assert body.wte.weight[211:].std() > 0.005
    assert body.wte.weight.requires_grad
    ids, special = ids_of(2, 6), torch.tensor([[3, 213, 211, 7]])
    with torch.no_grad():
        torch.testing.assert_close(body(ids)[0], getattr(theirs, "transformer", theirs)(ids)[0])
        assert body(special, token_type_ids=special)[0].shape == (1, 4, 64)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 214\); got 214"):
        body(torch.tensor([[214]]))
    trained = body.wte.weight[212].clone()
    ours.set_num_special_tokens(2)
    assert body.wte.weight.shape == (213, 64)
    assert torch.equal(body.wte.weight[212], trained)
    ours.set_num_special_tokens(0)
    assert torch.equal(body.wte.weight, words)
    with pytest.raises(ValueError, match="num_special_tokens must be at least 0; got -2"):
        ours.set_num_special_tokens(-2)


def test_special_tokens_stay_tied_and_learn(lm: Pair) -> None:
    ours, _ = lm
    ours.set_num_special_tokens(2)
    assert ours.lm_head.decoder.weight is ours.transformer.wte.weight
    assert ours(ids_of(1, 4))[0].shape == (1, 4, 213)
    ids = torch.tensor([[4, 212, 9, 211, 5]])
    ours(ids, lm_labels=ids).backward()
    assert ours.transformer.wte.weight.grad.abs().amax(1)[[4, 211, 212]].min() > 0
    restored = legacy.GPT2LMHeadModel(ours.config)
    restored.load_state_dict(ours.state_dict())
    assert torch.equal(restored.transformer.wte.weight, ours.transformer.wte.weight)


@pytest.mark.parametrize("hooked", [False, True])
def test_special_tokens_that_are_not_predicted(lm: Pair, hooked: bool) -> None:
    ours, theirs = lm
    ids = ids_of(2, 7)
    ours.set_num_special_tokens(4, predict_special_tokens=False)
    if hooked:
        ours.lm_head.decoder.register_forward_hook(lambda *_: None)
    logits, _ = ours(ids)
    assert logits.shape == (2, 7, 211)
    torch.testing.assert_close(logits, theirs(ids)[0])
    loss = ours(ids, lm_labels=ids)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    loss.backward()
    gradient = ours.transformer.wte.weight.grad
    assert gradient[:211].any()
    assert not gradient[211:].any()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 211\).*got 21[1-4]"):
        ours(torch.tensor([[1, 2]]), lm_labels=torch.tensor([[1, 212]]))


def test_special_tokens_of_a_checkpoint(lm: Pair, tmp_path: Path) -> None:
    ours, _ = lm
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    ours.config.to_json_file(tmp_path / "config.json")
    grown = legacy.GPT2LMHeadModel.from_pretrained(tmp_path, num_special_tokens=5)
    assert grown.config.total_tokens_embeddings == 216
    assert torch.equal(grown.transformer.wte.weight[:211], ours.transformer.wte.weight)
    assert grown.transformer.training

    grown.set_num_special_tokens(5, predict_special_tokens=False)
    torch.save(grown.state_dict(), tmp_path / "pytorch_model.bin")
    grown.config.to_json_file(tmp_path / "config.json")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["vocab_size"], fields["n_special"]) == (211, 5)
    again = legacy.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again.transformer.wte.weight, grown.transformer.wte.weight)
    assert again(ids_of(1, 2))[0].shape == (1, 2, 211)


def test_set_tied_ties(lm: Pair) -> None:
    ours, _ = lm
    ours.transformer.wte = nn.Embedding(211, 64)
    ours.set_tied()
    assert ours.lm_head.decoder.weight is ours.transformer.wte.weight


def test_resized_embeddings_count_as_vocabulary(base: Pair) -> None:
    ours, _ = base
    ours.set_num_special_tokens(3)
    ours.resize_token_embeddings(220)
    assert (ours.config.vocab_size, ours.config.n_special) == (220, 0)
    with pytest.raises(ValueError, match=r"in \[0, 220\); got 220"):
        ours(torch.tensor([[220]]))


def test_bad_labels(lm: Pair) -> None:
    ours, _ = lm
    ids = ids_of(2, 5)
    with pytest.raises(ValueError, match=r"lm_labels must be \[2, 5\], as the input; got \[2, 4\]"):
        ours(ids, lm_labels=ids[:, 1:])
    for wrong in (-100, 211):
        labels = ids.clone()
        labels[1, 2] = wrong
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 211\) or -1; got {wrong}"):
            ours(ids, lm_labels=labels)


def test_bad_input(base: Pair) -> None:
    ours, _ = base
    for ids, message in (
        (torch.tensor([[211]]), r"input_ids must be in \[0, 211\); got 211"),
        (torch.tensor([[-1]]), r"input_ids must be in \[0, 211\); got -1"),
        (torch.zeros(1, 0, dtype=torch.long), r"the input is empty: got shape \[1, 0\]"),
        (torch.tensor(3), r"the input is empty: got shape \[\]"),
        (torch.rand(1, 3), "input_ids must be integers; got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(ids)
    with pytest.raises(ValueError, match=r"position_ids must be in \[0, 40\); got 40"):
        ours(ids_of(1, 2), torch.tensor([[39, 40]]))


def test_bad_choices(double_heads: Pair) -> None:
    ours, _ = double_heads
    ids, places = ids_of(2, 3, 5), torch.full((2, 3), 4)
    with pytest.raises(ValueError, match=r"mc_token_ids must be in \[0, 5\); got 5"):
        ours(ids, places + 1)
    with pytest.raises(ValueError, match=r"mc_token_ids must be \[2, 3\].*; got \[2\]"):
        ours(ids, places[:, 0])
    with pytest.raises(ValueError, match=r"mc_labels must hold 2 choices; got \[3\]"):
        ours(ids, places, mc_labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"mc_labels must be in \[0, 3\); got 3"):
        ours(ids, places, mc_labels=torch.tensor([0, 3]))
