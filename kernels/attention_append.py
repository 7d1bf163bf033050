"""Causal attention that appends to a preallocated key-value cache, for decoding.

The same attention as in ``attention.py``; the new keys and values are written into the cache in
place, so it takes no gradient.
"""

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.attention import check_inputs
from gpt2fast.kernels.registry import register_op

_attention_append = register_op(
    "attention_append(Tensor qkv, Tensor(a!) kv_cache, SymInt start, int num_heads, Tensor? mask,"
    " float scale, bool upcast) -> Tensor",
    torch_ops.attention_append,
)


def attention_append(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    upcast: bool = False,
) -> Tensor:
    """Append the new keys and values to the cache in place and attend over all of it.

    Args:
        qkv: ``[B, T, 3C]``, the packed projection of a prompt, a chunk or one token.
        kv_cache: ``[2, B, H, capacity, D]``, written at ``start .. start + T``.
        start: how many positions of the cache are in use already.
        num_heads: H.
        mask, scale, upcast: as in `causal_attention`.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: the shapes do not agree, or the cache has no room.
        RuntimeError: qkv or the cache requires a gradient: an in-place write has none.
    """
    if torch.is_grad_enabled() and (qkv.requires_grad or kv_cache.requires_grad):
        raise RuntimeError(
            "attention_append writes in place and has no gradient; use torch.no_grad"
        )
    check_inputs(qkv, num_heads, kv_cache, start, mask)
    if start < 0 or start + qkv.shape[1] > kv_cache.shape[3]:
        raise ValueError(
            f"no room for {qkv.shape[1]} positions at {start} in a cache of {kv_cache.shape[3]}"
        )
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    return _attention_append(qkv, kv_cache, start, num_heads, mask, scale, upcast)
