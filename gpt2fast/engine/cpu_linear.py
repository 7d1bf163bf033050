"""Linear layers as the PyTorch runner calls them: each the op that reads its weights fastest.

A weight stays where the model has it, mapped from a file or shared with other models: nothing is
packed, so an engine on a CPU costs no second copy of the weights. What differs is the arithmetic.
Where the CPU has no 16-bit matrix products, PyTorch's are one to two orders of magnitude slower
than its float32 ones. There activations are float32, and 16-bit weights are cast on the way: one
matrix at a time, into a buffer that all layers share.

Products of few rows should cost what reading the weights costs, which PyTorch's own choice of a
library is often far from in float32. Which op is near it differs between processors, with their
threads and with the rows: it is measured, on small matrices, when it is first needed.
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

# What is measured, for as many rows and those fewer. With more than the last of them arithmetic
# decides, not the weights: layers multiply as PyTorch does, heads as with the last.
_MEASURED_ROWS = (1, 4, 16)

Buffers = dict[tuple[int, ...], Tensor]  # by their sizes


class Linear(ABC):
    """``x W + b`` of x ``[M, K]``, for one matrix W ``[K, N]``."""

    @abstractmethod
    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """The product ``[M, N]``: in ``out``, or elsewhere."""

    @abstractmethod
    def accumulate(self, x: Tensor, total: Tensor) -> None:
        """Add the product to ``total`` ``[M, N]``."""

    def for_a_row(self, buffers: Buffers) -> "RowLinear | None":
        """The same for one row, with less around it, where there is such a thing."""
        return None


class _Plain(Linear):
    """On the weight as it lies, in its own dtype."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        narrow = weight.device.type == "cpu" and weight.dtype != torch.float32
        self._by_columns = narrow and _columns_are_faster(weight.dtype)
        self._divisible = _is_dense_float32(weight)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self._by_columns and len(x) == 1:
            torch.addmv(self._bias, self._weight.t(), x[0], out=out[0])
            return out
        if self._divisible and (parts := _parts(*x.shape)) > 1:
            return torch.add(_in_parts(x, self._weight, parts), self._bias, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)

    def accumulate(self, x: Tensor, total: Tensor) -> None:
        total.add_(self._bias)
        if self._by_columns and len(x) == 1:
            total[0].addmv_(self._weight.t(), x[0])
        elif self._divisible and (parts := _parts(*x.shape)) > 1:
            total.add_(_in_parts(x, self._weight, parts))
        else:
            total.addmm_(x, self._weight)

    def for_a_row(self, buffers: Buffers) -> "RowLinear | None":
        return RowLinear(self._weight, self._bias, buffers) if self._divisible else None


