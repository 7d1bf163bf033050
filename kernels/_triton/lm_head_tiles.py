"""Tiles of the logits ``hidden @ weight.T``, reduced in registers: losses, argmax and top-k.

One matrix-product kernel reduces each tile of logits in its epilogue to what is asked for:
(maximum, sum of exponentials) a row for a loss, the largest (logit, index) pairs for a selection.
What is left of a row, a few numbers a tile, is combined by a second kernel. The logits themselves
are float32 and never leave the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt2fast.kernels._triton import configs, target
from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.launch import cdiv, launch, next_power_of_2
from gpt2fast.kernels._triton.matmul import accumulate, tile_position

LN_2 = tl.constexpr(0.6931471805599453)
# Half the most negative float32: below every logit, and differences from it stay finite.
LOWEST = tl.constexpr(-1.7014118346046923e38)
_NAN_BITS = tl.constexpr(0x7FC00000)
_LARGEST_INDEX = tl.constexpr(0x7FFFFFFF)  # i ^ this is this - i
_LEAST_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def _sort_keys(logits, indices):
    """int64 keys that sort as (logit, then lower index first); NaN counts as the largest logit."""
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where(logits != logits, _NAN_BITS, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (indices ^ _LARGEST_INDEX).to(tl.int64)


@triton.jit(do_not_specialize=["N"])
def _lm_head_tiles_kernel(
    hidden,
    weight,
    max_ptr,
    sum_ptr,
    keys_ptr,
    N,
    V,
    C,
    stride_hidden_row,
    stride_weight_row,
    TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Tiles of logits ``hidden @ weight.T``, each reduced over its columns.

    Persistent: a program takes tiles [BLOCK_M, BLOCK_V] at a stride of the number of programs.
    hidden is ``[N, C]``, weight ``[V, C]``, of one dtype, rows of unit stride: pointers, or
    with USE_TMA descriptors. With T = cdiv(V, BLOCK_V) tiles a row, it writes

    - where TOP is 0: max_ptr and sum_ptr, float32 ``[N, T]``: the maximum m of logits * log2(e),
      and the sum of exp2(logits * log2(e) - m);
    - else keys_ptr, int64 ``[N, T, TOP]``: the tile's largest sort keys, in descending order.

    Rows past N are computed and not written; columns past V count as minus infinity, and as the
    least key.
    """
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_v = tl.cdiv(V, BLOCK_V)
    # Flattened, the loop loads the next tile's first blocks while this one's are reduced.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_v, tl.num_programs(0), flatten=USE_TMA):
        tile_m, tile_v = tile_position(tile, tiles_m, tiles_v, GROUP_M)
        start_m = tile_m * BLOCK_M
        start_v = tile_v * BLOCK_V
        # [BLOCK_M, BLOCK_V]
        logits = accumulate(
            hidden,
            weight,
            start_m,
            start_v,
            N,
            V,
            0,
            C,
            stride_hidden_row,
            stride_weight_row,
            BLOCK_M,
            BLOCK_V,
            BLOCK_K,
            True,
            USE_TMA,
        )
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_v = start_v + tl.arange(0, BLOCK_V)
        mask_m = offs_m < N
        mask_v = (offs_v < V)[None, :]
        offs_out = offs_m.to(tl.int64) * tiles_v + tile_v  # [BLOCK_M]
        if TOP == 0:
            logits = tl.where(mask_v, logits, float("-inf"))
            top = tl.max(logits, 1) * LOG2_E  # [BLOCK_M]
            # Rounded once, and subtracted as it is stored: the rounding cancels.
            total = tl.sum(tl.exp2(logits * LOG2_E - top[:, None]), 1)
            tl.store(max_ptr + offs_out, top, mask=mask_m)
            tl.store(sum_ptr + offs_out, total, mask=mask_m)
        else:
            keys = _sort_keys(logits, offs_v[None, :])
            keys = tl.where(mask_v, keys, _LEAST_KEY)
            if TOP == 1:
                tl.store(keys_ptr + offs_out, tl.max(keys, 1), mask=mask_m)
            else:
                best = tl.topk(keys, TOP)  # [BLOCK_M, TOP]
                best_ptrs = keys_ptr + offs_out[:, None] * TOP + tl.arange(0, TOP)[None, :]
                tl.store(best_ptrs, best, mask=mask_m[:, None])


