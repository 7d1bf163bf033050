"""The input embedding, alone or with the LayerNorm after it, and its backward pass.

Forward: one read of each table row, on the row tiles of ``layer_norm.py``.

Backward: a table's gradient adds up the rows of dhidden by id, without atomics. The ids are sorted,
so that equal ones are neighbours, and the sorted list is cut into chunks of one length, each walked
by a program of its own (`_id_sum_kernel`). An id whose neighbours all lie in one chunk is then
done. One that crosses a border leaves a float32 share a chunk, and the program of the chunk where
it begins adds those up (`_join_chunks_kernel`). So a token that fills the batch is spread over all
programs, and the order of every sum is fixed.

An id out of range is not looked up: its row becomes NaN, and adds nothing to the table's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2fast.kernels._triton import configs
from gpt2fast.kernels._triton.launch import cdiv, launch
from gpt2fast.kernels._triton.layer_norm import (
    append_tile,
    check_affine,
    load_row_tiles,
    normalize_rows,
    row_stride,
    store_row_tile,
)


@triton.jit(do_not_specialize=["rows", "length", "stride_position_row"])
def _embedding_fwd_kernel(
    ids_ptr,
    position_ids_ptr,
    type_ids_ptr,
    wte_ptr,
    wpe_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    normed_ptr,
    statistics_ptr,
    rows,
    length,
    width,
    wte_rows,
    wpe_rows,
    stride_position_row,
    stride_wte_row,
    stride_wpe_row,
    eps,
    HAS_TYPES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAVE_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """hidden = wte[id] + wpe[position] (+ wte[type]) and its LayerNorm; grid: (row blocks,).

    ids_ptr, type_ids_ptr: ``[rows]``, rows being batch times length. position_ids_ptr:
    ``[batch or 1, length]``, stride_position_row 0 for one row. wte_ptr, wpe_ptr: ``[wte_rows or
    wpe_rows, width]`` with their strides. hidden_ptr, normed_ptr: ``[rows, width]``, contiguous.
    statistics_ptr: as in `normalize_rows`. Rows, columns and look-ups are masked: a row with an id
    out of range becomes NaN.
    """
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mask_m = offs_m < rows
    offs_position = offs_m // length * stride_position_row + offs_m % length
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    positions = tl.load(position_ids_ptr + offs_position, mask=mask_m, other=0).to(tl.int64)
    known_id = (ids >= 0) & (ids < wte_rows)
    known_position = (positions >= 0) & (positions < wpe_rows)
    known = known_id & known_position
    token = load_row_tiles(
        wte_ptr + ids * stride_wte_row, mask_m & known_id, width, BLOCK_M, LANES, CHUNKS
    )
    position = load_row_tiles(
        wpe_ptr + positions * stride_wpe_row, mask_m & known_position, width, BLOCK_M, LANES, CHUNKS
    )
    if HAS_TYPES:
        types = tl.load(type_ids_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        known_type = (types >= 0) & (types < wte_rows)
        known &= known_type
        kind = load_row_tiles(
            wte_ptr + types * stride_wte_row, mask_m & known_type, width, BLOCK_M, LANES, CHUNKS
        )
    row_ptr = hidden_ptr + offs_m.to(tl.int64) * width
    x = ()
    for chunk in tl.static_range(CHUNKS):
        # [BLOCK_M, LANES]
        hidden = token[chunk].to(tl.float32) + position[chunk].to(tl.float32)
        if HAS_TYPES:
            hidden += kind[chunk].to(tl.float32)
        hidden = tl.where(known, hidden, float("nan")).to(hidden_ptr.dtype.element_ty)
        store_row_tile(row_ptr, hidden, mask_m, width, chunk, LANES)
        x = append_tile(x, hidden.to(tl.float32))
    if NORMALIZE:
        normalize_rows(
            x, offs_m, mask_m, weight_ptr, bias_ptr, normed_ptr, statistics_ptr, rows, width, eps,
            SAVE_STATISTICS, BLOCK_M, LANES, CHUNKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "rows", "chunk"])
def _id_sum_kernel(
    dhidden_ptr,
    ids_ptr,
    order_ptr,
    dtable_ptr,
    partial_ptr,
    count,
    rows,
    table_rows,
    width,
    chunk,
    stride_dhidden_row,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds up the rows of dhidden by id, for one chunk of the sorted ids.

    Grid: (chunks, column blocks). dhidden_ptr: ``[rows, width]`` with its stride. ids_ptr: int32
    ``[count]``, sorted; order_ptr: int64 ``[count]``, where each stood, modulo rows its row (count
    is rows or twice as many). dtable_ptr: ``[table_rows, width]``, contiguous, written for ids that
    lie in this chunk alone. partial_ptr: float32 ``[chunks, 2, width]``, the shares of the id that
    comes from the chunk before, and of the one that goes on in the next. Columns are masked, and
    the rows of ids out of range.
    """
    pid = tl.program_id(0)
    start = pid * chunk
    end = min(start + chunk, count)
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1)
    after = tl.load(ids_ptr + end, mask=end < count, other=-1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    partial_ptr += pid.to(tl.int64) * 2 * width
    total = tl.zeros((BLOCK_N,), tl.float32)
    previous = before
    for i in tl.range(start, end, num_stages=STAGES):
        this = tl.load(ids_ptr + i)
        row = tl.load(order_ptr + i)
        row -= tl.where(row >= rows, rows, 0)
        values = tl.load(
            dhidden_ptr + row.to(tl.int64) * stride_dhidden_row + offs_n, mask=mask_n, other=0.0
        )
        total = tl.where(this == previous, total, 0.0) + values.to(tl.float32)
        previous = this
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < end, other=-1)
        done = (following != this) & (this >= 0) & (this < table_rows)
        whole = (this != before) & (this != after)
        tl.store(
            dtable_ptr + this.to(tl.int64) * width + offs_n,
            total.to(dtable_ptr.dtype.element_ty),
            mask=mask_n & (done & whole),
        )
        offs_share = tl.where(this == before, 0, width) + offs_n
        tl.store(partial_ptr + offs_share, total, mask=mask_n & (done & (whole == 0)))


