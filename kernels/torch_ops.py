"""The PyTorch implementation of every op: what runs where no kernel of ours does.

Plain differentiable functions of tensors, without validation (the public ops validate). Hidden
states are ``[..., C]``; weights of linear layers are ``[in, out]`` as in the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.kernels import blocked_attention


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight, bias, eps), summed


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    # addmm on [in, out] weights reads them as they lie: no transpose, no repacking.
    if x.dtype != weight.dtype or multiplies_fast(x.dtype, x.device) or _casts_again(x.device):
        out = torch.addmm(bias, rows, weight)
    else:
        out = torch.addmm(bias.float(), rows.float(), weight.float()).to(x.dtype)
    return out.view(*x.shape[:-1], weight.shape[1])


def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's matrix products of ``dtype`` are meant for use there.

    On a CPU without such instructions those of 16 bits take up to a hundred times as long as
    float32's.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _casts_again(device: torch.device) -> bool:
    """Whether somebody decides about dtypes behind us: autocast, or a compiler."""
    return torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling()


def gelu_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    residual: Tensor | None,
) -> Tensor:
    out = linear(F.gelu(linear(x, fc_weight, fc_bias), approximate="tanh"), proj_weight, proj_bias)
    return out if residual is None else residual + out


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
) -> Tensor:
    hidden = F.embedding(input_ids, wte) + F.embedding(position_ids, wpe)
    return hidden if token_type_ids is None else hidden + F.embedding(token_type_ids, wte)


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden = embedding(input_ids, position_ids, token_type_ids, wte, wpe)
    return layer_norm(hidden, weight, bias, eps), hidden


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Views of a packed ``[B, T, 3C]``: q ``[B, H, T, D]`` and kv ``[2, B, H, T, D]``."""
    batch, length, width = qkv.shape
    heads = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads))
    return heads[:, :, 0].transpose(1, 2), heads[:, :, 1:].permute(2, 0, 3, 1, 4)


