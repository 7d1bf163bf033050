"""Models with low-bit weights: what they compute, what they hold, and what they refuse."""

import copy
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpt2fast
from gpt2fast import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
    quantize,
)
from gpt2fast.engine.weights import fingerprint
from gpt2fast.kernels import packing, quantized
from gpt2fast.layers import Conv1D
from gpt2fast.quantization import is_quantized, stored_tensors
from gpt2fast.quantized_layers import QuantizedConv1D, QuantizedEmbedding, QuantizedHead, lay_out
from tests.tolerances import assert_close, relative_error

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 110], [1, 0, 198, 4, 4, 4, 63]])


def _logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def _rounded(model: GPT2LMHeadModel, mode: str) -> GPT2LMHeadModel:
    """A float64 model of the weights that the mode's forms stand for."""
    forms = {"fp16": 16, "int8": 8, "int4": 4}

    def rounded(weight: Tensor, bits: int) -> Tensor:
        kinds = {4: packing.quantize_int4, 8: packing.quantize_int8}
        data, scale = (weight.half(), None) if bits == 16 else kinds[bits](weight)
        return packing.dequantize(data, scale, bits)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.weight.copy_(rounded(module.weight.t().contiguous(), forms[mode]).t())
        wte = model.transformer.wte.weight
        wte.copy_(rounded(wte, max(forms[mode], 8)))
    return model.double()


def test_a_quantised_model_computes_what_its_weights_stand_for(
    floats: GPT2LMHeadModel, mode: str
) -> None:
    expected = _logits(_rounded(copy.deepcopy(floats), mode))
    logits = _logits(quantize(floats, mode))
    if mode == "int8":  # its activations are rounded too
        assert relative_error(logits, expected) < 0.03
    elif mode == "int4":  # whose head is int8
        assert relative_error(logits, expected) < 0.02
    else:
        assert_close("model", "forward", logits, expected)


def test_without_the_ops_of_a_cpu_it_computes_the_same(
    floats: GPT2LMHeadModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "pack", lambda *args: None)
    expected = _logits(_rounded(copy.deepcopy(floats), mode))
    assert_close("model", "forward", _logits(quantize(floats, mode)), expected)


def test_the_past_and_generation(floats: GPT2LMHeadModel, mode: str) -> None:
    model = quantize(floats, mode)
    expected = _logits(model)
    with torch.no_grad():
        past = model(IDS[:, :4]).past_key_values
        rest = model(IDS[:, 4:], past_key_values=past).logits
    assert relative_error(rest, expected[:, 4:]) < 1e-4
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    greedy = IDS
    for _ in range(5):
        greedy = torch.cat((greedy, _logits(model, greedy)[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, greedy)


def test_labels(floats: GPT2LMHeadModel, mode: str) -> None:
    model = quantize(floats, mode)
    with torch.no_grad():
        out = model(IDS, labels=IDS)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_modules_and_their_memory(floats: GPT2LMHeadModel, mode: str, tied: bool) -> None:
    if not tied:
        config = GPT2Config.from_dict({**floats.config.to_dict(), "tie_word_embeddings": False})
        floats = GPT2LMHeadModel(config)
    before = sum(p.numel() for p in floats.parameters() if p.dim() == 2)
    before -= floats.transformer.wpe.weight.numel()
    old = [weakref.ref(module) for module in floats.modules() if isinstance(module, Conv1D)]
    model = quantize(floats, mode)
    del floats
    assert not any(ref() for ref in old)  # the float weights are gone
    head, wte = model.lm_head, model.transformer.wte
    assert isinstance(head, QuantizedHead)
    assert isinstance(wte, QuantizedEmbedding)
    assert (head.weight is wte.weight) == tied
    _logits(model)
    convs = [module for module in model.modules() if isinstance(module, QuantizedConv1D)]
    assert len(convs) == 8
    for conv in convs:
        assert conv.packed is None or conv._buffers["weight"] is None  # in one layout alone
    forms = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in stored_tensors(model).items()
        if tensor.dtype in (torch.int8, torch.uint8, torch.float16)
    )
    most = {"fp16": 2, "int8": 1, "int4": 1}[mode]
    assert forms <= most * before
    assert mode != "int4" or forms < 0.8 * before
    assert model.config.quantization_config == {"quant_method": "gpt2fast", "mode": mode}
    assert model.transformer.config is model.config


@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_that_are_laid_out_together(
    floats: GPT2LMHeadModel, mode: str, threads: int
) -> None:
    model = quantize(floats, mode)
    twin = copy.deepcopy(model)
    expected = _logits(twin)  # one at a time
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lay_out(model)
    finally:
        torch.set_num_threads(before)
    pairs = list(zip(model.modules(), twin.modules(), strict=True))
    for one, other in pairs:
        if isinstance(one, QuantizedConv1D | QuantizedHead):
            assert type(one.packed) is type(other.packed)
        if isinstance(one, QuantizedConv1D):
            assert (one._buffers["weight"] is None) == (one.packed is not None)
    head = model.lm_head.packed
    lay_out(model)
    assert torch.equal(_logits(model), expected)
    assert model.lm_head.packed is head  # the rows are those that were laid out


def test_state_dicts(floats: GPT2LMHeadModel, mode: str) -> None:
    other = copy.deepcopy(floats)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5).add_(0.01)
    model, target = quantize(floats, mode), quantize(other, mode)
    expected = _logits(model)
    assert not torch.equal(_logits(target), expected)
    state = model.state_dict()
    assert state["transformer.h.0.attn.c_attn.weight"].shape[0] == 96
    target.load_state_dict(state)
    assert torch.equal(_logits(target), expected)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    target.load_state_dict(bare)
    assert torch.equal(_logits(target), expected)


