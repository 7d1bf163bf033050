"""Linear layers as the PyTorch runner calls them: each the op that reads its weights fastest.

A weight stays where the model has it, mapped from a file or shared with other models: nothing is
packed, so an engine on a CPU costs no second copy of the weights. What differs is the arithmetic.
Where the CPU has no 16-bit matrix products, PyTorch's are one to two orders of magnitude slower
than its float32 ones. There activations are float32, and 16-bit weights are cast on the way: one
matrix at a time, into a buffer that all layers share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast.kernels.torch_ops import multiplies_fast
from gpt2fast.layers import Conv1D
from gpt2fast.quantized_layers import QuantizedConv1D, QuantizedEmbedding, QuantizedHead, lay_out

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

_HEAD_ROWS = 3072  # of a head that is cast piece by piece
_DIRECT_HEAD_ROWS = 2  # of hidden states, up to which a 16-bit head is read as it is


class Linear(ABC):
    """``x W + b`` of x ``[M, K]``, for one matrix W ``[K, N]``."""

    @abstractmethod
    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """The product ``[M, N]``: in ``out``, or elsewhere."""

    @abstractmethod
    def accumulate(self, x: Tensor, total: Tensor) -> None:
        """Add the product to ``total`` ``[M, N]``."""


class _Plain(Linear):
    """On the weight as it lies, in its own dtype."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        narrow = weight.device.type == "cpu" and weight.dtype != torch.float32
        self._by_columns = narrow and _columns_are_faster(weight.dtype)
        self._divisible = _is_divisible(weight)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if len(x) == 1:
            if self._by_columns:
                torch.addmv(self._bias, self._weight.t(), x[0], out=out[0])
                return out
            if self._divisible and (parts := _parts(torch.get_num_threads(), x.shape[1])) > 1:
                return torch.add(self._in_parts(x, parts), self._bias, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)

    def accumulate(self, x: Tensor, total: Tensor) -> None:
        total.add_(self._bias)
        if len(x) == 1:
            if self._by_columns:
                total[0].addmv_(self._weight.t(), x[0])
                return
            if self._divisible and (parts := _parts(torch.get_num_threads(), x.shape[1])) > 1:
                total.add_(self._in_parts(x, parts))
                return
        total.addmm_(x, self._weight)

    def _in_parts(self, x: Tensor, parts: int) -> Tensor:
        """``x W`` of one row, ``[1, N]``: each thread multiplies with rows of W of its own."""
        weight = self._weight.view(parts, -1, self._weight.shape[1])
        return torch.bmm(x.reshape(parts, 1, -1), weight).sum(0)


class _LowBit(Linear):
    """A quantised module, which knows its own op."""

    def __init__(self, module: QuantizedConv1D) -> None:
        self._rows = module.rows

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return self._rows(x)

    def accumulate(self, x: Tensor, total: Tensor) -> None:
        total.add_(self._rows(x))


class _Cast(Linear):
    """On a 16-bit weight in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, buffer: "_Buffer") -> None:
        self._weight, self._bias, self._buffer = weight, bias.float(), buffer
        # The one product of bfloat16 that is as fast as float32's: with one row, down the columns.
        self._direct = weight.dtype == torch.bfloat16
        buffer.reserve(weight.numel())

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self._direct and len(x) == 1:
            return torch.add(self._bias, self._times(x), out=out)
        return torch.addmm(self._bias, x, self._buffer.cast(self._weight), out=out)

    def accumulate(self, x: Tensor, total: Tensor) -> None:
        total.add_(self._bias)
        if self._direct and len(x) == 1:
            total.add_(self._times(x))
        else:
            total.addmm_(x, self._buffer.cast(self._weight))

    def _times(self, x: Tensor) -> Tensor:
        """``x W`` of one row, ``[1, N]`` in the weight's dtype."""
        return torch.mv(self._weight.t(), x[0].to(self._weight.dtype))[None]


