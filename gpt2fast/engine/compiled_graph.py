"""One token of one sequence with int8 weights, written for `torch.compile`'s C++ compiler.

PyTorch's int8 products round the activations to 8 bits (7 without VNNI), and for one row they read
the weights at half of the memory's speed. Here a row x ``[K]`` is rounded to 16 bits with one step,
as far as 32-bit sums allow, and multiplied with the integers q ``[N, K]`` as they lie in the file,

    x ~ step u,    u integers,  |u| 127 K < 2^31,        y_n = scale_n step sum_k q_nk u_k + b_n

which for C++ compilers is a loop of 16-bit multiply-adds. What surrounds the products is fused.

`Layer` and `Head` are compiled once for a shape, with the weights as arguments, so that a compiled
file serves every layer, model and later process: see `gpt2fast.engine.compiled`.
"""

import math

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A transformer block.

    Args:
        heads: H, of head size D; the width C is H D.
        scale: what attention scores are multiplied with.
        eps: of LayerNorm.
    """

    def __init__(self, heads: int, scale: float, eps: float) -> None:
        super().__init__()
        self.heads, self.scale, self.eps = heads, scale, eps

    def forward(
        self,
        hidden: Tensor,
        places: Tensor,
        keys: Tensor,
        values: Tensor,
        ln_1: tuple[Tensor, Tensor],
        qkv: tuple[Tensor, Tensor, Tensor],
        out: tuple[Tensor, Tensor, Tensor],
        ln_2: tuple[Tensor, Tensor],
        fc: tuple[Tensor, Tensor, Tensor],
        proj: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Evaluate a token, and write its key and value behind those of its predecessors.

        Args:
            hidden: ``[C]`` float32.
            places: ``[T]``, 0 to its position T - 1, where T is less than the capacity.
            keys, values: ``[H, capacity, D]`` float32, of which T are read, and the last one of
                these written.
            ln_1, ln_2: weight and bias ``[C]``.
            qkv, out, fc, proj: int8 ``[N, K]``, float32 scales and bias ``[N]``.

        Returns:
            the block's output ``[C]``.
        """
        projected = _linear(_normed(hidden, ln_1, self.eps), *qkv)
        query, key, value = _kept(projected).view(3, self.heads, -1).unbind(0)
        count = places.shape[0]
        own = places.narrow(0, count - 1, 1)
        keys.index_copy_(1, own, key[:, None])
        values.index_copy_(1, own, value[:, None])

        keys, values = keys.narrow(1, 0, count), values.narrow(1, 0, count)
        scores = (keys * (query * self.scale)[:, None]).sum(-1)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        context = (weights[:, :, None] * values).sum(1) / weights.sum(-1, keepdim=True)

        hidden = _kept(hidden + _linear(_kept(context.flatten()), *out))
        inner = _gelu(_linear(_normed(hidden, ln_2, self.eps), *fc))
        return hidden + _linear(_kept(inner), *proj)


class Head(nn.Module):
    """The last LayerNorm and the language-model head.

    Args:
        eps: of LayerNorm.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, hidden: Tensor, ln_f: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor
    ) -> Tensor:
        """Logits ``[V]`` of ``hidden`` ``[C]``, from int8 ``[V, C]`` and scales ``[V]``."""
        return _linear(_normed(hidden, ln_f, self.eps), weight, scale, None)


def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``; see the module."""
    most = min(32767, (2**31 - 1) // (127 * weight.shape[1]))
    step = x.abs().amax().clamp_min(1e-30) / most
    # Inductor has no vectors of int16 and leaves such a loop to the C++ compiler, whose own for
    # this pattern (multiply-add of pairs) are what is wanted.
    rounded = _kept((x / step).round().to(torch.int16))
    products = weight.to(torch.int32) * rounded.to(torch.int32)
    y = products.sum(-1, dtype=torch.int32).float() * (scale * step)
    return y if bias is None else y + bias


def _normed(x: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """LayerNorm of ``[C]``."""
    weight, bias = norm
    variance, mean = torch.var_mean(x, correction=0)
    return _kept((x - mean) * torch.rsqrt(variance + eps) * weight + bias)


def _gelu(x: Tensor) -> Tensor:
    """``x / 2 (1 + tanh u)``, as ``x sigmoid(2 u)``: exp takes less time than tanh."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def _kept(x: Tensor) -> Tensor:
    """x itself, computed once: Inductor would compute it again for every output that reads it."""
    return x.as_strided(x.shape, x.stride())
