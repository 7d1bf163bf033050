"""Parameter names: every published form brought to one.

The published state dicts differ in the names: bare or prefixed (``transformer.``, and whatever a
wrapper added), with the leaves of the first TensorFlow conversion (``.g``, ``.b``, ``.w``), with
the heads' old names, with the attention masks saved as buffers. `canonical_name` brings all of
them, and the names of any model, to one form, and they are compared there.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gpt2fast.checkpoint.weights import CheckpointError
from gpt2fast.quantization import tied_head

# Parts of a name that wrappers insert: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = {"transformer", "model"}
_OLD_LEAVES = {"g": "weight", "w": "weight", "b": "bias"}
_OLD_HEADS = {
    "lm_head.decoder.weight": "lm_head.weight",
    "multiple_choice_head.linear.weight": "multiple_choice_head.summary.weight",
    "multiple_choice_head.linear.bias": "multiple_choice_head.summary.bias",
}
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def canonical_name(name: str) -> str | None:
    """Today's bare name for a name of any form; None for a buffer that old dumps hold.

    >>> canonical_name("module.transformer.h.0.ln_1.g")
    'h.0.ln_1.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        del parts[0]
    bare = ".".join(parts)
    if _MASK_BUFFER.fullmatch(bare):
        return None
    if len(parts) > 1 and parts[-1] in _OLD_LEAVES:
        bare = ".".join([*parts[:-1], _OLD_LEAVES[parts[-1]]])
    return _OLD_HEADS.get(bare, bare)


def rename_for(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of any published form, under the model's own names.

    Old buffers are dropped; entries without a place in the model keep their names.

    Raises:
        CheckpointError: two entries are the same parameter.
    """
    names = {canonical_name(name): name for name in _names(model)}
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in state_dict.items():
        canonical = canonical_name(name)
        if canonical is None:
            continue
        target = names.get(canonical, name)
        if target in renamed:
            raise CheckpointError(f"{origin[target]!r} and {name!r} are the same parameter")
        renamed[target] = value
        origin[target] = name
    return renamed


def _names(model: nn.Module) -> Iterator[str]:
    """Of everything a state dict holds, whether its tensors are there at the moment or not."""
    for prefix, module in model.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        for leaf in (*module._parameters, *kept):
            yield f"{prefix}.{leaf}" if prefix else leaf


def merge_tied(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, str]:
    """Leave one entry for every tied parameter, or quantised matrix: the model's first name of it.

    A second one is dropped, or stands in for a missing first one.

    Returns:
        The second names of the model's tied tensors, each with the first one.

    Raises:
        CheckpointError: the two are there and differ.
    """
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {
        name: first_name[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first_name[id(parameter)] != name
    }
    tied |= tied_head(model)
    for second, first in tied.items():
        if (copy := state_dict.pop(second, None)) is None:
            continue
        tensor = state_dict.setdefault(first, copy)
        if tensor.shape != copy.shape or not (
            tensor.data_ptr() == copy.data_ptr() or torch.equal(tensor, copy.to(tensor.dtype))
        ):
            raise CheckpointError(
                f"{second} and {first} differ in the checkpoint, though the configuration ties "
                "them; to keep both, load it with tie_word_embeddings=False"
            )
    return tied
