"""The configuration's options, training modes and numeric modes, against transformers."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import gpt2fast
from tests.models.reference import (
    HEADS,
    LAYERS,
    WIDTH,
    assert_forward,
    assert_gradients,
    ours_from,
    pair,
    randomize,
    sizes,
    tokens,
)
from tests.tolerances import assert_close

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 100},
        {"layer_norm_epsilon": 1e-2},
        {"n_head": 1},
        {"n_head": 48},
        {"tie_word_embeddings": False},
        *({"activation_function": name} for name in ("gelu", "relu", "silu", "swish", "tanh")),
        *({"activation_function": name} for name in ("sigmoid", "gelu_fast", "gelu_pytorch_tanh")),
    ],
    ids=str,
)
def test_options(fields: dict[str, Any]) -> None:
    ours, reference = pair(attention="eager", **fields)
    ids = tokens(2, 9)
    got, want = ours(ids, labels=ids), reference(ids, labels=ids)
    got.loss.backward()
    want.loss.backward()
    assert_forward(got.logits, want.logits)
    assert_gradients(ours, reference)
    with torch.no_grad():  # token by token, into the cache
        past, logits = None, []
        for token in ids.split(1, 1):
            step = ours(token, past)
            past = step.past_key_values
            logits.append(step.logits)
    assert_forward(torch.cat(logits, 1), want.logits)


def test_untied_head() -> None:
    ours, _ = pair(tie_word_embeddings=False)
    assert ours.lm_head.weight is not ours.transformer.wte.weight
    ours.tie_weights()
    assert ours.lm_head.weight is not ours.transformer.wte.weight
    assert pair()[0].num_parameters() == ours.num_parameters() - ours.lm_head.weight.numel()


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype, upcast: bool) -> None:
    """Within twice transformers' own error in the same dtype."""
    config = transformers.GPT2Config(
        **sizes(reorder_and_upcast_attn=upcast), attn_implementation="eager"
    )
    same = transformers.GPT2LMHeadModel(config).eval()
    randomize(same)
    same.to(dtype)
    ours, exact = ours_from(same).to(dtype), copy.deepcopy(same).double()
    for block in exact.transformer.h:
        block.attn.reorder_and_upcast_attn = False  # to float32: from float64 it is down
    ids = tokens(2, 21)
    outputs = [model(ids, labels=ids) for model in (ours, same, exact)]
    for output in outputs:
        output.loss.backward()
    got, plain, want = outputs
    assert got.logits.dtype == dtype
    assert_close("model", "forward", got.logits, want.logits, plain.logits)
    assert_close("model", "forward", got.loss, want.loss, plain.loss, dtype)
    # A parameter's gradient is a small sample of errors, so the budget is for all of them at once.
    errors = [
        sum(
            float((mine.grad.double() - truth.grad).square().sum() / truth.grad.square().sum())
            for mine, truth in zip(model.parameters(), exact.parameters(), strict=True)
        )
        for model in (ours, same)
    ]
    assert errors[0] <= 4 * errors[1]  # squares of the errors


def test_upcast_reaches_the_cache_too() -> None:
    """Sharp attention, where scores rounded to bfloat16 pick other keys."""
    ours, _ = pair(reorder_and_upcast_attn=True)
    with torch.no_grad():
        for block in ours.transformer.h:
            block.attn.c_attn.weight[:, : 2 * WIDTH] *= 8
    ours.bfloat16()
    ids = tokens(2, 21)
    differentiable = ours(ids).logits
    with torch.no_grad():
        appended = ours(ids).logits
        ours.transformer.h.apply(lambda module: setattr(module, "upcast", False))
        rounded = ours(ids).logits
    assert (appended - differentiable).abs().max() < 0.1 * (rounded - differentiable).abs().max()


class TestHeadMask:
    """transformers 5 ignores head_mask; the oracle scales the rows of c_proj that a head feeds."""

    def _masked(self, model: nn.Module, mask: Tensor) -> nn.Module:
        size = WIDTH // HEADS
        with torch.no_grad():
            for i, block in enumerate(model.transformer.h):  # type: ignore[union-attr]
                row = mask if mask.dim() == 1 else mask[i]
                block.attn.c_proj.weight *= row.repeat_interleave(size)[:, None]
        return model

    @pytest.mark.parametrize("per_layer", [False, True])
    def test_scales_what_a_head_adds(self, per_layer: bool) -> None:
        ours, reference = pair()
        shape = (LAYERS, HEADS) if per_layer else (HEADS,)
        mask, ids = (torch.rand(shape) * 2).requires_grad_(), tokens(2, 9)
        got = ours(ids, head_mask=mask, labels=ids)
        masked = self._masked(reference, mask.detach().double())
        assert_forward(got.logits, masked(ids).logits)
        got.loss.backward()  # the importance of heads is read off this gradient
        assert mask.grad is not None
        assert (mask.grad != 0).all()

    def test_ones_change_nothing_and_a_past_works(self) -> None:
        ours, _ = pair()
        ids, mask = tokens(2, 9), torch.ones(HEADS)
        with torch.no_grad():
            want = ours(ids).logits
            assert_forward(ours(ids, head_mask=mask).logits, want)
            past = ours(ids[:, :5], head_mask=mask).past_key_values
            got = ours(ids[:, 5:], past, head_mask=mask)
        assert_forward(got.logits, want[:, 5:])
        assert got.past_key_values.get_seq_length() == 9

    def test_wrong_shape(self) -> None:
        ours, _ = pair()
        with pytest.raises(ValueError, match=r"^head_mask must be \[4\] or \[3, 4\]; got \[3\]$"):
            ours(tokens(1, 2), head_mask=torch.ones(3))


