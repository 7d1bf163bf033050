"""The input embedding of GPT-2.

    h[b, t] = wte[input_ids[b, t]] + wpe[position_ids[b, t]] (+ wte[token_type_ids[b, t]])

Token types share the token embedding, as in both references.
"""

from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.registry import register_op

_embedding = register_op(
    "embedding(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, Tensor wte,"
    " Tensor wpe) -> Tensor",
    torch_ops.embedding,
)


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    wte: Tensor,
    wpe: Tensor,
) -> Tensor:
    """Sum of token, position and (optional) token-type embeddings.

    Args:
        input_ids: ``[B, T]``, int64; the caller has checked the range.
        position_ids: ``[B, T]`` or ``[1, T]``, int64.
        token_type_ids: ``[B, T]``, int64, or None.
        wte: ``[V, C]``, the token embedding.
        wpe: ``[P, C]``, the position embedding.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: the shapes do not agree.
    """
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
    return _embedding(input_ids, position_ids, token_type_ids, wte, wpe)
