"""LayerNorm, alone and fused with the residual addition before it.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        over the last dimension

with the biased variance, as in Ba, Kiros and Hinton, *Layer Normalization* (2016).
"""

from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.registry import register_op

_layer_norm = register_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    torch_ops.layer_norm,
)
_add_layer_norm = register_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor)",
    torch_ops.add_layer_norm,
)


def _check_affine(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            f"weight and bias must have shape {tuple(x.shape[-1:])}, the last dimension of x; "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: ``[..., C]``, float32, float16 or bfloat16.
        weight, bias: ``[C]``.
        eps: added to the variance.

    Returns:
        ``[..., C]`` in x's dtype; statistics are accumulated in float32.

    Raises:
        ValueError: weight or bias does not match x's last dimension.
    """
    _check_affine(x, weight, bias)
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``x + residual``, and the sum itself, in one pass.

    Args:
        x, residual: ``[..., C]``, of one shape.
        weight, bias: ``[C]``.
        eps: added to the variance.

    Returns:
        ``(layer_norm(x + residual), x + residual)``, each ``[..., C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"x and residual must have one shape; got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    _check_affine(x, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)
