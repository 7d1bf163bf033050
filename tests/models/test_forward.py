"""The models against transformers: hidden states, logits, losses, and every gradient.

transformers runs in float64 and ours in float32; "equal" is 1e-5 of a tensor's largest value.
"""

from typing import Any

import pytest
import torch
import transformers

from gpt2fast import KVCache
from tests.models.reference import (
    CONTEXT,
    HEADS,
    KINDS,
    LAYERS,
    VOCAB,
    WIDTH,
    assert_forward,
    assert_gradients,
    ours_from,
    padding,
    pair,
    positions_under,
    randomize,
    sizes,
    tokens,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (3, CONTEXT)], ids=str)
def test_outputs(kind: str, shape: tuple[int, int]) -> None:
    ours, reference = pair(kind)
    ids = tokens(*shape)
    with torch.no_grad():
        got, want = ours(ids), reference(ids)
    name = "last_hidden_state" if kind == "GPT2Model" else "logits"
    assert list(got.keys()) == list(want.keys())
    assert_forward(got[name], want[name])
    if kind == "GPT2DoubleHeadsModel":
        assert_forward(got.mc_logits, want.mc_logits)
    for layer, theirs in zip(got.past_key_values, want.past_key_values.layers, strict=True):
        assert_forward(layer[0], theirs.keys)
        assert_forward(layer[1], theirs.values)


def test_gradients_of_hidden_states() -> None:
    ours, reference = pair("GPT2Model")
    ids, upstream = tokens(2, 11), torch.randn(2, 11, WIDTH)
    ours(ids).last_hidden_state.backward(upstream)
    reference(ids).last_hidden_state.backward(upstream.double())
    assert_gradients(ours, reference)


def test_gradients_of_logits() -> None:
    ours, reference = pair()
    ids, upstream = tokens(2, 11), torch.randn(2, 11, VOCAB)
    ours(ids).logits.backward(upstream)
    reference(ids).logits.backward(upstream.double())
    assert_gradients(ours, reference)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("length", [2, 17])
