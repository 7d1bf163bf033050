"""The linear layer of GPT-2 (weights ``[in, out]``) and its two-layer GELU perceptron.

    linear(x)   = x W + b
    gelu_mlp(x) = gelu(x W_fc + b_fc) W_proj + b_proj (+ residual)
    gelu(u)     = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))

the tanh form of Hendrycks and Gimpel, *Gaussian Error Linear Units* (2016), which GPT-2 was
trained with.

On our kernels, backward saves x, the pre-activations u and the weights: gelu(u) is computed again
beside gelu'(u), in the epilogue of dout W_proj^T.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.registry import (
    apply,
    autocast_inputs,
    casts_weights,
    forbid_second_derivative,
    needs_gradient,
    register_kernel,
    register_op,
)


def _fake_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_gelu_mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(x.shape[0], proj_weight.shape[1], dtype=dtype)
    return out, x.new_empty(x.shape[0], fc_weight.shape[1]) if save_pre else x.new_empty(0)


def _fake_gelu_mlp_bwd(
    dout: Tensor,
    x: Tensor | None,
    pre: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    *needed: bool,
) -> tuple[Tensor, ...]:
    (width, inner), rows = fc_weight.shape, dout.shape[0]
    shapes = ((rows, width), (width, inner), (inner,), proj_weight.shape, proj_weight.shape[1:])
    return tuple(
        pre.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)
    )


_linear_fwd = register_kernel(
    "linear_fwd(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "gelu_mlp:linear_fwd",
    _fake_linear_fwd,
)
_gelu_mlp_fwd = register_kernel(
    "gelu_mlp_fwd(Tensor x, Tensor fc_weight, Tensor fc_bias, Tensor proj_weight, Tensor proj_bias,"
    " Tensor? residual, bool save_pre) -> (Tensor out, Tensor pre)",
    "gelu_mlp:gelu_mlp_fwd",
    _fake_gelu_mlp_fwd,
)
_gelu_mlp_bwd = register_kernel(
    "gelu_mlp_bwd(Tensor dout, Tensor? x, Tensor pre, Tensor fc_weight, Tensor proj_weight,"
    " bool need_x, bool need_fc_weight, bool need_fc_bias, bool need_proj_weight,"
    " bool need_proj_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gelu_mlp:gelu_mlp_bwd",
    _fake_gelu_mlp_bwd,
)


class _GeluMlp(torch.autograd.Function):
    """The perceptron on rows. Saved: x, the pre-activations of the GELU, and the weights."""

    @staticmethod
    def forward(
        x: Tensor,
        fc_weight: Tensor,
        fc_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        residual: Tensor | None,
        save_pre: bool,
    ) -> tuple[Tensor, Tensor]:
        return _gelu_mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, residual, save_pre)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, fc_weight, _, proj_weight, _, residual, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        # x serves the gradient of fc_weight alone, which may be frozen.
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, output[1], fc_weight, proj_weight
        )
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("gelu_mlp")
        if dout is None:
            return (None,) * 7
        needed = ctx.needs_input_grad[:5]
        dresidual = dout.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        if not any(needed):
            return None, None, None, None, None, dresidual, None
        grads = _gelu_mlp_bwd(_as_rows(dout), *ctx.saved_tensors, *needed)
        wanted = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return *wanted, dresidual, None


def _as_rows(x: Tensor) -> Tensor:
    """``[..., C]`` as ``[M, C]`` whose rows are contiguous and do not overlap: a view if it can."""
    rows = x.reshape(-1, x.shape[-1])
    fits = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
    return rows if fits else rows.contiguous()


def _readable(weight: Tensor) -> Tensor:
    """A weight that the kernel can read: either way round, but without gaps in its rows."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _served(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these: something to multiply, all of one dtype and device."""
    return all(t.numel() != 0 and t.dtype == x.dtype and t.device == x.device for t in (x, *others))


def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch serves training, where nothing can be fused that it does not fuse."""
    from gpt2fast.kernels._triton import configs

    if needs_gradient(x, weight, bias) or casts_weights(weight, bias):
        return NotImplemented
    (x,) = autocast_inputs(x)
    # Asked first, as it leaves most products of a forward pass to PyTorch.
    if configs.matmul_provider("linear", x.shape[:-1].numel(), x.element_size()) != "triton":
        return NotImplemented
    if not _served(x, weight, bias):
        return NotImplemented
    out: Tensor = _linear_fwd(_as_rows(x), _readable(weight), bias.contiguous())
    return out.view(*x.shape[:-1], weight.shape[1])


def _gelu_mlp_triton(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None,
) -> Tensor:
    given = (fc_weight, fc_bias, proj_weight, proj_bias)
    if casts_weights(*given) and not needs_gradient(x, residual, *given):
        return NotImplemented
    x, *parameters = autocast_inputs(x, *given)
    if not _served(x, *parameters):
        return NotImplemented
    if residual is not None and (residual.dtype not in DTYPES or residual.device != x.device):
        return NotImplemented
    fc_weight, fc_bias, proj_weight, proj_bias = parameters
    tensors = (
        _as_rows(x),
        _readable(fc_weight),
        fc_bias.contiguous(),
        _readable(proj_weight),
        proj_bias.contiguous(),
        None if residual is None else _as_rows(residual),
    )
    # The gradient of the second bias and of the residual need nothing saved.
    if needs_gradient(*tensors):
        out = apply(_GeluMlp, *tensors, needs_gradient(*tensors[:4]))[0]
    else:
        out = _gelu_mlp_fwd(*tensors, False)[0]
    return out.view(*x.shape[:-1], proj_weight.shape[1])


_linear = register_op(
    "linear(Tensor x, Tensor weight, Tensor bias) -> Tensor", torch_ops.linear, _linear_triton
)
_gelu_mlp = register_op(
    "gelu_mlp(Tensor x, Tensor fc_weight, Tensor fc_bias, Tensor proj_weight, Tensor proj_bias,"
    " Tensor? residual) -> Tensor",
    torch_ops.gelu_mlp,
    _gelu_mlp_triton,
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
