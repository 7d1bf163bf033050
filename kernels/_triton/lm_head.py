"""The head's losses and gradients in chunks of rows.

For gradients the logits are needed twice. cuBLAS writes those of a chunk of rows; one kernel reads
them, writes the losses and turns them in place into p - onehot(label); two more products make of
that the gradients. Losses alone come from ``lm_head_tiles.py``, without any logits, but in float32,
which the tensor cores do not have, they take this way too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton import configs
from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.launch import cdiv, launch
from gpt2fast.kernels._triton.lm_head_tiles import LN_2, LOWEST, check, losses_by_tiles

_LINE = 64  # columns of 16 bits


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    ignore_index,
    V,
    width,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: its loss (float32), and with WRITE_GRADIENT p - onehot(label) over its logits.

    Grid: the rows. logits_ptr is ``[rows, width]``, where columns from V to width hold anything and
    become 0: width is a multiple of 16, and only whole vectors are loaded. labels_ptr is ``[rows]``
    int64. Ignored rows get loss 0 and zeros; a label out of range gets NaN in both.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * width
    label = tl.load(labels_ptr + row)
    offs = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WRITE_GRADIENT:
            for start in range(0, width, BLOCK_V):
                zero = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + offs, zero, mask=start + offs < width)
    else:
        valid = (label >= 0) & (label < V)
        logit = tl.load(logits_ptr + label, mask=valid, other=0.0).to(tl.float32)
        # Every lane keeps its own maximum and sum: nothing is exchanged until the end.
        top = tl.full([BLOCK_V], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, width, BLOCK_V):
            offs_v = start + offs
            x = tl.load(
                logits_ptr + offs_v, mask=offs_v < width, other=0.0, eviction_policy="evict_last"
            )
            x = tl.where(offs_v < V, x.to(tl.float32), float("-inf"))
            # One of the two terms is exp(0).
            ratio = tl.exp2(-tl.abs(x - top) * LOG2_E)
            total = tl.where(x > top, total * ratio + 1.0, total + ratio)
            top = tl.maximum(top, x)
        row_top = tl.max(top, 0)
        row_total = tl.sum(total * tl.exp2((top - row_top) * LOG2_E), 0)
        logsumexp = row_top + tl.log2(row_total) * LN_2
        logsumexp = tl.where(valid, logsumexp, float("nan"))
        tl.store(losses_ptr + row, logsumexp - logit)
        if WRITE_GRADIENT:
            # Nobody overwrites the label's logit before everybody has read it.
            tl.debug_barrier()
            for start in range(0, width, BLOCK_V):
                offs_v = start + offs
                x = tl.load(
                    logits_ptr + offs_v,
                    mask=offs_v < width,
                    other=0.0,
                    eviction_policy="evict_first",
                )
                p = tl.exp2((x.to(tl.float32) - logsumexp) * LOG2_E)
                gradient = tl.where(offs_v < V, tl.where(offs_v == label, p - 1.0, p), 0.0)
                gradient = gradient.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + offs_v, gradient, mask=offs_v < width)


def _chunks(rows: int, row_bytes: int) -> list[slice]:
    """Equal chunks of rows, of whole tiles of the products, as few as the table's bytes allow."""
    tile = configs.LM_HEAD_CHUNK_TILE
    most = max(1, configs.LM_HEAD_CHUNK_BYTES // row_bytes // tile) * tile
    step = cdiv(cdiv(rows, cdiv(rows, most)), tile) * tile
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """total = beta * total + left.T @ right, in the total's float32 whatever the operands are."""
    if total.dtype == left.dtype:
        torch.addmm(total, left.t(), right, beta=beta, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, left.t().to(total.dtype), right.to(total.dtype), beta=beta, out=total)


def _padded_rows(weight: Tensor) -> int:
    """How many rows the products have of the weight, in whole lines where 16 bits multiply.

    cuBLAS has fast kernels for widths of whole 16 bytes alone: with 50257 columns, or terms of a
    sum, a product takes several times as long as with 50304, and the copy a hundredth of it.
    """
    rows = weight.shape[0]
    return cdiv(rows, _LINE) * _LINE if weight.element_size() == 2 else rows


def _padded(weight: Tensor) -> Tensor:
    """The weight with `_padded_rows`, those behind its own zero."""
    rows = _padded_rows(weight)
    if rows == len(weight):
        return weight
    padded = weight.new_empty(rows, weight.shape[1])
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, in float32 whatever the operands are."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif out.device.type == "cuda":
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _losses_by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The losses; fills the gradients that are given: float32, the weight's of `_padded_rows`."""
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(rows, dtype=torch.float32)
    # Rows of whole 128-byte lines: GPT-2's 50257 columns would put most of them at odd addresses,
    # which neither cuBLAS nor a kernel reads well.
    padded = cdiv(vocab_size, _LINE) * _LINE
    weight = _padded(weight)
    chunks = _chunks(rows, padded * hidden.element_size())
    buffer = hidden.new_empty(chunks[0].stop, padded)
    # The upstream gradient goes to the narrow side of each product, not over the logits.
    scaled = hidden
    if upstream is not None and grad_weight is not None:
        scaled = (hidden * upstream[:, None]).to(hidden.dtype)
    block_v, warps = configs.LM_HEAD_CROSS_ENTROPY
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start, : len(weight)]
        torch.mm(hidden[chunk], weight.t(), out=logits)
        launch(
            _cross_entropy_kernel,
            (chunk.stop - chunk.start,),
            (buffer, labels[chunk], losses[chunk]),
            (ignore_index, vocab_size, padded),
            WRITE_GRADIENT=grad_hidden is not None or grad_weight is not None,
            BLOCK_V=block_v,
            num_warps=warps,
        )
        if grad_hidden is not None:
            _product(logits, weight, grad_hidden[chunk])
        if grad_weight is not None:
            _add_product(grad_weight, logits, scaled[chunk], beta=int(chunk.start > 0))
    if upstream is not None and grad_hidden is not None:
        grad_hidden.mul_(upstream[:, None])
    return losses


def lm_head_loss_fwd(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Losses ``[N]`` float32 of hidden ``[N, C]`` under weight ``[V, C]``, 0 where ignored."""
    check(hidden, weight, labels)
    if not len(labels):
        return hidden.new_empty(0, dtype=torch.float32)
    if hidden.dtype in configs.LM_HEAD_TILE_DTYPES:
        return losses_by_tiles(hidden, weight, labels, ignore_index)
    return _losses_by_chunks(hidden, weight, labels, None, ignore_index, None, None)


def lm_head_loss_fwd_bwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, weighted by upstream ``[N]`` float32 where given.

    The gradients are ``[N, C]`` and ``[V, C]``, both float32; empty where not needed.
    Ignored rows add nothing, whatever upstream holds for them (NaN excepted).
    """
    check(hidden, weight, labels)
    grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs_hidden else None
    grad_weight = None
    if needs_weight:
        grad_weight = weight.new_empty(_padded_rows(weight), weight.shape[1], dtype=torch.float32)
    if len(labels):
        losses = _losses_by_chunks(
            hidden, weight, labels, upstream, ignore_index, grad_hidden, grad_weight
        )
    else:
        losses = hidden.new_empty(0, dtype=torch.float32)
        if grad_weight is not None:
            grad_weight.zero_()
    nothing = losses.new_empty(0)
    return (
        losses,
        nothing if grad_hidden is None else grad_hidden,
        nothing if grad_weight is None else grad_weight[: len(weight)],
    )