def test_loss_and_gradients(length: int, train: bool) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ours, reference = pair(**dropout)
    ours.train(train)
    ids = tokens(3, length)
    labels = ids.clone()
    labels[0, : length // 2] = -100
    got, want = ours(ids, labels=labels), reference(ids, labels=labels)
    assert list(got.keys()) == list(want.keys()) == ["loss", "logits", "past_key_values"]
    assert got.loss.dtype == torch.float32
    got.loss.backward()
    want.loss.backward()
    assert_forward(got.loss, want.loss)
    assert_forward(got.logits, want.logits)
    assert_gradients(ours, reference)


def test_loss_and_logits_both_give_gradients() -> None:
    """Logits that were left uncomputed by the loss belong to the same graph."""
    ours, reference = pair()
    ids, upstream = tokens(2, 7), torch.randn(2, 7, VOCAB) / 100
    for model, weights in ((ours, upstream), (reference, upstream.double())):
        output = model(ids, labels=ids)
        (output.loss + (output.logits * weights).sum()).backward()
    assert_gradients(ours, reference)


def test_realistic_width() -> None:
    """Two layers of GPT-2's own width, a tenth of its vocabulary, over 100 tokens."""
    ours, reference = pair(
        std=0.05, n_embd=768, n_head=12, n_layer=2, n_positions=256, vocab_size=5003
    )
    ids = torch.randint(5003, (1, 100))
    got, want = ours(ids, labels=ids), reference(ids, labels=ids)
    got.loss.backward()
    want.loss.backward()
    assert_forward(got.loss, want.loss)
    assert_forward(got.logits, want.logits)
    assert_gradients(ours, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_published_initialisation(kind: str) -> None:
    """At the scale of fresh weights: standard deviation 0.02, biases zero."""
    reference = getattr(transformers, kind)(transformers.GPT2Config(**sizes())).eval()
    ours, ids = ours_from(reference), tokens(2, 9)
    with torch.no_grad():
        assert_forward(ours(ids)[0], reference.double()(ids)[0])


class TestDoubleHeads:
    def test_losses_and_gradients(self) -> None:
        ours, reference = pair("GPT2DoubleHeadsModel")
        ids, mc_labels = tokens(2, 3, 9), torch.tensor([2, 0])
        mc_token_ids = torch.tensor([[8, 5, 3], [0, 8, 7]])
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
        arguments = {"mc_token_ids": mc_token_ids, "labels": labels, "mc_labels": mc_labels}
        got, want = ours(ids, **arguments), reference(ids, **arguments)
        assert list(got.keys()) == list(want.keys())
        for name in ("loss", "mc_loss", "logits", "mc_logits"):
            assert_forward(got[name], want[name])
        (got.loss + 2 * got.mc_loss).backward()
        (want.loss + 2 * want.mc_loss).backward()
        # Softmax over the choices cancels a shared bias: its gradient is zero but for rounding.
        bias = "multiple_choice_head.summary.bias"
        assert_gradients(ours, reference, but=[bias])
        assert ours.get_parameter(bias).grad.abs() < 1e-6

    def test_choices_of_any_integer_dtype(self) -> None:
        ours, _ = pair("GPT2DoubleHeadsModel")
        ids, places, labels = tokens(2, 3, 9), torch.randint(9, (2, 3)), torch.tensor([2, 0])
        with torch.no_grad():
            want = ours(ids, mc_token_ids=places, mc_labels=labels)
            got = ours(ids, mc_token_ids=places.int(), mc_labels=labels.int())
        assert torch.equal(got.mc_loss, want.mc_loss)
        assert torch.equal(got.mc_logits, want.mc_logits)

    def test_default_position_is_the_last(self) -> None:
        ours, reference = pair("GPT2DoubleHeadsModel")
        ids = tokens(2, 3, 9)
        with torch.no_grad():
            got, want = ours(ids), reference(ids)
            last = ours(ids, mc_token_ids=torch.full((2, 3), 8))
        assert got.mc_logits.shape == (2, 3)
        assert_forward(got.mc_logits, want.mc_logits)
        assert torch.equal(got.mc_logits, last.mc_logits)

    def test_ignored_choice(self) -> None:
        ours, reference = pair("GPT2DoubleHeadsModel")
        ids, mc_labels = tokens(3, 2, 5), torch.tensor([1, -100, 0])
        with torch.no_grad():
            got, want = ours(ids, mc_labels=mc_labels), reference(ids, mc_labels=mc_labels)
        assert_forward(got.mc_loss, want.mc_loss)

    @pytest.mark.parametrize(
        "fields",
        [
            {"summary_type": "last"},
            {"summary_type": "first"},
            {"summary_type": "mean"},
            {"summary_activation": "tanh"},
            {"summary_proj_to_labels": False},
            {"summary_use_proj": False},
            {"summary_first_dropout": 0.0},
        ],
        ids=str,
    )
    def test_summaries(self, fields: dict[str, Any]) -> None:
        ours, reference = pair("GPT2DoubleHeadsModel", **fields)
        ids = tokens(3, 7)  # their "last" and "first" pick along the choices of longer shapes
        with torch.no_grad():
            assert_forward(ours(ids).mc_logits, reference(ids).mc_logits)

    def test_summary_picks_along_time_for_every_choice(self) -> None:
        ours, _ = pair("GPT2DoubleHeadsModel", summary_type="first")
        ids = tokens(2, 3, 7)
        with torch.no_grad():
            together, apart = ours(ids).mc_logits, ours(ids.view(6, 7)).mc_logits
        assert together.shape == (2, 3)
        assert torch.allclose(together.flatten(), apart, atol=1e-6)


class TestInputs:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 2)], ids=str)
    def test_leading_dimensions(self, kind: str, lead: tuple[int, ...]) -> None:
        ours, _ = pair(kind)
        flat = tokens(torch.Size(lead).numel(), 7)
        with torch.no_grad():
            got, want = ours(flat.view(*lead, 7), output_hidden_states=True), ours(flat)
        assert got[0].shape == (*lead, 7, want[0].shape[-1])
        assert torch.allclose(got[0].reshape(want[0].shape), want[0], atol=1e-6)
        assert got.hidden_states[1].shape == (*lead, 7, WIDTH)
        assert got.past_key_values.batch_size == len(flat)

    def test_leading_dimensions_with_a_loss(self) -> None:
        ours, reference = pair("GPT2DoubleHeadsModel")
        ids = tokens(2, 3, 7)
        got = ours(ids, labels=ids, attention_mask=torch.ones_like(ids))
        assert_forward(got.loss, reference(ids, labels=ids).loss)

    def test_token_types(self) -> None:
        ours, reference = pair()
        ids, types = tokens(2, 7), tokens(2, 7)
        got = ours(ids, token_type_ids=types, labels=ids)
        want = reference(ids, token_type_ids=types, labels=ids)
        got.loss.backward()
        want.loss.backward()
        assert_forward(got.logits, want.logits)
        assert_gradients(ours, reference)

    @pytest.mark.parametrize("with_types", [False, True])
    def test_embeddings_instead_of_ids(self, with_types: bool) -> None:
        ours, reference = pair()
        embeds = torch.randn(2, 7, WIDTH) / 5
        types = tokens(2, 7) if with_types else None
        leaves = [embeds.clone().requires_grad_(), embeds.double().requires_grad_()]
        labels = tokens(2, 7)
        for model, leaf in zip((ours, reference), leaves, strict=True):
            model(inputs_embeds=leaf, token_type_ids=types, labels=labels).loss.backward()
        assert_forward(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
        assert_gradients(ours, reference)

    def test_embeddings_equal_ids(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 7)
        with torch.no_grad():
            got = ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits
            assert torch.allclose(got, ours(ids).logits, atol=1e-6)

    @pytest.mark.parametrize("form", ["row", "one row", "batch"])
    def test_positions(self, form: str) -> None:
        ours, reference = pair()
        ids = tokens(2, 7)
        positions = torch.randint(CONTEXT, (7,) if form == "row" else (1, 7))
        if form == "batch":
            positions = torch.randint(CONTEXT, (2, 7))
        theirs = positions[None] if form == "row" else positions
        got = ours(ids, position_ids=positions, labels=ids)
        want = reference(ids, position_ids=theirs, labels=ids)
        got.loss.backward()
        want.loss.backward()
        assert_forward(got.logits, want.logits)
        assert_gradients(ours, reference)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
    def test_ids_of_any_integer_dtype(self, dtype: torch.dtype) -> None:
        ours, _ = pair()
        ids = tokens(2, 7)
        with torch.no_grad():
            want = ours(ids, token_type_ids=ids, labels=ids)
            got = ours(ids.to(dtype), token_type_ids=ids.to(dtype), labels=ids.to(dtype))
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.logits, want.logits)

    def test_positional_order_is_that_of_transformers(self) -> None:
        ours, reference = pair("GPT2Model")
        ids, types = tokens(2, 7), tokens(2, 7)
        arguments = (ids, None, torch.ones_like(ids), types, torch.arange(3, 10)[None])
        with torch.no_grad():
            assert_forward(ours(*arguments)[0], reference(*arguments)[0])

    def test_inputs_are_not_changed(self) -> None:
        ours, _ = pair()
        ids, mask = tokens(2, 7), torch.ones(2, 7)
        mask[0, :3] = 0
        before = ids.clone(), mask.clone()
        ours(ids, attention_mask=mask, labels=ids, token_type_ids=ids)
        assert torch.equal(ids, before[0])
        assert torch.equal(mask, before[1])


