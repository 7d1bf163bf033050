"""PyTorch's own ops for low-bit weights on a CPU, each with the layout of weights that it reads.

int8 weights ``[N, K]``, with a scale an output, are multiplied with activations that are rounded to
8 bits as well, each row x_i of them with a step and a zero of its own,

    x_i  ~  step_i (u_i + zero_i),            u_i integers in 0 .. levels
    x_i W^T  ~  step_i (u_i q^T) scale + step_i zero_i sum_k W^T

so that a row comes out the same, but for the last bits, whatever rows are evaluated with it.
Without VNNI the CPU adds pairs of products in 16 bits, where 255 * 127 * 2 saturates: `levels` is
then 127 instead of 255.

The integer products leave a single row to a single thread. So few rows are multiplied in float32,
with activations rounded in the same way, by an op that divides the work: see `Bags`.

fp16 weights are multiplied in float32. Nothing here has a gradient.
"""

import functools
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

FULL, REDUCED = 255, 127  # levels of activations
# Outputs that are packed at a time: bounds what exists in float32.
_BLOCK = 8192
_STRIP = 64  # outputs that `Bags` sums at a time; as many float32 fit into a core's registers


class Packed(ABC):
    """A weight in the layout of one op, with its bias.

    Attributes:
        source: the tensors that were packed, each with its count of writes then, where their owner
            keeps them and has set it.
    """

    source: tuple[tuple[Tensor, int], ...] = ()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of float32 ``[M, K]``: float32 ``[M, N]``."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that was packed, value for value."""


class Int8Kind(Packed):
    """8-bit activations and weights; a subclass multiplies the integers.

    Attributes:
        name: of PyTorch's op.
    """

    name: ClassVar[str]

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, levels: int) -> None:
        self._bias, self._levels = bias, levels
        self._pack(weight, scale)
        # sum_k W^T, a hundred times as fast as PyTorch sums integers
        self._sums = self._multiply(full((1, weight.shape[1]), 1.0))

    def __call__(self, x: Tensor) -> Tensor:
        # The range holds 0, and is never empty.
        low = x.amin(1, keepdim=True).clamp_max_(-1e-30)
        step = (x.amax(1, keepdim=True).clamp_min_(0) - low).mul_(1 / self._levels)
        zero = (low / step).round_()
        product = self._multiply((x / step).sub_(zero))
        offset = zero.mul_(step)
        if self._bias is None:
            rest = offset * self._sums
        else:
            rest = torch.addcmul(self._bias, offset, self._sums)
        return rest.addcmul_(product, step)

    @abstractmethod
    def _pack(self, weight: Tensor, scale: Tensor) -> None:
        """Lay the weight out."""

    @abstractmethod
    def _multiply(self, levels: Tensor) -> Tensor:
        """Values in 0 .. levels, and half of one more, rounded, times the weight."""


class Fbgemm(Int8Kind):
    """``quantized.linear_*``: blocks laid out for the CPU's integer instructions."""

    name = "quantized.linear"

    def _pack(self, weight: Tensor, scale: Tensor) -> None:
        zeros = torch.zeros(len(weight), dtype=torch.long, device="cpu")
        with warnings.catch_warnings():
            # Tensors of these types are announced for removal; `int8_ops` copes with that.
            warnings.simplefilter("ignore")
            wrapped = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self._packed: Any = torch.ops.quantized.linear_prepack(wrapped, None)
        self._dynamic = torch.ops.quantized.linear_dynamic.default
        self._static = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().__call__(x)
        # The op's one range for all rows is this row's: the same numbers in a third of the calls.
        try:
            product: Tensor = self._dynamic(x, self._packed, self._levels == REDUCED)
        except RuntimeError:  # it refuses what is not a number, which is to come out as that
            return super().__call__(x)
        return product if self._bias is None else product.add_(self._bias)

    def _multiply(self, levels: Tensor) -> Tensor:
        product: Tensor = self._static(levels, 1.0, 0, self._packed)
        return product

    def weight(self) -> Tensor:
        unpacked: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()
        return unpacked


class Onednn(Int8Kind):
    """``onednn.qlinear_pointwise``, which also knows the CPU's matrix tiles (AMX)."""

    name = "onednn.qlinear"

    def _pack(self, weight: Tensor, scale: Tensor) -> None:
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = scale
        self._zeros = torch.zeros(len(weight), dtype=torch.int32, device="cpu")

    def _multiply(self, levels: Tensor) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels.round_().clamp_(0, FULL).to(torch.uint8),  # 256 would come out as 0
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

    def weight(self) -> Tensor:
        return self._packed.to_dense().t().contiguous()


