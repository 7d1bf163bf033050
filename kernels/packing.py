"""Weights in the layouts that decoding reads them in, and their low-bit forms.

Decoding reads every weight once a token, so a matrix lies output-major, ``[N, K]``: each output's
inner product is one contiguous stream. Low-bit forms are symmetric, rounded to nearest:

    int8    w[n, k] = scale[n] * q[n, k]                       q in [-127, 127], a scale an output
    int4    w[n, k] = scale[n, k // 128] * (q[n, k] - 8)       q in [0, 15], a scale a group of 128

Two int4 values share a byte: the even k in the low half, the odd one in the high half. The last
group of a row may be shorter than 128.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INT4_GROUP = 128


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of each of L layers, packed for decoding.

    Attributes:
        data: ``[L, N, K]`` in float32, float16 or bfloat16; int8 ``[L, N, K]``; or, for int4,
            uint8 ``[L, N, K / 2]``. Contiguous.
        scale: None; float32 ``[L, N]`` for int8; float32 ``[L, N, ceil(K / 128)]`` for int4.
        bias: ``[L, N]``, or None for the head.
        bits: 32, 16, 8 or 4.
    """

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None
    bits: int

    @property
    def outputs(self) -> int:
        """N."""
        return self.data.shape[1]

    @property
    def inputs(self) -> int:
        """K."""
        return self.data.shape[2] * (2 if self.bits == 4 else 1)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Data, scale and bias for a kernel; the data again for what is not there, and not read."""
        # Device functions of Triton 3.6 return no tuple that holds a None.
        scale, bias = (self.data if part is None else part for part in (self.scale, self.bias))
        return self.data, scale, bias


@dataclass(frozen=True)
class DecodeWeights:
    """Everything a decoding step reads of a model.

    C is the width, F the inner width of the perceptron, V the vocabulary, P the positions.

    Attributes:
        wte, wpe: embeddings ``[V, C]`` and ``[P, C]``, not quantised.
        ln_1, ln_2: LayerNorm's weight and bias, ``[L, 2, C]``.
        ln_f: ``[2, C]``.
        qkv, out, fc, proj: ``N, K`` = 3C, C; C, C; F, C; C, F.
        head: one layer, V, C. Its data may be ``wte`` itself.
        heads: attention heads.
        eps: of LayerNorm.
        scales: float32 ``[L]``, what attention scores are multiplied with.
    """

    wte: Tensor
    wpe: Tensor
    ln_1: Tensor
    ln_2: Tensor
    ln_f: Tensor
    qkv: Matrix
    out: Matrix
    fc: Matrix
    proj: Matrix
    head: Matrix
    heads: int
    eps: float
    scales: Tensor


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``[N, K]`` to int8.

    Returns:
        int8 ``[N, K]`` and float32 scales ``[N]``. A row of zeros has scale 1.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    rounded = (weight / scale[:, None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``[N, K]``, K even, to int4 in groups of 128.

    Returns:
        uint8 ``[N, K / 2]`` and float32 scales ``[N, ceil(K / 128)]``.
    """
    rows, inner = weight.shape
    groups = -(-inner // INT4_GROUP)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * INT4_GROUP - inner))
    grouped = padded.view(rows, groups, INT4_GROUP)
    scale = grouped.abs().amax(2) / 7
    scale = torch.where(scale > 0, scale, 1.0)
    q = (grouped / scale[:, :, None]).round().clamp(-8, 7).to(torch.int8) + 8
    q = q.view(rows, -1)[:, :inner].to(torch.uint8)
    return q[:, ::2] | (q[:, 1::2] << 4), scale


# Bits -> data and scale of ``[N, K]`` in that form.
FORMS: dict[int, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    16: lambda weight: (weight.half(), None),
    8: quantize_int8,
    4: quantize_int4,
}


def dequantize(data: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """``[..., N, K]`` in float32 from a matrix's ``data`` and ``scale``; the forms' definition."""
    if bits >= 16:
        return data.float()
    assert scale is not None
    if bits == 8:
        return data.float() * scale[..., None]
    q = torch.stack((data & 15, data >> 4), -1).flatten(-2).float() - 8
    return q * scale.repeat_interleave(INT4_GROUP, -1)[..., : q.shape[-1]]
