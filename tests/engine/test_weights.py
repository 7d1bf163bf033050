"""Which models the engine serves, what it sees of their changes, and how it packs them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import gpt2fast
from gpt2fast.engine.weights import fingerprint, pack, why_not
from gpt2fast.kernels.packing import Matrix, dequantize
from gpt2fast.quantization import MODES
from tests.models.reference import randomize, sizes

Change = Callable[[Any], object]


def tiny(kind: str = "GPT2LMHeadModel", **overrides: Any) -> Any:
    model = getattr(gpt2fast, kind)(gpt2fast.GPT2Config(**sizes(**overrides)))
    randomize(model)
    return model.eval()


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serves_models_as_they_are_built(kind: str, dtype: torch.dtype) -> None:
    assert why_not(tiny(kind).to(dtype)) is None
    assert why_not(tiny(kind, tie_word_embeddings=False, n_inner=60).to(dtype)) is None


def test_training_mode_matters_only_with_dropout() -> None:
    quiet = tiny(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert why_not(quiet) is None
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        probabilities = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, name: 0.1}
        model = tiny(**probabilities).train()
        assert "training mode" in (why_not(model) or "")
        assert why_not(model.eval()) is None


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def prehook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def replace_forward(module: nn.Module) -> None:
    module.forward = module.forward


CALLED = [
    "transformer",
    "transformer.wte",
    "transformer.wpe",
    "transformer.drop",
    "transformer.h.1",
    "transformer.h.1.ln_1",
    "transformer.h.1.attn",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.attn.c_proj",
    "transformer.h.1.attn.resid_dropout",
    "transformer.h.1.ln_2",
    "transformer.h.1.mlp",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.act",
    "transformer.h.1.mlp.c_proj",
    "transformer.h.1.mlp.dropout",
    "transformer.ln_f",
    "lm_head",
]


def test_every_module_that_is_called_is_listed() -> None:
    model = tiny(n_layer=2)
    called = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    model(torch.tensor([[1, 2]]))
    assert {name for name in called if not name.startswith("transformer.h.0")} == {"", *CALLED}


@pytest.mark.parametrize("name", CALLED)
def test_refuses_changed_modules(name: str) -> None:
    for change in (hook, prehook, replace_forward):
        model = tiny()
        change(model.get_submodule(name))
        assert why_not(model) is not None, change


@pytest.mark.parametrize("name", CALLED)
def test_refuses_replaced_modules(name: str) -> None:
    model = tiny()
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Adapter(model.get_submodule(name)))
    assert "Adapter" in (why_not(model) or "")


def test_refuses_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "all modules" in (why_not(tiny()) or "")
    finally:
        handle.remove()


def _to_meta(model: Any) -> None:
    model.to("meta")


def _one_block_elsewhere(model: Any) -> None:
    model.transformer.h[2].to("meta")


def _norms_in_float32(model: Any) -> None:
    model.half()
    model.transformer.ln_f.float()


def _other_eps(model: Any) -> None:
    model.transformer.h[1].ln_2.eps = 1e-3


def _head_with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(97))


def _longer_head(model: Any) -> None:
    model.lm_head = nn.Linear(48, 100, bias=False)


def _norm_without_bias(model: Any) -> None:
    model.transformer.ln_f.bias = None


def _no_blocks(model: Any) -> None:
    del model.transformer.h[:]


def _sparse(model: Any) -> None:
    model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight.detach().to_sparse())


def _wider_block(model: Any) -> None:
    model.transformer.h[1].mlp = tiny(n_inner=60).transformer.h[1].mlp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_to_meta, "meta"),
        (_one_block_elsewhere, "several devices"),
        (lambda model: model.double(), "float64"),
        (_norms_in_float32, "several dtypes"),
        (_other_eps, "eps"),
        (_head_with_bias, "bias"),
        (_longer_head, "shapes"),
        (_norm_without_bias, "no bias"),
        (_no_blocks, "no blocks"),
        (_sparse, "no plain tensor"),
        (_wider_block, "differ in shape"),
    ],
)
def test_refuses_other_weights(change: Change, message: str) -> None:
    model = tiny()
    change(model)
    assert message in (why_not(model) or "")


def test_refuses_other_activations() -> None:
    for name in ("gelu", "relu"):
        assert why_not(tiny(activation_function=name)) is not None


def test_refuses_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in (why_not(model) or "")
    assert why_not(model) is None


def _optimizer_step(model: Any) -> None:
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.bias[3] += 1


def _replaced(model: Any) -> None:
    old = model.transformer.h[0].ln_1
    old.weight = nn.Parameter(old.weight.detach().clone())


def _head_untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _there_and_back(model: Any) -> None:
    # The storage of the cast may end up where the first one was.
    model.half().float()


def _scaling(model: Any) -> None:
    model.transformer.h[1].attn.scaling *= 2


@pytest.mark.parametrize(
    "change",
    [
        _optimizer_step,
        _in_place,
        _replaced,
        _head_untied,
        _there_and_back,
        _scaling,
        lambda model: model.half(),
        lambda model: model.load_state_dict(tiny().state_dict()),
        lambda model: model.resize_token_embeddings(99),
        lambda model: model.set_input_embeddings(nn.Embedding(97, 48)),
    ],
)
def test_fingerprint_sees_changes(change: Change) -> None:
    model = tiny()
    before = fingerprint(model)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    model.train().eval()
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_tells_apart_what_takes_the_same_place() -> None:
    model = tiny()
    seen = set()
    addresses = set()
    for _ in range(20):
        model.transformer.wpe.weight = None  # so that its memory may be used again
        model.transformer.wpe.weight = nn.Parameter(torch.zeros(40, 48))
        addresses.add(model.transformer.wpe.weight.data_ptr())
        seen.add(fingerprint(model))
    assert len(addresses) < 20
    assert len(seen) == 20


def test_fingerprint_keeps_no_weights() -> None:
    model = tiny()
    embedding = StorageWeakRef(model.transformer.wpe.weight.untyped_storage())
    before = fingerprint(model)
    model.transformer.wpe.weight = nn.Parameter(torch.zeros(40, 48))
    assert embedding.expired()
    assert fingerprint(model) != before


def test_fingerprint_of_inference_tensors() -> None:
    with torch.inference_mode():
        model = tiny()
    before = fingerprint(model)
    assert fingerprint(model) == before
    bias = model.transformer.h[2].mlp.c_fc.bias
    with torch.inference_mode():
        bias[3], bias[4] = bias[4].item(), bias[3].item()
    assert fingerprint(model) != before


def test_fingerprints_of_two_models_differ() -> None:
    model = tiny()
    assert fingerprint(copy.deepcopy(model)) != fingerprint(model)


def matrices(weights: Any) -> Iterator[tuple[str, Matrix]]:
    for name in ("qkv", "out", "fc", "proj", "head"):
        yield name, getattr(weights, name)


MODULES = {"qkv": "attn.c_attn", "out": "attn.c_proj", "fc": "mlp.c_fc", "proj": "mlp.c_proj"}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack(bits: int | None, dtype: torch.dtype) -> None:
    model = tiny(n_inner=140).to(dtype)
    weights = pack(model, bits)
    body = model.transformer
    assert torch.equal(weights.wte, body.wte.weight)
    assert torch.equal(weights.wpe, body.wpe.weight)
    for i, block in enumerate(body.h):
        assert torch.equal(weights.ln_1[i], torch.stack((block.ln_1.weight, block.ln_1.bias)))
        assert torch.equal(weights.ln_2[i], torch.stack((block.ln_2.weight, block.ln_2.bias)))
    assert torch.equal(weights.ln_f, torch.stack((body.ln_f.weight, body.ln_f.bias)))
    for name, matrix in matrices(weights):
        head = name == "head"
        expected_bits = 8 if head and bits else bits or 8 * dtype.itemsize
        assert matrix.bits == expected_bits
        assert matrix.data.is_contiguous()
        values = dequantize(matrix.data, matrix.scale, matrix.bits)
        modules = [model.lm_head] if head else [b.get_submodule(MODULES[name]) for b in body.h]
        assert len(values) == len(modules)
        for i, module in enumerate(modules):
            weight = module.weight if head else module.weight.t()
            assert (matrix.outputs, matrix.inputs) == tuple(weight.shape)
            # Half a step of the coarsest scale.
            step = {8: 1 / 127, 4: 1 / 7}.get(matrix.bits, 0.0) * weight.abs().max().float()
            assert (values[i] - weight.float()).abs().max() <= step / 2 + 1e-6
            if not head:
                assert matrix.bias is not None
                assert torch.equal(matrix.bias[i], module.bias)
        assert (matrix.bias is None) == head
    assert (weights.heads, weights.eps) == (4, 1e-5)
    assert not weights.qkv.data.requires_grad


def test_tied_head_is_no_copy() -> None:
    model = tiny()
    head = pack(model).head
    assert head.data.data_ptr() == model.transformer.wte.weight.data_ptr()
    untied = tiny(tie_word_embeddings=False)
    head = pack(untied).head
    assert torch.equal(head.data[0], untied.lm_head.weight)
    assert not torch.equal(head.data[0], untied.transformer.wte.weight)


@pytest.mark.parametrize("way", ["shifted", "transposed"])
def test_what_cannot_be_read_in_place_is_copied(way: str) -> None:
    """Kernels read rows one after the other, 16 bytes at a time."""
    model = tiny(tie_word_embeddings=False)
    modules = model.transformer.wte, model.transformer.wpe, model.lm_head
    for module in modules:
        weight = module.weight.detach()
        if way == "shifted":
            moved = weight.new_empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
            assert moved.data_ptr() % 16
        else:
            moved = weight.t().contiguous().t()
        module.weight = nn.Parameter(moved)
    weights = pack(model)
    for packed, module in zip(
        (weights.wte, weights.wpe, weights.head.data[0]), modules, strict=True
    ):
        assert torch.equal(packed, module.weight)
        assert packed.is_contiguous()
        assert packed.data_ptr() % 16 == 0
        assert not packed.requires_grad


def test_scales() -> None:
    root = 12**-0.5
    for options, expected in (
        ({}, [root, root, root]),
        ({"scale_attn_weights": False}, [1.0, 1.0, 1.0]),
        ({"scale_attn_by_inverse_layer_idx": True}, [root, root / 2, root / 3]),
    ):
        assert pack(tiny(**options)).scales.tolist() == pytest.approx(expected)


def test_packing_in_inference_mode_gives_ordinary_tensors() -> None:
    with torch.inference_mode():
        weights = pack(tiny())
    assert not weights.qkv.data.is_inference()
    assert not weights.scales.is_inference()


def test_pack_refuses() -> None:
    with pytest.raises(ValueError, match="bits must be 8, 4 or None; got 5"):
        pack(tiny(), 5)
    with pytest.raises(ValueError, match="even number of inputs; got 61"):
        pack(tiny(n_inner=61), 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_models(mode: str, dtype: torch.dtype) -> None:
    """Packed as they are: the same numbers, whether a forward pass has laid them out or not."""
    model = gpt2fast.quantize(tiny().to(dtype), mode)
    assert why_not(model) is None
    before = fingerprint(model)
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        weights = pack(model)
        bits = MODES[mode]
        for name, matrix in matrices(weights):
            expected = bits[name == "head"]
            assert matrix.bits == (8 * dtype.itemsize if expected == 16 else expected)
            values = dequantize(matrix.data, matrix.scale, matrix.bits)
            modules = [model.lm_head]
            if name != "head":
                modules = [b.get_submodule(MODULES[name]) for b in model.transformer.h]
            for i, module in enumerate(modules):
                held = dequantize(module.weight, module.scale, module.bits)
                assert torch.equal(values[i], held.to(dtype).float() if expected == 16 else held)
        assert weights.wte.dtype == dtype
        assert torch.equal(weights.wte, model.transformer.wte(torch.arange(97)))
        model(ids)
        assert fingerprint(model) == before
    other = gpt2fast.quantize(tiny().to(dtype), mode)
    model.load_state_dict(other.state_dict())
    assert fingerprint(model) != before


def test_quantised_models_that_are_refused() -> None:
    model = gpt2fast.quantize(tiny(), "int8")
    with pytest.raises(ValueError, match="weights of 8 bits already; got bits=4"):
        pack(model, 4)
    assert pack(model, 8).head.bits == 8
    model.transformer.h[1].mlp = gpt2fast.quantize(tiny(), "int4").transformer.h[1].mlp
    assert "differ in shape" in (why_not(model) or "")
    hook(model.lm_head)
    assert why_not(model) == "lm_head has a hook or was replaced"
