"""Linear layers as the PyTorch runner calls them: each the op that reads its weights fastest.

A weight stays where the model has it, mapped from a file or shared with other models: nothing is
packed, so an engine on a CPU costs no second copy of the weights. What differs is the arithmetic.
Where the CPU has no 16-bit matrix products, PyTorch's are one to two orders of magnitude slower
than its float32 ones. There activations are float32, and 16-bit weights are cast on the way: one
matrix at a time, into a buffer that all layers share.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast.layers import Conv1D

Linear = Callable[[Tensor], Tensor]  # [M, K] -> [M, N], bias included

_HEAD_ROWS = 4096  # of a head that is cast piece by piece
_DIRECT_HEAD_ROWS = 2  # of hidden states, up to which a 16-bit head is read as it is


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has fast matrix products of ``dtype`` there."""
    if device.type != "cpu":
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class Linears:
    """Makes the layers of one model.

    Attributes:
        dtype: of activations: the weights' own, or float32 where that has no fast products.
    """

    def __init__(self, weights: torch.dtype, device: torch.device) -> None:
        self.dtype = weights if multiplies(weights, device) else torch.float32
        self._casts = self.dtype != weights
        self._buffer = torch.empty(0, dtype=self.dtype, device=device)

    def layer(self, module: nn.Module) -> Linear:
        """The layer of a `Conv1D`, or a module that is called as it is."""
        if not isinstance(module, Conv1D):
            return module
        weight, bias = module.weight.detach(), module.bias.detach()  # [K, N], [N]
        if not self._casts:
            return lambda x: torch.addmm(bias, x, weight)
        self._reserve(weight.numel())
        wide_bias = bias.to(self.dtype)
        direct = weight.dtype == torch.bfloat16

        def cast(x: Tensor) -> Tensor:
            if direct and len(x) == 1:
                # The one product of bfloat16 that is as fast as float32's: read down the columns.
                return torch.mv(weight.t(), x[0].bfloat16()).to(x.dtype).add_(wide_bias)[None]
            wide = self._buffer[: weight.numel()].view(weight.shape)
            return torch.addmm(wide_bias, x, wide.copy_(weight))

        return cast

    def head(self, weight: Tensor) -> Linear:
        """Logits of ``[M, C]``, float32 ``[M, V]``, from the head's weight ``[V, C]``."""
        weight = weight.detach()
        if not self._casts:
            return lambda x: F.linear(x, weight).float()
        rows = min(len(weight), _HEAD_ROWS)
        self._reserve(rows * weight.shape[1])

        def cast(x: Tensor) -> Tensor:
            if len(x) <= _DIRECT_HEAD_ROWS:
                return F.linear(x.to(weight.dtype), weight).float()
            logits = x.new_empty(len(x), len(weight))
            for part, out in zip(weight.split(rows), logits.split(rows, 1), strict=True):
                wide = self._buffer[: part.numel()].view(part.shape)
                torch.mm(x, wide.copy_(part).t(), out=out)
            return logits

        return cast

    def _reserve(self, size: int) -> None:
        if size > len(self._buffer):
            self._buffer = self._buffer.new_empty(size)
