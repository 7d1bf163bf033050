"""Causal self-attention on the packed projection of GPT-2.

    softmax(scale * q k^T + mask) v        for each of H heads of size D = C / H

q, k and v are read from one ``[B, T, 3C]`` projection and the heads come back merged,
``[B, T, C]``. T queries stand at the end of S >= T keys (bottom-right alignment): with a past of
length P, S = P + T and query t sees keys 0 .. P + t.

`causal_attention` is differentiable; the op that writes the new keys and values into a preallocated
cache, and takes no gradient, is in ``attention_append.py``.

A mask is either ``[B, S]`` boolean (the keys that may be attended, causality implied) or a complete
4-D mask ``[B or 1, H or 1, T, S]``, boolean (True attends) or float (added to the scores).
"""

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.registry import register_op

_causal_attention = register_op(
    "causal_attention(Tensor qkv, int num_heads, Tensor? past_kv, Tensor? mask, float scale,"
    " float dropout_p, bool upcast) -> Tensor",
    torch_ops.causal_attention,
)


def check_inputs(
    qkv: Tensor, num_heads: int, past: Tensor | None, start: int, mask: Tensor | None
) -> None:
    """Raise a ValueError unless the inputs of attention after ``start`` positions fit together."""
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be [batch, time, 3 * {num_heads} heads * head size]; got {list(qkv.shape)}"
        )
    batch, length, width = qkv.shape
    head_size = width // (3 * num_heads)
    if past is not None:
        expected = [2, batch, num_heads, "time", head_size]
        shape = list(past.shape)
        if past.dim() != 5 or shape[:3] + shape[4:] != expected[:3] + expected[4:]:
            raise ValueError(f"past keys and values must be {expected}; got {shape}")
    if mask is not None:
        key_length = start + length
        allowed = mask.shape == (batch, key_length) or (
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, num_heads)
            and mask.shape[2:] == (length, key_length)
        )
        if not allowed:
            raise ValueError(
                f"mask must be [{batch}, {key_length}] or [{batch} or 1, {num_heads} or 1, "
                f"{length}, {key_length}]; got {list(mask.shape)}"
            )
        if mask.dtype != torch.bool and (mask.dim() == 2 or not mask.is_floating_point()):
            raise ValueError(
                f"a {mask.dim()}-D mask must be boolean{' or float' if mask.dim() == 4 else ''}; "
                f"got {mask.dtype}"
            )


def prepare_mask(key_mask: Tensor | None, query_length: int, device: torch.device) -> Tensor | None:
    """The mask to hand to every layer of one forward pass, computed once.

    Args:
        key_mask: ``[B, S]`` boolean, the keys that may be attended, or None for all.
        query_length: T.
        device: where the pass runs: the PyTorch ops want a complete mask, kernels the ``[B, S]``.

    Returns:
        None where causality alone decides, otherwise a mask that the attention ops accept.
    """
    if key_mask is None:
        return None
    return torch_ops.expand_key_mask(key_mask.to(device), query_length)


def causal_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    past_kv: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
) -> Tensor:
    """Differentiable causal attention.

    Args:
        qkv: ``[B, T, 3C]``, the packed projection.
        num_heads: H.
        past_kv: ``[2, B, H, P, D]``, keys then values that come before, or None.
        mask: see the module's docstring; None attends causally to everything.
        scale: factor of the scores; default ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention weight.
        upcast: compute scores and softmax in float32 whatever the inputs' dtype.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    check_inputs(qkv, num_heads, past_kv, 0 if past_kv is None else past_kv.shape[3], mask)
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    return _causal_attention(qkv, num_heads, past_kv, mask, scale, dropout_p, upcast)


def weighted_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    past_kv: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    head_mask: Tensor | None = None,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """`causal_attention` that keeps its weights, for inspection and head masks.

    Plain PyTorch on every device: the weights are what a fused kernel exists not to store.

    Args:
        head_mask: broadcast against ``[B, H, T, S]`` and multiplied with the weights, or None.
        (the others): as in `causal_attention`.

    Returns:
        the merged heads ``[B, T, C]`` and the weights ``[B, H, T, S]`` after softmax, dropout and
        head mask.
    """
    start = 0 if past_kv is None else past_kv.shape[3]
    check_inputs(qkv, num_heads, past_kv, start, mask)
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    q, _ = torch_ops.split_heads(qkv, num_heads)
    kv = packed_kv(qkv, num_heads, past_kv)
    return torch_ops.weighted_attention(q, kv, mask, scale, dropout_p, head_mask, upcast)


def packed_kv(qkv: Tensor, num_heads: int, past_kv: Tensor | None = None) -> Tensor:
    """Keys and values of a packed projection as a model's past holds them.

    Args:
        qkv: ``[B, T, 3C]``.
        num_heads: H.
        past_kv: ``[2, B, H, P, D]``, put before them, or None.

    Returns:
        ``[2, B, H, P + T, D]``; without a past, a view of qkv. Differentiable.
    """
    _, kv = torch_ops.split_heads(qkv, num_heads)
    return kv if past_kv is None else torch.cat((past_kv, kv), dim=3)