@triton.jit(do_not_specialize=["count", "chunk"])
def _join_chunks_kernel(
    ids_ptr,
    dtable_ptr,
    partial_ptr,
    count,
    table_rows,
    width,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds up the shares of the id that begins in one chunk and goes on in the next ones.

    Grid and pointers: as in `_id_sum_kernel`. BLOCK_M following chunks a step, until one begins
    with another id.
    """
    pid = tl.program_id(0)
    start = pid * chunk
    end = start + chunk
    before = tl.load(ids_ptr + start - 1, mask=start > 0, other=-1)
    this = tl.load(ids_ptr + end - 1, mask=end < count, other=-1)
    after = tl.load(ids_ptr + end, mask=end < count, other=-2)
    if (this == after) & (this != before) & (this >= 0) & (this < table_rows):
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < width
        # [BLOCK_M, BLOCK_N]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = pid + 1
        more = True
        while more:
            offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
            head = tl.load(ids_ptr + offs_m * chunk, mask=offs_m * chunk < count, other=-1)
            hit = head == this
            total += tl.load(
                partial_ptr + offs_m[:, None] * 2 * width + offs_n[None, :],
                mask=hit[:, None] & mask_n[None, :],
                other=0.0,
            )
            first += BLOCK_M
            more = tl.min(hit.to(tl.int32), 0) == 1
        own = tl.load(
            partial_ptr + (pid.to(tl.int64) * 2 + 1) * width + offs_n, mask=mask_n, other=0.0
        )
        tl.store(
            dtable_ptr + this.to(tl.int64) * width + offs_n,
            (own + tl.sum(total, 0)).to(dtable_ptr.dtype.element_ty),
            mask=mask_n,
        )


def _check_ids(name: str, ids: Tensor, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> None:
    if (
        tuple(ids.shape) not in shapes
        or not ids.is_contiguous()
        or ids.dtype not in (torch.int32, torch.int64)
        or ids.device != like.device
    ):
        raise ValueError(
            f"{name} must be contiguous int32 or int64 {' or '.join(map(str, shapes))} on "
            f"{like.device}; got {ids.dtype} {tuple(ids.shape)} with strides "
            f"{tuple(ids.stride())} on {ids.device}"
        )


def embedding_fwd(
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
    """``(hidden, its LayerNorm in dtype, [mean, rstd])``, the last two empty where not asked for.

    Without weight and bias there is no LayerNorm. A row with an id out of range is NaN.
    """
    batch, length = input_ids.shape
    _check_ids("input_ids", input_ids, ((batch, length),), wte)
    _check_ids("position_ids", position_ids, ((batch, length), (1, length)), wte)
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, ((batch, length),), wte)
    rows, width = batch * length, wte.shape[1]
    device = wte.device
    stride_wte, stride_wpe = row_stride("wte", wte, wte), row_stride("wpe", wpe, wpe)
    hidden = torch.empty(batch, length, width, dtype=wte.dtype, device=device)
    if wpe.shape[1] != width or wpe.dtype != wte.dtype or wpe.device != device:
        raise ValueError(
            f"wpe must be [P, {width}] in {wte.dtype} on {device}; got {list(wpe.shape)} in "
            f"{wpe.dtype} on {wpe.device}"
        )
    normalize = weight is not None and bias is not None
    if weight is not None and bias is not None:
        check_affine(weight, bias, hidden)
    normed = torch.empty(hidden.shape if normalize else 0, dtype=dtype, device=device)
    statistics = torch.empty(2, rows if save_statistics else 0, dtype=torch.float32, device=device)
    if rows:
        tile = configs.row_tile(width, wte.itemsize)
        launch(
            _embedding_fwd_kernel, (cdiv(rows, tile.block_m),),
            (input_ids, position_ids, token_type_ids, wte, wpe, weight, bias,
             hidden, normed, statistics),
            (rows, length, width, wte.shape[0], wpe.shape[0],
             length if position_ids.shape[0] > 1 else 0, stride_wte, stride_wpe, eps),
            HAS_TYPES=token_type_ids is not None, NORMALIZE=normalize,
            SAVE_STATISTICS=save_statistics,
            BLOCK_M=tile.block_m, LANES=tile.lanes, CHUNKS=tile.chunks, num_warps=tile.warps,
        )  # fmt: skip
    return hidden, normed, statistics


def embedding_bwd(dhidden: Tensor, ids: Tensor, table_rows: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a table ``[table_rows, C]``, in ``dtype``: rows of dhidden added up by id.

    Args:
        dhidden: ``[..., C]``, R rows.
        ids: R ids, or 2R: those of the first and of a second look-up. Those outside
            ``[0, table_rows)`` add nothing.
    """
    width = dhidden.shape[-1]
    rows, count = dhidden.numel() // width, ids.numel()
    if count not in (rows, 2 * rows) or ids.device != dhidden.device:
        raise ValueError(
            f"expected {rows} or {2 * rows} ids on {dhidden.device}; got {count} on {ids.device}"
        )
    stride = row_stride("dhidden", dhidden, dhidden)
    dtable = torch.zeros(table_rows, width, dtype=dtype, device=dhidden.device)
    if not count:
        return dtable
    # A radix sort's passes go by the bytes of its keys. Clamped first, to ids that are still out of
    # range: the low half of an int64 may be in it.
    keys = ids.reshape(-1).clamp(-1, table_rows).to(torch.int32)
    ids, order = keys.sort(stable=True)
    config = configs.EMBEDDING_BWD
    chunk = max(config.shortest_chunk, cdiv(count, config.most_chunks))
    chunks = cdiv(count, chunk)
    partial = torch.empty(chunks, 2, width, dtype=torch.float32, device=dhidden.device)
    launch(
        _id_sum_kernel, (chunks, cdiv(width, config.sum_block_n)),
        (dhidden, ids, order, dtable, partial),
        (count, rows, table_rows, width, chunk, stride),
        BLOCK_N=config.sum_block_n, STAGES=config.sum_stages, num_warps=config.sum_warps,
    )  # fmt: skip
    if chunks > 1:
        launch(
            _join_chunks_kernel, (chunks, cdiv(width, config.join_block_n)),
            (ids, dtable, partial), (count, table_rows, width, chunk),
            BLOCK_M=config.join_block_m, BLOCK_N=config.join_block_n, num_warps=config.join_warps,
        )  # fmt: skip
    return dtable
