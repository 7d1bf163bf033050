"""The tied language-model head fused with cross-entropy.

    loss_i = logsumexp_v(h_i . W_v) - h_i . W_{label_i}

Rows are processed in chunks, so no more than a chunk of the ``[tokens, vocabulary]`` logits exists
at a time (on a GPU 400 MB of them: all, where there are few rows). For a summed or averaged loss
the gradients are formed while a chunk's probabilities are at hand,

    dL/dh_i = (p_i - onehot(label_i)) W        dL/dW = sum_i (p_i - onehot(label_i))^T h_i

and only scaled by the upstream gradient in the backward pass; for per-token losses the backward
pass computes the probabilities again. Saved for backward: the unscaled gradients (hidden's in its
dtype, the weight's in float32), or for per-token losses the inputs.

On a GPU, losses that need no gradient are reduced from tiles of logits that never leave the
registers (``_triton/lm_head_tiles.py``), and so store no logits at all.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.backend import readable
from gpt2fast.kernels.registry import register_kernel, register_op

# Logits of one chunk, in elements. The chunk should stay in the last-level cache while softmax and
# two matrix products pass over it, yet amortise one pass over the weight gradient.
_CHUNK_ELEMENTS = 8 * 2**20
# With gradients the weight is read twice and its gradient once a chunk, which counts for more than
# the cache.
_IN_ONE = 2
_LINE = 16  # elements of float32 in a cache line
_REDUCTIONS = ("mean", "sum", "none")


def row_chunks(rows: int, vocab_size: int, chunks: int = 1) -> list[slice]:
    """The rows in chunks whose logits PyTorch's operators hold at a time, ``chunks`` in one."""
    step = max(16, chunks * _CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """float32 softmax of logits ``[n, V]``, of -inf too, and the loss ``[n]`` of the labels.

    Overwrites float32 logits on a CPU, where new memory costs as much as the softmax.
    """
    own, top = logits.gather(-1, labels[:, None]), logits.amax(-1, keepdim=True)
    if _reuses(logits):
        probabilities = torch.softmax(logits, -1, out=logits)
    else:
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    # logsumexp = max - log max p: that is at least 1 / V, so its logarithm is safe.
    logsumexp = top.float() - probabilities.amax(-1, keepdim=True).log_()
    return probabilities, (logsumexp - own.float())[:, 0]


def _reuses(tensor: Tensor) -> bool:
    """Whether the memory of logits is used again."""
    plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return plain and not torch.compiler.is_compiling()


def _products(hidden: Tensor, weight: Tensor, chunks_in_one: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits, chunk by chunk; the next ones may overwrite them.

    Logits are ``[n, V]``, or wider by columns of -inf, which change no softmax.
    """
    vocab = weight.shape[0]
    chunks = row_chunks(len(hidden), vocab, chunks_in_one)
    if not (chunks and _reuses(hidden)):
        for rows in chunks:
            yield rows, hidden[rows] @ weight.t()
        return
    # Into rows that begin at cache lines a CPU multiplies faster by a quarter.
    buffer = hidden.new_empty(chunks[0].stop, -(-vocab // _LINE) * _LINE)
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        torch.mm(hidden[rows], weight.t(), out=logits[:, :vocab])
        logits[:, vocab:] = -torch.inf
        yield rows, logits


class _Gradients:
    """dL/dh ``[N, C]`` and dL/dW ``[V, C]``, the latter in float32, built chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool):
        self._inputs = hidden, weight
        self._hidden = torch.empty_like(hidden) if needs_hidden else None
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None

    def add(self, rows: slice, probabilities: Tensor, labels: Tensor, factor: Tensor) -> None:
        """Add the rows' ``factor * (p - onehot(label))``; overwrites ``probabilities``."""
        if self._hidden is None and self._weight is None:
            return
        hidden, weight = self._inputs
        ones = factor.new_ones(len(labels), 1)
        grad_logits = probabilities.scatter_add_(-1, labels[:, None], -ones)
        grad_logits = grad_logits[:, : len(weight)].to(weight.dtype)
        # The factor goes to the narrow side of each product, not over the logits.
        factor = factor[:, None]
        if self._hidden is not None:
            self._hidden[rows] = ((grad_logits @ weight) * factor).to(weight.dtype)
        if self._weight is not None:
            scaled = (hidden[rows] * factor).to(weight.dtype)
            if weight.dtype == torch.float32:
                self._weight.addmm_(grad_logits.t(), scaled)
            else:
                self._weight += grad_logits.t() @ scaled

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        return self._hidden, self._weight


def _losses_torch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses ``[N]`` and the gradients of their sum or mean, those that are needed."""
    kept = labels != ignore_index
    labels = labels.where(kept, 0)
    factor = kept.float()
    if mean:
        factor /= factor.sum().clamp_min_(1)
    losses = hidden.new_empty(len(labels), dtype=torch.float32)
    if not (needs_hidden or needs_weight):
        for rows, logits in _products(hidden, weight, 1):
            losses[rows] = F.cross_entropy(logits.float(), labels[rows], reduction="none")
            del logits  # before the next ones are made
        return losses.where(kept, 0), None, None
    gradients = _Gradients(hidden, weight, needs_hidden, needs_weight)
    for rows, logits in _products(hidden, weight, _IN_ONE):
        probabilities, losses[rows] = _probabilities(logits, labels[rows])
        gradients.add(rows, probabilities, labels[rows], factor[rows])
    return losses.where(kept, 0), *gradients.result()


def _gradients_torch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of per-token losses under ``upstream`` ``[N]``, 0 where ignored."""
    labels = labels.where(labels != ignore_index, 0)
    gradients = _Gradients(hidden, weight, needs_hidden, needs_weight)
    for rows, logits in _products(hidden, weight, _IN_ONE):
        probabilities, _ = _probabilities(logits, labels[rows])
        gradients.add(rows, probabilities, labels[rows], upstream[rows])
    return gradients.result()


def _fwd_fake(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


_loss_fwd = register_kernel(
    "lm_head_loss_fwd(Tensor hidden, Tensor weight, Tensor labels, int ignore_index) -> Tensor",
    "lm_head:lm_head_loss_fwd",
    _fwd_fake,
)


def _fwd_bwd_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=torch.float32),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32),
    )


