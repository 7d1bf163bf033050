"""What the attention kernels share: the order of tiles, loads, visible keys, dropout; checks.

Keys come in two segments: the past, ``[2, B, H, capacity, D]``, of which the first P are in use,
then the T new ones in the packed projection ``[B, T, 3C]``. Both are cut into tiles of BLOCK_N,
each segment from its own beginning.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton.launch import descriptor
from gpt2fast.kernels._triton.target import current_target
from gpt2fast.kernels.backend import DTYPES

# Arguments of the kernels that vary from call to call: no reason to compile again.
UNSPECIALIZED = [
    "past_length", "length", "heads", "batch_heads", "section", "threshold", "stride_mask_batch",
]  # fmt: skip
# In place of -inf: a row that sees no key of a tile then still has finite differences, and what it
# adds up is multiplied by 0 when the row meets a key that it sees, at the latest itself.
MASKED_SCORE = tl.constexpr(-1.0e30)
# Rounds from which on Philox2x32 is indistinguishable from random in BigCrush; the 10 of
# general-purpose generators are a safety margin (Salmon et al., "Parallel random numbers: as easy
# as 1, 2, 3", 2011). They are most of what dropout costs.
_ROUNDS = tl.constexpr(7)
# Bytes of keys and values whose programs run side by side; well within every chip's L2.
_SECTION_BYTES = 16 << 20


@triton.jit
def scheduled(program, tiles, batch_heads, section):
    """The (tile, batch * head) of a program: within a section of heads, tiles in order.

    Tiles are ordered by weight, the heaviest first, so the last programs to run are light ones.
    Sections keep the keys and values in use within L2.
    """
    first = program // (section * tiles) * section
    within = program - first * tiles
    heads = min(section, batch_heads - first)
    return within // heads, first + within % heads


@triton.jit
def load_tile(
    base_ptr,
    row,
    rows,
    stride_row,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows ``row ..`` of a ``[rows, HEAD_SIZE]`` matrix as ``[BLOCK, BLOCK_D]``, zero outside.

    Unless BOUNDED, all rows of the block exist.
    """
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + row.to(tl.int64) * stride_row + offs[:, None] * stride_row + offs_d[None, :]
    mask_d = offs_d[None, :] < HEAD_SIZE
    if BOUNDED:
        tile = tl.load(ptrs, mask=((row + offs) < rows)[:, None] & mask_d, other=0.0)
    elif HEAD_SIZE == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=mask_d, other=0.0)
    return tile  # [BLOCK, BLOCK_D]


@triton.jit
def load_heads(
    source,
    desc,
    row,
    rows,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
    BY_POINTER: tl.constexpr,
):
    """`load_tile` of one head by descriptor where there is one, unless BY_POINTER.

    source is (pointer, row stride, the head's coordinates in desc).
    """
    base_ptr, stride_row, outer, inner = source
    if desc is None or BY_POINTER:
        tile = load_tile(base_ptr, row, rows, stride_row, HEAD_SIZE, BLOCK, BLOCK_D, BOUNDED)
    else:
        tile = desc.load([outer, inner, row, 0]).reshape([BLOCK, BLOCK_D])
    return tile  # [BLOCK, BLOCK_D]


