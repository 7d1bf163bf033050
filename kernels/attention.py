"""Causal self-attention on the packed projection of GPT-2.

    softmax(scale * q k^T + mask) v        for each of H heads of size D = C / H

q, k and v are read from one ``[B, T, 3C]`` projection and the heads come back merged,
``[B, T, C]``. T queries stand at the end of S >= T keys (bottom-right alignment): with a past of
length P, S = P + T and query t sees keys 0 .. P + t.

`causal_attention` is differentiable; the op that writes the new keys and values into a preallocated
cache, and takes no gradient, is in ``attention_append.py``.

A mask is either ``[B, S]`` boolean (the keys that may be attended, causality implied) or a complete
4-D mask ``[B or 1, H or 1, T, S]``, boolean (True attends) or float (added to the scores). Without
a complete one, a query always attends to itself.

On the kernels, scores and softmax are in float32 and never stored. For backward they keep qkv, the
past, the output, the logarithm of every row's sum of exponentials (float32 ``[B, H, T]``) and, with
dropout, a seed: the weights and the mask are computed again. The seed is drawn on the device from
PyTorch's generator, so ``torch.manual_seed`` fixes the mask, and checkpointing replays it; it is
another mask than that of PyTorch's operators.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.backend import DTYPES, serves
from gpt2fast.kernels.registry import (
    apply,
    autocast_inputs,
    forbid_second_derivative,
    needs_gradient,
    register_kernel,
    register_op,
)

_MAX_HEAD_SIZE = 128


def _fwd_fake(qkv: Tensor, num_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    lse = qkv.new_empty((batch, num_heads, length) if rest[-1] else 0, dtype=torch.float32)
    return qkv.new_empty(batch, length, width // 3), lse


def _bwd_fake(
    dout: Tensor, qkv: Tensor, num_heads: int, past: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(
        past.shape if past is not None and rest[-1] else 0
    )


_causal_attention_fwd = register_kernel(
    "causal_attention_fwd(Tensor qkv, int num_heads, Tensor? past, Tensor? key_mask,"
    " Tensor? first_keys, Tensor? lengths, Tensor? seed, float scale, float dropout_p,"
    " bool save_lse) -> (Tensor, Tensor)",
    "attention_fwd:attention_fwd",
    _fwd_fake,
)
_causal_attention_bwd = register_kernel(
    "causal_attention_bwd(Tensor dout, Tensor qkv, int num_heads, Tensor? past, Tensor? key_mask,"
    " Tensor? first_keys, Tensor? lengths, Tensor? seed, Tensor out, Tensor lse, float scale,"
    " float dropout_p, bool past_gradient) -> (Tensor, Tensor)",
    "attention_bwd:attention_bwd",
    _bwd_fake,
)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        qkv: Tensor,
        num_heads: int,
        past: Tensor | None,
        key_mask: Tensor | None,
        first_keys: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _causal_attention_fwd(
            qkv, num_heads, past, key_mask, first_keys, lengths, seed, scale, dropout_p, True
        )
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, ctx.num_heads, past, key_mask, first_keys, lengths, seed, *ctx.numbers = inputs
        ctx.save_for_backward(qkv, past, key_mask, first_keys, lengths, seed, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("causal_attention")
        if grads[0] is None:
            return (None,) * 9
        qkv, past, key_mask, first_keys, lengths, seed, out, lse = ctx.saved_tensors
        dqkv, dpast = _causal_attention_bwd(
            grads[0].contiguous(),
            qkv,
            ctx.num_heads,
            past,
            key_mask,
            first_keys,
            lengths,
            seed,
            out,
            lse,
            *ctx.numbers,
            ctx.needs_input_grad[2],
        )
        need_qkv, _, need_past, *_ = ctx.needs_input_grad
        return (dqkv if need_qkv else None, None, dpast if need_past else None, *(None,) * 6)


def _contiguous_rows(tensor: Any) -> Any:
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    # Not contiguous(): to that a single column is contiguous whatever its stride.
    return tensor.clone(memory_format=torch.contiguous_format)


def _causal_attention_triton(
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
    """The op on our kernels, whose scores and softmax are in float32 whatever ``upcast`` says."""
    head_size = qkv.shape[2] // (3 * num_heads)
    if (
        (mask is not None and mask.dim() == 4)
        or (past_kv is not None and past_kv.dtype not in DTYPES)
        or head_size % 8
        or head_size > _MAX_HEAD_SIZE
        or dropout_p > 1 - 2**-16  # probabilities are rounded to 16 bits
    ):
        return NotImplemented
    qkv, past_kv = autocast_inputs(qkv, past_kv)
    if past_kv is not None:
        past_kv = past_kv.to(qkv.dtype)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), device=qkv.device)
    qkv, past_kv = _contiguous_rows(qkv), _contiguous_rows(past_kv)
    mask, first_keys, lengths = map(_contiguous_rows, (mask, first_keys, lengths))
    saves = needs_gradient(qkv, past_kv)
    if saves and past_kv is not None and not past_kv.requires_grad:
        # Part of a cache: others may append behind it before the backward pass reads it, and what
        # was made in inference mode cannot be saved at all.
        past_kv = past_kv.clone()
    arguments = (qkv, num_heads, past_kv, mask, first_keys, lengths, seed, scale, dropout_p)
    if saves:
        out: Tensor = apply(_CausalAttention, *arguments)[0]
        return out
    out, _ = _causal_attention_fwd(*arguments, False)
    return out


_causal_attention = register_op(
    "causal_attention(Tensor qkv, int num_heads, Tensor? past_kv, Tensor? mask,"
    " Tensor? first_keys, Tensor? lengths, float scale, float dropout_p, bool upcast) -> Tensor",
    torch_ops.causal_attention,
    _causal_attention_triton,
)


def checked_scale(scale: float | None, qkv: Tensor, num_heads: int) -> float:
    """The factor of the scores, ``1 / sqrt(D)`` unless it is given.

    Raises:
        ValueError: it is not positive: the kernels scale the largest score, PyTorch's give NaN.
    """
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    return scale


def check_inputs(
    qkv: Tensor, num_heads: int, past: Tensor | None, start: int, mask: Tensor | None
) -> None:
    """Raise a ValueError unless the inputs of attention after ``start`` positions fit together."""
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be [batch, time, 3 * {num_heads} heads * head size]; got {list(qkv.shape)}"
        )
    batch, length, width = qkv.shape
    head_size = width // (3 * num_heads)
    if past is not None:
        expected = [2, batch, num_heads, "time", head_size]
        shape = list(past.shape)
        if past.dim() != 5 or shape[:3] + shape[4:] != expected[:3] + expected[4:]:
            raise ValueError(f"past keys and values must be {expected}; got {shape}")
    if mask is not None:
        key_length = start + length
        allowed = mask.shape == (batch, key_length) or (
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, num_heads)
            and mask.shape[2:] == (length, key_length)
        )
        if not allowed:
            raise ValueError(
                f"mask must be [{batch}, {key_length}] or [{batch} or 1, {num_heads} or 1, "
                f"{length}, {key_length}]; got {list(mask.shape)}"
            )
        if mask.dtype != torch.bool and (mask.dim() == 2 or not mask.is_floating_point()):
            raise ValueError(
                f"a {mask.dim()}-D mask must be boolean{' or float' if mask.dim() == 4 else ''}; "
                f"got {mask.dtype}"
            )


def prepare_mask(key_mask: Tensor | None, query_length: int, device: torch.device) -> Tensor | None:
    """The mask to hand to every layer of one forward pass, computed once.

    Args:
        key_mask: ``[B, S]`` boolean, the keys that may be attended, or None for all.
        query_length: T.
        device: where the pass runs.

    Returns:
        None where causality alone decides. Otherwise a mask that the attention ops accept: the
        ``[B, S]`` itself where our kernels run, which test it as they go, else a complete one.
    """
    if key_mask is None:
        return None
    # While tracing, which device checks would interrupt, the short form: the compiler shares what
    # PyTorch's layers each make of it.
    if torch.compiler.is_compiling() or serves(device):
        return key_mask.to(device)
    return torch_ops.expand_key_mask(key_mask.to(device), query_length)


def causal_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    past_kv: Tensor | None = None,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
) -> Tensor:
    """Differentiable causal attention.

    Args:
        qkv: ``[B, T, 3C]``, the packed projection.
        num_heads: H.
        past_kv: ``[2, B, H, P, D]``, keys then values that come before, or None.
        mask: see the module's docstring; None attends causally to everything.
        first_keys: int32 ``[B]``, the position among the S keys of each row's first real one; the
            left padding before it is not attended.
        lengths: int32 ``[B]``, the position after each row's last real key; the padding from there
            on is not attended. Neither of the two goes together with a complete mask.
        scale: factor of the scores, positive; default ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention weight.
        upcast: compute scores and softmax in float32 whatever the inputs' dtype.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or a number is out of its range.
    """
    check_inputs(qkv, num_heads, past_kv, 0 if past_kv is None else past_kv.shape[3], mask)
    for name, bound in (("first_keys", first_keys), ("lengths", lengths)):
        if bound is None:
            continue
        shape = [qkv.shape[0]]
        if list(bound.shape) != shape or bound.dtype != torch.int32 or bound.device != qkv.device:
            raise ValueError(
                f"{name} must be {shape}, int32, on {qkv.device}; got {list(bound.shape)}, "
                f"{bound.dtype}, on {bound.device}"
            )
        if mask is not None and mask.dim() == 4:
            raise ValueError(f"{name} and a complete 4-D mask exclude each other; got both")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1; got {dropout_p}")
    scale = checked_scale(scale, qkv, num_heads)
    return _causal_attention(
        qkv, num_heads, past_kv, mask, first_keys, lengths, scale, dropout_p, upcast
    )


def weighted_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    past_kv: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    head_mask: Tensor | None = None,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """`causal_attention` that keeps its weights, for inspection and head masks.

    Plain PyTorch on every device: the weights are what a fused kernel exists not to store.

    Args:
        head_mask: broadcast against ``[B, H, T, S]`` and multiplied with the weights, or None.
        (the others): as in `causal_attention`.

    Returns:
        the merged heads ``[B, T, C]`` and the weights ``[B, H, T, S]`` after softmax, dropout and
        head mask.
    """
    start = 0 if past_kv is None else past_kv.shape[3]
    check_inputs(qkv, num_heads, past_kv, start, mask)
    scale = checked_scale(scale, qkv, num_heads)
    q, _ = torch_ops.split_heads(qkv, num_heads)
    kv = packed_kv(qkv, num_heads, past_kv)
    return torch_ops.weighted_attention(q, kv, mask, scale, dropout_p, head_mask, upcast)


def packed_kv(qkv: Tensor, num_heads: int, past_kv: Tensor | None = None) -> Tensor:
    """Keys and values of a packed projection as a model's past holds them.

    Args:
        qkv: ``[B, T, 3C]``.
        num_heads: H.
        past_kv: ``[2, B, H, P, D]``, put before them, or None.

    Returns:
        ``[2, B, H, P + T, D]``; without a past, a view of qkv. Differentiable.
    """
    _, kv = torch_ops.split_heads(qkv, num_heads)
    return kv if past_kv is None else torch.cat((past_kv, kv), dim=3)