# Losses and gradients at once: a mean or a sum forms them in its forward pass, and per-token losses
# in the backward pass, weighted by the upstream gradient.
_loss_fwd_bwd = register_kernel(
    "lm_head_loss_fwd_bwd(Tensor hidden, Tensor weight, Tensor labels, Tensor? upstream,"
    " int ignore_index, bool needs_hidden, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    "lm_head:lm_head_loss_fwd_bwd",
    _fwd_bwd_fake,
)


def rows_of_unit_stride(tensor: Tensor) -> Tensor:
    """The matrix as the kernels read it: any stride between rows, none within."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _losses_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    hidden, weight = rows_of_unit_stride(hidden), rows_of_unit_stride(weight)
    labels = labels.contiguous()
    if not (needs_hidden or needs_weight):
        return _loss_fwd(hidden, weight, labels, ignore_index), None, None
    losses, grad_hidden, grad_weight = _loss_fwd_bwd(
        hidden, weight, labels, None, ignore_index, needs_hidden, needs_weight
    )
    return losses, grad_hidden if needs_hidden else None, grad_weight if needs_weight else None


def _gradients_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight = rows_of_unit_stride(hidden), rows_of_unit_stride(weight)
    _, grad_hidden, grad_weight = _loss_fwd_bwd(
        hidden, weight, labels.contiguous(), upstream, ignore_index, needs_hidden, needs_weight
    )
    return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None


def _gradients_of_mean(reduction: str, dtype: torch.dtype, triton: bool) -> bool:
    """Whether the gradients are divided by the number of rows as they are formed.

    Not in 16 bits, where such small factors lose precision.
    """
    return reduction == "mean" and dtype == torch.float32 and not triton


class _LMHeadLoss(torch.autograd.Function):
    """Outputs (loss, dL/dh, dL/dW); the last two are intermediate results, not differentiable."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        reduction: str,
        compute_dtype: torch.dtype,
        needs_hidden: bool,
        needs_weight: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        per_token = reduction == "none"
        needed = needs_hidden and not per_token, needs_weight and not per_token
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        if triton:
            losses, dhidden, dweight = _losses_triton(hidden, weight, labels, ignore_index, *needed)
        else:
            mean = _gradients_of_mean(reduction, compute_dtype, triton)
            losses, dhidden, dweight = _losses_torch(
                hidden, weight, labels, ignore_index, *needed, mean
            )
        if per_token:
            return losses, None, None
        loss = losses.sum()
        if reduction == "mean":
            loss = loss / (labels != ignore_index).sum()
        return loss, dhidden, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        (
            hidden,
            weight,
            labels,
            ctx.ignore_index,
            ctx.reduction,
            ctx.compute_dtype,
            _,
            _,
            ctx.triton,
        ) = inputs
        ctx.dtypes = hidden.dtype, weight.dtype
        if ctx.reduction == "none":
            ctx.save_for_backward(hidden, weight, labels)
        else:
            ctx.mark_non_differentiable(*(grad for grad in output[1:] if grad is not None))
            scale = None
            formed = _gradients_of_mean(ctx.reduction, ctx.compute_dtype, ctx.triton)
            if ctx.reduction == "mean" and not formed:
                # Where nothing is kept the mean is NaN, but the gradients stay zero.
                scale = 1.0 / (labels != ctx.ignore_index).sum().clamp_min(1)
            ctx.save_for_backward(*output[1:], scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # torch's own once_differentiable would let this pass: upstream needs no gradient.
            raise RuntimeError(
                "lm_head_loss is differentiable once; for create_graph=True compute the logits"
            )
        if ctx.reduction == "none":
            hidden, weight, labels = ctx.saved_tensors
            grads, scale = (
                (_gradients_triton if ctx.triton else _gradients_torch)(
                    hidden.to(ctx.compute_dtype),
                    weight.to(ctx.compute_dtype),
                    labels,
                    upstream.where(labels != ctx.ignore_index, 0),
                    ctx.ignore_index,
                    *ctx.needs_input_grad[:2],
                ),
                None,
            )
        else:
            *grads, mean = ctx.saved_tensors
            scale = upstream if mean is None else upstream * mean
            if scale.device.type == "cpu" and readable(scale) and scale.item() == 1:
                scale = None  # another pass over the weight's gradient
        typed = (
            None if grad is None else (grad if scale is None else grad * scale).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *typed, None, None, None, None, None, None, None


def _apply(
    triton: bool, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    device, grad = hidden.device.type, torch.is_grad_enabled()
    wanted = grad and hidden.requires_grad, grad and weight.requires_grad
    options = labels.long(), ignore_index, reduction
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Cast once here: left to autocast, the whole weight would be cast for every chunk.
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _LMHeadLoss.apply(hidden, weight, *options, dtype, *wanted, triton)[0]
    dtype = hidden.dtype
    if not triton and not torch_ops.multiplies_fast(dtype, hidden.device):
        dtype = torch.float32  # the weight once a call, not a slow product a chunk
    return _LMHeadLoss.apply(hidden, weight, *options, dtype, *wanted, triton)[0]


def _lm_head_loss_torch(*args: Any) -> Tensor:
    return _apply(False, *args)


def _lm_head_loss_triton(hidden: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """The op on our kernels; matrices of strided rows are copied."""
    if not weight.shape[0]:
        return NotImplemented
    return _apply(True, hidden, weight, *args)


_lm_head_loss = register_op(
    "lm_head_loss(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, str reduction)"
    " -> Tensor",
    _lm_head_loss_torch,
    _lm_head_loss_triton,
)


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` without the logits tensor.

    Args:
        hidden: ``[N, C]``, final hidden states.
        weight: ``[V, C]``, the (tied) head.
        labels: ``[N]``, integers in ``[0, V)`` or ``ignore_index``; not shifted here.
        ignore_index: the label of rows that count neither in the loss nor in its mean.
        reduction: "mean" over the kept rows (NaN where none is kept), "sum", or "none".

    Returns:
        float32: a scalar, or ``[N]`` for "none" (0 where ignored). Differentiable once, by autograd
        (not under the transforms of ``torch.func``).

    Raises:
        ValueError: the shapes do not agree, a label is out of range, or the reduction is unknown.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, C] and weight [V, C]; got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"expected labels [{hidden.shape[0]}]; got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers; got {labels.dtype}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}; got {reduction!r}")
    if readable(labels):
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
        if wrong.any():
            raise ValueError(
                f"labels must be in [0, {weight.shape[0]}) or {ignore_index}; "
                f"got {labels[wrong][0].item()}"
            )
    return _lm_head_loss(hidden, weight, labels, ignore_index, reduction)
