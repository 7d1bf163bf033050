"""The models as PyTorch modules: names, hooks, replaced parts, copies, resizing, initialisation."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gpt2fast
from gpt2fast.layers import Conv1D
from tests.models.reference import (
    KINDS,
    LAYERS,
    VOCAB,
    WIDTH,
    assert_forward,
    assert_gradients,
    ours_from,
    pair,
    randomize,
    sizes,
    tokens,
)

SUBMODULES = [
    "wte", "wpe", "drop", "ln_f", "h.1", "h.1.ln_1", "h.1.ln_2", "h.1.attn", "h.1.attn.c_attn",
    "h.1.attn.c_proj", "h.1.attn.resid_dropout", "h.1.mlp", "h.1.mlp.c_fc", "h.1.mlp.act",
    "h.1.mlp.c_proj", "h.1.mlp.dropout",
]  # fmt: skip


class TestStateDict:
    @pytest.mark.parametrize("kind", KINDS)
    def test_names_shapes_and_order_are_those_of_transformers(self, kind: str) -> None:
        ours, reference = pair(kind)
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in reference.named_parameters()
        }
        assert list(ours.state_dict()) == list(reference.state_dict())
        assert not list(ours.buffers())

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_both_directions(self, kind: str, tied: bool) -> None:
        theirs = getattr(transformers, kind)(
            transformers.GPT2Config(**sizes(tie_word_embeddings=tied))
        ).eval()
        randomize(theirs)
        mine = getattr(gpt2fast, kind)(gpt2fast.GPT2Config(**sizes(tie_word_embeddings=tied)))
        mine.load_state_dict(theirs.state_dict())
        back = getattr(transformers, kind)(theirs.config).eval()
        back.load_state_dict(mine.state_dict())
        ids = tokens(2, 5)
        with torch.no_grad():
            want = theirs(ids)[0]
            assert torch.equal(back(ids)[0], want)
            assert torch.allclose(mine.eval()(ids)[0], want, atol=1e-5)

    def test_between_our_own(self) -> None:
        model, _ = pair("GPT2DoubleHeadsModel")
        other = gpt2fast.GPT2DoubleHeadsModel(model.config).eval()
        assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
        ids = tokens(1, 2, 5)
        with torch.no_grad():
            assert torch.equal(other(ids).mc_logits, model(ids).mc_logits)
        assert other.lm_head.weight is other.transformer.wte.weight


class TestHooks:
    """Fusing across modules must not hide them: a hook on any of them fires, and acts."""

    @pytest.mark.parametrize("name", SUBMODULES)
    def test_forward_hooks_fire_once_and_may_change_the_output(self, name: str) -> None:
        ours, reference = pair("GPT2Model")
        ids, calls, logits = tokens(2, 5), [], []

        def double(_: nn.Module, __: Any, output: Any) -> Any:
            calls.append(name)
            return tuple(output) if isinstance(output, tuple) else output * 2

        for model in (ours, reference):
            handle = model.get_submodule(name).register_forward_hook(double)
            with torch.no_grad():
                logits.append(model(ids)[0])
            handle.remove()
        assert calls == [name] * 2
        assert_forward(*logits)
        with torch.no_grad():
            if name not in ("h.1.attn",):
                assert not torch.allclose(ours(ids)[0], logits[0], atol=1e-4)

    @pytest.mark.parametrize("name", [n for n in SUBMODULES if n not in ("wte", "wpe")])
    def test_pre_hooks(self, name: str) -> None:
        ours, reference = pair("GPT2Model")
        ids, outputs = tokens(2, 5), []
        for model in (ours, reference):
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args: (args[0] * 2, *args[1:])
            )
            with torch.no_grad():
                outputs.append(model(ids)[0])
        assert_forward(*outputs)

    def test_a_hook_for_all_modules_is_seen_by_each(self) -> None:
        ours, reference = pair("GPT2Model")
        ids, outputs = tokens(2, 5), []
        for model in (ours, reference):
            inner = {model.h[0].mlp.c_fc, model.h[1].ln_2}

            def double(module: nn.Module, _: Any, output: Any, inner: Any = inner) -> Any:
                return output * 2 if module in inner else output

            handle = nn.modules.module.register_module_forward_hook(double)
            try:
                with torch.no_grad():
                    outputs.append(model(ids)[0])
            finally:
                handle.remove()
        assert_forward(*outputs)

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # ids have no gradient
    @pytest.mark.parametrize("name", [n for n in SUBMODULES if n not in ("h.1", "h.1.attn")])
    def test_backward_hooks(self, name: str) -> None:
        ours, reference = pair("GPT2Model")
        ids, seen = tokens(2, 5), []
        upstream = torch.randn(2, 5, WIDTH)
        for model in (ours, reference):
            model.get_submodule(name).register_full_backward_hook(
                lambda _, __, grads: seen.append(grads[0])
            )
            model(ids)[0].backward(upstream.to(next(model.parameters()).dtype))
        assert_forward(*seen)
        assert_gradients(ours, reference)

    def test_removed_hooks_leave_nothing_behind(self) -> None:
        ours, _ = pair()
        ids = tokens(2, 5)
        with torch.no_grad():
            want = ours(ids).logits
            for name in SUBMODULES:
                ours.transformer.get_submodule(name).register_forward_hook(lambda *_: None).remove()
            assert torch.equal(ours(ids).logits, want)

    def test_in_place_forward_and_hooks_agree_with_a_past(self) -> None:
        ours, reference = pair()
        ids = tokens(2, 8)
        for name in SUBMODULES:
            ours.transformer.get_submodule(name).register_forward_hook(lambda *_: None)
        with torch.no_grad():
            past = ours(ids[:, :5]).past_key_values
            assert_forward(ours(ids[:, 5:], past).logits, reference(ids).logits[:, 5:])


class Lora(nn.Module):
    """A low-rank adapter around a frozen Conv1D."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = base.weight.shape  # type: ignore[misc, union-attr]
        self.down = nn.Parameter(torch.randn(inputs, rank) / 10)
        self.up = nn.Parameter(torch.randn(rank, outputs) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


PROJECTIONS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


class TestReplacedModules:
    @pytest.mark.parametrize("name", PROJECTIONS)
    def test_adapter(self, name: str) -> None:
        ours, reference = pair()
        ids = tokens(2, 7)
        with torch.no_grad():
            before = ours(ids).logits
        for model in (ours, reference):
            model.requires_grad_(False)
            for block in model.transformer.h:
                parent, leaf = name.split(".")
                torch.manual_seed(9)
                lora = Lora(getattr(getattr(block, parent), leaf))
                setattr(getattr(block, parent), leaf, lora.to(next(model.parameters()).dtype))
        got, want = ours(ids, labels=ids), reference(ids, labels=ids)
        got.loss.backward()
        want.loss.backward()
        assert_gradients(ours, reference)
        assert not torch.allclose(got.logits, before, atol=1e-3)
        with torch.no_grad():
            past = ours(ids[:, :4]).past_key_values
            assert_forward(ours(ids[:, 4:], past).logits, want.logits[:, 4:])

    @pytest.mark.parametrize("name", [*PROJECTIONS, "ln_1", "ln_2", "mlp", "mlp.dropout"])
    def test_forward_replaced_on_the_instance(self, name: str) -> None:
        """As accelerate's offloading does it."""
        ours, _ = pair()
        module = ours.transformer.h[1].get_submodule(name)
        calls, original = [], module.forward

        def forward(*args: Any) -> Any:
            calls.append(1)
            return original(*args)

        module.forward = forward
        with torch.no_grad():
            ours(tokens(1, 3))
        assert calls == [1]

    @pytest.mark.parametrize("name", PROJECTIONS)
    def test_parametrization(self, name: str) -> None:
        ours, _ = pair()
        ids = tokens(1, 3)

        class Halve(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x / 2

        module = ours.transformer.h[1].get_submodule(name)
        with torch.no_grad():
            halved = copy.deepcopy(ours)
            halved.transformer.h[1].get_submodule(name).weight /= 2
            want = halved(ids).logits
            parametrize.register_parametrization(module, "weight", Halve())
            assert torch.allclose(ours(ids).logits, want, atol=1e-6)

    def test_wrapped_block(self) -> None:
        ours, _ = pair()
        ids, seen = tokens(1, 6), []

        class Wrapper(nn.Module):
            def __init__(self, block: nn.Module) -> None:
                super().__init__()
                self.block = block

            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                seen.append(1)
                return self.block(*args, **kwargs)

        with torch.no_grad():
            want = ours(ids).logits
            ours.transformer.h[1] = Wrapper(ours.transformer.h[1])
            past = ours(ids[:, :4]).past_key_values
            got = ours(ids[:, 4:], past).logits
        assert torch.allclose(got, want[:, 4:], atol=1e-6)
        assert seen == [1, 1]

    @pytest.mark.parametrize("grad", [False, True])
    def test_arguments_that_are_walked_over(self, grad: bool) -> None:
        """FSDP maps over a block's arguments; what the block leaves behind still arrives."""
        from torch.distributed.utils import _apply_to_tensors

        ours, _ = pair()
        ids = tokens(1, 6)
        with torch.set_grad_enabled(grad):
            want = ours(ids)
            for block in ours.transformer.h:
                block.register_forward_pre_hook(
                    lambda _, args: _apply_to_tensors(lambda t: t * 1, args)
                )
            got = ours(ids, output_attentions=True)
            assert len(got.attentions) == LAYERS
            past = ours(ids[:, :4]).past_key_values
            assert torch.allclose(ours(ids[:, 4:], past).logits, want.logits[:, 4:], atol=1e-6)

    def test_other_embeddings_and_activation(self) -> None:
        ours, reference = pair(tie_word_embeddings=False)
        ids = tokens(2, 5)

        class Scaled(nn.Embedding):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 3

        for model in (ours, reference):
            embedding = Scaled(VOCAB, WIDTH, _weight=model.get_input_embeddings().weight.detach())
            model.set_input_embeddings(embedding)
            for block in model.transformer.h:
                block.mlp.act = nn.ReLU()
        with torch.no_grad():
            assert_forward(ours(ids).logits, reference(ids).logits)

    def test_positions_without_parameters(self) -> None:
        """Nothing but the input tells the device, as in a replica of DataParallel."""
        ours, reference = pair()
        ids = tokens(2, 5)

        class Waves(nn.Module):
            def forward(self, positions: Tensor) -> Tensor:
                return (positions[..., None] * torch.linspace(0, 1, WIDTH)).sin()

        for model in (ours, reference):
            model.transformer.wpe = Waves()
        with torch.no_grad():
            assert_forward(ours(ids).logits, reference(ids).logits)


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_independent_and_still_tied(self, kind: str, duplicate: Any) -> None:
        ours, _ = pair(kind)
        ids = tokens(2, 5)
        other = duplicate(ours)
        assert other.config == ours.config
        with torch.no_grad():
            want = ours(ids)[0]
            assert torch.equal(other(ids)[0], want)
            other.get_input_embeddings().weight.zero_()
            assert torch.equal(ours(ids)[0], want)
        if kind != "GPT2Model":
            assert other.lm_head.weight is other.transformer.wte.weight

    def test_torch_save_of_a_whole_model(self) -> None:
        ours, _ = pair()
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other, ids = torch.load(file, weights_only=False), tokens(1, 4)
        with torch.no_grad():
            assert torch.equal(other(ids).logits, ours(ids).logits)

    def test_moving_keeps_the_tie(self) -> None:
        ours, _ = pair()
        ours.bfloat16()
        assert ours.dtype == torch.bfloat16
        assert ours.device.type == "cpu"
        assert ours.lm_head.weight is ours.transformer.wte.weight
        ours.to(torch.float32)
        assert ours.lm_head.weight is ours.transformer.wte.weight


def test_counting_parameters() -> None:
    ours, reference = pair("GPT2DoubleHeadsModel")
    assert ours.num_parameters() == reference.num_parameters()
    embeddings = (VOCAB + ours.config.n_positions) * WIDTH
    assert ours.num_parameters(exclude_embeddings=True) == ours.num_parameters() - embeddings
    ours.transformer.h.requires_grad_(False)
    trainable = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert ours.num_parameters(only_trainable=True) == trainable


def test_a_block_and_a_layer_by_hand() -> None:
    """What a probe or a pipeline stage does: calling parts of the model directly."""
    ours, reference = pair("GPT2Model")
    x = torch.randn(2, 5, WIDTH)
    mask = torch.zeros(5, 5, dtype=torch.double).masked_fill(
        ~torch.ones(5, 5).tril().bool(), float("-inf")
    )[None, None]
    with torch.no_grad():
        for mine, theirs in zip(ours.h, reference.h, strict=True):
            assert_forward(mine(x), theirs(x.double(), attention_mask=mask))
            assert_forward(mine.mlp(x), theirs.mlp(x.double()))
            attended, weights = mine.attn(x)
            assert_forward(attended, theirs.attn(x.double(), attention_mask=mask)[0])
            assert weights is None
        assert_forward(ours.ln_f(x), reference.ln_f(x.double()))
    assert len(ours.h) == LAYERS
    assert str(Conv1D(3, 2)) == "Conv1D(nf=3, nx=2)"


def test_per_sample_gradients() -> None:
    """torch.func over the model's logits."""
    ours, _ = pair(n_layer=1)
    ids = tokens(2, 5)
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(ours, parameters, (ids,), {"use_cache": False}).logits
        return logits.square().mean()

    got = torch.func.grad(loss)(parameters)
    ours(ids).logits.square().mean().backward()
    for name, parameter in ours.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-4, atol=1e-7), name


def test_exported_names() -> None:
    assert ours_from(pair()[1]).__class__ is gpt2fast.GPT2LMHeadModel
    assert gpt2fast.GPT2Model.__module__.startswith("gpt2fast.")