class RowLinear:
    """``x W + b`` of one row in float32, by the present number of threads.

    After a product has swept the caches, making a view takes as long as adding two rows: here all
    views are made beforehand.

    Args:
        buffers: of other layers of the model, which are never multiplied at once.

    Attributes:
        shape: of x.
    """

    def __init__(self, weight: Tensor, bias: Tensor, buffers: Buffers) -> None:
        inputs, outputs = weight.shape
        parts = _parts(1, inputs)
        self.shape = (1, inputs) if parts == 1 else (parts, 1, inputs // parts)
        self._bias = bias
        self._weight = weight if parts == 1 else weight.view(parts, -1, outputs)
        size = (0 if parts == 1 else parts, 1, outputs)
        if size not in buffers:
            buffers[size] = weight.new_empty(size)
        self._products = buffers[size]
        self._parts = self._products.unbind(0)

    def into(self, x: Tensor, out: Tensor) -> None:
        """The product, in ``out`` ``[1, N]``."""
        if not self._parts:
            torch.addmm(self._bias, x, self._weight, out=out)
            return
        torch.bmm(x, self._weight, out=self._products)
        torch.add(self._parts[0], self._bias, out=out)
        for part in self._parts[1:]:
            out.add_(part)

    def accumulate(self, x: Tensor, total: Tensor) -> None:
        """Add the product to ``total`` ``[1, N]``."""
        total.add_(self._bias)
        if not self._parts:
            total.addmm_(x, self._weight)
            return
        torch.bmm(x, self._weight, out=self._products)
        for part in self._parts:
            total.add_(part)


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
        self._float32 = _is_dense_float32(weight)
        if buffer is not None:
            buffer.reserve(self._rows * weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight
        if self._float32 and _takes_onednn(len(x)):
            return _onednn(x, weight)
        if self._buffer is None or len(x) <= _DIRECT_HEAD_ROWS:
            return F.linear(x.to(weight.dtype), weight).float()
        logits = x.new_empty(len(x), len(weight))
        pieces = weight.split(self._rows), logits.split(self._rows, 1)
        for part, out in zip(*pieces, strict=True):
            torch.mm(x, self._buffer.cast(part).t(), out=out)
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

    return _is_faster(
        lambda weight: torch.addmv(bias, weight.t(), x[0]),
        lambda weight: torch.addmm(bias, x, weight),
        weight[None],
        1.3,
    )


def _is_dense_float32(weight: Tensor) -> bool:
    """Whether there is more than one op for products of a weight, as it lies."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _measured_rows(rows: int) -> int:
    return next((few for few in _MEASURED_ROWS if rows <= few), _MEASURED_ROWS[-1])


def _parts(rows: int, inputs: int) -> int:
    """In how many parts of its ``inputs`` to multiply, so that each thread has one; 1 for whole."""
    threads = torch.get_num_threads()
    if threads == 1 or not 0 < rows <= _MEASURED_ROWS[-1]:
        return 1
    if not _parts_are_faster(threads, _measured_rows(rows)):
        return 1
    return next(n for n in range(threads, 0, -1) if inputs % n == 0)


def _in_parts(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """``x W`` ``[M, N]``: each thread multiplies with rows of W of its own."""
    rows, inputs = x.shape
    x = x.view(rows, parts, inputs // parts).transpose(0, 1)
    return torch.bmm(x, weight.view(parts, inputs // parts, -1)).sum(0)


@cache
def _parts_are_faster(threads: int, rows: int) -> bool:
    """Whether a product of few rows, which libraries leave to one thread or to ops made for many
    rows, is faster in parts: with a number of threads, in the process."""
    weights = _weights(rows)
    x = weights[0, :rows, :1024]
    parts = max(n for n in range(1, threads + 1) if x.shape[1] % n == 0)
    return parts > 1 and _is_faster(
        lambda weight: _in_parts(x, weight, parts), lambda weight: torch.mm(x, weight), weights
    )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` by the library that `F.linear` does not ask in float32, on W ``[V, C]`` unpacked.

    It takes bfloat16 inside where `F.linear` does: if `torch.set_float32_matmul_precision` says so.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def _takes_onednn(rows: int) -> bool:
    """Whether a float32 head multiplies so many rows by oneDNN."""
    enabled = bool(torch.backends.mkldnn.enabled)
    return enabled and _onednn_is_faster(torch.get_num_threads(), _measured_rows(rows))


@cache
def _onednn_is_faster(threads: int, rows: int) -> bool:
    """Whether a head of few rows is faster by oneDNN: with a number of threads, in the process."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch was built without it
        return False
    weights = _weights(rows).view(-1, 2048, 1024)
    x = weights[0, :rows]
    return _is_faster(
        lambda weight: _onednn(x, weight), lambda weight: F.linear(x, weight), weights
    )


def _weights(rows: int) -> Tensor:
    """Matrices to measure products of few rows with.

    One row costs what memory does: these are more than a core keeps in its caches. With more rows
    one matrix shows how an op goes through it.
    """
    return torch.ones(2 if rows == 1 else 1, 1024, 2048, dtype=torch.float32)


def _is_faster(
    op: Callable[[Tensor], object],
    than: Callable[[Tensor], object],
    weights: Tensor,
    times: float = 1.0,
) -> bool:
    """Whether ``op`` is so many times as fast, by the shortest of a few runs on each weight.

    Runs are short and timed one by one: where others use the processor too, some are undisturbed.
    Ops that are nearly level may come out either way, which costs nothing; a margin would leave the
    better one aside where it is disturbed.
    """
    shortest = {run: [float("inf")] * len(weights) for run in (op, than)}
    with torch.inference_mode():
        for _ in range(8):
            for run, seconds in shortest.items():
                for i, weight in enumerate(weights):
                    start = perf_counter()
                    run(weight)
                    seconds[i] = min(seconds[i], perf_counter() - start)
    return times * sum(shortest[op]) < sum(shortest[than])
