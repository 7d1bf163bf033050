"""Numbers and shapes against pytorch-pretrained-BERT 0.6.2 itself, in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast import legacy
from tests.tolerances import assert_close

Pair = tuple[nn.Module, nn.Module]


def ids_of(*shape: int, below: int = 211) -> Tensor:
    return torch.randint(below, shape)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert_close("model", "forward", ours, theirs)


def assert_same_presents(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Of every parameter, by name; and there is one for each."""
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient.abs().max() > 1e-6:
            assert_close("model", "backward", mine[name], gradient)
        else:
            # They move all choices alike, which their softmax does not see: rounding alone.
            assert name in ("multiple_choice_head.linear.bias", "transformer.ln_f.bias")
            assert mine[name].abs().max() < 1e-6


def backward_sum(outputs: Any) -> None:
    """A random upstream gradient for every output, the same one for both models."""
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (out * torch.randn(out.shape, generator=generator)).sum()
        for out in ([outputs] if isinstance(outputs, Tensor) else outputs)
    )
    total.backward()


@pytest.mark.parametrize("lead", [(2,), (1,), (2, 3)])
def test_hidden_states_and_presents(base: Pair, lead: tuple[int, ...]) -> None:
    ours, theirs = base
    ids = ids_of(*lead, 11)
    hidden, presents = ours(ids)
    expected, expected_presents = theirs(ids)
    assert_same(hidden, expected)
    assert_same_presents(presents, expected_presents)


def test_positions_and_token_types_by_position(base: Pair) -> None:
    ours, theirs = base
    ids, positions, types = ids_of(2, 9), ids_of(2, 9, below=40), ids_of(2, 9)
    for model_args in ((ids, positions), (ids, None, types), (ids, positions, types)):
        assert_same(ours(*model_args)[0], theirs(*model_args)[0])


def test_gradients_of_hidden_states_and_presents(base: Pair) -> None:
    ids, types = ids_of(2, 9), ids_of(2, 9)
    for model in base:
        hidden, presents = model(ids, token_type_ids=types)
        backward_sum([hidden, *presents])
    assert_same_gradients(*base)


def test_logits(lm: Pair) -> None:
    ours, theirs = lm
    ids = ids_of(2, 3, 7)
    logits, presents = ours(ids)
    expected, expected_presents = theirs(ids)
    assert_same(logits, expected)
    assert_same_presents(presents, expected_presents)


def test_lm_loss_and_every_gradient(lm: Pair) -> None:
    ids, positions, types = ids_of(3, 12), ids_of(3, 12, below=40), ids_of(3, 12)
    labels = ids.clone()
    labels[0, :5] = -1
    labels[2] = -1
    losses = [model(ids, positions, types, labels) for model in lm]
    assert losses[0].shape == ()
    assert_same(*losses)
    for loss in losses:
        (1.7 * loss).backward()
    assert_same_gradients(*lm)


def test_gradients_of_logits(lm: Pair) -> None:
    ids = ids_of(2, 9)
    for model in lm:
        backward_sum(model(ids)[0])
    assert_same_gradients(*lm)


