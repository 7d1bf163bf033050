"""A model's weights for the engine: whether it can be served, whether it has changed, its packing.

The engine computes what the modules of `gpt2fast.transformer` compute when nobody has changed them.
`why_not` finds what would make a difference: a hook, an adapter, dropout in training mode, another
activation. Packed weights are copies, so `fingerprint` tells whether they are still the model's.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as nn_module

from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.packing import FORMS, DecodeWeights, Matrix, dequantize
from gpt2fast.layers import (
    GPT2MLP,
    Conv1D,
    GPT2Attention,
    GPT2Block,
    LayerNorm,
    drops,
    is_plain,
)
from gpt2fast.quantized_layers import (
    Quantized,
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedHead,
)
from gpt2fast.transformer import GPT2Model

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

Fingerprint = tuple[Hashable, ...]

_KNOWN = {
    *(GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, LayerNorm, Conv1D),
    *(nn.Embedding, nn.Linear, nn.GELU, nn.Dropout),
    *(QuantizedConv1D, QuantizedEmbedding, QuantizedHead),
}
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_INTEGER_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def why_not(model: "LanguageModel") -> str | None:
    """Why the engine cannot compute exactly what the model's modules would; None if it can.

    Holds for the model's mode, and the autocasting, of this moment.
    """
    if nn_module._has_any_global_hook():
        return "a hook is registered for all modules"
    body = model.transformer
    if not is_plain(body, GPT2Model):
        return _changed("transformer", body)
    for name, module, kinds in (
        ("wte", body.wte, (nn.Embedding, QuantizedEmbedding)),
        ("wpe", body.wpe, (nn.Embedding,)),
        ("ln_f", body.ln_f, (LayerNorm,)),
        ("lm_head", model.lm_head, (nn.Linear, QuantizedHead)),
    ):
        if not any(is_plain(module, kind) for kind in kinds):
            return _changed(name, module)
    if drops(body.drop):
        return _changed("drop", body.drop, "is in training mode")
    for i, block in enumerate(body.h):
        reason = _why_not_block(block)
        if reason is not None:
            return f"block {i}: {reason}"
    return _why_not_values(model)


def _changed(name: str, module: nn.Module, otherwise: str = "has a hook") -> str:
    """For a module that is not as it is built; ``otherwise`` where its class is."""
    if type(module) in _KNOWN:
        return f"{name} {otherwise} or was replaced"
    return f"{name} is a {type(module).__module__}.{type(module).__qualname__}"


def _why_not_block(block: nn.Module) -> str | None:
    if not is_plain(block, GPT2Block):
        return _changed("the block", block)
    attn, mlp = block.attn, block.mlp
    if not is_plain(attn, GPT2Attention):
        return _changed("attn", attn)
    if not is_plain(mlp, GPT2MLP):
        return _changed("mlp", mlp)
    for name, module, kind in (
        ("ln_1", block.ln_1, LayerNorm),
        ("ln_2", block.ln_2, LayerNorm),
        ("mlp.act", mlp.act, nn.GELU),
    ):
        if not is_plain(module, kind):
            return _changed(name, module)
    for name, module in (
        ("attn.c_attn", attn.c_attn),
        ("attn.c_proj", attn.c_proj),
        ("mlp.c_fc", mlp.c_fc),
        ("mlp.c_proj", mlp.c_proj),
    ):
        if not (is_plain(module, Conv1D) or is_plain(module, QuantizedConv1D)):
            return _changed(name, module)
    if mlp.act.approximate != "tanh":
        return "the activation is not GELU in its tanh form"
    # The attention reads the probability of its dropout and never calls the module.
    if attn.training and attn.attn_dropout.p > 0:
        return "attn is in training mode"
    for name, dropout in (("attn", attn.resid_dropout), ("mlp", mlp.dropout)):
        if drops(dropout):
            return _changed(f"dropout of {name}", dropout, "is in training mode")
    return None


def _why_not_values(model: "LanguageModel") -> str | None:
    """What is wrong with the tensors, of modules that are all as they were built."""
    body, head = model.transformer, model.lm_head
    if head.bias is not None:
        return "lm_head has a bias"
    first = body.wpe.weight  # the matrix that is never quantised
    device, kind, dtype = first.device, first.device.type, first.dtype
    for module, name, tensor in _tensors(model):
        if isinstance(module, Quantized) and name in ("weight", "scale"):
            if tensor.device != device:
                return f"parameters are on several devices, {device} and {tensor.device}"
            continue
        if tensor.device != device:
            return f"parameters are on several devices, {device} and {tensor.device}"
        if tensor.dtype != dtype:
            return f"parameters have several dtypes, {dtype} and {tensor.dtype}"
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout != torch.strided:
            return f"a {type(module).__name__} has a {name} that is no plain tensor"
    if kind == "meta":
        return "parameters are on the meta device"
    if dtype not in DTYPES:
        return f"parameters are {dtype}"
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "autocast is on"
    if _form(head)[:2] != _form(body.wte)[:2]:
        return "lm_head and wte have different shapes"
    return _why_not_shapes(_blocks(model), body.ln_f)


def _why_not_shapes(blocks: list[GPT2Block], ln_f: LayerNorm) -> str | None:
    if not blocks:
        return "there are no blocks"
    norms = [ln_f, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    if any(norm.weight is None or norm.bias is None for norm in norms):
        return "a LayerNorm has no weight or no bias"
    if any(norm.eps != ln_f.eps for norm in norms):
        return "LayerNorms differ in eps"
    shapes = [_shapes(block) for block in blocks]
    return "blocks differ in shape" if any(shape != shapes[0] for shape in shapes) else None


def _shapes(block: GPT2Block) -> tuple[Hashable, ...]:
    return (block.attn.num_heads, *map(_form, _projections(block)))


def _form(module: nn.Module) -> tuple[int, int, int]:
    """Outputs, inputs and bits of a matrix, 0 for a floating one."""
    if isinstance(module, Quantized):
        return module.outputs, module.inputs, module.bits
    first, second = cast("Tensor", module.weight).shape
    return (second, first, 0) if isinstance(module, Conv1D) else (first, second, 0)


def _blocks(model: "LanguageModel") -> list[GPT2Block]:
    return cast("list[GPT2Block]", list(model.transformer.h))


def _projections(block: GPT2Block) -> tuple[Conv1D, Conv1D, Conv1D, Conv1D]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def _tensors(model: "LanguageModel") -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Everything that a decoding step reads of a model."""
    body = model.transformer
    modules = [body.wte, body.wpe, body.ln_f, model.lm_head]
    for block in _blocks(model):
        modules += block.ln_1, block.ln_2, *_projections(block)
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield module, name, tensor


