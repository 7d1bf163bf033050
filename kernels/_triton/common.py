"""Device functions that several kernels share."""

import triton
import triton.language as tl

# Constants stand second in a product: constexpr * tensor fails in the interpreter of Triton 3.7.
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E); the chip has exp2
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 x; exact at both ends, where exp2 is 0 or infinite."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def gelu(x):
    """GELU in the tanh form, of float32 x: (1 + tanh(z)) / 2 is sigmoid(2z)."""
    return x * sigmoid((x + x * x * x * _CUBIC) * _TWO_SQRT_2_OVER_PI)


@triton.jit
def gelu_and_grad(x):
    """`gelu` and its derivative, of float32 x."""
    square = x * x
    gate = sigmoid(x * (1.0 + square * _CUBIC) * _TWO_SQRT_2_OVER_PI)
    slope = (1.0 + square * (3.0 * _CUBIC)) * _TWO_SQRT_2_OVER_PI
    value = x * gate
    return value, gate + value * (1.0 - gate) * slope
