"""The input embedding of GPT-2, alone and with the first LayerNorm.

    h[b, t] = wte[input_ids[b, t]] + wpe[position_ids[b, t]] (+ wte[token_type_ids[b, t]])

Token types share the token embedding, as in both references. The gradient of a table adds up the
rows of dh that looked a row up; for the backward pass the kernels save the ids, and with the
LayerNorm what ``layer_norm.py`` saves.
"""

from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.layer_norm import (
    MAX_WIDTH,
    check_affine,
    equal_rows,
    layer_norm_bwd,
    output_dtype,
)
from gpt2fast.kernels.registry import (
    apply,
    forbid_second_derivative,
    needs_gradient,
    register_kernel,
    register_op,
)


def _embedding_fwd_fake(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = wte.new_empty(*input_ids.shape, wte.shape[1])
    normed = wte.new_empty(0 if weight is None else hidden.shape, dtype=dtype)
    rows = input_ids.shape[0] * input_ids.shape[1] if save_statistics else 0
    return hidden, normed, wte.new_empty(2, rows, dtype=torch.float32)


def _embedding_bwd_fake(
    dhidden: Tensor, ids: Tensor, table_rows: int, dtype: torch.dtype
) -> Tensor:
    return dhidden.new_empty(table_rows, dhidden.shape[-1], dtype=dtype)


_embedding_fwd = register_kernel(
    "embedding_fwd(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, Tensor wte,"
    " Tensor wpe, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, bool save_statistics)"
    " -> (Tensor, Tensor, Tensor)",
    "embedding:embedding_fwd",
    _embedding_fwd_fake,
)
_embedding_bwd = register_kernel(
    "embedding_bwd(Tensor dhidden, Tensor ids, SymInt table_rows, ScalarType dtype) -> Tensor",
    "embedding:embedding_bwd",
    _embedding_bwd_fake,
)


def _forward(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel, on ids, weight and bias made contiguous."""
    ids, positions, types, weight, bias = (
        None if t is None else t.contiguous()
        for t in (input_ids, position_ids, token_type_ids, weight, bias)
    )
    out: tuple[Tensor, Tensor, Tensor] = _embedding_fwd(
        ids, positions, types, equal_rows(wte), equal_rows(wpe), weight, bias, eps, dtype,
        save_statistics,
    )  # fmt: skip
    return out


def _table_gradients(
    ctx: Any, dhidden: Tensor, ids: Tensor, positions: Tensor, types: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of wte and wpe, as far as they are needed."""
    (token_rows, position_rows), dtype = ctx.tables
    dwte = dwpe = None
    if ctx.needs_input_grad[3]:
        looked_up = ids if types is None else torch.cat((ids.reshape(-1), types.reshape(-1)))
        dwte = _embedding_bwd(dhidden, looked_up, token_rows, dtype)
    if ctx.needs_input_grad[4]:
        if positions.shape[0] != ids.shape[0]:  # the batch shares its positions
            dhidden = dhidden.sum(0, dtype=torch.float32)
        dwpe = _embedding_bwd(dhidden, positions, position_rows, dtype)
    return dwte, dwpe


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        wte: Tensor,
        wpe: Tensor,
    ) -> Tensor:
        return _forward(
            input_ids, position_ids, token_type_ids, wte, wpe, None, None, 0.0, wte.dtype, False
        )[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ids, positions, types, wte, wpe = inputs
        ctx.save_for_backward(ids, positions, types)
        ctx.tables = (wte.shape[0], wpe.shape[0]), wte.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("embedding")
        return None, None, None, *_table_gradients(ctx, equal_rows(grads[0]), *ctx.saved_tensors)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        wte: Tensor,
        wpe: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(
            input_ids, position_ids, token_type_ids, wte, wpe, weight, bias, eps, dtype, True
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ids, positions, types, wte, wpe, weight, *_ = inputs
        hidden, _, statistics = output
        ctx.save_for_backward(ids, positions, types, hidden, weight, statistics)
        ctx.tables = (wte.shape[0], wpe.shape[0]), wte.dtype
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_second_derivative("embedding_layer_norm")
        *looked_up, hidden, weight, statistics = ctx.saved_tensors
        dhidden, dnormed, _ = grads
        need_tables = any(ctx.needs_input_grad[3:5])
        need_weight, need_bias = ctx.needs_input_grad[5:7]
        dwte = dwpe = dweight = dbias = None
        if dnormed is not None:
            dhidden, _, dweight, dbias = layer_norm_bwd(
                equal_rows(dnormed),
                None if dhidden is None else equal_rows(dhidden),
                hidden,
                weight.contiguous(),
                statistics,
                need_tables,
                None,
                need_weight or need_bias,
            )
            dweight = dweight if need_weight else None
            dbias = dbias if need_bias else None
        if need_tables and dhidden is not None:
            dwte, dwpe = _table_gradients(ctx, equal_rows(dhidden), *looked_up)
        return None, None, None, dwte, dwpe, dweight, dbias, None, None


def _covers(wte: Tensor, wpe: Tensor, *ids: Tensor | None) -> bool:
    """Whether the kernels know these tables and ids; what else PyTorch takes is left to it."""
    return (
        wte.dtype == wpe.dtype
        and wte.dtype in DTYPES
        and 0 < wte.shape[1] <= MAX_WIDTH
        and all(i is None or i.dtype in (torch.int32, torch.int64) for i in ids)
    )


def _embedding_triton(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
) -> Any:
    if not _covers(wte, wpe, input_ids, position_ids, token_type_ids):
        return NotImplemented
    if needs_gradient(wte, wpe):
        return apply(_Embedding, input_ids, position_ids, token_type_ids, wte, wpe)
    return _forward(
        input_ids, position_ids, token_type_ids, wte, wpe, None, None, 0.0, wte.dtype, False
    )[0]


def _embedding_layer_norm_triton(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Any:
    dtype = output_dtype(wte.dtype, weight, bias)
    if dtype is None or not _covers(wte, wpe, input_ids, position_ids, token_type_ids):
        return NotImplemented
    args = input_ids, position_ids, token_type_ids, wte, wpe, weight, bias, eps, dtype
    if needs_gradient(wte, wpe, weight, bias):
        hidden, normed, _ = apply(_EmbeddingLayerNorm, *args)
    else:
        hidden, normed, _ = _forward(*args, False)
    return normed, hidden


_embedding = register_op(
    "embedding(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, Tensor wte,"
    " Tensor wpe) -> Tensor",
    torch_ops.embedding,
    _embedding_triton,
)
_embedding_layer_norm = register_op(
    "embedding_layer_norm(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids,"
    " Tensor wte, Tensor wpe, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    torch_ops.embedding_layer_norm,
    _embedding_layer_norm_triton,
)


def _check(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, time]; got {list(input_ids.shape)}")
    batch, length = input_ids.shape
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must be [{batch}, {length}] or [1, {length}]; "
            f"got {list(position_ids.shape)}"
        )
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(
            f"token_type_ids must be [{batch}, {length}]; got {list(token_type_ids.shape)}"
        )
    if wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise ValueError(
            f"expected wte [V, C] and wpe [P, C]; got {list(wte.shape)} and {list(wpe.shape)}"
        )


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
) -> Tensor:
    """Sum of token, position and (optional) token-type embeddings.

    Ids out of range: NaN on the kernels, an error of PyTorch's elsewhere. NaN is what the row of
    such an id becomes; it adds nothing to the gradient of the table that has no such row.

    Args:
        input_ids: ``[B, T]``, int64.
        position_ids: ``[B, T]`` or ``[1, T]``, int64.
        token_type_ids: ``[B, T]``, int64, or None.
        wte: ``[V, C]``, the token embedding.
        wpe: ``[P, C]``, the position embedding.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check(input_ids, position_ids, token_type_ids, wte, wpe)
    return _embedding(input_ids, position_ids, token_type_ids, wte, wpe)


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`embedding` and the LayerNorm of it, in one pass.

    Ids out of range: NaN on the kernels, an error of PyTorch's elsewhere, as in `embedding`.

    Args:
        input_ids, position_ids, token_type_ids, wte, wpe: as in `embedding`.
        weight, bias: ``[C]``.
        eps: added to the variance.

    Returns:
        ``(layer_norm(embedding), embedding)``, each ``[B, T, C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check(input_ids, position_ids, token_type_ids, wte, wpe)
    check_affine(wte, weight, bias)
    return _embedding_layer_norm(
        input_ids, position_ids, token_type_ids, wte, wpe, weight, bias, eps
    )