def test_full_width(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair("GPT2LMHeadModel", 5003, n_embd=768, n_head=12, n_layer=2)
    ids = ids_of(2, 33, below=5003)
    with torch.no_grad():
        assert_same(*(model(ids)[0] for model in pair))
    losses = [model(ids, lm_labels=ids) for model in pair]
    assert_same(*losses)
    for loss in losses:
        loss.backward()
    assert_same_gradients(*pair)


def test_no_label_kept_gives_nan(lm: Pair) -> None:
    ids = ids_of(1, 5)
    for model in lm:
        assert model(ids, lm_labels=torch.full_like(ids, -1)).isnan()


def test_double_heads_logits_and_scores(double_heads: Pair) -> None:
    ours, theirs = double_heads
    ids, places = ids_of(2, 3, 11), torch.tensor([[3, 10, 0], [10, 9, 4]])
    logits, scores, presents = ours(ids, places)
    expected = theirs(ids, places)
    assert logits.shape == (2, 3, 11, 211)
    assert scores.shape == (2, 3)
    assert_same(logits, expected[0])
    assert_same(scores, expected[1])
    assert_same_presents(presents, expected[2])


def corrected_losses(
    model: nn.Module, ids: Tensor, places: Tensor, lm_labels: Tensor | None, choice: Tensor | None
) -> list[Tensor]:
    """0.6.2's losses, with its language-model loss mended: it shifts the choices, not the time."""
    logits, scores, _ = model(ids, places)
    losses = []
    if lm_labels is not None:
        targets = lm_labels[..., 1:].reshape(-1)
        losses.append(F.cross_entropy(logits[..., :-1, :].flatten(0, -2), targets, ignore_index=-1))
    if choice is not None:
        losses.append(F.cross_entropy(scores, choice))
    return losses


@pytest.mark.parametrize("which", ["lm", "mc", "both"])
def test_double_heads_losses_and_every_gradient(double_heads: Pair, which: str) -> None:
    ours, theirs = double_heads
    ids, places = ids_of(2, 3, 11), torch.tensor([[3, 10, 0], [10, 9, 4]])
    lm_labels = ids.clone()
    lm_labels[:, :, 7:] = -1
    choice = torch.tensor([2, 0])
    labels = (None if which == "mc" else lm_labels, None if which == "lm" else choice)
    losses = ours(ids, places, *labels)
    expected = corrected_losses(theirs, ids, places, *labels)
    assert isinstance(losses, list)
    assert len(losses) == len(expected) == (2 if which == "both" else 1)
    for loss, other in zip(losses, expected, strict=True):
        assert_same(loss, other)
    sum(losses).backward()
    sum(expected).backward()
    assert_same_gradients(ours, theirs)


def test_double_heads_choice_loss_is_the_reference_s_own(double_heads: Pair) -> None:
    ids, places = ids_of(2, 3, 11), torch.tensor([[3, 10, 0], [10, 9, 4]])
    ours, theirs = (model(ids, places, mc_labels=torch.tensor([1, 2])) for model in double_heads)
    assert len(ours) == len(theirs) == 1
    assert_same(ours[0], theirs[0])


def test_double_heads_labels_of_another_integer_dtype(double_heads: Pair) -> None:
    ours, _ = double_heads
    ids, places, choice = ids_of(2, 3, 11), torch.full((2, 3), 10), torch.tensor([1, 2])
    losses = ours(ids, places, ids.int(), choice.int())
    assert torch.equal(torch.stack(losses), torch.stack(ours(ids, places, ids, choice)))


def test_double_heads_other_arguments_by_position(double_heads: Pair) -> None:
    ours, theirs = double_heads
    ids, places = ids_of(2, 3, 5), torch.full((2, 3), 4)
    types, positions = ids_of(2, 3, 5), ids_of(2, 3, 5, below=20)
    past, expected_past = ours(ids, places)[2], theirs(ids, places)[2]
    args = (ids, places, None, None, types, positions)
    got, expected = ours(*args, past), theirs(*args, expected_past)
    assert_same(got[0], expected[0])
    assert_same(got[1], expected[1])
    assert_same_presents(got[2], expected[2])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_continuing_from_the_past(lm: Pair, lead: tuple[int, ...], grad: bool) -> None:
    """In steps of several sizes, compared with the reference's steps and with one pass."""
    ours, theirs = lm
    ids = ids_of(*lead, 12)
    with torch.set_grad_enabled(grad):
        whole, _ = ours(ids)
        past = expected_past = None
        for start, end in ((0, 5), (5, 6), (6, 11), (11, 12)):
            logits, past = ours(ids[..., start:end], past=past)
            expected, expected_past = theirs(ids[..., start:end], past=expected_past)
            assert_same(logits, expected)
            assert_same(logits, whole[..., start:end, :])
            assert_same_presents(past, expected_past)


def test_gradients_flow_through_the_past(lm: Pair) -> None:
    ids = ids_of(2, 9)
    for model in lm:
        _, past = model(ids[:, :5])
        model(ids[:, 5:], lm_labels=ids[:, 5:], past=past).backward()
    assert_same_gradients(*lm)


def test_each_continues_from_the_other_s_presents(base: Pair) -> None:
    ours, theirs = base
    ids = ids_of(2, 9)
    expected, _ = theirs(ids)
    hidden, _ = ours(ids[:, 4:], past=theirs(ids[:, :4])[1])
    assert_same(hidden, expected[:, 4:])
    hidden, _ = theirs(ids[:, 4:], past=ours(ids[:, :4])[1])
    assert_same(hidden, expected[:, 4:])


def test_positions_continue_at_the_past(base: Pair) -> None:
    ours, _ = base
    ids = ids_of(1, 6)
    _, past = ours(ids[:, :4])
    assert_same(
        ours(ids[:, 4:], torch.tensor([[4, 5]]), past=past)[0], ours(ids[:, 4:], past=past)[0]
    )


def test_attentions_come_first(lm: Pair) -> None:
    ours, _ = lm
    ids = ids_of(2, 6)
    logits, _ = ours(ids)
    ours.config.output_attentions = True
    attentions, again, presents = ours(ids)
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 6, 6)] * 3
    torch.testing.assert_close(attentions[1].sum(-1), torch.ones(2, 4, 6))
    assert_same(again, logits)
    assert len(presents) == 3


def test_training_mode_drops_out_and_steps_like_a_module(config: legacy.GPT2Config) -> None:
    model = legacy.GPT2LMHeadModel(config).train()
    ids = ids_of(2, 8)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = model.eval()(ids, lm_labels=ids)
    first.backward()
    optimizer.step()
    assert model(ids, lm_labels=ids) < first


def test_choices_lose_the_same_features(config: legacy.GPT2Config) -> None:
    """The multiple-choice head's dropout, as the TensorFlow original's noise shape has it."""
    config.resid_pdrop = 0.5
    head = legacy.GPT2DoubleHeadsModel(config).train().multiple_choice_head
    hidden = torch.randn(4, 1, 1, 64).expand(4, 3, 5, 64)
    scores = head(hidden, torch.zeros(4, 3, dtype=torch.long))
    torch.testing.assert_close(scores, scores[:, :1].expand(4, 3))
    assert not torch.allclose(scores, head(hidden, torch.zeros(4, 3, dtype=torch.long)))


def test_hooks_on_the_decoder_see_the_loss(lm: Pair) -> None:
    ours, theirs = lm
    ids = ids_of(2, 6)
    for model in lm:
        model.lm_head.decoder.register_forward_hook(lambda module, args, out: 2 * out)
    assert_same(ours(ids, lm_labels=ids), theirs(ids, lm_labels=ids))


def test_gradient_checkpointing_leaves_no_presents(lm: Pair) -> None:
    ours, theirs = lm
    ours.gradient_checkpointing_enable()
    ours.train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = ids_of(2, 6)
    assert ours(ids)[1] is None
    ours(ids, lm_labels=ids).backward()
    theirs(ids, lm_labels=ids).backward()
    assert_same_gradients(ours, theirs)
