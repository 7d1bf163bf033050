"""Accelerated models compute what they computed before, forward and backward."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import gpt2fast
from gpt2fast.integrations import modules
from gpt2fast.integrations.deferred import DeferredLogits
from tests.integrations.conftest import pair, plain
from tests.models.reference import assert_forward, assert_gradients, padding, tokens

# Class -> what to call it with besides ids: a loss for each.
LABELS: dict[str, Any] = {
    "GPT2Model": lambda ids: {},
    "GPT2LMHeadModel": lambda ids: {"labels": ids},
    "GPT2DoubleHeadsModel": lambda ids: {
        "labels": ids,
        "mc_labels": torch.tensor([1, 0]),
        "mc_token_ids": torch.full(ids.shape[:-1], ids.shape[-1] - 1),
    },
    "GPT2ForSequenceClassification": lambda ids: {"labels": torch.tensor([0, 2])},
    "GPT2ForTokenClassification": lambda ids: {"labels": ids % 3},
    "GPT2ForQuestionAnswering": lambda ids: {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    },
}


# What adds the same to every choice changes none: the gradient is rounding.
INVARIANT = {
    "GPT2DoubleHeadsModel": ("multiple_choice_head.summary.bias",),
    "GPT2ForQuestionAnswering": ("transformer.ln_f.bias", "qa_outputs.bias"),
}


def ids_for(kind: str, length: int) -> torch.Tensor:
    shape = (2, 2, length) if kind == "GPT2DoubleHeadsModel" else (2, length)
    return tokens(*shape).clamp_min(2)


def assert_same_outputs(ours: Any, reference: Any, keep: torch.Tensor | None = None) -> None:
    assert list(ours.keys()) == list(reference.keys())
    for name, wanted in reference.items():
        got = ours[name]
        if isinstance(wanted, torch.Tensor):
            assert_forward(got.double(), wanted, keep if wanted.dim() > 2 else None)


def loss_of(kind: str, out: Any) -> torch.Tensor:
    if kind == "GPT2Model":
        return (
            out.last_hidden_state * torch.linspace(-1, 1, out.last_hidden_state.shape[-1])
        ).sum()
    loss: torch.Tensor = out.loss
    return loss + out.mc_loss if kind == "GPT2DoubleHeadsModel" else loss


@pytest.mark.parametrize("kind", LABELS)
def test_outputs_loss_and_gradients(kind: str) -> None:
    ours, reference = pair(kind)
    ids = ids_for(kind, 13)
    outputs = []
    for model in (ours, reference):
        out = model(ids, **LABELS[kind](ids))
        loss_of(kind, out).backward()
        outputs.append(out)
    assert_same_outputs(*outputs)
    assert_gradients(ours, reference, but=INVARIANT.get(kind, ()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side: str) -> None:
    ours, reference = pair()
    ids, mask = tokens(3, 11), padding(side, 3, 11)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    outputs = []
    for model in (ours, reference):
        out = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
        out.loss.backward()
        outputs.append(out)
    assert_same_outputs(*outputs, keep=mask.bool())
    assert_gradients(ours, reference)


def test_complete_mask_of_the_caller() -> None:
    ours, reference = pair()
    ids = tokens(2, 7)
    mask = (torch.rand(2, 1, 7, 7) < 0.7).tril() | torch.eye(7, dtype=torch.bool)
    with torch.no_grad():
        assert_same_outputs(ours(ids, attention_mask=mask), reference(ids, attention_mask=mask))


@pytest.mark.parametrize("hooked", ["", "ln_2", "attn", "mlp"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches(kind: str, hooked: str) -> None:
    ours, reference = pair(n_layer=2)
    if hooked:
        for block in ours.transformer.h:
            block.get_submodule(hooked).register_forward_hook(lambda *args: None)
    ids = tokens(2, 12)
    results = []
    for model in (ours, reference):
        past: Any = transformers.DynamicCache()
        if kind == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=16)
        logits = []
        with torch.no_grad():
            for part in ids.split([5, 1, 3, 3], dim=1):
                seen = past.get_seq_length()
                positions = torch.arange(int(seen), int(seen) + part.shape[1])[None]
                out = model(part, past_key_values=past, position_ids=positions, use_cache=True)
                logits.append(out.logits)
        assert past.get_seq_length() == 12
        results.append((torch.cat(logits, 1), past.layers[1].keys[:, :, :12]))
    for got, wanted in zip(*results, strict=True):
        assert_forward(got, wanted)
    with torch.no_grad():
        assert_forward(results[0][0], reference(ids).logits)


def test_blocks_take_their_cache_by_name() -> None:
    ours, reference = pair(n_layer=1)
    outputs = []
    hidden = torch.randn(2, 5, 48)
    for model, states in ((ours, hidden), (reference, hidden.double())):
        block = model.transformer.h[0]
        past = transformers.DynamicCache()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions have another name besides
            first = block(states, past_key_values=past)
            outputs.append((first, block(states[:, :1], past_key_values=past)))
        assert past.get_seq_length() == 6
    for got, wanted in zip(*outputs, strict=True):
        # Blocks of older versions return tuples.
        assert_forward(*(x if isinstance(x, torch.Tensor) else x[0] for x in (got, wanted)))


def test_weights_and_hidden_states() -> None:
    ours, reference = pair(attention="eager")
    ids = tokens(2, 9)
    with torch.no_grad():
        for arguments in ({"output_attentions": True}, {"output_hidden_states": True}):
            got, wanted = ours(ids, **arguments), reference(ids, **arguments)
            name = "attentions" if "output_attentions" in arguments else "hidden_states"
            assert len(got[name]) == len(wanted[name])
            for a, b in zip(got[name], wanted[name], strict=True):
                assert_forward(a, b)
            assert_same_outputs(got, wanted)


def test_eager_may_be_chosen_afterwards() -> None:
    ours, reference = pair()
    ours.set_attn_implementation("eager")
    ids = tokens(1, 6)
    with torch.no_grad():
        weights = ours(ids, output_attentions=True).attentions
    assert weights[0].shape == (1, 4, 6, 6)
    gpt2fast.restore(ours)
    assert ours.config._attn_implementation == "eager"
    assert_forward(ours(ids).logits, reference(ids).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False},
        {"n_inner": 20},
        {"layer_norm_epsilon": 1e-3},
    ],
    ids=lambda fields: next(iter(fields)) + "-" + str(next(iter(fields.values()))),
)
def test_configurations(fields: dict[str, Any]) -> None:
    ours, reference = pair(n_layer=2, **fields)
    if "reorder_and_upcast_attn" in fields:
        reference.float()  # it has no float64 in this mode
    ids = tokens(2, 8)
    outputs = []
    for model in (ours, reference):
        out = model(ids, labels=ids)
        out.loss.backward()
        outputs.append(out)
    assert_same_outputs(*outputs)
    assert_gradients(ours, reference)


def test_cross_attention_stays_as_it_is() -> None:
    ours, reference = pair("GPT2Model", n_layer=1, add_cross_attention=True)
    assert ours.config._attn_implementation == "sdpa"
    ids, encoded = tokens(2, 5), torch.randn(2, 4, 48)
    for model, states in ((ours, encoded), (reference, encoded.double())):
        out = model(ids, encoder_hidden_states=states)
        out.last_hidden_state.square().sum().backward()
    assert_gradients(ours, reference)


def test_dropout_in_training() -> None:
    """Activity differs from call to call in training mode, and not in eval mode."""
    model = gpt2fast.accelerate(plain(resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0))
    ids = tokens(1, 10)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(1)
    first = model(ids, labels=ids).loss
    torch.manual_seed(1)
    assert torch.equal(first, model(ids, labels=ids).loss)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_loss_options_of_the_trainer() -> None:
    ours, reference = pair()
    ids = tokens(2, 9)
    for arguments in (
        {"labels": ids, "num_items_in_batch": 7},
        {"labels": ids, "num_items_in_batch": torch.tensor(11)},
        {"labels": ids, "shift_labels": ids.roll(-1, 1)},
        {"labels": ids, "ignore_index": int(ids[0, 3])},
        {"labels": ids.masked_fill(ids > 50, -100)},
    ):
        assert_forward(ours(ids, **arguments).loss, reference(ids, **arguments).loss)


def test_bfloat16_loss_has_the_type_and_is_near() -> None:
    model = plain().bfloat16()
    ids = tokens(2, 9)
    before = model(ids, labels=ids).loss
    after = gpt2fast.accelerate(model)(ids, labels=ids).loss
    assert after.dtype == before.dtype == torch.float32
    assert after.item() == pytest.approx(before.item(), rel=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.float()(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(before.item(), rel=2e-2)


def test_logits_wait_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2fast.accelerate(plain())
    ids = tokens(2, 9)
    out = model(ids, labels=ids)
    assert isinstance(out.logits, DeferredLogits)
    assert out.logits._value is None
    assert type(model(ids).logits) is torch.Tensor
    with torch.no_grad():  # an evaluation: only many of them wait
        evaluated = model(ids, labels=ids)
        assert type(evaluated.logits) is torch.Tensor
        monkeypatch.setattr(modules, "_MANY_LOGITS", 1000)
        waiting = model(ids, labels=ids)
    assert type(waiting.logits) is DeferredLogits
    assert_forward(waiting.loss, evaluated.loss)
    assert type(model(ids, labels=ids, logits_to_keep=9).logits) is DeferredLogits


def test_hooks_see_what_they_saw() -> None:
    ours, reference = pair()
    ids = tokens(2, 7)
    for target in ("transformer.h.1.ln_2", "transformer.h.1.mlp.act", "transformer.h.0.mlp.c_fc"):
        seen = []
        for model in (ours, reference):
            handle = model.get_submodule(target).register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output)
            )
            model(ids)
            handle.remove()
        assert_forward(*seen)
    handle = ours.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    hooked = ours(ids, labels=ids)
    assert type(hooked.logits) is torch.Tensor
    handle.remove()
    assert_forward(hooked.logits, 2 * reference(ids).logits)


def test_every_module_is_taken_in() -> None:
    """What is fast is what is measured: none is left out unnoticed."""
    model = gpt2fast.accelerate(plain())
    kinds = {type(module) for module in model.modules()}
    assert set(modules.LAYERS.values()) - {modules.FastGELUActivation} <= kinds
    assert nn.LayerNorm not in kinds
    assert modules.Linear in kinds
    assert model.config._attn_implementation == "gpt2fast"