def fingerprint(model: "LanguageModel") -> Fingerprint:
    """A value that differs once anything was changed that `pack` reads of the model.

    Sees parameters written in place, replaced, cast or moved, and modules replaced. Does not see
    writes through ``parameter.data``, which PyTorch does not count. Tensors made in inference mode
    have no count of writes: they are read whole, so that such a model pays for it at every call.

    Args:
        model: one for which `why_not` gives None.
    """
    values: list[Hashable] = [
        (block.attn.scaling, block.attn.num_heads, block.ln_1.eps) for block in _blocks(model)
    ]
    for module, name, tensor in _tensors(model):
        if isinstance(module, QuantizedConv1D) and name == "weight" and tensor.device.type == "cpu":
            continue  # on a CPU it gives way to its packed form; the others tell of a change
        values += (
            # Addresses are used again: a reference tells storages apart without keeping them.
            StorageWeakRef(tensor.untyped_storage()),
            _checksum(tensor) if tensor.is_inference() else tensor._version,
            id(tensor),
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
    return tuple(values)


def _checksum(tensor: Tensor) -> int:
    """Of the bits, every element's weighted with its place."""
    bits = tensor.detach().contiguous().view(_INTEGER_VIEWS[tensor.element_size()]).flatten()
    total = 0
    for chunk in bits.split(1 << 20):
        places = torch.arange(1, len(chunk) + 1, device=chunk.device)
        total = hash((total, int((chunk * places).sum())))
    return total


def pack(model: "LanguageModel", bits: int | None = None) -> DecodeWeights:
    """Copy the weights into the layouts that decoding reads.

    Args:
        model: one for which `why_not` gives None.
        bits: 8 or 4 to quantise the blocks' matrices so, and the head to 8; None for the form that
            the model has them in, of which a tied head is no copy.

    Returns:
        tensors on the model's device; biases, embeddings and LayerNorms in the model's dtype.

    Raises:
        ValueError: other bits, also than those of a quantised model; int4 for matrices with an odd
            number of inputs.
    """
    if bits not in (None, 8, 4):
        raise ValueError(f"bits must be 8, 4 or None; got {bits}")
    body, head, dtype = model.transformer, model.lm_head, model.transformer.wpe.weight.dtype
    blocks = _blocks(model)
    inputs = [_form(module)[1] for module in _projections(blocks[0])]
    odd = [size for size in inputs if size % 2]
    if bits == 4 and odd:
        raise ValueError(f"int4 needs an even number of inputs; got {odd[0]}")
    columns = list(zip(*map(_projections, blocks), strict=True))
    # Not as inference tensors, whatever the caller's mode: the engine outlives it.
    with torch.inference_mode(False), torch.no_grad():  # the first turns gradients on
        qkv, out, fc, proj = (_packed(column, bits, dtype) for column in columns)
        return DecodeWeights(
            wte=_embedding(body.wte, dtype),
            wpe=_readable(body.wpe.weight),
            ln_1=torch.stack([_norm(block.ln_1) for block in blocks]),
            ln_2=torch.stack([_norm(block.ln_2) for block in blocks]),
            ln_f=_norm(body.ln_f),
            qkv=qkv,
            out=out,
            fc=fc,
            proj=proj,
            head=_packed_head(head, bits, dtype),
            heads=blocks[0].attn.num_heads,
            eps=body.ln_f.eps,
            scales=torch.tensor(
                [block.attn.scaling for block in blocks], dtype=torch.float32, device=model.device
            ),
        )


def _norm(norm: LayerNorm) -> Tensor:
    return torch.stack((norm.weight, norm.bias))


def _embedding(wte: nn.Module, dtype: torch.dtype) -> Tensor:
    if isinstance(wte, Quantized):
        return dequantize(wte.weight, wte.scale, wte.bits).to(dtype)
    return _readable(cast("nn.Embedding", wte).weight)


def _readable(weight: Tensor) -> Tensor:
    """As the kernels read it, row by row in loads of 16 bytes: itself where it is so already."""
    weight = weight.detach().contiguous()
    return weight.clone() if weight.data_ptr() % 16 else weight


def _packed(modules: Sequence[Conv1D], bits: int | None, dtype: torch.dtype) -> Matrix:
    """One kind of projection of all layers."""
    bias = torch.stack([module.bias for module in modules])
    quantised = [
        module for module in cast("Sequence[nn.Module]", modules) if isinstance(module, Quantized)
    ]
    if quantised:
        return _as_quantised(quantised, bias, bits, dtype)
    return _matrix([module.weight.t() for module in modules], bias, bits)


def _packed_head(head: nn.Module, bits: int | None, dtype: torch.dtype) -> Matrix:
    bits = None if bits is None else 8
    if isinstance(head, Quantized):
        return _as_quantised([head], None, bits, dtype)
    weight = cast("nn.Linear", head).weight.detach()
    if bits is None:
        return Matrix(_readable(weight)[None], None, None, 8 * weight.element_size())
    return _matrix([weight], None, bits)


def _as_quantised(
    modules: Sequence[Quantized], bias: Tensor | None, bits: int | None, dtype: torch.dtype
) -> Matrix:
    """As the modules have it; from float16 to the dtype of the activations."""
    held = modules[0].bits
    if bits not in (None, held):
        raise ValueError(f"the model has weights of {held} bits already; got bits={bits}")
    data = torch.stack([module.weight for module in modules])
    if held == 16:
        return Matrix(data.to(dtype), None, bias, 8 * dtype.itemsize)
    scales = [module.scale for module in modules if module.scale is not None]
    return Matrix(data, torch.stack(scales), bias, held)


def _matrix(weights: list[Tensor], bias: Tensor | None, bits: int | None) -> Matrix:
    """Pack ``[N, K]`` of each layer, one after the other."""
    form = 8 * weights[0].element_size() if bits is None else bits
    data = scales = None
    for i, weight in enumerate(weights):
        packed, scale = (weight, None) if bits is None else FORMS[bits](weight)
        if data is None:
            data = packed.new_empty(len(weights), *packed.shape)
            scales = None if scale is None else scale.new_empty(len(weights), *scale.shape)
        data[i] = packed
        if scales is not None and scale is not None:
            scales[i] = scale
    assert data is not None
    return Matrix(data, scales, bias, form)
