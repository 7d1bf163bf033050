"""One token of one sequence with int8 weights, written for `torch.compile`'s C++ compiler.

PyTorch's int8 products round the activations to 8 bits (7 without VNNI), and for one row they read
the weights at half of the memory's speed. Here a row x ``[K]`` is rounded to 16 bits with one step,
as far as 32-bit sums allow, and multiplied with the integers q ``[N, K]`` as they lie in the file,

    x ~ step u,    u integers,  |u| 127 K < 2^31,        y_n = scale_n step sum_k q_nk u_k + b_n

which for C++ compilers is a loop of 16-bit multiply-adds. What surrounds the products is fused.

`Layer` and `Head` are compiled once for a shape, with the weights as arguments, so that a compiled
file serves every layer, model and later process: see `gpt2fast.engine.compiled`.
"""

import torch
import torch.nn.functional as F
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
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the token at position n, whose predecessors' keys and values are cached.

        Args:
            hidden: ``[C]`` float32.
            places: ``[n]``; only its length is of interest.
            keys, values: ``[H, capacity, D]`` float32, of which n positions are read.
            ln_1, ln_2: weight and bias ``[C]``.
            qkv, out, fc, proj: int8 ``[N, K]``, float32 scales and bias ``[N]``.

        Returns:
            the block's output ``[C]``, and this token's key and value ``[2, H, D]``.
        """
        projected = _linear(_normed(hidden, ln_1, self.eps), *qkv)
        query, key, value = _kept(projected).view(3, self.heads, -1).unbind(0)
        query = query * self.scale

        count = places.shape[0]
        keys, values = keys.narrow(1, 0, count), values.narrow(1, 0, count)
        scores = (keys * query[:, None]).sum(-1)
        own_score = (query * key).sum(-1, keepdim=True)
        top = torch.maximum(scores.amax(-1, keepdim=True), own_score)
        weights, own_weight = torch.exp(scores - top), torch.exp(own_score - top)
        total = weights.sum(-1, keepdim=True) + own_weight
        context = ((weights[:, :, None] * values).sum(1) + own_weight * value) / total

        hidden = _kept(hidden + _linear(_kept(context.flatten()), *out))
        inner = F.gelu(_linear(_normed(hidden, ln_2, self.eps), *fc), approximate="tanh")
        hidden = hidden + _linear(_kept(inner), *proj)
        return hidden, torch.stack((key, value))


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
    centred = x - x.mean()
    return _kept(centred * torch.rsqrt((centred * centred).mean() + eps) * weight + bias)


def _kept(x: Tensor) -> Tensor:
    """x itself, computed once: Inductor would compute it again for every output that reads it."""
    return x.as_strided(x.shape, x.stride())