class TestCheckpointing:
    def test_equal_gradients_and_no_cache(self) -> None:
        ours, reference = pair(**NO_DROPOUT)
        ours.train()
        ours.gradient_checkpointing_enable()
        assert ours.is_gradient_checkpointing
        ids = tokens(2, 9)
        arguments = {"labels": ids, "token_type_ids": tokens(2, 9)}
        got = ours(ids, **arguments)
        assert got.past_key_values is None
        assert_forward(got.loss, reference(ids, **arguments).loss)
        got.loss.backward()
        reference(ids, **arguments).loss.backward()
        assert_gradients(ours, reference)

    def test_layers_are_recomputed(self) -> None:
        ours, _ = pair(**NO_DROPOUT)
        ours.train()
        calls = []
        ours.transformer.h[1].ln_1.register_forward_hook(lambda *_: calls.append(1))
        ids = tokens(1, 5)
        ours(ids, labels=ids).loss.backward()
        assert len(calls) == 1
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours(ids, labels=ids).loss.backward()
        assert len(calls) == 3
        ours.gradient_checkpointing_disable()
        ours(ids, labels=ids).loss.backward()
        assert len(calls) == 4

    def test_only_in_training(self) -> None:
        ours, _ = pair()
        ours.gradient_checkpointing_enable()
        assert ours(tokens(1, 3)).past_key_values is not None

    def test_dropout_is_drawn_once(self) -> None:
        ours, _ = pair(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
        ours.train()
        ids, gradients = tokens(2, 9), []
        for recompute in (False, True):
            ours._set_gradient_checkpointing(recompute)
            ours.zero_grad()
            torch.manual_seed(7)
            ours(ids, labels=ids).loss.backward()
            gradients.append([p.grad.clone() for p in ours.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)

    def test_with_attentions_and_hidden_states(self) -> None:
        ours, reference = pair(attention="eager", **NO_DROPOUT)
        ours.train()
        ours.gradient_checkpointing_enable()
        ids = tokens(2, 9)
        got = ours(ids, output_attentions=True, output_hidden_states=True)
        want = reference(ids, output_attentions=True, output_hidden_states=True)
        for name in ("attentions", "hidden_states"):
            for mine, theirs in zip(got[name], want[name], strict=True):
                assert_forward(mine, theirs)

    def test_reentrant_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^gradient_checkpointing_kwargs: only use_reentrant"):
            pair()[0].gradient_checkpointing_enable({"use_reentrant": True})

    def test_what_the_trainer_passes(self) -> None:
        ours, _ = pair()
        ours.gradient_checkpointing_enable(None, every_n_layers=1, offload=False)
        assert ours.is_gradient_checkpointing
        for unsupported in ({"every_n_layers": 2}, {"offload": True}):
            with pytest.raises(ValueError, match="only every_n_layers=1 and offload=False"):
                ours.gradient_checkpointing_enable(None, **unsupported)


class TestDropout:
    def test_same_seed_same_draw_as_transformers(self) -> None:
        """The same random numbers in the same order: even single training runs can be compared."""
        ours, reference = pair()
        reference.float()
        ids = tokens(3, 9)
        for model in (ours, reference):
            model.train()
            torch.manual_seed(5)
            model(ids, labels=ids).loss.backward()
        assert_gradients(ours, reference)

    def test_deterministic_by_seed(self) -> None:
        ours, _ = pair()
        ours.train()
        ids, losses = tokens(2, 9), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(ours(ids, labels=ids).loss.item())
        assert losses[0] == losses[1] != losses[2]

    def test_none_equals_evaluation(self) -> None:
        ours, _ = pair(**NO_DROPOUT)
        ids = tokens(2, 9)
        with torch.no_grad():
            want = ours(ids).logits
            assert torch.allclose(ours.train()(ids).logits, want, atol=1e-6)

    @pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
    def test_each_kind_acts_alone(self, field: str) -> None:
        ours, _ = pair(**{**NO_DROPOUT, field: 0.5})
        ids = tokens(2, 9)
        with torch.no_grad():
            assert not torch.allclose(ours.train()(ids).logits, ours.eval()(ids).logits, atol=1e-3)

    @pytest.mark.parametrize("field", ["resid_pdrop", "attn_pdrop"])
    def test_unbiased(self, field: str) -> None:
        """Averaged over draws, one block's output is that without dropout."""
        ours, _ = pair("GPT2Model", **{**NO_DROPOUT, field: 0.3})
        block, x = ours.h[0].train(), torch.randn(1, 5, WIDTH)
        # The MLP behind attention is not linear: silence it to see attention's mean.
        nn.init.zeros_(block.mlp.c_proj.weight)
        with torch.no_grad():
            draws = torch.cat([block(x.expand(50, -1, -1)) for _ in range(40)])
            want = block.eval()(x)
        error = (draws.mean(0) - want[0]) / (draws.std(0) / len(draws) ** 0.5).clamp_min(1e-6)
        assert error.abs().max() < 5  # standard errors, over 240 numbers

    def test_monte_carlo(self) -> None:
        """An evaluated model whose Dropout modules alone are put into training mode."""
        ours, reference = pair(embd_pdrop=0.0)
        reference.float()
        ids, logits = tokens(2, 9), []
        for model in (ours, reference):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.train()
            torch.manual_seed(3)
            with torch.no_grad():
                logits.append(model(ids).logits)
        assert_forward(*logits)
        ours.eval()
        with torch.no_grad():
            assert not torch.allclose(ours(ids).logits, logits[0], atol=1e-3)

    def test_a_block_in_training_mode_drops_even_without_gradients(self) -> None:
        ours, _ = pair(**{**NO_DROPOUT, "attn_pdrop": 0.5})
        ids = tokens(2, 9)
        with torch.no_grad():
            want = ours(ids).logits
            ours.transformer.h[1].train()
            assert not torch.allclose(ours(ids).logits, want, atol=1e-3)


class TestAutocast:
    @pytest.mark.parametrize("grad", [False, True])
    def test_within_the_budget_of_transformers(self, grad: bool) -> None:
        ours, reference = pair()
        same = transformers.GPT2LMHeadModel(reference.config).eval()
        same.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
        ids = tokens(2, 21)
        want = reference(ids, labels=ids)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            got, plain = ours(ids, labels=ids), same(ids, labels=ids)
            logits = got.logits
        assert logits.dtype == plain.logits.dtype == torch.bfloat16
        assert_close("model", "forward", logits, want.logits, plain.logits)
        assert_close("model", "forward", got.loss, want.loss, plain.loss, torch.bfloat16)
        if not grad:
            return
        for output in (got, plain, want):
            output.loss.backward()
        for name, parameter in ours.named_parameters():
            truth = reference.get_parameter(name).grad
            theirs = same.get_parameter(name).grad
            assert parameter.grad.dtype == torch.float32
            mine, other = (
                float((g.double() - truth).norm() / truth.norm()) for g in (parameter.grad, theirs)
            )
            assert mine <= 2 * other + torch.finfo(torch.bfloat16).eps / 2, name

    def test_logits_read_outside(self) -> None:
        ours, reference = pair()
        ids = tokens(2, 9)
        with torch.autocast("cpu", torch.bfloat16):
            output = ours(ids, labels=ids)
        error = (output.logits - reference(ids).logits).abs().max()
        assert error < 0.05 * reference(ids).logits.abs().max()


class TestCompile:
    """Captured as one graph, by a backend that leaves out code generation."""

    def test_training_step(self) -> None:
        ours, reference = pair(n_layer=1, **NO_DROPOUT)
        ours.train()
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        ids = tokens(2, 9)
        got, want = compiled(ids, labels=ids), reference(ids, labels=ids)
        got.loss.backward()
        want.loss.backward()
        assert_forward(got.loss, want.loss)
        assert_forward(got.logits, want.logits)
        assert_gradients(ours, reference)

    def test_inference_with_mask_and_past(self) -> None:
        ours, reference = pair(n_layer=1)
        ids, mask = tokens(2, 9), torch.ones(2, 9)
        mask[0, :3] = 0
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            first = compiled(ids[:, :6], attention_mask=mask[:, :6])
            second = compiled(
                ids[:, 6:], past_key_values=first.past_key_values, attention_mask=mask
            )
            want = reference(
                ids,
                attention_mask=mask,
                position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
            )
        assert_forward(second.logits, want.logits[:, 6:])
        assert second.past_key_values.get_seq_length() == 9


def test_meta_device() -> None:
    """Shapes without data: how sharded set-ups look at a model first."""
    with torch.device("meta"):
        model = gpt2fast.GPT2LMHeadModel(gpt2fast.GPT2Config(**sizes())).eval()
        ids = torch.zeros(2, 7, dtype=torch.long)
        with torch.no_grad():
            output = model(ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert output.logits.shape == (2, 7, 97)
    assert output.logits.device.type == "meta"
    assert output.past_key_values[0].shape == (2, 2, HEADS, 7, WIDTH // HEADS)
