"""Selection at the tied language-model head: argmax and top-k of ``hidden @ weight.T``.

    argmax_v h_i . W_v        the k largest h_i . W_v and their v

For generation and for scoring by rank. The logits are compared as they are accumulated, in float32:
they are not rounded to the dtype of the inputs first, where the leading ones of 50257 would often
tie. NaN counts as larger than any number, as in ``torch.argmax`` and ``torch.topk``.

On a GPU, with 16-bit inputs, they are selected from tiles of logits that never leave the registers
(``_triton/lm_head_tiles.py``); in float32, where the tensor cores do not help, and for many rows of
a top-k, PyTorch's operators serve, a chunk of rows at a time. No gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels.lm_head import row_chunks, rows_of_unit_stride
from gpt2fast.kernels.registry import autocast_inputs, register_kernel, register_op

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_MAX_K = 128  # columns of a tile
# Rows of a top-k from which sorting every tile takes longer than PyTorch's selection. Predicted.
_KERNEL_MAX_TOPK_ROWS = 256
_UPCAST_ENTRIES = 4096  # of the vocabulary that are cast at a time: 12 MB at GPT-2's 768


def _float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` in float32 (float64 where they are), rounded to nothing less."""
    if hidden.dtype not in _KERNEL_DTYPES:
        return hidden @ weight.t()
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    hidden = hidden.float()
    return torch.cat([hidden @ part.float().t() for part in weight.split(_UPCAST_ENTRIES)], 1)


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Detached and in one dtype: autocast's where it is on, else that of hidden."""
    hidden, weight = hidden.detach(), weight.detach()
    if torch.amp.is_autocast_available(hidden.device.type):
        hidden, weight = autocast_inputs(hidden, weight)
    return hidden, weight.to(hidden.dtype)


def _without_autocast(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, *args: int
) -> Any:
    hidden, weight = _operands(hidden, weight)
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(hidden, weight, *args)
    return function(hidden, weight, *args)


def _argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    indices = hidden.new_empty(hidden.shape[0], dtype=torch.int64)
    for rows in row_chunks(hidden.shape[0], weight.shape[0]):
        indices[rows] = _float32_logits(hidden[rows], weight).argmax(1)
    return indices


def _topk(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = hidden.new_empty(hidden.shape[0], k, dtype=torch.float32)
    indices = hidden.new_empty(hidden.shape[0], k, dtype=torch.int64)
    for rows in row_chunks(hidden.shape[0], weight.shape[0]):
        values[rows], indices[rows] = _float32_logits(hidden[rows], weight).topk(k)
    return values, indices


_argmax_fwd = register_kernel(
    "lm_head_argmax_fwd(Tensor hidden, Tensor weight) -> Tensor",
    "lm_head_tiles:lm_head_argmax_fwd",
    lambda hidden, weight: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)


def _topk_fake(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[0], k, dtype=torch.float32),
        hidden.new_empty(hidden.shape[0], k, dtype=torch.int64),
    )


_topk_fwd = register_kernel(
    "lm_head_topk_fwd(Tensor hidden, Tensor weight, int k) -> (Tensor, Tensor)",
    "lm_head_tiles:lm_head_topk_fwd",
    _topk_fake,
)


def _lm_head_argmax_triton(hidden: Tensor, weight: Tensor) -> Tensor:
    """The op on our kernels; matrices of strided rows are copied."""
    hidden, weight = _operands(hidden, weight)
    if hidden.dtype not in _KERNEL_DTYPES:
        return NotImplemented
    result: Tensor = _argmax_fwd(rows_of_unit_stride(hidden), rows_of_unit_stride(weight))
    return result


def _lm_head_topk_triton(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The op on our kernels; matrices of strided rows are copied."""
    hidden, weight = _operands(hidden, weight)
    if (
        hidden.dtype not in _KERNEL_DTYPES
        or k > _KERNEL_MAX_K
        or hidden.shape[0] > _KERNEL_MAX_TOPK_ROWS
    ):
        return NotImplemented
    result: tuple[Tensor, Tensor] = _topk_fwd(
        rows_of_unit_stride(hidden), rows_of_unit_stride(weight), k
    )
    return result


_lm_head_argmax = register_op(
    "lm_head_argmax(Tensor hidden, Tensor weight) -> Tensor",
    functools.partial(_without_autocast, _argmax),
    _lm_head_argmax_triton,
)
_lm_head_topk = register_op(
    "lm_head_topk(Tensor hidden, Tensor weight, int k) -> (Tensor, Tensor)",
    functools.partial(_without_autocast, _topk),
    _lm_head_topk_triton,
)


def _check(hidden: Tensor, weight: Tensor) -> None:
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or not weight.shape[0]
    ):
        raise ValueError(
            f"expected hidden [N, C] and weight [V, C], V at least 1; got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )


def lm_head_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """The index of the largest of ``hidden @ weight.T`` in each row, without the logits tensor.

    Args:
        hidden: ``[N, C]``, final hidden states.
        weight: ``[V, C]``, the (tied) head.

    Returns:
        int64 ``[N]``: of equal logits the first, of a row with NaN the first NaN. Logits are
        compared in float32, before any rounding to the inputs' dtype.

    Raises:
        ValueError: the shapes do not agree, or the vocabulary is empty.
    """
    _check(hidden, weight)
    return _lm_head_argmax(hidden, weight)


def lm_head_topk(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``hidden @ weight.T`` in each row, without the logits tensor.

    Args:
        hidden: ``[N, C]``, final hidden states.
        weight: ``[V, C]``, the (tied) head.
        k: how many, from 1 to V. Up to 128 on the kernels; PyTorch serves more.

    Returns:
        float32 values ``[N, k]``, in descending order and not rounded to the inputs' dtype, and
        their int64 indices ``[N, k]``. Which of equal logits comes first is not specified.

    Raises:
        ValueError: the shapes do not agree, or k is out of range.
        RuntimeError: hidden or weight requires a gradient, of which the values have none.
    """
    _check(hidden, weight)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in [1, {weight.shape[0]}]; got {k}")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise RuntimeError("the values of lm_head_topk have no gradient; use torch.no_grad")
    return _lm_head_topk(hidden, weight, k)
