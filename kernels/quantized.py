"""Linear layers with low-bit weights: PyTorch's own ops, chosen by what they take on this machine.

The forms are those of `gpt2fast.kernels.packing`, output-major ``[N, K]``: int8 with a scale an
output, fp16, int4 with a scale a group. On a CPU int8 weights are multiplied with activations that
are rounded to 8 bits as well, each row x_i of them with a step and a zero of its own,

    x_i  ~  step_i (u_i + zero_i),            u_i integers in 0 .. levels
    x_i W^T  ~  step_i (u_i q^T) scale + step_i zero_i sum_k W^T

so that a row comes out the same, but for the last bits, whatever rows are evaluated with it.
Without VNNI the CPU adds pairs of products in 16 bits, where 255 * 127 * 2 saturates: `levels` is
then 127 instead of 255. Which is the case is found by trying.

fp16 weights are multiplied in float32. Nothing here has a gradient.
"""

import functools
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels.packing import dequantize

_FULL, _REDUCED = 255, 127
# Outputs that are packed, or dequantised, at a time: bounds what exists in float32.
_BLOCK = 8192


class Packed(ABC):
    """A weight in the layout of one op, with its bias.

    Attributes:
        source: the tensors that were packed, each with its count of writes then, where their owner
            keeps them and has set it.
    """

    name: ClassVar[str]
    source: tuple[tuple[Tensor, int], ...] = ()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of float32 ``[M, K]``: float32 ``[M, N]``."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that was packed, value for value."""


class _Int8(Packed):
    """8-bit activations and weights; a subclass multiplies the integers."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, levels: int) -> None:
        self._scale, self._bias, self._levels = scale, bias, levels
        self._inputs = weight.shape[1]
        self._pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        # The range holds 0, and is never empty.
        low = x.amin(1, keepdim=True).clamp_max_(-1e-30)
        step = (x.amax(1, keepdim=True).clamp_min_(0) - low).mul_(1 / self._levels)
        zero = (low / step).round_()
        product = self._multiply((x / step).sub_(zero))
        return self._combined(product, step, zero.mul_(step))

    @functools.cached_property
    def _sums(self) -> Tensor:
        """What ones come to, ``[1, N]``: a hundred times as fast as PyTorch sums integers."""
        return self._multiply(_full((1, self._inputs), 1.0))

    @abstractmethod
    def _pack(self, weight: Tensor) -> None:
        """Lay the weight out, in the calling thread alone: it may be one of several that do."""

    @abstractmethod
    def _multiply(self, levels: Tensor) -> Tensor:
        """Values in 0 .. levels, and half of one more, rounded, times the weight."""

    @abstractmethod
    def _combined(self, product: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        """``x W^T + b``, of `_multiply`'s product and what each row ``[M, 1]`` was rounded by."""