class Bags(Int8Kind):
    """``quantized.embedding_bag_byte``: x W^T as sums of W^T's rows, each with its x_k.

    The op is made for recommendation models: a *bag* sums rows of a table of bytes, weighted, in
    float32, and threads share the bags. Here a bag is a strip of outputs, and a row of the table
    what one input adds to them: the weights are read in one stream, by all threads, and the
    strip's sums stay in registers.
    """

    name = "quantized.embedding_bag_byte"

    def _pack(self, weight: Tensor, scale: Tensor) -> None:
        outputs, inputs = weight.shape
        strips = -(-outputs // _STRIP)
        self._outputs, self._scale = outputs, scale
        # Behind a row's bytes u stand its own scale and offset: u - 128 is the weight.
        table = weight.new_full((strips, inputs, _STRIP + 8), 128, dtype=torch.uint8)
        ends = torch.tensor([1.0, -128.0], dtype=torch.float32, device="cpu")
        table[:, :, _STRIP:] = ends.view(torch.uint8)
        shifted = weight.view(torch.uint8) ^ 128
        whole = outputs // _STRIP
        table[:whole, :, :_STRIP] = shifted[: whole * _STRIP].view(whole, _STRIP, inputs).mT
        if whole < strips:
            table[whole, :, : outputs - whole * _STRIP] = shifted[whole * _STRIP :].t()
        self._table = table.view(-1, _STRIP + 8)
        self._inputs = inputs
        self._sum = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().__call__(x)
        # As in `Fbgemm`: one range, and the same numbers, by fewer calls.
        try:
            step, zero = torch._choose_qparams_per_tensor(x, self._levels == REDUCED)
            rounded = torch.fake_quantize_per_tensor_affine(x, step, zero, 0, FULL)
        except RuntimeError:
            return super().__call__(x)
        product = self._products(rounded)
        if self._bias is None:
            return product.mul_(self._scale)
        return torch.addcmul(self._bias, product, self._scale)

    def _multiply(self, levels: Tensor) -> Tensor:
        return self._products(levels.round_()).mul_(self._scale)

    def _products(self, x: Tensor) -> Tensor:
        """``x q^T`` ``[M, N]`` in float32."""
        rows = len(x)
        indices, offsets = _bags(rows, len(self._table) // self._inputs, self._inputs)
        weights = x[:, None].expand(rows, len(offsets) // rows, self._inputs).reshape(-1)
        sums: Tensor = self._sum(self._table, indices, offsets, False, 0, False, weights)
        return sums.view(rows, -1)[:, : self._outputs]

    def weight(self) -> Tensor:
        strips = self._table.view(-1, self._inputs, _STRIP + 8)[:, :, :_STRIP]
        rows = strips.mT.reshape(-1, self._inputs)[: self._outputs]
        return (rows ^ 128).view(torch.int8)


@functools.lru_cache(maxsize=64)
def _bags(rows: int, strips: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Of the table's rows, those of each bag, one bag behind the other; and where each begins."""
    with torch.inference_mode(False):
        count = strips * inputs
        indices = torch.arange(count, dtype=torch.int32, device="cpu").repeat(rows)
        return indices, torch.arange(0, rows * count, inputs, dtype=torch.int32, device="cpu")


class Int8(Packed):
    """One op for few rows and another for more, each laid out when it is first needed.

    A model that has evaluated both prompts and single tokens so holds its int8 weights twice.

    Args:
        few: the op up to ``most`` rows.
        many: the op from there on.
        levels: of activations in both, so that a row comes out the same in either.
        rows: of which call the layout is needed first.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rows: int,
        *,
        few: type[Int8Kind],
        many: type[Int8Kind],
        most: int,
        levels: int,
    ) -> None:
        self._kinds, self._most = (few, many), most
        self._scale, self._bias, self._levels = scale, bias, levels
        self._ops: list[Int8Kind | None] = [None, None]
        self._lay_out(rows > most, weight)

    def __call__(self, x: Tensor) -> Tensor:
        which = len(x) > self._most
        op = self._ops[which]
        if op is None:
            op = self._lay_out(which, self.weight())
        return op(x)

    def _lay_out(self, which: bool, weight: Tensor) -> Int8Kind:
        op = self._kinds[which](weight, self._scale, self._bias, self._levels)
        self._ops[which] = op
        return op

    def weight(self) -> Tensor:
        return next(op for op in self._ops if op is not None).weight()


class Fp16(Packed):
    """``quantized.linear_dynamic_fp16``: weights widened in registers, float32 arithmetic."""

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


def full(shape: tuple[int, ...], value: float) -> Tensor:
    """Of the ops' dtype and device, whatever the process's defaults are."""
    return torch.full(shape, value, dtype=torch.float32, device="cpu")
