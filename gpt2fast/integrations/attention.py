"""Attention for transformers' models, registered there under our name.

`register` adds an attention function, and where that version of transformers has one a function
that makes masks, to the registries that transformers keeps for this. Nothing that is there
already is changed, and only models whose configuration names "gpt2fast" use them.

Both hand to transformers' own functions for SDPA what our kernels do not serve, which on a CPU is
everything. On a GPU the mask of a padded batch stays ``[B, S]``, which our kernels test as they go.
"""

from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from gpt2fast import kernels
from gpt2fast.kernels.backend import serves

try:
    masking_utils: Any = import_module("transformers.masking_utils")
except ImportError:  # before 4.53
    masking_utils = None

NAME = "gpt2fast"

# Whether the caller wants the weights, in those versions where "sdpa" then gives way to "eager".
WEIGHTS: ContextVar[bool] = ContextVar("weights", default=False)


def register() -> None:
    """Make "gpt2fast" an attention implementation of transformers."""
    if isinstance(ALL_ATTENTION_FUNCTIONS, dict):  # before 4.51
        ALL_ATTENTION_FUNCTIONS[NAME] = attention_forward
    else:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    if masking_utils is not None:
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    head_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls an attention function.

    Args:
        query, key, value: ``[B, H, T, D]`` and twice ``[B, H, S, D]``.
        attention_mask: None, what `attention_mask` returns, or a complete 4-D mask.

    Returns:
        ``[B, T, H, D]``, and the weights, or None where nobody wants them.
    """
    if head_mask is not None or WEIGHTS.get():
        output, weights = modeling_gpt2.eager_attention_forward(
            module, query, key, value, attention_mask, head_mask=head_mask
        )
        return output, weights
    short = attention_mask is not None and attention_mask.dim() == 2
    causal = module.is_causal if is_causal is None else is_causal
    if short or (
        attention_mask is None
        and causal
        and query.shape == key.shape == value.shape
        and query.shape[2] > 1
        and serves(query.device)
    ):
        batch, heads, length, size = query.shape
        packed = torch.stack((query, key, value), dim=2).permute(0, 3, 2, 1, 4)
        merged = kernels.causal_attention(
            packed.reshape(batch, length, 3 * heads * size),
            heads,
            mask=attention_mask,
            scale=scaling,
            dropout_p=dropout,
        )
        return merged.view(batch, length, heads, size), None
    output, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return output, None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As transformers calls a function that makes masks.

    Returns:
        ``[B, S]`` boolean where our kernels attend causally to a padded batch without a past;
        elsewhere what transformers makes for SDPA.
    """
    padding = kwargs.get("attention_mask")
    if (
        not args
        and padding is not None
        and padding.dim() == 2
        and kwargs.get("mask_function") is masking_utils.causal_mask_function
        and kwargs.get("allow_is_causal_skip", True)
        and "q_length" in kwargs
        and kwargs["q_length"] == kwargs.get("kv_length") == padding.shape[1]
        and kwargs["q_length"] > 1
        and serves(padding.device)
    ):
        return padding.bool()
    mask: Tensor | None = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return mask