@triton.jit
def store_tile(
    base_ptr,
    row,
    rows,
    stride_row,
    tile,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The reverse of `load_tile`; rows and columns that do not exist are left alone."""
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + row.to(tl.int64) * stride_row + offs[:, None] * stride_row + offs_d[None, :]
    mask = ((row + offs) < rows)[:, None] & (offs_d[None, :] < HEAD_SIZE)
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_bounds(first_keys_ptr, lengths_ptr, batch, keys):
    """The keys ``[low, high)`` that a batch row may attend, of ``keys``; (0, keys) if unbounded."""
    low = 0
    high = keys
    if first_keys_ptr is not None:
        low = max(tl.load(first_keys_ptr + batch), 0)
    if lengths_ptr is not None:
        high = max(min(tl.load(lengths_ptr + batch), keys), 0)
    return low, high


@triton.jit
def tile_bounds(low, high, end, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """Cut keys ``[low, high)`` of one segment into tiles, none at or past tile ``end``.

    Returns (first, first_full, end_full, last): of the tiles ``[first, last)`` those in
    ``[first_full, end_full)`` have all of their keys inside; PARTIAL says to treat none so.
    """
    first = min(low // BLOCK, end)
    first_full = min(tl.cdiv(low, BLOCK), end)
    end_full = first_full if PARTIAL else min(max(high // BLOCK, first_full), end)
    last = min(max(tl.cdiv(high, BLOCK), end_full), end)
    return first, first_full, end_full, last


@triton.jit
def kept_keys(bounds, key, BLOCK: tl.constexpr):
    """Which of a segment's keys ``key .. key + BLOCK`` may be attended, ``[BLOCK]``.

    bounds is (mask's pointer or None, where in it the segment begins, low, high).
    """
    mask_ptr, offset, low, high = bounds
    offs = key + tl.arange(0, BLOCK)
    kept = (offs >= low) & (offs < high)
    if mask_ptr is not None:
        kept = kept & (tl.load(mask_ptr + offset + offs, mask=kept, other=0) != 0)
    return kept


@triton.jit
def kept_weights(
    dropout,
    segment,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which attention weights dropout keeps, ``[ROWS, COLUMNS]``, a function of seed and position.

    dropout is (seed's pointer, batch * head, threshold); segment 1 is the past, 0 the new keys.
    Rows are queries and columns the segment's keys, or the reverse if TRANSPOSED; the tile may
    begin at any multiple of 16.

    Philox2x32 on counters (query, key), under a key of the seed, head and segment. A call's 64 bits
    serve four weights, 16 bits each: those whose queries and keys differ by 8. In the layout of the
    matrix instructions of compute capability 8 and 9 one thread holds these four, whichever side is
    transposed, so nothing is exchanged between threads.
    """
    seed_ptr, batch_head, threshold = dropout
    key, shift_query, shift_key, _ = tl.philox(tl.load(seed_ptr), 2 * batch_head + segment, 0, 0, 0)
    rows = (row // 2 + tl.arange(0, ROWS // 2)[:, None]).to(tl.uint32)
    columns = (column // 2 + tl.arange(0, COLUMNS // 2)[None, :]).to(tl.uint32)
    zero = tl.zeros([ROWS // 2, COLUMNS // 2], tl.uint32)
    if TRANSPOSED:
        c0, c1 = columns + shift_query + zero, rows + shift_key + zero
    else:
        c0, c1 = rows + shift_query + zero, columns + shift_key + zero
    for _ in tl.static_range(_ROUNDS):
        # One instruction, where the two halves of a 32-bit product would take two.
        product = c0.to(tl.uint64) * 0xD256D193
        c0 = (product >> 32).to(tl.uint32) ^ key ^ c1
        c1 = product.to(tl.uint32)
        key += 0x9E3779B9
    # A word for each value of the key's bit of 8, a half of it for each of the query's; of what is
    # compared the upper 16 bits count.
    words = tl.join(c0, c1)  # [ROWS / 2, COLUMNS / 2, 2]
    words = tl.join(words << 16, words)  # [ROWS / 2, COLUMNS / 2, 2, 2]
    words = tl.reshape(words, [ROWS // 16, 8, COLUMNS // 16, 8, 2, 2])
    if TRANSPOSED:
        words = tl.permute(words, [0, 4, 1, 2, 5, 3])
    else:
        words = tl.permute(words, [0, 5, 1, 2, 4, 3])
    return tl.reshape(words, [ROWS, COLUMNS]).to(tl.int32, bitcast=True) >= threshold


def dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """What a random int32 must reach for its weight to be kept, and what to multiply it by.

    The probability is rounded to 16 bits; the factor makes up for what is really dropped.
    """
    dropped = round(dropout_p * 2**16)
    return (dropped << 16) - 2**31, 2**16 / (2**16 - dropped)


def section_heads(keys: int, head_bytes: int) -> int:
    """How many heads, of ``head_bytes`` a key, share a section of the grid."""
    return max(1, _SECTION_BYTES // max(1, 2 * keys * head_bytes))


def heads_descriptor(tensor: Tensor, head_size: int, rows: int, block_d: int) -> object:
    """For copying tiles of one head by the tensor memory accelerator; None where it cannot.

    Shows a packed ``[B, T, n * D]`` as ``[B, n, T, D]`` and a past ``[2, B, H, P, D]`` as
    ``[2 * B, H, P, D]``, in boxes of ``[rows, block_d]`` whose parts outside of a head are zero.
    """
    if tensor.dtype == torch.float32 or not current_target(tensor.device).has_tma:
        return None
    if tensor.dim() == 3:
        batch, length, width = tensor.shape
        stride_batch, stride_row, _ = tensor.stride()
        shape = [batch, width // head_size, length, head_size]
        strides = [stride_batch, head_size, stride_row, 1]
    else:
        _, batch, heads, length, _ = tensor.shape
        stride_part, stride_batch, stride_head, stride_row, _ = tensor.stride()
        if stride_part != batch * stride_batch:
            return None
        shape = [2 * batch, heads, length, head_size]
        strides = [stride_batch, stride_head, stride_row, 1]
    aligned = 16 // tensor.element_size()
    if tensor.data_ptr() % 16 or any(s <= 0 or s % aligned for s in strides[:-1]):
        return None
    return descriptor(tensor, shape, strides, [1, 1, rows, block_d])


def check_heads(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``tensor`` has this shape, a dtype of ours, and contiguous heads, on device."""
    contiguous = tensor.stride(-1) == 1 or not tensor.numel()
    if tuple(tensor.shape) != shape or not contiguous or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be {list(shape)} of {DTYPES}, its last dimension contiguous; got "
            f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}; got {tensor.device}")


def check_rows(batch: int, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise unless each tensor is None or ``[batch]`` int32, contiguous, on the device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (batch,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be [{batch}] int32, contiguous; "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}; got {tensor.device}")
