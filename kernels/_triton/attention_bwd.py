"""Causal attention, backward: two kernels, deterministic, without atomics.

With P the weights, Z the kept ones' factor (1, or 0 and 1 / keep probability with dropout), and
delta = rowsum(dO * O), a row:

    dV = (P * Z)^T dO      dP = Z * (dO V^T)      dS = P * (dP - delta)
    dQ = scale * dS K      dK = scale * dS^T Q

P is computed again from q, k and the logarithm that forward saved. One kernel takes tiles of
queries (dQ, and delta on its way), the other tiles of keys (dK and dV); the second scores of the
second are the price for never adding up in memory. The second works on transposed tiles, keys by
queries, so that P^T and dS^T leave the matrix unit as it wants them back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.attention_bwd_dq import _attention_bwd_dq_kernel
from gpt2fast.kernels._triton.attention_tiles import (
    UNSPECIALIZED,
    check_heads,
    check_rows,
    dropout_threshold,
    heads_descriptor,
    kept_keys,
    kept_weights,
    key_bounds,
    load_heads,
    load_tile,
    scheduled,
    section_heads,
    store_tile,
)
from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.configs import attention_bwd_configs
from gpt2fast.kernels._triton.launch import cdiv, launch, next_power_of_2
from gpt2fast.kernels._triton.target import current_target


@triton.jit
def _add_to_dkdv(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    key,
    queries,
    douts,
    qkv_desc,
    dout_desc,
    statistics,
    begin,
    end,
    length,
    bounds,
    scale,
    dropout,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS^T Q and (P * Z)^T dO over the tiles ``[begin, end)`` of queries.

    queries and douts are sources of `load_heads`, statistics the pointers to the head's lse and
    delta, bounds as `kept_keys` wants them, dropout as `kept_weights`.
    """
    lse_ptr, delta_ptr = statistics
    for tile in tl.range(begin, end):
        query = tile * BLOCK_M
        offs_m = query + tl.arange(0, BLOCK_M)
        q = load_heads(
            queries, qkv_desc, query, length, HEAD_SIZE, BLOCK_M, BLOCK_D, True, False
        )  # [BLOCK_M, BLOCK_D]
        # Queries past the end weigh exp2(-inf) = 0.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        weights = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            visible = kept_keys(bounds, key, BLOCK_N)[:, None]
            if not PAST:
                offs_n = key + tl.arange(0, BLOCK_N)[:, None]
                visible = (visible & (offs_n <= offs_m[None, :])) | (offs_n == offs_m[None, :])
            weights = tl.where(visible, weights, 0.0)
        dout = load_heads(
            douts, dout_desc, query, length, HEAD_SIZE, BLOCK_M, BLOCK_D, True, False
        )  # [BLOCK_M, BLOCK_D]
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < length, other=0.0)
        dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        kept_part = weights
        if dropout[0] is not None:
            kept = kept_weights(dropout, 1 if PAST else 0, key, query, BLOCK_N, BLOCK_M, True)
            kept_part = tl.where(kept, weights, 0.0)
            dweights = tl.where(kept, dweights, 0.0)
        dv = tl.dot(kept_part.to(q.dtype), dout, dv, input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    qkv_ptr,
    qkv_desc,
    past_ptr,
    dout_ptr,
    dout_desc,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    dpast_ptr,
    key_mask_ptr,
    first_keys_ptr,
    lengths_ptr,
    seed_ptr,
    stride_qkv_batch,
    stride_qkv_row,
    stride_past_part,
    stride_past_batch,
    stride_past_head,
    stride_past_row,
    stride_mask_batch,
    past_length,
    length,
    heads,
    batch_heads,
    section,
    scale,
    threshold,
    kept_factor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAST: tl.constexpr,
):
    """dK and dV of one tile of BLOCK_N keys of one head; grid: tiles * batch * heads.

    The keys are the new ones, into dqkv, or with PAST those of the past, into dpast
    ``[2, B, H, P, D]`` contiguous. The first keys are seen by the most queries and come first.
    Pointers as in `_attention_bwd_dq_kernel`, which must have run: it writes delta.
    """
    keys = past_length if PAST else length
    tile, batch_head = scheduled(tl.program_id(0), tl.cdiv(keys, BLOCK_N), batch_heads, section)
    key = tile * BLOCK_N
    batch, head = batch_head // heads, batch_head % heads
    low, high = key_bounds(first_keys_ptr, lengths_ptr, batch, past_length + length)
    mask_offset = batch.to(tl.int64) * stride_mask_batch
    dropout = (seed_ptr, batch_head, threshold)

    width = heads * HEAD_SIZE
    query_ptr = qkv_ptr + batch.to(tl.int64) * stride_qkv_batch + head * HEAD_SIZE
    if PAST:
        key_ptr = (
            past_ptr + batch.to(tl.int64) * stride_past_batch + head.to(tl.int64) * stride_past_head
        )
        value_ptr = key_ptr + stride_past_part
        stride_row = stride_past_row
        high = min(high, past_length)
    else:
        key_ptr = query_ptr + width
        value_ptr = key_ptr + width
        stride_row = stride_qkv_row
        low, high = max(low - past_length, 0), max(high - past_length, 0)
        mask_offset += past_length
    k = load_tile(key_ptr, key, keys, stride_row, HEAD_SIZE, BLOCK_N, BLOCK_D, True)
    v = load_tile(value_ptr, key, keys, stride_row, HEAD_SIZE, BLOCK_N, BLOCK_D, True)
    k = k.to(qkv_ptr.dtype.element_ty)
    v = v.to(qkv_ptr.dtype.element_ty)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Tiles of queries on the diagonal see some of the keys. Those below it see what is kept:
    # all of the keys, some, or none.
    diagonal, below = 0, 0
    if not PAST:
        diagonal, below = key // BLOCK_M, tl.cdiv(min(key + BLOCK_N, length), BLOCK_M)
    end = tl.cdiv(length, BLOCK_M)
    queries = (query_ptr, stride_qkv_row, batch, head)
    douts = (dout_ptr + batch.to(tl.int64) * length * width + head * HEAD_SIZE, width, batch, head)
    row_offset = batch_head.to(tl.int64) * length
    statistics = (lse_ptr + row_offset, delta_ptr + row_offset)
    bounds = (key_mask_ptr, mask_offset, low, high)
    key_end = min(key + BLOCK_N, keys)
    kept_end = tl.where(min(key_end, high) > max(key, low), end, below)
    masked_end = below
    if key_mask_ptr is not None:
        masked_end = kept_end
    else:
        masked_end = tl.where((key >= low) & (key_end <= high), below, kept_end)
        dk, dv = _add_to_dkdv(
            dk, dv, k, v, key, queries, douts, qkv_desc, dout_desc, statistics, masked_end,
            kept_end, length, bounds, scale, dropout,
            HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, PAST, False,
        )  # fmt: skip
    dk, dv = _add_to_dkdv(
        dk, dv, k, v, key, queries, douts, qkv_desc, dout_desc, statistics, diagonal,
        masked_end, length, bounds, scale, dropout,
        HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, PAST, True,
    )  # fmt: skip
    dk *= scale * kept_factor / LOG2_E
    dv *= kept_factor
    if PAST:
        part = batch_heads.to(tl.int64) * past_length * HEAD_SIZE
        dk_ptr = dpast_ptr + batch_head.to(tl.int64) * past_length * HEAD_SIZE
        dv_ptr = dk_ptr + part
        stride_row = HEAD_SIZE
    else:
        dk_ptr = dqkv_ptr + batch.to(tl.int64) * length * 3 * width + width + head * HEAD_SIZE
        dv_ptr = dk_ptr + width
        stride_row = 3 * width
    store_tile(dk_ptr, key, keys, stride_row, dk, HEAD_SIZE, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, key, keys, stride_row, dv, HEAD_SIZE, BLOCK_N, BLOCK_D)


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    num_heads: int,
    past: Tensor | None,
    key_mask: Tensor | None,
    first_keys: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    past_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `attention_fwd` from its inputs, its outputs and dout ``[B, T, C]`` contiguous.

    Returns:
        dqkv ``[B, T, 3C]`` and, if ``past_gradient``, dpast ``[2, B, H, P, D]`` (else empty).
    """
    batch, length, width = qkv.shape
    head_size = width // (3 * num_heads)
    check_heads("qkv", qkv, (batch, length, 3 * num_heads * head_size), qkv.device)
    for name, tensor in (("dout", dout), ("out", out)):
        check_heads(name, tensor, (batch, length, width // 3), qkv.device)
        if not tensor.is_contiguous() or tensor.dtype != qkv.dtype:
            raise ValueError(
                f"{name} must be contiguous {qkv.dtype}; "
                f"got {tensor.dtype} with strides {list(tensor.stride())}"
            )
    past_length = 0 if past is None else past.shape[3]
    if past is not None:
        check_heads("the past", past, (2, batch, num_heads, past_length, head_size), qkv.device)
    check_rows(batch, qkv.device, first_keys=first_keys, lengths=lengths)
    dqkv = torch.empty(batch, length, width, dtype=qkv.dtype, device=qkv.device)
    dpast = qkv.new_empty(0)
    if past_gradient and past is not None:
        dpast = torch.empty(past.shape, dtype=past.dtype, device=qkv.device)
    if not out.numel():
        return dqkv, dpast.zero_()

    block_d = max(16, next_power_of_2(head_size))
    for_dq, for_dkdv = attention_bwd_configs(
        current_target(qkv.device), qkv.element_size(), block_d
    )
    past_strides: tuple[int, ...] = (0, 0, 0, 0)
    if past_length == 0:
        past = None
    if past is not None:
        past_strides = past.stride()[:4]
    delta = torch.empty_like(lse)
    batch_heads = batch * num_heads
    sizes = (
        qkv.stride(0),
        qkv.stride(1),
        *past_strides,
        0 if key_mask is None else key_mask.stride(0),
        past_length,
        length,
        num_heads,
        batch_heads,
        section_heads(past_length + length, head_size * qkv.element_size()),
        scale * LOG2_E.value,
        *dropout_threshold(dropout_p),
    )
    pointers = (
        qkv,
        heads_descriptor(qkv, head_size, for_dq.block_n, block_d),
        past,
        None if past is None else heads_descriptor(past, head_size, for_dq.block_n, block_d),
        out,
        dout,
        lse,
        delta,
        dqkv,
        key_mask,
        first_keys,
        lengths,
        seed,
    )
    launch(
        _attention_bwd_dq_kernel,
        (cdiv(length, for_dq.block_m) * batch_heads,),
        pointers,
        sizes,
        HEAD_SIZE=head_size,
        BLOCK_M=for_dq.block_m,
        BLOCK_N=for_dq.block_n,
        BLOCK_D=block_d,
        num_warps=for_dq.warps,
        num_stages=for_dq.stages,
    )
    for of_past, keys in ((False, length), (True, past_length)):
        if of_past and not dpast.numel():
            continue
        others = (
            qkv,
            heads_descriptor(qkv, head_size, for_dkdv.block_m, block_d),
            past if of_past else None,
            dout,
            heads_descriptor(dout, head_size, for_dkdv.block_m, block_d),
            lse,
            delta,
            dqkv,
            dpast if of_past else None,
            key_mask,
            first_keys,
            lengths,
            seed,
        )
        launch(
            _attention_bwd_dkdv_kernel,
            (cdiv(keys, for_dkdv.block_n) * batch_heads,),
            others,
            sizes,
            HEAD_SIZE=head_size,
            BLOCK_M=for_dkdv.block_m,
            BLOCK_N=for_dkdv.block_n,
            BLOCK_D=block_d,
            PAST=of_past,
            num_warps=for_dkdv.warps,
            num_stages=for_dkdv.stages,
        )
    return dqkv, dpast