def bottom_right_mask(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Boolean ``[T, S]``: query t sees keys up to t + S - T, the last query sees them all."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)


def expand_key_mask(key_mask: Tensor, query_length: int) -> Tensor:
    """The causal mask ``[B, 1, T, S]`` restricted to the keys that ``key_mask`` ``[B, S]`` keeps.

    Every query keeps itself, so that a padding query, which may keep no other key, stays finite.
    """
    key_length = key_mask.shape[1]
    mask = bottom_right_mask(query_length, key_length, key_mask.device) & key_mask[:, None, None, :]
    mask.diagonal(key_length - query_length, dim1=-2, dim2=-1).fill_(True)
    return mask


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where CUDA's kernels would fault on its address.

    PyTorch's memory-efficient attention reads 16 bytes at once if the strides allow it, and does
    not look where the tensor begins.
    """
    if tensor.device.type == "cuda" and tensor.storage_offset() * tensor.itemsize % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _attend(
    q: Tensor,
    kv: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    upcast: bool,
) -> Tensor:
    """Attention of q ``[B, H, T, D]`` over kv ``[2, B, H, S, D]``; heads merged, ``[B, T, C]``."""
    query_length, key_length = q.shape[2], kv.shape[3]
    kv = kv.to(q.dtype)  # a past may come from the other side of an autocast boundary
    if dropout_p == 1:  # CUDA's kernels multiply what is left by 1 / 0
        out = _attend(q, kv, mask, scale, 0.0, upcast)
        return F.dropout(out, 1.0)
    if upcast and q.dtype != torch.float32:
        out, _ = weighted_attention(q, kv, mask, scale, dropout_p, None, upcast)
        return out
    if mask is None and 1 < query_length < key_length:
        mask = bottom_right_mask(query_length, key_length, q.device)
    elif mask is not None and mask.dim() == 2:
        mask = expand_key_mask(mask, query_length)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        _aligned(q),
        _aligned(kv[0]),
        _aligned(kv[1]),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=bool(mask is None and query_length > 1),
        scale=scale,
    )
    return out.transpose(1, 2).flatten(2)


def weighted_attention(
    q: Tensor,
    kv: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    head_mask: Tensor | None,
    upcast: bool,
) -> tuple[Tensor, Tensor]:
    """The same attention with its weights kept: merged heads ``[B, T, C]``, ``[B, H, T, S]``.

    ``head_mask`` multiplies the weights (1 keeps). ``upcast`` computes scores and softmax in
    float32 outside autocast, as ``reorder_and_upcast_attn`` asks.
    """
    if mask is None:
        mask = bottom_right_mask(q.shape[2], kv.shape[3], q.device)
    elif mask.dim() == 2:
        mask = expand_key_mask(mask, q.shape[2])
    key, value = kv.to(q.dtype).unbind(0)
    if upcast:
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.float() * scale) @ key.float().transpose(-1, -2)
    else:
        # Scaled before the product, which float16 could not hold.
        scores = (q * scale) @ key.transpose(-1, -2)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1).to(value.dtype), dropout_p, training=dropout_p > 0)
    if head_mask is not None:
        weights = weights * head_mask.to(weights.dtype)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def causal_attention(
    qkv: Tensor,
    num_heads: int,
    past_kv: Tensor | None,
    mask: Tensor | None,
    first_keys: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    upcast: bool,
) -> Tensor:
    alone = past_kv is None and mask is None and first_keys is None and lengths is None
    if alone and blocked_attention.serves(qkv, num_heads, dropout_p):
        return blocked_attention.blocked_attention(qkv, num_heads, scale, dropout_p)
    q, kv = split_heads(qkv, num_heads)
    if past_kv is not None:
        kv = torch.cat((past_kv, kv), dim=3)
    for bound, keeps in ((first_keys, torch.ge), (lengths, torch.lt)):
        if bound is not None:
            kept = keeps(torch.arange(kv.shape[3], device=qkv.device), bound[:, None])
            mask = kept if mask is None else mask & kept
    return _attend(q, kv, mask, scale, dropout_p, upcast)


def attention_append(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int,
    starts: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    first_keys: Tensor | None,
    source_rows: Tensor | None,
    scale: float,
    upcast: bool,
) -> Tensor:
    q, kv = split_heads(qkv, num_heads)
    batch, length, device = qkv.shape[0], qkv.shape[1], qkv.device
    if starts is None:
        end, positions = start + length, None
        kv_cache[:, :batch, :, start:end].copy_(kv)
    else:
        end = kv_cache.shape[3]
        # [B, T]; a row without room overwrites its own last position
        positions = (starts[:, None] + torch.arange(length, device=device)).clamp(0, end - 1)
        rows = torch.arange(batch, device=device)[:, None]
        kv_cache[:, rows, :, positions] = kv.permute(1, 3, 0, 2, 4).to(kv_cache.dtype)
    keys = torch.arange(end, device=device)
    if first_keys is not None:
        kept = keys >= first_keys[:, None]
        mask = kept if mask is None else mask & kept
    if source_rows is not None:
        own = torch.arange(batch, device=device)[:, None]
        past_end = start if starts is None else starts[:, None]
        # Positions that are not in use may name any row.
        rows = torch.where(keys < past_end, source_rows[:, :end], own)
        rows = rows.clamp(0, kv_cache.shape[1] - 1)
        context = kv_cache[:, rows, :, keys].permute(2, 0, 3, 1, 4)
    elif start == 0 and starts is None:
        # From an empty cache the fresh keys are the whole context, and lie closer together.
        context = kv
    else:
        context = kv_cache[:, :, :, :end]
    if starts is not None and positions is not None:
        # What lies behind a row's last position may be anything, NaN included.
        used = keys < starts[:, None] + length
        context = torch.where(used[:, None, :, None], context, 0)
        if mask is None or mask.dim() == 2:
            own_key = keys == positions[:, :, None]
            seen = keys <= positions[:, :, None]
            mask = (seen if mask is None else seen & mask[:, None] | own_key)[:, None]
        elif mask.dtype == torch.bool:
            mask = mask & used[:, None, None]
        else:
            mask = mask.masked_fill(~used[:, None, None], float("-inf"))
    return _attend(q, context, mask, scale, 0.0, upcast)
