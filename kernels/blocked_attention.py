"""Causal attention for training on a CPU, in blocks of queries.

For the queries of a block only the keys up to the block's end are multiplied, and what is computed
of a block is used while it is in the caches of a core:

    P = softmax(scale q k^T + causal)      out = (M P / (1 - p)) v
    dv = (M P / (1 - p))^T dout            dS = P (M (dout v^T) / (1 - p) - sum(dout out))
    dq = scale dS k                        dk = scale dS^T q

with M the mask of dropout. PyTorch's own fused attention takes half as long again on a CPU, and
with dropout falls back to whole matrices, which takes three times as long.

For backward it saves q, k and v apart, the output, the causal half of P, and with dropout of M, a
byte a weight. That is why without dropout, where PyTorch saves no weights, it serves only as long
as they are few.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64

# As measured: below these lengths PyTorch's attention is faster, without and with dropout.
_LEAST_LENGTH, _LEAST_LENGTH_DROPOUT = 320, 96
_MOST_WEIGHTS = 2**23  # of one layer, without dropout: 16 MB as half of them are kept


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, scale: float, dropout_p: float) -> Tensor:
        batch, length, _ = qkv.shape
        heads = qkv.reshape(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        # [3, B H, T, D]; scale and 1 / (1 - p) go to the narrow factors.
        q, k, v = factors = heads.reshape(3, batch * num_heads, length, -1)
        if factors.data_ptr() == qkv.data_ptr():
            q, v = q.clone(), v.clone()
        q.mul_(scale)
        v.div_(1 - dropout_p)
        out = torch.empty_like(q)
        saved = []
        for start, end in _blocks(length):
            scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
            size = end - start
            future = torch.ones(size, size, dtype=torch.bool).triu_(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
            weights = torch.softmax(scores, -1, out=scores)  # in place
            saved.append(weights)
            if dropout_p > 0:
                saved.append(_keep(weights.shape, dropout_p))
                weights = weights * saved[-1]
            torch.bmm(weights, v[:, :end], out=out[:, start:end])
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.scale, ctx.dropout_p, ctx.shape = scale, dropout_p, (batch, num_heads, length)
        return _merged(out, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        saved.reverse()
        batch, num_heads, length = ctx.shape
        dout = dout.reshape(batch, length, num_heads, -1).transpose(1, 2).reshape_as(out)
        grads = q.new_zeros(3, *q.shape)
        dq, dk, dv = grads.unbind(0)
        delta = (dout * out).sum(-1, keepdim=True)
        for start, end in _blocks(length):
            block, weights = dout[:, start:end], saved.pop()
            dweights = torch.bmm(block, v[:, :end].transpose(1, 2))
            dropped = weights
            if ctx.dropout_p > 0:
                keep = saved.pop()
                dropped = weights * keep
                dweights.mul_(keep)
            dv[:, :end].baddbmm_(dropped.transpose(1, 2), block)
            dscores = dweights.sub_(delta[:, start:end]).mul_(weights)
            torch.bmm(dscores, k[:, :end], out=dq[:, start:end])
            dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, start:end])  # q is scaled
        dq.mul_(ctx.scale)
        dv.div_(1 - ctx.dropout_p)
        split = grads.view(3, batch, num_heads, length, -1).permute(1, 3, 0, 2, 4)
        return split.reshape(batch, length, -1), None, None, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _BLOCK):
        yield start, min(start + _BLOCK, length)


def _keep(shape: torch.Size, dropout_p: float) -> Tensor:
    """Booleans that are true with probability 1 - p, to 16 bits of it: four to a random word."""
    count = shape.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(dropout_p * 2**16) - 2**15
    return (words.view(torch.int16)[:count] >= threshold).view(shape)


def _merged(out: Tensor, batch: int) -> Tensor:
    """``[B H, T, D]`` to ``[B, T, C]``."""
    return out.view(batch, -1, *out.shape[1:]).transpose(1, 2).flatten(2)


def serves(qkv: Tensor, num_heads: int, dropout_p: float) -> bool:
    """Whether `blocked_attention` is the one to use: to train, on a CPU, in float32."""
    if not (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.float32
        and qkv.requires_grad
        and torch.is_grad_enabled()
    ):
        return False
    batch, length, _ = qkv.shape
    worth = length >= (_LEAST_LENGTH_DROPOUT if dropout_p > 0 else _LEAST_LENGTH) and (
        dropout_p > 0 or batch * num_heads * length * length <= _MOST_WEIGHTS
    )
    return bool(
        worth
        and batch > 0
        and dropout_p < 1 - 2**-16  # probabilities are rounded to 16 bits
        and type(qkv) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()
        and not torch.is_autocast_enabled("cpu")
    )


def blocked_attention(qkv: Tensor, num_heads: int, scale: float, dropout_p: float) -> Tensor:
    """Causal attention of a packed float32 ``[B, T, 3C]`` on a CPU: merged heads ``[B, T, C]``.

    Differentiable once.
    """
    out: Tensor = _BlockedAttention.apply(qkv, num_heads, scale, dropout_p)
    return out
