"""The linear layer of GPT-2 (weights ``[in, out]``) and its two-layer GELU perceptron.

    linear(x)   = x W + b
    gelu_mlp(x) = gelu(x W_fc + b_fc) W_proj + b_proj (+ residual)
    gelu(u)     = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))

the tanh form of Hendrycks and Gimpel, *Gaussian Error Linear Units* (2016), which GPT-2 was
trained with.
"""

from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.registry import register_op

_linear = register_op("linear(Tensor x, Tensor weight, Tensor bias) -> Tensor", torch_ops.linear)
_gelu_mlp = register_op(
    "gelu_mlp(Tensor x, Tensor fc_weight, Tensor fc_bias, Tensor proj_weight, Tensor proj_bias,"
    " Tensor? residual) -> Tensor",
    torch_ops.gelu_mlp,
)


def _check_linear(name: str, in_features: int, weight: Tensor, bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[0] != in_features or bias.shape != weight.shape[1:]:
        raise ValueError(
            f"{name}: expected weight [{in_features}, out] and bias [out]; "
            f"got {list(weight.shape)} and {list(bias.shape)}"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` with the published checkpoints' ``[in, out]`` weights.

    Args:
        x: ``[..., in]``.
        weight: ``[in, out]``.
        bias: ``[out]``.

    Returns:
        ``[..., out]``, accumulated in float32.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check_linear("linear", x.shape[-1], weight, bias)
    return _linear(x, weight, bias)


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """``gelu(x W_fc + b_fc) W_proj + b_proj``, plus ``residual`` where one is given.

    Args:
        x: ``[..., C]``.
        fc_weight, fc_bias: ``[C, I]`` and ``[I]``.
        proj_weight, proj_bias: ``[I, C]`` and ``[C]``.
        residual: ``[..., C]`` or None.

    Returns:
        ``[..., C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check_linear("fc", x.shape[-1], fc_weight, fc_bias)
    _check_linear("proj", fc_weight.shape[1], proj_weight, proj_bias)
    expected = (*x.shape[:-1], proj_weight.shape[1])
    if residual is not None and residual.shape != expected:
        raise ValueError(f"residual must have shape {expected}; got {tuple(residual.shape)}")
    return _gelu_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, residual)
