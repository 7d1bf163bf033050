"""LayerNorm, alone and fused with the residual addition before it.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        over the last dimension

with the biased variance, as in Ba, Kiros and Hinton, *Layer Normalization* (2016). With
z = (x - mean(x)) / sqrt(var(x) + eps) and g = weight * dy, per row:

    dx = (g - mean(g) - z mean(g z)) / sqrt(var(x) + eps)

and, over all rows, dweight = sum(dy z) and dbias = sum(dy).

For the backward pass the kernels save what was normalised (an input, or the sum, which is an
output anyway), the weight, and the mean and 1 / sqrt(var + eps) of every row in float32.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.registry import (
    apply,
    forbid_second_derivative,
    needs_gradient,
    register_kernel,
    register_op,
)

MAX_WIDTH = 8192  # a row must fit in the registers of one program; wider ones are PyTorch's


def _layer_norm_fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(0)
    if residual is not None:
        summed_dtype = torch.promote_types(x.dtype, residual.dtype)
        summed = x.new_empty(x.shape, dtype=summed_dtype)
    rows = math.prod(x.shape[:-1]) if save_statistics else 0
    return x.new_empty(x.shape, dtype=dtype), summed, x.new_empty(2, rows, dtype=torch.float32)


def _layer_norm_bwd_fake(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    need_dx: bool,
    cast: torch.dtype | None,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    dx_cast = x.new_empty(x.shape if need_dx and cast else 0, dtype=cast or x.dtype)
    width = x.shape[-1] if need_affine else 0
    return dx, dx_cast, weight.new_empty(width), weight.new_empty(width)


layer_norm_fwd = register_kernel(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps,"
    " ScalarType dtype, bool save_statistics) -> (Tensor, Tensor, Tensor)",
    "layer_norm:layer_norm_fwd",
    _layer_norm_fwd_fake,
)
layer_norm_bwd = register_kernel(
    "layer_norm_bwd(Tensor dy, Tensor? dsummed, Tensor x, Tensor weight, Tensor statistics,"
    " bool need_dx, ScalarType? cast, bool need_affine) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm:layer_norm_bwd",
    _layer_norm_bwd_fake,
)


def equal_rows(x: Tensor) -> Tensor:
    """x ``[..., C]``, copied where its rows are not contiguous, or not equally far apart."""
    if x.is_contiguous():
        return x
    sizes, strides = x.shape, x.stride()
    outer = [i for i in range(x.dim() - 1) if sizes[i] != 1]
    equal = all(strides[a] == strides[b] * sizes[b] for a, b in pairwise(outer))
    return x if strides[-1] == 1 and equal else x.contiguous()


def output_dtype(x: torch.dtype, weight: Tensor, bias: Tensor) -> torch.dtype | None:
    """The dtype of the LayerNorm of an ``x``, as PyTorch has it on a GPU; None: not ours."""
    # Width 1 would be a constant to Triton, and the result is the bias anyway.
    if not 1 < weight.shape[0] <= MAX_WIDTH or weight.dtype != bias.dtype:
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return torch.float32 if x in DTYPES and weight.dtype in DTYPES else None
    return x if x in DTYPES and weight.dtype == x else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, _, statistics = layer_norm_fwd(
            equal_rows(x), None, weight.contiguous(), bias.contiguous(), eps, dtype, True
        )
        return y, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, *_ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("layer_norm")
        x, weight, statistics = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if grads[0] is None:
            return None, None, None, None, None
        dx, _, dweight, dbias = layer_norm_bwd(
            equal_rows(grads[0]),
            None,
            equal_rows(x),
            weight.contiguous(),
            statistics,
            need_x,
            None,
            need_weight or need_bias,
        )
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = layer_norm_fwd(
            equal_rows(x),
            equal_rows(residual),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            dtype,
            True,
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, residual, weight, *_ = inputs
        _, summed, statistics = output
        ctx.save_for_backward(summed, weight, statistics)
        ctx.dtypes = x.dtype, residual.dtype
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("add_layer_norm")
        summed, weight, statistics = ctx.saved_tensors
        dy, dsummed, _ = grads
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if dy is None:  # only the sum was used
            if dsummed is None:
                return None, None, None, None, None, None
            dx, dresidual = (dsummed.to(dtype) for dtype in ctx.dtypes)
            need_weight = need_bias = False
            dweight = dbias = None
        else:
            x_dtype, residual_dtype = ctx.dtypes
            other = residual_dtype if x_dtype == summed.dtype else x_dtype
            whole, cast, dweight, dbias = layer_norm_bwd(
                equal_rows(dy),
                None if dsummed is None else equal_rows(dsummed),
                summed,
                weight.contiguous(),
                statistics,
                need_x or need_residual,
                None if other == summed.dtype else other,
                need_weight or need_bias,
            )
            dx = whole if x_dtype == summed.dtype else cast
            dresidual = whole if residual_dtype == summed.dtype else cast
        return (
            dx if need_x else None,
            dresidual if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    dtype = output_dtype(x.dtype, weight, bias)
    if dtype is None:
        return NotImplemented
    if needs_gradient(x, weight, bias):
        return apply(_LayerNorm, x, weight, bias, eps, dtype)[0]
    return layer_norm_fwd(
        equal_rows(x), None, weight.contiguous(), bias.contiguous(), eps, dtype, False
    )[0]


def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Any:
    summed_dtype = torch.promote_types(x.dtype, residual.dtype)
    dtype = output_dtype(summed_dtype, weight, bias)
    if dtype is None or summed_dtype not in (x.dtype, residual.dtype):
        return NotImplemented
    if needs_gradient(x, residual, weight, bias):
        return apply(_AddLayerNorm, x, residual, weight, bias, eps, dtype)[:2]
    return layer_norm_fwd(
        equal_rows(x),
        equal_rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        eps,
        dtype,
        False,
    )[:2]


_layer_norm = register_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    torch_ops.layer_norm,
    _layer_norm_triton,
)
_add_layer_norm = register_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor)",
    torch_ops.add_layer_norm,
    _add_layer_norm_triton,
)


def check_affine(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError where weight or bias does not have the shape of x's last dimension."""
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
        ``[..., C]`` in x's dtype (float32 under autocast on a GPU); statistics are accumulated in
        float32.

    Raises:
        ValueError: weight or bias does not match x's last dimension.
    """
    check_affine(x, weight, bias)
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """LayerNorm of ``x + residual``, and the sum itself, in one pass.

    Args:
        x, residual: ``[..., C]``, of one shape. Of two dtypes, the sum has the wider one.
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
    check_affine(x, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)