@triton.jit(do_not_specialize=["N", "ignore_index", "tiles"])
def _loss_combine_kernel(
    max_ptr,
    sum_ptr,
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    losses_ptr,
    ignore_index,
    N,
    V,
    C,
    tiles,
    stride_hidden_row,
    stride_weight_row,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """losses_ptr ``[N]`` float32 from the tiles of `_lm_head_tiles_kernel`, BLOCK_M rows a program.

    The logit of the label (labels_ptr ``[N]`` int64) is computed here, one inner product a row,
    which costs less than looking for it in every tile. Ignored rows get 0; a label out of range,
    which nobody has checked inside a compiled graph, gets NaN and reads nothing.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    rows = offs_m.to(tl.int64)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start_t in range(0, tiles, BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask = mask_m[:, None] & (offs_t < tiles)[None, :]
        offs = rows[:, None] * tiles + offs_t[None, :]  # [BLOCK_M, BLOCK_T]
        tile_top = tl.load(max_ptr + offs, mask=mask, other=float("-inf"))
        tile_total = tl.load(sum_ptr + offs, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tile_top, 1))
        total = total * tl.exp2(top - new_top)
        total += tl.sum(tile_total * tl.exp2(tile_top - new_top[:, None]), 1)
        top = new_top
    label = tl.load(labels_ptr + offs_m, mask=mask_m, other=0)
    kept = label != ignore_index
    valid = (label >= 0) & (label < V)
    logit = tl.zeros([BLOCK_M], tl.float32)
    for start_c in range(0, C, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask = (mask_m & kept & valid)[:, None] & (offs_c < C)[None, :]
        offs = rows[:, None] * stride_hidden_row + offs_c[None, :]  # [BLOCK_M, BLOCK_C]
        hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        offs = label[:, None] * stride_weight_row + offs_c[None, :]
        logit += tl.sum(hidden * tl.load(weight_ptr + offs, mask=mask, other=0.0), 1)
    loss = (top + tl.log2(total)) * LN_2 - logit
    # Summed in another order than the tiles, the logit of a sure label may come out above.
    loss = tl.where(loss < 0.0, 0.0, loss)
    loss = tl.where(valid, loss, float("nan"))
    tl.store(losses_ptr + offs_m, tl.where(kept, loss, 0.0), mask=mask_m)


@triton.jit(do_not_specialize=["N", "tiles"])
def _argmax_combine_kernel(
    keys_ptr, indices_ptr, N, tiles, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr
):
    """indices_ptr ``[N]`` int64: the index in the largest of each row's keys ``[N, tiles]``."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    best = tl.full([BLOCK_M], _LEAST_KEY, tl.int64)
    for start_t in range(0, tiles, BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask = mask_m[:, None] & (offs_t < tiles)[None, :]
        offs = offs_m.to(tl.int64)[:, None] * tiles + offs_t[None, :]  # [BLOCK_M, BLOCK_T]
        keys = tl.load(keys_ptr + offs, mask=mask, other=_LEAST_KEY)
        best = tl.maximum(best, tl.max(keys, 1))
    tl.store(indices_ptr + offs_m, (best & _LARGEST_INDEX) ^ _LARGEST_INDEX, mask=mask_m)


def check(hidden: Tensor, weight: Tensor, labels: Tensor | None = None) -> None:
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or hidden.dtype != weight.dtype
        or hidden.device != weight.device
    ):
        raise ValueError(
            "expected hidden [N, C] and weight [V, C] of one dtype and device; got "
            f"{list(hidden.shape)} {hidden.dtype} on {hidden.device} and "
            f"{list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have rows of unit stride; got {tensor.stride()}")
    if labels is not None and (
        labels.shape != hidden.shape[:1]
        or labels.dtype != torch.int64
        or labels.device != hidden.device
        or not labels.is_contiguous()
    ):
        raise ValueError(
            f"expected contiguous int64 labels [{hidden.shape[0]}] on {hidden.device}; got "
            f"{list(labels.shape)} {labels.dtype} on {labels.device}, strides {labels.stride()}"
        )


def _takes_descriptor(tensor: Tensor) -> bool:
    """Whether rows start where the tensor memory accelerator can read: at multiples of 16 bytes."""
    step = tensor.stride(0)
    aligned = step * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and step >= tensor.shape[1]


def _tile(hidden: Tensor, weight: Tensor, top: int) -> configs.LMHeadTile:
    can_copy = _takes_descriptor(hidden) and _takes_descriptor(weight)
    return configs.lm_head_tile(
        hidden.shape[0], top, can_copy, target.current_target(hidden.device)
    )


def _launch_tiles(
    hidden: Tensor,
    weight: Tensor,
    tile: configs.LMHeadTile,
    top: int,
    maxima: Tensor | None,
    sums: Tensor | None,
    keys: Tensor | None,
) -> None:
    (rows, width), vocab_size = hidden.shape, weight.shape[0]
    multiprocessors = target.current_target(hidden.device).multiprocessors
    block_k = tile.block_bytes // hidden.element_size()
    tiles = cdiv(rows, tile.block_rows) * cdiv(vocab_size, tile.block_vocab)
    a: Tensor | TensorDescriptor = hidden
    b: Tensor | TensorDescriptor = weight
    if tile.tma:
        a = TensorDescriptor.from_tensor(hidden, [tile.block_rows, block_k])
        b = TensorDescriptor.from_tensor(weight, [tile.block_vocab, block_k])
    launch(
        _lm_head_tiles_kernel,
        (min(tiles, multiprocessors * tile.programs),),
        (a, b, maxima, sums, keys),
        (rows, vocab_size, width, hidden.stride(0), weight.stride(0)),
        TOP=top,
        BLOCK_M=tile.block_rows,
        BLOCK_V=tile.block_vocab,
        BLOCK_K=block_k,
        GROUP_M=configs.LM_HEAD_GROUP,
        USE_TMA=tile.tma,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def losses_by_tiles(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    tile = _tile(hidden, weight, 0)
    tiles = cdiv(vocab_size, tile.block_vocab)
    losses = hidden.new_empty(rows, dtype=torch.float32)
    maxima, sums = hidden.new_empty(2, rows, tiles, dtype=torch.float32).unbind(0)
    _launch_tiles(hidden, weight, tile, 0, maxima, sums, None)
    block_m = configs.LM_HEAD_COMBINE_ROWS
    width, strides = hidden.shape[1], (hidden.stride(0), weight.stride(0))
    launch(
        _loss_combine_kernel,
        (cdiv(rows, block_m),),
        (maxima, sums, hidden, weight, labels, losses),
        (ignore_index, rows, vocab_size, width, tiles, *strides),
        BLOCK_M=block_m,
        BLOCK_T=32,
        BLOCK_C=128,
        num_warps=4,
    )
    return losses


def _keys_by_tiles(hidden: Tensor, weight: Tensor, top: int) -> Tensor:
    """int64 ``[N, T, top]``: the sort keys of each tile's largest logits."""
    tile = _tile(hidden, weight, top)
    tiles = cdiv(weight.shape[0], tile.block_vocab)
    keys = hidden.new_empty(hidden.shape[0], tiles, top, dtype=torch.int64)
    _launch_tiles(hidden, weight, tile, top, None, None, keys)
    return keys


def lm_head_argmax_fwd(hidden: Tensor, weight: Tensor) -> Tensor:
    """The index of the largest logit of each row, int64 ``[N]``."""
    check(hidden, weight)
    rows = hidden.shape[0]
    indices = hidden.new_empty(rows, dtype=torch.int64)
    if not rows:
        return indices
    keys = _keys_by_tiles(hidden, weight, 1)
    block_m = configs.LM_HEAD_COMBINE_ROWS
    launch(
        _argmax_combine_kernel,
        (cdiv(rows, block_m),),
        (keys, indices),
        (rows, keys.shape[1]),
        BLOCK_M=block_m,
        BLOCK_T=64,
        num_warps=4,
    )
    return indices


def lm_head_topk_fwd(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, float32 ``[N, k]``, descending, and their indices."""
    check(hidden, weight)
    rows = hidden.shape[0]
    if not rows:
        return hidden.new_empty(0, k, dtype=torch.float32), hidden.new_empty(
            0, k, dtype=torch.int64
        )
    keys = _keys_by_tiles(hidden, weight, next_power_of_2(k)).flatten(1)
    best = keys.topk(k).values
    bits = (best >> 32).int()
    # The inverse of _sort_keys, which is its own inverse in the upper half.
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0x7FFFFFFF - (best & 0x7FFFFFFF)