class Fbgemm(_Int8):
    """``quantized.linear_*``: blocks laid out for the CPU's integer instructions."""

    name = "quantized.linear"

    def _pack(self, weight: Tensor) -> None:
        # A view: copies of all matrices would leave as many holes in the process's memory. With one
        # scale, because `linear_prepack` takes microseconds to read each of several.
        integers = (
            _empty_integers()
            .clone()
            .set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
        )
        self._packed: Any = torch.ops.quantized.linear_prepack(integers, None)
        self._dynamic = torch.ops.quantized.linear_dynamic.default
        self._static = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().__call__(x)
        # The op's one range for all rows is this row's: the same numbers in a third of the calls.
        try:
            product: Tensor = self._dynamic(x, self._packed, self._levels == _REDUCED)
        except RuntimeError:  # it refuses what is not a number, which is to come out as that
            return super().__call__(x)
        return self._scaled(product)

    def _multiply(self, levels: Tensor) -> Tensor:
        product: Tensor = self._static(levels, 1.0, 0, self._packed)
        return product

    def _combined(self, product: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        return self._scaled(product.mul_(step).addcmul_(offset, self._sums))

    def _scaled(self, product: Tensor) -> Tensor:
        if self._bias is None:
            return product.mul_(self._scale)
        return torch.addcmul(self._bias, product, self._scale)

    def weight(self) -> Tensor:
        unpacked: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()
        return unpacked


class Onednn(_Int8):
    """``onednn.qlinear_pointwise``, which also knows the CPU's matrix tiles (AMX)."""

    name = "onednn.qlinear"

    def _pack(self, weight: Tensor) -> None:
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32, device="cpu")

    def _multiply(self, levels: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels.round_().clamp_(0, _FULL).to(torch.uint8),  # 256 would come out as 0
            1.0,
            0,
            self._packed,
            self._scale,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product

    def _combined(self, product: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        if self._bias is None:
            rest = offset * self._sums
        else:
            rest = torch.addcmul(self._bias, offset, self._sums)
        return rest.addcmul_(product, step)

    def weight(self) -> Tensor:
        return self._packed.to_dense().t().contiguous()


class Fp16(Packed):
    """``quantized.linear_dynamic_fp16``: weights widened in registers, float32 arithmetic."""

    name = "quantized.linear_dynamic_fp16"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        pack = torch.ops.quantized.linear_prepack_fp16
        parts = weight.split(_BLOCK)
        biases = [None] * len(parts) if bias is None else bias.split(_BLOCK)
        self._parts = [
            pack(part.float(), part_bias) for part, part_bias in zip(parts, biases, strict=True)
        ]
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        products: list[Tensor] = [self._multiply(x, part) for part in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def weight(self) -> Tensor:
        unpack = torch.ops.quantized.linear_unpack_fp16
        return torch.cat([unpack(part)[0].half() for part in self._parts])


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


def pack(weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int) -> Packed | None:
    """The weight in the layout of the fastest op; None where `plain_linear` has to serve.

    Args:
        weight, scale, bits: as for `plain_linear`, on the CPU.
        bias: float32 ``[N]`` or None.
    """
    if bits == 8 and scale is not None and (op := int8_op()) is not None:
        kind, levels = op
        return kind(weight, scale, bias, levels)
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


@functools.cache
def int8_op() -> tuple[type[Fbgemm] | type[Onednn], int] | None:
    """The fastest of `int8_ops` for 128 tokens after a prompt of as many, and its levels.

    Returns:
        None if there is none.
    """
    rows = int8_ops()
    if not rows:
        return None
    name = min(rows, key=lambda op: 128 * rows[op]["one row"] + rows[op]["128 rows"])
    kinds: tuple[type[Fbgemm] | type[Onednn], ...] = Fbgemm, Onednn
    kind = next(kind for kind in kinds if kind.name == name)
    return kind, int(rows[name]["levels"])


@functools.cache
def int8_ops() -> dict[str, dict[str, float]]:
    """What this machine's int8 ops take, measured at the first call, in some milliseconds.

    Returns:
        for each op that is there and right: "levels" of its activations, and the milliseconds that
        a 768 by 768 matrix takes one thread with "one row" and "128 rows".
    """
    table = {}
    with torch.inference_mode(False), torch.no_grad(), _one_thread():
        weight = torch.arange(768 * 768, dtype=torch.int32, device="cpu").mul_(73).to(torch.int8)
        weight, scale = weight.view(768, 768), _full((768,), 1 / 127)
        many = _pattern(128, 768)
        for kind in (Fbgemm, Onednn):
            try:
                levels = _FULL if _is_exact(kind, _FULL) else _REDUCED
                if levels == _REDUCED and not _is_exact(kind, _REDUCED):
                    continue
                packed = kind(weight, scale, None, levels)
                one, more = _milliseconds(packed, many[:1]), _milliseconds(packed, many)
            except (RuntimeError, AttributeError):
                continue  # this PyTorch, or this processor, does not have it
            table[kind.name] = {"levels": levels, "one row": one, "128 rows": more}
    return table


def _is_exact(kind: type[Fbgemm] | type[Onednn], levels: int) -> bool:
    """Whether the largest activations and weights are summed exactly, in each sign."""
    weight = _full((64, 256), 127).to(torch.int8)
    weight[1::2] = -127
    top = _full((2, 256), levels)
    product = kind(weight, _full((64,), 1), None, levels)._multiply(top.clone())
    return torch.allclose(product, top @ weight.float().t(), rtol=1e-5)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where other programs run, threads wait for each other, and that is all one would measure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _milliseconds(op: Packed, x: Tensor) -> float:
    """The best of a few calls, after a first one."""
    op(x)
    best = float("inf")
    for _ in range(24 if len(x) == 1 else 4):  # other programs disturb short calls more
        start = time.perf_counter()
        op(x)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def _pattern(rows: int, columns: int) -> Tensor:
    """Values in -1 .. 1, without touching the state of random numbers."""
    numbers = torch.arange(1, rows * columns + 1, dtype=torch.float32, device="cpu")
    return numbers.mul_(0.7548777).sin_().view(rows, columns)


@functools.cache
def _empty_integers() -> Tensor:
    """An empty tensor of PyTorch's quantised integers, with a scale of 1."""
    with warnings.catch_warnings(), torch.inference_mode(False):
        # Tensors of these types are announced for removal; `int8_ops` copes with that.
        warnings.simplefilter("ignore")
        return torch._empty_affine_quantized(
            (0,), scale=1.0, zero_point=0, dtype=torch.qint8, device="cpu"
        )


def _full(shape: tuple[int, ...], value: float) -> Tensor:
    """Of the ops' dtype and device, whatever the process's defaults are."""
    return torch.full(shape, value, dtype=torch.float32, device="cpu")
