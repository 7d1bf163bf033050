"""The ops written out in plain PyTorch, and the comparison of an op with them.

An oracle runs in any dtype: in float64 it is the truth, in 16 bits it is the plain PyTorch whose
error ours is measured against.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import assert_close

_LARGE = 1 << 20  # elements

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    if x.dtype != torch.float64:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    return layer_norm(x + residual, weight, bias, eps), x + residual


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.t(), bias)


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    u = linear(x, fc_weight, fc_bias)
    if u.dtype == torch.float64:
        u = u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    else:
        u = F.gelu(u, approximate="tanh")
    out = linear(u, proj_weight, proj_bias)
    return out if residual is None else out + residual


def embedding(
    input_ids: Tensor, position_ids: Tensor, types: Tensor | None, wte: Tensor, wpe: Tensor
) -> Tensor:
    out = wte[input_ids] + wpe[position_ids]
    return out if types is None else out + wte[types]


def allowed_keys(query_length: int, key_length: int, key_mask: Tensor | None = None) -> Tensor:
    """Which keys a query sees, ``[1 or B, 1, T, S]``: query t is position t + S - T."""
    query = torch.arange(query_length)[:, None] + key_length - query_length
    key = torch.arange(key_length)[None, :]
    allowed = (key <= query)[None, None]
    if key_mask is not None:
        allowed = (allowed & key_mask[:, None, None]) | (key == query)
    return allowed


def attention(
    qkv: Tensor,
    num_heads: int,
    past_kv: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merged heads ``[B, T, C]`` and the weights ``[B, H, T, S]``."""
    query, key, value = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
    )
    if past_kv is not None:
        key, value = torch.cat((past_kv[0], key), 2), torch.cat((past_kv[1], value), 2)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-1, -2) * scale
    if mask is None or mask.dim() == 2:
        mask = allowed_keys(query.shape[2], key.shape[2], mask)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if head_mask is not None:
        weights = weights * head_mask
    return (weights @ value).transpose(1, 2).flatten(2), weights


def lm_head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str
) -> Tensor:
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def _run(
    function: Callable[..., Any], tensors: list[Tensor], upstream: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``function(*tensors)`` and the gradients of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not upstream:
        upstream.extend(torch.randn(o.shape, dtype=torch.float64) for o in outputs)
    grads = torch.autograd.grad(
        outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    return outputs, list(grads)


def compare(
    op: str,
    ours: Callable[..., Any],
    oracle: Callable[..., Any],
    tensors: list[Tensor],
) -> None:
    """Assert that outputs and every gradient of ``ours(*tensors)`` are the oracle's.

    The upstream gradients are random, and rounded to the dtype that they are given in. Tensors of
    models' real sizes are summed over many rows: see `tests.tolerances`.
    """
    dtype = tensors[0].dtype
    upstream: list[Tensor] = []
    outputs, grads = _run(ours, tensors, upstream)
    upstream = [u.to(o.dtype).double() for u, o in zip(upstream, outputs, strict=True)]
    expected, expected_grads = _run(oracle, [t.double() for t in tensors], upstream)
    plain: list[Tensor | None] = [None] * len(outputs)
    plain_grads: list[Tensor | None] = [None] * len(grads)
    if dtype not in (torch.float32, torch.float64) or max(t.numel() for t in tensors) > _LARGE:
        plain, plain_grads = _run(oracle, tensors, upstream)
    for got, want, same in zip(outputs, expected, plain, strict=True):
        assert_close(op, "forward", got, want, same, dtype)
    for got, want, same, tensor in zip(grads, expected_grads, plain_grads, tensors, strict=True):
        assert got.dtype == dtype == tensor.dtype
        assert_close(op, "backward", got, want, same)
