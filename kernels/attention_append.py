"""Causal attention that appends to a preallocated key-value cache, for decoding.

    softmax(scale * q k^T + mask) v        over the keys in the cache and the new ones

One op for a prompt, a chunk of it, or one token: row b's T new keys and values are written into the
cache at positions start .. start + T, in place, and its T queries attend to every position up to
their own. Because it writes in place it takes no gradient.

``start`` is one number for all rows, known on the host, or one a row, on the device. The second
form is for ragged batches, and for CUDA graphs: nothing about lengths is read on the host, so the
same graph serves every step. What a key must pass to be attended by a query:

- it stands at or before the query's position;
- it stands at or behind ``first_keys[b]`` (left padding) and ``mask`` keeps it; a query always
  attends to itself.

Beams: with ``source_rows`` the key at position s of row b is read from the cache's row
``source_rows[b, s]``, while new ones are written to row b. Reordering beams then means gathering
rows of that table rather than of the cache.

On our kernels, up to 16 queries a row are served by ``_triton/decode.py``, which splits the keys of
a head among several programs, and more by ``_triton/attention_fwd.py``. The cache may have another
dtype than the projection, as at the border of autocast: it keeps its own, and the result has the
projection's. PyTorch's operators serve complete masks, and ``source_rows`` with more than 16
queries.
"""

import torch
from torch import Tensor

from gpt2fast.kernels import torch_ops
from gpt2fast.kernels.attention import check_inputs, checked_scale
from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.registry import autocast_inputs, register_kernel, register_op

MAX_SPLIT_QUERIES = 16  # of a row, that the kernel of split keys serves
ALIGNMENT = 8  # elements; the kernels take strides in multiples of it, for loads of 16 bytes
_MAX_HEAD_SIZE = 128


def aligned(tensor: Tensor) -> bool:
    """Whether all strides but the last are multiples of `ALIGNMENT`, where they count."""
    sizes, strides = tensor.shape[:-1], tensor.stride()
    return all(n == 1 or s % ALIGNMENT == 0 for n, s in zip(sizes, strides, strict=False))