class TestReturns:
    def test_hidden_states_and_attentions(self) -> None:
        ours, reference = pair(attention="eager")
        ids, mask = tokens(3, 9), padding("left", 3, 9)
        options = {"output_hidden_states": True, "output_attentions": True, "attention_mask": mask}
        with torch.no_grad():
            got, want = (
                ours(ids, **options),
                reference(ids, **options, position_ids=positions_under(mask)),
            )
        assert [*got.keys(), "cross_attentions"] == list(want.keys())  # theirs are empty
        assert len(got.hidden_states) == LAYERS + 1
        assert len(got.attentions) == LAYERS
        for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            assert_forward(mine, theirs, keep=mask.bool())
        for mine, theirs in zip(got.attentions, want.attentions, strict=True):
            assert mine.shape == (3, HEADS, 9, 9)
            kept = mask.bool()[:, None].expand(3, HEADS, 9)
            assert_forward(mine, theirs, keep=kept)
        last = ours.transformer(ids, attention_mask=mask).last_hidden_state
        assert_forward(got.hidden_states[-1], last, keep=mask.bool())

    def test_attentions_with_a_past(self) -> None:
        ours, reference = pair(attention="eager")
        ids = tokens(2, 9)
        with torch.no_grad():
            past = ours(ids[:, :6]).past_key_values
            got = ours(ids[:, 6:], past, output_attentions=True)
            want = reference(ids, output_attentions=True)
        for mine, theirs in zip(got.attentions, want.attentions, strict=True):
            assert_forward(mine, theirs[:, :, 6:])
        assert got.past_key_values.get_seq_length() == 9
        assert_forward(got.past_key_values[1][0], want.past_key_values.layers[1].keys)

    def test_asking_for_attentions_changes_nothing_else(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 9)
        with torch.no_grad():
            plain, asked = ours(ids), ours(ids, output_attentions=True)
        # Another order of additions: each is as exact as the table says.
        assert_forward(asked.logits, plain.logits)

    def test_the_configuration_may_ask(self) -> None:
        ours, _ = pair(output_hidden_states=True)
        output = ours(tokens(1, 3))
        assert len(output.hidden_states) == LAYERS + 1
        assert ours(tokens(1, 3), output_hidden_states=False).hidden_states is None

    @pytest.mark.parametrize("kind", KINDS)
    def test_plain_tuple(self, kind: str) -> None:
        ours, reference = pair(kind)
        ids = tokens(2, 5)
        with torch.no_grad():
            got, want = ours(ids, return_dict=False), reference(ids, return_dict=False)
        assert type(got) is tuple
        assert len(got) == len(want)
        assert_forward(got[0], want[0])
        assert isinstance(got[-1], KVCache)

    def test_unpacking(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        logits, past = ours(ids)
        assert logits.shape == (2, 5, VOCAB)
        loss, logits, past = ours(ids, labels=ids)
        assert loss.shape == ()
        assert past.get_seq_length() == 5
        (logits,) = ours(ids, use_cache=False)

    def test_use_cache_follows_the_configuration(self) -> None:
        ours, _ = pair(use_cache=False)
        assert ours(tokens(1, 3)).past_key_values is None
        assert ours(tokens(1, 3), use_cache=True).past_key_values.get_seq_length() == 3

    @pytest.mark.parametrize("keep", [0, 1, 4, 100, [0, 3], [5], []], ids=str)
    def test_logits_to_keep(self, keep: int | list[int]) -> None:
        ours, reference = pair()
        ids = tokens(2, 6)
        which = torch.tensor(keep, dtype=torch.long) if isinstance(keep, list) else keep
        with torch.no_grad():
            got, want = ours(ids, logits_to_keep=which), reference(ids, logits_to_keep=which)
        assert got.logits.shape == want.logits.shape
        assert_forward(got.logits, want.logits)


def test_randomize_leaves_nothing_at_its_default() -> None:
    model = transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**sizes()))
    randomize(model)
    assert all(len(p.unique()) > 1 or p.numel() == 1 for p in model.parameters())