def test_the_head_follows_the_rows_that_it_shares(floats: GPT2LMHeadModel, mode: str) -> None:
    other = copy.deepcopy(floats)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(0.5).add_(0.01)
    model, target = quantize(floats, mode), quantize(other, mode)
    expected = _logits(model)
    assert not torch.equal(_logits(target), expected)
    target.transformer.load_state_dict(model.transformer.state_dict())
    assert torch.equal(_logits(target), expected)
    packed, mark = target.lm_head.packed, fingerprint(target)
    assert torch.equal(_logits(target), expected)
    assert target.lm_head.packed is packed
    assert fingerprint(target) == mark
    target.transformer.wte.weight[7] = 0  # which is none of the ids
    assert not _logits(target)[..., 7].any()
    assert fingerprint(target) != mark


def test_a_float_state_dict_is_refused(floats: GPT2LMHeadModel) -> None:
    state = floats.state_dict()
    model = quantize(floats, "int8")
    with pytest.raises(RuntimeError, match=r"c_attn.weight is torch.float32.*torch.int8"):
        model.load_state_dict(state)


def test_copies_pickles_and_casts(floats: GPT2LMHeadModel, mode: str) -> None:
    model = quantize(floats, mode)
    expected = _logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_logits(twin), expected)
        assert twin.lm_head.weight.data_ptr() == twin.transformer.wte.weight.data_ptr()
    conv = model.transformer.h[0].mlp.c_fc
    forms = conv.weight.dtype, None if conv.scale is None else conv.scale.dtype
    model.bfloat16()
    assert (conv.weight.dtype, None if conv.scale is None else conv.scale.dtype) == forms
    halves = _logits(model)
    assert halves.dtype == torch.bfloat16
    assert relative_error(halves.float(), expected) < 0.1
    model.to("meta")
    assert all(t.is_meta for t in stored_tensors(model).values())


def test_other_models(floats: GPT2LMHeadModel) -> None:
    body = GPT2Model(floats.config).eval()
    heads = GPT2DoubleHeadsModel(floats.config).eval()
    with torch.no_grad():
        expected = body(IDS).last_hidden_state
        choices = heads(IDS[None]).mc_logits
        hidden = quantize(body, "fp16")(IDS).last_hidden_state
        scores = quantize(heads, "fp16")(IDS[None]).mc_logits
    assert relative_error(hidden, expected) < 2e-3
    assert relative_error(scores, choices) < 5e-3


def test_training_is_refused(floats: GPT2LMHeadModel) -> None:
    model = quantize(floats.train(), "int8")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()
    embeds = torch.randn(1, 3, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no gradient passes.*QuantizedConv1D"):
        model(inputs_embeds=embeds)
    model(IDS)  # and evaluation needs no torch.no_grad()
    with pytest.raises(TypeError, match="QuantizedEmbedding"):
        model.resize_token_embeddings(300)


@pytest.mark.parametrize("mode", ["int2", "INT8", None, 8])
def test_unknown_modes(floats: GPT2LMHeadModel, mode: object) -> None:
    with pytest.raises(ValueError, match=f"int8, fp16, int4; got {mode!r}"):
        quantize(floats, mode)  # type: ignore[arg-type]


def test_what_cannot_be_quantised_is_left_whole(floats: GPT2LMHeadModel) -> None:
    hook = floats.transformer.h[1].mlp.c_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match=r"h\.1\.mlp\.c_proj.*hooked"):
        quantize(floats, "int8")
    assert all(type(block.attn.c_attn) is Conv1D for block in floats.transformer.h)
    hook.remove()
    quantize(floats, "int8")
    with pytest.raises(ValueError, match=r"quantised already.*int8"):
        quantize(floats, "int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_weights_that_do_not_fit_leave_the_model_whole(
    floats: GPT2LMHeadModel, bad: float, mode: str
) -> None:
    floats.train()
    with torch.no_grad():
        floats.transformer.h[1].mlp.c_proj.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj holds"):
        quantize(floats, mode)
    assert not is_quantized(floats)
    assert floats.training
    assert all(parameter.requires_grad for parameter in floats.parameters())


def test_int4_takes_an_even_number_of_inputs(floats: GPT2LMHeadModel) -> None:
    model = GPT2LMHeadModel(GPT2Config.from_dict({**floats.config.to_dict(), "n_inner": 33}))
    with pytest.raises(ValueError, match=r"even number of inputs; .*h\.0\.mlp\.c_proj has 33"):
        quantize(model, "int4")
    assert not is_quantized(model)
    quantize(model, "int8")


def test_the_bundled_model_loses_less_than_a_hundredth_of_its_perplexity() -> None:
    """On some English at hand: its card, of which single tokens matter little."""
    card = Path(gpt2fast.__file__).parent / "bundled" / "README.md"
    ids = torch.tensor([GPT2Tokenizer().encode(card.read_text(encoding="utf-8"))[:500]])
    losses = {}
    for mode in (None, "int8", "fp16"):
        model = GPT2LMHeadModel.from_pretrained("bundled", quantize=mode)
        with torch.no_grad():
            losses[mode] = model(ids, labels=ids).loss.item()
    assert 2 < losses[None] < 9
    assert abs(losses["int8"] - losses[None]) < 0.01
    assert abs(losses["fp16"] - losses[None]) < 0.0001
