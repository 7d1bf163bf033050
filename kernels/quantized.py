"""Linear layers with low-bit weights: PyTorch's own ops, chosen by what they take on this machine.

The forms are those of `gpt2fast.kernels.packing`, output-major ``[N, K]``: int8 with a scale an
output, fp16, int4 with a scale a group. The ops, with their layouts, are in
`gpt2fast.kernels.quantized_ops`; which of them are there, right and fast is found by trying.
"""

import functools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels.packing import dequantize
from gpt2fast.kernels.quantized_ops import (
    FULL,
    REDUCED,
    Bags,
    Fbgemm,
    Fp16,
    Int8,
    Int8Kind,
    Onednn,
    Packed,
    full,
)

_BLOCK = 8192  # outputs that are dequantised at a time: bounds what exists in float32

_KINDS: dict[str, type[Int8Kind]] = {kind.name: kind for kind in (Fbgemm, Onednn, Bags)}


def plain_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """``x W^T`` by dequantising a block of outputs at a time: any form, any device.

    Args:
        x: ``[M, K]``, of a floating dtype, in which the product is computed.
        weight, scale, bits: as `gpt2fast.kernels.packing.Matrix` has them, without layers.
    """
    parts = weight.split(_BLOCK)
    scales = [None] * len(parts) if scale is None else scale.split(_BLOCK)
    products = [
        F.linear(x, dequantize(part, part_scale, bits).to(x.dtype))
        for part, part_scale in zip(parts, scales, strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


def pack(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, rows: int
) -> Packed | None:
    """The weight in the layout of the fastest op; None where `plain_linear` has to serve.

    Args:
        weight, scale, bits: as for `plain_linear`, on the CPU.
        bias: float32 ``[N]`` or None.
        rows: of the first call, for which it is laid out.
    """
    if bits == 8 and scale is not None and (choice := int8_choice()) is not None:
        return choice.lay_out(weight, scale, bias, rows)
    if bits == 16 and fp16_packs():
        return Fp16(weight, bias)
    return None


@functools.cache
def fp16_packs() -> bool:
    """Whether this PyTorch has `Fp16`'s ops and they multiply correctly here."""
    weight = _pattern(64, 64).half()
    x = _pattern(3, 64)
    try:
        return torch.allclose(Fp16(weight, None)(x), x @ weight.float().t(), rtol=1e-3, atol=1e-3)
    except (RuntimeError, AttributeError):
        return False


class Int8Choice(NamedTuple):
    """The op for up to ``most`` rows, if another than the one for many; and levels of both."""

    few: type[Int8Kind] | None
    most: int
    many: type[Int8Kind]
    levels: int

    def __str__(self) -> str:
        few = "" if self.few is None else f"{self.few.name} up to {self.most} rows, then "
        return f"{few}{self.many.name}, {self.levels} levels of activations"

    def lay_out(self, weight: Tensor, scale: Tensor, bias: Tensor | None, rows: int) -> Packed:
        """For `pack`, which has the arguments."""
        few, most, many, levels = self
        if few is None:
            return many(weight, scale, bias, levels)
        return Int8(weight, scale, bias, rows, few=few, many=many, most=most, levels=levels)


@functools.cache
def int8_choice() -> Int8Choice | None:
    """The fastest of `int8_ops` for 128 tokens after a prompt of as many; None if there is none."""
    times = int8_ops()
    if not times:
        return None
    alone = times.get(Bags.name, {"one row": float("inf")})["one row"]

    def cost(name: str) -> float:
        return 128 * min(times[name]["one row"], alone) + times[name]["128 rows"]

    best = min(times, key=cost)
    many, levels = _KINDS[best], int(times[best]["levels"])
    if many is Bags or times[best]["one row"] <= alone:
        return Int8Choice(None, 0, many, levels)
    return Int8Choice(Bags, _most_rows(many, levels), many, levels)


@functools.cache
def int8_ops() -> dict[str, dict[str, float]]:
    """What this machine's int8 ops take, measured at the first call, in some milliseconds.

    Returns:
        for each op that is there and right: "levels" of its activations, and the milliseconds that
        a 768 by 768 matrix takes with "one row" and "128 rows".
    """
    table = {}
    many = _pattern(128, 768)
    with torch.inference_mode(False), torch.no_grad():
        for kind in _KINDS.values():
            try:
                levels = FULL if _is_exact(kind, FULL) else REDUCED
                if levels == REDUCED and not _is_exact(kind, REDUCED):
                    continue
                packed = _square(kind, levels)
                one, more = _milliseconds(packed, many[:1]), _milliseconds(packed, many)
            except (RuntimeError, AttributeError):
                continue  # this PyTorch, or this processor, does not have it
            table[kind.name] = {"levels": levels, "one row": one, "128 rows": more}
    return table


def _most_rows(many: type[Int8Kind], levels: int) -> int:
    """Up to how many rows, as measured, `Bags` is the faster one: it takes its time for each."""
    x = _pattern(16, 768)
    with torch.inference_mode(False), torch.no_grad():
        few, other = _square(Bags, levels), _square(many, levels)
        for rows in (2, 4, 8, 16):
            if _milliseconds(few, x[:rows]) > _milliseconds(other, x[:rows]):
                return rows // 2
    return 16


def _square(kind: type[Int8Kind], levels: int) -> Packed:
    weight = _pattern(768, 768).mul_(127).to(torch.int8)
    return kind(weight, full((768,), 1 / 127), None, levels)


def _is_exact(kind: type[Int8Kind], levels: int) -> bool:
    """Whether the largest activations and weights are summed exactly, in each sign."""
    weight = full((64, 256), 127).to(torch.int8)
    weight[1::2] = -127
    top = full((2, 256), levels)
    product = kind(weight, full((64,), 1), None, levels)._multiply(top.clone())
    return torch.allclose(product, top @ weight.float().t(), rtol=1e-5)


def _milliseconds(op: Packed, x: Tensor) -> float:
    """The best of some calls, after a first one: more of short ones, which others disturb more."""
    op(x)
    best = float("inf")
    for _ in range(24 if len(x) == 1 else 6):
        start = time.perf_counter()
        op(x)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def _pattern(rows: int, columns: int) -> Tensor:
    """Values in -1 .. 1, without touching the state of random numbers."""
    numbers = torch.arange(1, rows * columns + 1, dtype=torch.float32, device="cpu")
    return numbers.mul_(0.7548777).sin_().view(rows, columns)
