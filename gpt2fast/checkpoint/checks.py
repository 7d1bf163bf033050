"""Whether a checkpoint holds what its configuration says, before anything is built of it."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gpt2fast.checkpoint.names import canonical_name
from gpt2fast.checkpoint.weights import CheckpointError
from gpt2fast.config import GPT2Config
from gpt2fast.quantization import bits_of, is_form, mode_of

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_LAYER = re.compile(r"h\.(\d+)\.")


def check_layers(config: GPT2Config, tensors: Mapping[str, Tensor]) -> None:
    """Before anything is built: are there as many layers as the configuration says?"""
    names = [canonical_name(name) or "" for name in tensors]
    layers = {match[1] for name in names if (match := _LAYER.match(name))}
    if len(layers) < config.n_layer:
        raise CheckpointError(
            f"the configuration has n_layer={config.n_layer}, but the checkpoint holds "
            f"{len(layers)} layers of GPT-2; it holds {listed(tensors) or 'nothing'}"
        )


def stored_mode(config: GPT2Config, asked: str | None) -> str | None:
    """The mode that the checkpoint is quantised in, if it is; ``asked`` must not contradict it."""
    if asked is not None:
        bits_of(asked)
    try:
        stored = mode_of(config)
    except ValueError as error:
        raise CheckpointError(f"config: {error}") from error
    if stored is not None and asked not in (None, stored):
        raise ValueError(f"quantize={asked!r}: the checkpoint is quantised already, as {stored!r}")
    return stored


def check_tensors(
    model: nn.Module, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    wrong = [
        f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"the checkpoint does not fit the configuration: {wrong[0]}{more}")
    for name, tensor in weights.items():
        if is_form(model, name):
            if tensor.dtype != (form := expected[name].dtype):
                raise CheckpointError(f"{name} is {tensor.dtype}, expected {form}")
            if name.endswith(".scale") and (bad := ~(tensor > 0) | tensor.isinf()).any():
                raise CheckpointError(
                    f"{name} must be positive and finite; it holds {tensor[bad][0].item()}"
                )
        elif tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")


def listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return ", ".join(listed[:6]) + more