def contiguous_rows(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def _fake(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


_attention_append_fwd = register_kernel(
    "attention_append_fwd(Tensor qkv, Tensor(a!) kv_cache, SymInt start, Tensor? starts,"
    " int num_heads, Tensor? mask, Tensor? first_keys, Tensor? source_rows, float scale) -> Tensor",
    "decode:attention_append",
    _fake,
)


def _with_contiguous_rows(table: Tensor | None) -> Tensor | None:
    return table if table is None or contiguous_rows(table) else table.contiguous()


def _attention_append_triton(
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
    """The op on our kernels, whose scores and softmax are in float32 whatever ``upcast`` says."""
    head_size = kv_cache.shape[4]
    if (
        (mask is not None and mask.dim() == 4)
        or (source_rows is not None and qkv.shape[1] > MAX_SPLIT_QUERIES)
        or kv_cache.dtype not in DTYPES
        or head_size % ALIGNMENT
        or head_size > _MAX_HEAD_SIZE
        or kv_cache.stride(4) != 1
        or not aligned(kv_cache)
    ):
        return NotImplemented
    if qkv.stride(2) != 1 or not aligned(qkv):
        qkv = qkv.contiguous()
    starts, mask, first_keys, source_rows = map(
        _with_contiguous_rows, (starts, mask, first_keys, source_rows)
    )
    out = _attention_append_fwd(
        qkv, kv_cache, start, starts, num_heads, mask, first_keys, source_rows, scale
    )
    torch.autograd.graph.increment_version(kv_cache)  # as PyTorch's in-place operators do
    # Under autocast PyTorch's attention gives the lower precision, also for a float32 projection.
    result: Tensor = autocast_inputs(out)[0]
    return result


_attention_append = register_op(
    "attention_append(Tensor qkv, Tensor(a!) kv_cache, SymInt start, Tensor? starts, int num_heads,"
    " Tensor? mask, Tensor? first_keys, Tensor? source_rows, float scale, bool upcast) -> Tensor",
    torch_ops.attention_append,
    _attention_append_triton,
)


def attention_append(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int | Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    source_rows: Tensor | None = None,
    scale: float | None = None,
    upcast: bool = False,
) -> Tensor:
    """Append the new keys and values to the cache in place and attend over all of it.

    Args:
        qkv: ``[B, T, 3C]``, the packed projection of a prompt, a chunk or one token.
        kv_cache: ``[2, B, H, capacity, D]``, keys then values; with ``source_rows`` it may have
            more than B rows, of which the first B are written. Positions from start + T on may hold
            anything, NaN included; those before start hold numbers, masked ones too.
        start: how many positions of the cache are in use already: one number for all rows, or an
            int32 tensor ``[B]`` on the cache's device. Such a tensor is never read on the host, so
            nobody checks that start + T fits: a row without room, or with a negative start, gets an
            undefined result and undefined contents of its own slots; no other row is touched.
        num_heads: H.
        mask: ``[B, S]`` boolean, the keys that may be attended, or a complete
            ``[B or 1, H or 1, T, S]``, as in `causal_attention`; S is start + T, or the capacity
            where start is a tensor.
        first_keys: int32 ``[B]``, the position of each row's first real key, before which is left
            padding; not together with a complete mask.
        source_rows: int32 ``[B, capacity]``, the row of the cache that each earlier position of a
            row is read from. Must not name a slot that this call writes (rows that share slots
            have the same start). Entries from start on are not used and may hold anything.
        scale, upcast: as in `causal_attention`.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the cache has no room.
        RuntimeError: qkv or the cache requires a gradient: an in-place write has none.
    """
    if torch.is_grad_enabled() and (qkv.requires_grad or kv_cache.requires_grad):
        raise RuntimeError(
            "attention_append writes in place and has no gradient; use torch.no_grad"
        )
    starts = start if isinstance(start, Tensor) else None
    first = 0 if isinstance(start, Tensor) else start
    _check(qkv, kv_cache, first, starts, num_heads, mask, first_keys, source_rows)
    scale = checked_scale(scale, qkv, num_heads)
    return _attention_append(
        qkv, kv_cache, first, starts, num_heads, mask, first_keys, source_rows, scale, upcast
    )


def _check(
    qkv: Tensor,
    kv_cache: Tensor,
    start: int,
    starts: Tensor | None,
    num_heads: int,
    mask: Tensor | None,
    first_keys: Tensor | None,
    source_rows: Tensor | None,
) -> None:
    """Raise a ValueError unless everything fits together."""
    batch, length = (*qkv.shape, 0, 0)[:2]
    rows, capacity = (kv_cache.shape[1], kv_cache.shape[3]) if kv_cache.dim() == 5 else (0, 0)
    own = kv_cache
    if source_rows is not None and rows > batch:
        own = kv_cache[:, :batch]
    check_inputs(qkv, num_heads, own, start if starts is None else capacity - length, mask)
    for name, table, shape in (
        ("start", starts, [batch]),
        ("first_keys", first_keys, [batch]),
        ("source_rows", source_rows, [batch, capacity]),
    ):
        if table is None:
            continue
        if list(table.shape) != shape or table.dtype != torch.int32 or table.device != qkv.device:
            raise ValueError(
                f"{name} must be {shape}, int32, on {qkv.device}; got {list(table.shape)}, "
                f"{table.dtype}, on {table.device}"
            )
    if first_keys is not None and mask is not None and mask.dim() == 4:
        raise ValueError("first_keys and a complete 4-D mask exclude each other; got both")
    if starts is None and (start < 0 or start + length > capacity):
        raise ValueError(f"no room for {length} positions at {start} in a cache of {capacity}")
    if starts is not None and length > capacity:
        raise ValueError(f"no room for {length} positions in a cache of {capacity}")
