"""Models with low-bit weights: a float model turned into one, in memory or while it is read.

The matrices of the blocks and of the head become int8 (a scale an output), fp16 or int4 (a scale a
group of 128 inputs; head and embedding int8); the token embedding is read from the head's rows
where they are tied. Position embeddings, LayerNorms and biases stay as they are. Such a model
generates, and evaluates texts with or without labels; it has no gradients.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2fast.kernels import packing
from gpt2fast.layers import Conv1D, is_plain
from gpt2fast.quantized_layers import (
    Quantized,
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedHead,
)

if TYPE_CHECKING:
    from gpt2fast.base import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

METHOD = "gpt2fast"
CONFIG_FIELD = "quantization_config"
# Mode -> bits of the blocks' matrices, and of the head and the token embedding.
MODES = {"int8": (8, 8), "fp16": (16, 16), "int4": (4, 8)}
_DTYPES = {16: torch.float16, 8: torch.int8, 4: torch.uint8}
_LARGEST = 65504  # of float16; weights are of the order of 1
_BLOCK = 256  # outputs that are quantised at a time: what they take on the way stays in caches
_BLOCK_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def quantize(model: Model, mode: str) -> Model:
    """Turn a model's matrices into low-bit ones, in place; each float one is freed in turn.

    The model is put into evaluation mode, for good, and its other parameters need no gradients
    any more. Modules with hooks, adapters or biased heads are not touched: they are refused.

    Args:
        model: a `GPT2LMHeadModel`, `GPT2DoubleHeadsModel` or `GPT2Model`.
        mode: "int8"; "fp16", which loses next to nothing; or "int4", which is for GPUs: on a CPU
            it only saves memory, and is slow.

    Returns:
        The model itself.

    Raises:
        ValueError: an unknown mode; the model is quantised already; a weight is not finite, or
            does not fit the form.
        TypeError: the model has a module that cannot be quantised.
    """
    bits = bits_of(mode)
    if is_quantized(model):
        held = getattr(model.config, CONFIG_FIELD, None)
        raise ValueError(f"the model is quantised already: {held}")
    targets = _targets(model)
    for name, module in targets:
        _check(name, module)
    for name, module in targets:
        _check_values(name, _output_major(module, module.weight.detach()), bits(name))
    dtype = model.dtype
    model.eval().requires_grad_(False)
    rows: tuple[Tensor, Tensor | None] | None = None
    for name, module in targets:
        if not isinstance(module, nn.Linear) or rows is None:
            form = _form(_output_major(module, module.weight.detach()), bits(name))
        else:
            form = rows
        if isinstance(module, nn.Embedding) and model.config.tie_word_embeddings:
            rows = form
        model.set_submodule(name, _module(module, *form, bits(name), dtype))
    _mark(model, mode)
    return model


def bits_of(mode: str) -> Callable[[str], int]:
    """The bits of a matrix by its name.

    Raises:
        ValueError: an unknown mode.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"quantize must be one of {', '.join(MODES)}; got {mode!r}")
    matrices, rows = MODES[mode]
    return lambda name: matrices if name.endswith(_BLOCK_MATRICES) else rows


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Quantized) for module in model.modules())


def stored_tensors(model: "PreTrainedModel") -> dict[str, Tensor]:
    """What a checkpoint holds: each parameter and each quantised tensor once, by its first name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Quantized) and not (
            isinstance(module, QuantizedHead) and model.config.tie_word_embeddings
        ):
            leaves = {leaf: getattr(module, leaf, None) for leaf in ("weight", "scale", "bias")}
            tensors |= {f"{name}.{leaf}": t for leaf, t in leaves.items() if t is not None}
    return tensors


def is_form(model: nn.Module, name: str) -> bool:
    """Whether a tensor's dtype is part of its form, and not the model's."""
    module, _, leaf = name.rpartition(".")
    return leaf in ("weight", "scale") and isinstance(model.get_submodule(module), Quantized)


def tied_head(model: nn.Module) -> dict[str, str]:
    """The entries of a quantised head that is tied, each with the embedding's that it repeats."""
    head, config = getattr(model, "lm_head", None), getattr(model, "config", None)
    if not isinstance(head, QuantizedHead) or config is None or not config.tie_word_embeddings:
        return {}
    rows = f"{model.base_model_prefix}.wte"
    return {f"lm_head.{leaf}": f"{rows}.{leaf}" for leaf in ("weight", "scale")}