class _Head:
    """Logits from the head's weight ``[V, C]``."""

    def __init__(self, weight: Tensor, buffer: "_Buffer | None") -> None:
        self._weight, self._buffer = weight, buffer
        self._rows = min(len(weight), _HEAD_ROWS)
        self._divisible = buffer is None and _is_divisible(weight)
        if buffer is not None:
            buffer.reserve(self._rows * weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight
        if self._divisible and len(x) == 1:
            parts = _parts(torch.get_num_threads(), 0)
            if parts > 1:
                return self._in_parts(x, parts)
        if self._buffer is None or len(x) <= _DIRECT_HEAD_ROWS:
            return F.linear(x.to(weight.dtype), weight).float()
        logits = x.new_empty(len(x), len(weight))
        pieces = weight.split(self._rows), logits.split(self._rows, 1)
        for part, out in zip(*pieces, strict=True):
            torch.mm(x, self._buffer.cast(part).t(), out=out)
        return logits

    def _in_parts(self, x: Tensor, parts: int) -> Tensor:
        """Of one row: each thread multiplies with entries of the vocabulary of its own."""
        vocab_size, width = self._weight.shape
        share = vocab_size // parts
        logits = x.new_empty(1, vocab_size)
        even = logits[0, : parts * share].view(parts, 1, share)
        weight = self._weight[: parts * share].view(parts, share, width).transpose(1, 2)
        torch.bmm(x.expand(parts, 1, width), weight, out=even)
        if parts * share < vocab_size:
            torch.mm(x, self._weight[parts * share :].t(), out=logits[:, parts * share :])
        return logits


class Linears:
    """Makes the layers of one model.

    Attributes:
        dtype: of activations: the weights' own, or float32 where that has no fast products, as low
            bits have none on a CPU.
    """

    def __init__(self, model: "LanguageModel") -> None:
        weights, device = model.dtype, model.device
        low_bit = isinstance(model.lm_head, QuantizedHead)
        fast = multiplies_fast(weights, device) and not (low_bit and device.type == "cpu")
        self.dtype = weights if fast else torch.float32
        self._buffer = None if fast else _Buffer(device)
        if low_bit and device.type == "cpu":
            lay_out(model)

    def layer(self, module: Conv1D | QuantizedConv1D) -> Linear:
        if isinstance(module, QuantizedConv1D):
            return _LowBit(module)
        weight, bias = module.weight.detach(), module.bias.detach()
        if self._buffer is None:
            return _Plain(weight, bias)
        return _Cast(weight, bias, self._buffer)

    def head(self, module: nn.Linear | QuantizedHead) -> Callable[[Tensor], Tensor]:
        """Hidden states ``[M, C]`` to logits ``[M, V]`` in float32."""
        if isinstance(module, QuantizedHead):
            rows = module.rows
            return lambda x: rows(x).float()
        return _Head(module.weight.detach(), self._buffer)

    def embedding(self, module: nn.Embedding | QuantizedEmbedding) -> Callable[[Tensor], Tensor]:
        """Ids ``[M]`` to rows ``[M, C]``."""
        if isinstance(module, QuantizedEmbedding):
            return module.forward
        return partial(torch.embedding, module.weight.detach())


class _Buffer:
    """Room for one matrix in float32."""

    def __init__(self, device: torch.device) -> None:
        self._values = torch.empty(0, dtype=torch.float32, device=device)

    def reserve(self, size: int) -> None:
        if size > len(self._values):
            self._values = self._values.new_empty(size)

    def cast(self, matrix: Tensor) -> Tensor:
        """The matrix in float32, until the next call."""
        return self._values[: matrix.numel()].view(matrix.shape).copy_(matrix)


@cache
def _columns_are_faster(dtype: torch.dtype) -> bool:
    """Whether `addmv`, going down the columns, multiplies one row much faster than `addmm`.

    Measured, in milliseconds: between processors it is ten times faster or slower, and their
    names do not tell.
    """
    weight = torch.ones(512, 2048, dtype=dtype)
    x, bias = weight[:1, :512].contiguous(), weight[0]

    with torch.inference_mode():
        columns = _seconds(lambda: torch.addmv(bias, weight.t(), x[0]))
        return 1.3 * columns < _seconds(lambda: torch.addmm(bias, x, weight))


def _is_divisible(weight: Tensor) -> bool:
    """Whether a weight's rows may be multiplied apart."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _parts(threads: int, inputs: int) -> int:
    """In how many parts to multiply one float32 row, so that each thread has one; 1 for whole.

    Args:
        threads: those of PyTorch.
        inputs: they are divided evenly; 0 where something else is.
    """
    if threads == 1 or not _parts_are_faster(threads):
        return 1
    return next(n for n in range(threads, 0, -1) if inputs % n == 0)


@cache
def _parts_are_faster(threads: int) -> bool:
    """Whether a product of one row, which some libraries leave to one thread, is faster in parts.

    Measured, in milliseconds, once for a number of threads.
    """
    weight = torch.ones(4, 1024, 2048, dtype=torch.float32)  # more than a core keeps in its caches
    x = weight[0, :1, :1024].contiguous()
    parts = max(n for n in range(1, threads + 1) if 1024 % n == 0)

    def whole() -> None:
        for matrix in weight:
            torch.mm(x, matrix)

    def apart() -> None:
        for matrix in weight:
            torch.bmm(x.view(parts, 1, -1), matrix.view(parts, -1, 2048)).sum(0)

    with torch.inference_mode():
        return parts > 1 and 1.15 * _seconds(apart) < _seconds(whole)


def _seconds(op: Callable[[], object]) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(8):
        start = perf_counter()
        op()
        times.append(perf_counter() - start)
    return min(times)
