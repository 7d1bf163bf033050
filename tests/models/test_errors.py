"""Bad input is refused with a message that says what was wrong, before anything is computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.reference import CONTEXT, HEADS, LAYERS, VOCAB, WIDTH, pair, tokens

IDS = torch.arange(6).view(2, 3)
NAN = float("nan")


def _ids(*values: Any) -> Tensor:
    return torch.tensor([values])


CASES: dict[str, tuple[dict[str, Any], str]] = {
    # token ids
    "id too large": ({"input_ids": _ids(0, VOCAB)}, "input_ids must be in [0, 97); got 97"),
    "id negative": ({"input_ids": _ids(-1, 3)}, "input_ids must be in [0, 97); got -1"),
    "ids float": ({"input_ids": _ids(1.0)}, "input_ids must be integers; got torch.float32"),
    "ids bool": ({"input_ids": _ids(True)}, "input_ids must be integers; got torch.bool"),
    "ids complex": ({"input_ids": _ids(1j)}, "input_ids must be integers; got torch.complex64"),
    "a list": ({"input_ids": [[1, 2]]}, "input_ids must be a tensor; got list"),
    # emptiness
    "nothing given": ({}, "give either input_ids or inputs_embeds, and not both"),
    "both given": (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 3, WIDTH)},
        "give either input_ids or inputs_embeds, and not both",
    ),
    "no token": (
        {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
        "the input is empty: got shape [2, 0]",
    ),
    "no row": (
        {"input_ids": torch.zeros(0, 3, dtype=torch.long)},
        "the input is empty: got shape [0, 3]",
    ),
    "a single number": ({"input_ids": torch.tensor(3)}, "the input is empty: got shape []"),
    "no embedding": (
        {"inputs_embeds": torch.zeros(2, 0, WIDTH)},
        "the input is empty: got shape [2, 0]",
    ),
    "embeddings of another width": (
        {"inputs_embeds": torch.zeros(2, 3, 7)},
        "inputs_embeds must be [..., 48]; got [2, 3, 7]",
    ),
    # positions
    "position too large": (
        {"input_ids": IDS, "position_ids": _ids(0, 1, CONTEXT)},
        "position_ids must be in [0, 40); got 40",
    ),
    "position negative": (
        {"input_ids": IDS, "position_ids": _ids(0, -1, 1)},
        "position_ids must be in [0, 40); got -1",
    ),
    "positions float": (
        {"input_ids": IDS, "position_ids": _ids(0.0, 1.0, 2.0)},
        "position_ids must be integers; got torch.float32",
    ),
    "too few positions": (
        {"input_ids": IDS, "position_ids": _ids(0, 1)},
        "position_ids must be [2, 3] or [3]; got [1, 2]",
    ),
    "positions transposed": (
        {"input_ids": IDS, "position_ids": torch.zeros(3, 2, dtype=torch.long)},
        "position_ids must be [2, 3] or [3]; got [3, 2]",
    ),
    "too long": (
        {"input_ids": torch.zeros(1, CONTEXT + 1, dtype=torch.long)},
        "the context holds 40 positions; got 0 in the past and 41 new ones",
    ),
    "embeddings too long": (
        {"inputs_embeds": torch.zeros(1, CONTEXT + 1, WIDTH)},
        "the context holds 40 positions; got 0 in the past and 41 new ones",
    ),
    "too long under a mask": (
        {
            "input_ids": torch.zeros(1, CONTEXT + 1, dtype=torch.long),
            "attention_mask": torch.ones(1, CONTEXT + 1),
        },
        "the context holds 40 positions; got 0 in the past and 41 new ones",
    ),
    # token types
    "types too large": (
        {"input_ids": IDS, "token_type_ids": IDS + VOCAB},
        "token_type_ids must be in [0, 97); got 102",
    ),
    "types float": (
        {"input_ids": IDS, "token_type_ids": IDS.float()},
        "token_type_ids must be integers; got torch.float32",
    ),
    "too few types": (
        {"input_ids": IDS, "token_type_ids": IDS[:1]},
        "token_type_ids must be [2, 3]; got [1, 3]",
    ),
    "types transposed": (
        {"input_ids": IDS, "token_type_ids": IDS.t()},
        "token_type_ids must be [2, 3]; got [3, 2]",
    ),
    # masks
    "mask too short": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2)},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [2, 2]",
    ),
    "mask of one row": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3)},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [1, 3]",
    ),
    "mask transposed": (
        {"input_ids": IDS, "attention_mask": torch.ones(3, 2)},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [3, 2]",
    ),
    "mask of two dimensions for four": (
        {"input_ids": IDS, "attention_mask": torch.ones(3, 3)},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [3, 3]",
    ),
    "4-D mask of another batch": (
        {"input_ids": IDS, "attention_mask": torch.ones(3, 1, 3, 3).bool()},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [3, 1, 3, 3]",
    ),
    "4-D mask of other heads": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2, 3, 3).bool()},
        "attention_mask must be [2, 3] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 3]; "
        "got [2, 2, 3, 3]",
    ),
    "4-D mask of integers": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3).long()},
        "a 4-D attention_mask must be boolean or float; got torch.int64",
    ),
    "head mask": (
        {"input_ids": IDS, "head_mask": torch.ones(HEADS, LAYERS)},
        "head_mask must be [4] or [3, 4]; got [4, 3]",
    ),
    "encoder": (
        {"input_ids": IDS, "encoder_hidden_states": torch.zeros(1, 1, WIDTH)},
        "encoder_hidden_states is not supported: GPT-2 is a decoder alone",
    ),
    # the past
    "no past": (
        {"input_ids": IDS, "past_key_values": 3},
        "cannot read a past from int",
    ),
    "past of another batch": (
        {"input_ids": IDS, "past_key_values": [torch.zeros(2, 1, 4, 5, 12)] * LAYERS},
        "the past must be 3 layers of [2, 2, 4, 5, 12]; got 3 of [2, 1, 4, 5, 12]",
    ),
    "mask without the past": (
        {
            "input_ids": IDS,
            "past_key_values": [torch.zeros(2, 2, 4, 5, 12)] * LAYERS,
            "attention_mask": torch.ones(2, 3),
        },
        "attention_mask must be [2, 8] (past and new tokens), or 4-D [2 or 1, 4 or 1, 3, 8]; "
        "got [2, 3]",
    ),
}

LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"labels": IDS + VOCAB}, "labels must be in [0, 97) or -100; got 98"),
    "label negative": ({"labels": IDS - 6}, "labels must be in [0, 97) or -100; got -5"),
    "legacy ignore index": (
        {"labels": torch.full_like(IDS, -1)},
        "labels must be in [0, 97) or -100; got -1",
    ),
    "labels float": ({"labels": IDS.float()}, "labels must be integers; got torch.float32"),
    "too few labels": ({"labels": IDS[:, :2]}, "labels must be [2, 3], as the logits; got [2, 2]"),
    "labels flat": ({"labels": IDS.view(-1)}, "labels must be [2, 3], as the logits; got [6]"),
    "labels transposed": ({"labels": IDS.t()}, "labels must be [2, 3], as the logits; got [3, 2]"),
}

KEEP: dict[str, tuple[dict[str, Any], str]] = {
    "labels of all, logits of some": (
        {"labels": IDS, "logits_to_keep": 2},
        "labels must be [2, 2], as the logits; got [2, 3]",
    ),
    "negative": ({"logits_to_keep": -1}, "logits_to_keep must be at least 0; got -1"),
    "out of range": (
        {"logits_to_keep": torch.tensor([3])},
        "logits_to_keep must be in [0, 3); got 3",
    ),
    "a mask": (
        {"logits_to_keep": torch.tensor([True, False, True])},
        "logits_to_keep must be integers; got torch.bool",
    ),
    "2-D": (
        {"logits_to_keep": torch.tensor([[0], [1]])},
        "logits_to_keep must be an integer or 1-D; got [2, 1]",
    ),
    "shifted labels": (
        {"shift_labels": IDS[:, 1:]},
        "labels must be [2, 3], as the logits; got [2, 2]",
    ),
}

CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "position too large": (
        {"mc_token_ids": torch.tensor([0, 3])},
        "mc_token_ids must be in [0, 3); got 3",
    ),
    "position negative": (
        {"mc_token_ids": torch.tensor([0, -1])},
        "mc_token_ids must be in [0, 3); got -1",
    ),
    "positions of another shape": (
        {"mc_token_ids": torch.tensor([0])},
        "mc_token_ids must be [2], one position a sequence; got [1]",
    ),
    "choice too large": (
        {"mc_labels": torch.tensor([2])},
        "mc_labels must be in [0, 2); got 2",
    ),
    "choices float": (
        {"mc_labels": torch.tensor([1.0])},
        "mc_labels must be integers; got torch.float32",
    ),
    "too many choices": (
        {"mc_labels": torch.tensor([0, 1])},
        "mc_labels must hold 1 choices; got [2]",
    ),
}


def _assert_refused(model: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        model(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"])
def test_inputs(kind: str, case: str) -> None:
    if case == "encoder" and kind == "GPT2DoubleHeadsModel":
        pytest.skip("has no such argument, as in transformers")
    ours, _ = pair(kind)
    computed: list[nn.Module] = []
    for block in ours.modules():
        if not list(block.children()):
            block.register_forward_pre_hook(lambda module, _: computed.append(module))
    _assert_refused(ours, *CASES[case])
    if case != "head mask":  # checked layer by layer, once the embedding is there
        assert not computed


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel"])
def test_labels(kind: str, case: str, fused: bool) -> None:
    ours, _ = pair(kind)
    if not fused:
        ours.lm_head.register_forward_hook(lambda *_: None)
    arguments, message = LABELS[case]
    if not fused and "-100" in message:
        message = message.replace(" or -100", "").replace("98", "102")  # the largest, not the first
    _assert_refused(ours, {"input_ids": IDS, **arguments}, message)


@pytest.mark.parametrize("case", KEEP)
def test_kept_positions(case: str) -> None:
    arguments, message = KEEP[case]
    _assert_refused(pair()[0], {"input_ids": IDS, **arguments}, message)


@pytest.mark.parametrize("case", CHOICES)
def test_choices(case: str) -> None:
    arguments, message = CHOICES[case]
    _assert_refused(pair("GPT2DoubleHeadsModel")[0], {"input_ids": IDS, **arguments}, message)


def test_a_refused_call_leaves_the_past_usable() -> None:
    ours, _ = pair()
    ids = tokens(2, 6)
    with torch.no_grad():
        past = ours(ids[:, :4]).past_key_values
        before = [layer.clone() for layer in past]
        for arguments in (
            {"input_ids": ids[:, 4:] + VOCAB},
            {"input_ids": ids[:, 4:], "attention_mask": torch.ones(2, 5)},
            {"input_ids": ids[:, 4:], "position_ids": torch.full((2,), CONTEXT)},
        ):
            with pytest.raises(ValueError, match="must be"):
                ours(**arguments, past_key_values=past)
        assert all(map(torch.equal, past, before))
        got = ours(ids[:, 4:], past)
        assert got.past_key_values.buffers is past.buffers  # nobody has claimed its slots
        assert torch.allclose(got.logits, ours(ids).logits[:, 4:], atol=1e-6)


def test_a_past_on_another_device() -> None:
    ours, _ = pair()
    past = [torch.empty(2, 2, HEADS, 3, WIDTH // HEADS, device="meta")] * LAYERS
    message = "the past must be on cpu, as the model; it is on meta"
    _assert_refused(ours, {"input_ids": IDS, "past_key_values": past}, message)


def test_a_nan_stays_visible() -> None:
    """Not hidden by masking or by the loss: whoever made it can find it."""
    ours, _ = pair()
    with torch.no_grad():
        ours.transformer.h[1].mlp.c_fc.bias[0] = NAN
    output = ours(IDS, labels=IDS)
    assert output.loss.isnan()
    assert output.logits.isnan().all()