def make_room(model: "PreTrainedModel", mode: str, dtype: torch.dtype) -> None:
    """Put empty quantised modules into a float model on the meta device, for `stored_tensors`.

    Raises:
        ValueError: the mode cannot hold a matrix of the model's.
    """
    bits = bits_of(mode)
    for name, module in _targets(model):
        weight = _output_major(module, module.weight)
        form = bits(name)
        _check_inputs(name, weight.shape[1], form)
        data, scale = _empty_form(weight, form)
        model.set_submodule(name, _module(module, data, scale, form, dtype))
    model.requires_grad_(False)
    _mark(model, mode)


def quantize_tensors(model: "PreTrainedModel", weights: dict[str, Tensor], mode: str) -> None:
    """Turn a float model's tensors, by their names in it, into those of the mode, one by one."""
    bits = bits_of(mode)
    for name, module in _targets(model):
        key = f"{name}.weight"
        if key not in weights:
            continue  # a tied head
        weight = weights.pop(key)
        _check_values(name, _output_major(module, weight), bits(name))
        form = _form(_output_major(module, weight), bits(name))
        weights[key] = form[0]
        if form[1] is not None:
            weights[f"{name}.scale"] = form[1]


def mode_of(config: Any) -> str | None:
    """The mode of a checkpoint by its configuration; None for a float one.

    Raises:
        ValueError: another program quantised it, or the mode is unknown.
    """
    stated = getattr(config, CONFIG_FIELD, None)
    if stated is None:
        return None
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    if not isinstance(stated, Mapping) or method != METHOD:
        raise ValueError(
            f"{CONFIG_FIELD}: only checkpoints that gpt2fast quantised are read "
            f"(quant_method {METHOD!r}); got {method!r}"
        )
    mode = stated.get("mode")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{CONFIG_FIELD}: mode must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def _targets(model: "PreTrainedModel") -> list[tuple[str, Any]]:
    """What is quantised, by name: the matrices of the blocks, the embedding, then the head."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    layers = range(model.config.n_layer)
    names = [f"{prefix}h.{i}.{matrix}" for i in layers for matrix in _BLOCK_MATRICES]
    names.append(f"{prefix}wte")
    if hasattr(model, "lm_head"):
        names.append("lm_head")
    return [(name, model.get_submodule(name)) for name in names]


def _mark(model: "PreTrainedModel", mode: str) -> None:
    """Write the mode into the model's configuration, which float models may share."""
    shared = model.config
    config = copy.copy(shared)
    setattr(config, CONFIG_FIELD, {"quant_method": METHOD, "mode": mode})
    for module in model.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = config


def _check(name: str, module: nn.Module) -> None:
    plain = (
        is_plain(module, Conv1D)
        or is_plain(module, nn.Embedding)
        or (is_plain(module, nn.Linear) and module.bias is None)
    )
    if not plain:
        raise TypeError(
            f"{name} cannot be quantised: it is a {type(module).__name__} that was hooked, "
            "replaced or given a bias"
        )
    if module.weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no values to quantise")


def _check_inputs(name: str, inner: int, bits: int) -> None:
    if bits == 4 and inner % 2:
        raise ValueError(f"int4 needs an even number of inputs; {name} has {inner}")


def _check_values(name: str, weight: Tensor, bits: int) -> None:
    """Whether ``[N, K]`` fits the form of so many bits."""
    _check_inputs(name, weight.shape[1], bits)
    for block in weight.split(_BLOCK):
        top = block.abs().max().item()
        if not top < _LARGEST:
            raise ValueError(f"{name} holds {top}, which is not finite or too large")


def _form(weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """``[N, K]`` in the form of so many bits, a block of outputs at a time."""
    # First what stays: above what a block took on its way, it would keep that from being returned.
    data, scale = _empty_form(weight, bits)
    for start in range(0, len(weight), _BLOCK):
        rows = slice(start, start + _BLOCK)
        data[rows], part = packing.FORMS[bits](weight[rows].contiguous())
        if scale is not None and part is not None:
            scale[rows] = part
    return data, scale


def _empty_form(weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Room for ``[N, K]`` in the form of so many bits."""
    rows, inner = weight.shape
    data = weight.new_empty(rows, inner // 2 if bits == 4 else inner, dtype=_DTYPES[bits])
    groups = -(-inner // packing.INT4_GROUP)
    shape = {16: None, 8: (rows,), 4: (rows, groups)}[bits]
    return data, None if shape is None else weight.new_empty(shape, dtype=torch.float32)


def _output_major(module: nn.Module, weight: Tensor) -> Tensor:
    """``[N, K]`` of a module's weight, as a view."""
    return weight.t() if isinstance(module, Conv1D) else weight


def _module(
    module: nn.Module, data: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype
) -> Quantized:
    """What stands in for a module."""
    if isinstance(module, Conv1D):
        return QuantizedConv1D(data, scale, bits, module.bias.detach())
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(data, scale, bits, dtype)
    return QuantizedHead(data, scale, bits)
