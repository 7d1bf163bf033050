"""attention_append: the result, the cache's new slots, and its untouched ones."""

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, backends, backends_and_dtypes, triton_only
from tests.tolerances import assert_close

HEADS, HEAD_SIZE = 3, 8
NAN = float("nan")


def _poisoned(
    batch: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    heads: int = HEADS,
    head_size: int = HEAD_SIZE,
) -> Tensor:
    return torch.full((2, batch, heads, capacity, head_size), NAN, dtype=dtype)


def _qkv(
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    width: int = HEADS * HEAD_SIZE,
) -> Tensor:
    return torch.randn(batch, length, 3 * width).to(dtype)


def _heads(qkv: Tensor, cache: Tensor) -> Tensor:
    """Keys and values of a projection, ``[2, B, H, T, D]``, in the cache's dtype."""
    parts = [p.unflatten(-1, (cache.shape[2], -1)).transpose(1, 2) for p in qkv.chunk(3, -1)[1:]]
    return torch.stack(parts).to(cache.dtype)


def _check_slots(cache: Tensor, qkv: Tensor) -> None:
    """The first slots hold qkv's keys and values bit by bit; the others are still poisoned."""
    assert torch.equal(cache[:, :, :, : qkv.shape[1]], _heads(qkv, cache))
    assert cache[:, :, :, qkv.shape[1] :].isnan().all()


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cache(
    starts: list[int], capacity: int, dtype: torch.dtype, heads: int = HEADS, size: int = HEAD_SIZE
) -> Tensor:
    """Row b holds random keys and values at its first ``starts[b]`` positions, NaN behind them."""
    cache = _poisoned(len(starts), capacity, dtype, heads, size)
    for row, start in enumerate(starts):
        cache[:, row, :, :start] = torch.randn(2, heads, start, size).to(dtype)
    return cache


def _check_append(
    qkv: Tensor,
    cache: Tensor,
    starts: list[int],
    *,
    on_device: bool = True,
    mask: Tensor | None = None,
    first_keys: Tensor | None = None,
    source_rows: Tensor | None = None,
) -> None:
    """Call the op, and compare with one row after the other over its keys, gathered explicitly.

    mask is ``[B, capacity]`` whatever ``start`` is.
    """
    heads, length = cache.shape[2], qkv.shape[1]
    before = cache.clone()
    given = mask
    if mask is not None and not on_device:
        given = mask[:, : starts[0] + length]
    out = kernels.attention_append(
        qkv,
        cache,
        _int32(*starts) if on_device else starts[0],
        heads,
        mask=given,
        first_keys=first_keys,
        source_rows=source_rows,
    )
    assert out.shape == (*qkv.shape[:2], qkv.shape[2] // 3)
    after, truth, plain = before.clone(), [], []
    for row, start in enumerate(starts):
        end = start + length
        after[:, row, :, start:end] = _heads(qkv[row : row + 1], cache)[:, 0]
        rows = torch.full((start,), row) if source_rows is None else source_rows[row, :start].long()
        past = before[:, rows, :, torch.arange(start)].permute(1, 2, 0, 3)[:, None]
        past = past.to(qkv.dtype)
        kept = torch.ones(1, end, dtype=torch.bool) if mask is None else mask[row : row + 1, :end]
        if first_keys is not None:
            kept = kept & (torch.arange(end) >= first_keys[row])
        for results, dtype in ((truth, torch.float64), (plain, qkv.dtype)):
            one = qkv[row : row + 1].to(dtype)
            results.append(oracles.attention(one, heads, past.to(dtype), mask=kept)[0])
    assert_close("attention", "forward", out, torch.cat(truth), torch.cat(plain))
    assert torch.equal(cache.nan_to_num(7), after.nan_to_num(7))


CHUNKS = [[1], [7], [1] * 5, [5, 1, 1], [4, 3, 5], [1, 6], [16], [13, 18, 2], [33, 1]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@backends_and_dtypes
def test_chunks(batch: int, chunks: list[int], backend: str, dtype: torch.dtype) -> None:
    """Prompt, chunks and tokens one by one are one causal pass."""
    whole = _qkv(batch, sum(chunks), dtype)
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole, HEADS)
    cache, start, outputs = _poisoned(batch, sum(chunks) + 3, dtype), 0, []
    for chunk in whole.split(chunks, dim=1):
        outputs.append(kernels.attention_append(chunk, cache, start, HEADS))
        start += chunk.shape[1]
        _check_slots(cache, whole[:, :start])
    assert_close("attention", "forward", torch.cat(outputs, 1), expected, plain)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("start", [63, 64, 65, 150, 256])
@backends
def test_split_keys(start: int, length: int, on_device: bool, backend: str) -> None:
    """Few heads and a long context: several programs share a head's keys."""
    qkv, cache = _qkv(1, length, width=16), _cache([start], start + 70, torch.float32, 1, 16)
    _check_append(qkv, cache, [start], on_device=on_device)


@pytest.mark.parametrize("length", [1, 3, 16, 19])
@pytest.mark.parametrize("starts", [[0, 7, 130], [64, 0, 1], [0, 0, 0]], ids=str)
@backends_and_dtypes
def test_ragged(starts: list[int], length: int, backend: str, dtype: torch.dtype) -> None:
    """Rows of different lengths; of the programs that the capacity asks for, some have no keys."""
    _check_append(_qkv(3, length, dtype), _cache(starts, 200, dtype), starts)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 4, 18])
@backends
def test_left_padding(length: int, on_device: bool, backend: str) -> None:
    """First keys in the past, at its end, and among the new ones."""
    starts = [70, 70, 70, 70]
    _check_append(
        _qkv(4, length),
        _cache(starts, 90, torch.float32),
        starts,
        on_device=on_device,
        first_keys=_int32(0, 66, 70, 70 + length // 2),
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 4, 18])
@backends_and_dtypes
def test_key_mask_and_left_padding(
    length: int, on_device: bool, backend: str, dtype: torch.dtype
) -> None:
    starts = [9, 40] if on_device else [40, 40]
    mask = torch.rand(2, 96) < 0.5
    for first_keys in (None, _int32(3, 17)):
        cache = _cache(starts, 96, dtype)
        _check_append(
            _qkv(2, length, dtype),
            cache,
            starts,
            on_device=on_device,
            mask=mask,
            first_keys=first_keys,
        )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17])
@backends
def test_source_rows(length: int, on_device: bool, backend: str) -> None:
    """Past keys from other rows, also from rows behind the batch; new ones into the row's own."""
    starts, capacity = [37, 37], 60
    source_rows = torch.randint(0, 4, (2, capacity), dtype=torch.int32)
    source_rows[:, 37:] = torch.iinfo(torch.int32).max  # not in use: anything
    source_rows[0, 37:] = -1
    cache = _cache([37] * 4, capacity, torch.float32)
    _check_append(_qkv(2, length), cache, starts, on_device=on_device, source_rows=source_rows)


@backends
def test_source_rows_ragged_masked_and_split(backend: str) -> None:
    """All tables together; pairs of rows share their slots, as the beams of one prompt do."""
    starts, capacity = [130, 130, 70, 70], 200
    source_rows = torch.cat(
        (torch.randint(0, 2, (2, capacity)), torch.randint(2, 4, (2, capacity)))
    )
    _check_append(
        _qkv(4, 1, width=8),
        _cache(starts, capacity, torch.float32, 1),
        starts,
        mask=torch.rand(4, capacity) < 0.7,
        first_keys=_int32(5, 5, 64, 64),
        source_rows=source_rows.int(),
    )


@backends
def test_reordering_beams_by_the_table(backend: str) -> None:
    """Steps of a beam search: gathering rows of the table is gathering rows of the cache."""
    beams, capacity = 3, 12
    whole = _qkv(1, 4).expand(beams, -1, -1)
    moved = _poisoned(beams, capacity)
    kernels.attention_append(whole, moved, 0, HEADS)
    kept, table = moved.clone(), torch.arange(beams)[:, None].repeat(1, capacity).int()
    for step in range(4, 9):
        order = torch.randint(0, beams, (beams,))
        moved, table = moved[:, order], table[order]
        table[:, step:] = torch.arange(beams)[:, None]
        qkv = _qkv(beams, 1)
        expected = kernels.attention_append(qkv, moved, step, HEADS)
        out = kernels.attention_append(qkv, kept, step, HEADS, source_rows=table)
        assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("length", [1, 4])
@triton_only
def test_masked_slots_may_hold_nan(length: int, backend: str) -> None:
    """The kernel for few queries: zero times NaN is not zero."""
    cache, mask = _cache([20, 20], 32, torch.float32), torch.rand(2, 32) < 0.5
    for row in range(2):
        cache[:, row, :, :20][:, :, ~mask[row, :20]] = NAN
    qkv = _qkv(2, length)
    out = kernels.attention_append(qkv, cache.clone(), _int32(20, 20), HEADS, mask=mask)
    zeroed = cache.nan_to_num(0)
    expected = kernels.attention_append(qkv, zeroed, _int32(20, 20), HEADS, mask=mask)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [16, 32, 40, 80, 96, 128])
@backends
def test_head_sizes(size: int, backend: str) -> None:
    for length in (1, 3, 17):
        qkv, cache = _qkv(1, length, width=2 * size), _cache([70], 90, torch.float32, 2, size)
        _check_append(qkv, cache, [70])


@backends
def test_head_size_of_no_kernel(backend: str) -> None:
    """Not a multiple of 8: PyTorch serves."""
    qkv, cache = _qkv(1, 2, width=20), _cache([4], 8, torch.float32, 2, 10)
    _check_append(qkv, cache, [4])


@backends
def test_fills_the_cache_to_the_last_slot(backend: str) -> None:
    for starts in (0, 5), (_int32(0), _int32(5)):
        qkv, cache = _qkv(1, 6), _poisoned(1, 6)
        kernels.attention_append(qkv[:, :5], cache, starts[0], HEADS)
        out = kernels.attention_append(qkv[:, 5:], cache, starts[1], HEADS)
        _check_slots(cache, qkv)
        expected, _ = oracles.attention(qkv.double(), HEADS)
        assert_close("attention", "forward", out, expected[:, 5:])


@pytest.mark.parametrize("length", [1, 4, 17])
@backends
def test_rows_without_room_touch_no_other(length: int, backend: str) -> None:
    """Starts are not read on the host; the rows that have room are as they would be alone."""
    storage = torch.full((2, 8, HEADS, 24, HEAD_SIZE), NAN)
    cache = storage[:, 2:6]
    cache[:, 1, :, :3] = torch.randn(2, HEADS, 3, HEAD_SIZE)
    alone, qkv = cache[:, 1:2].clone(), _qkv(4, length)
    cache[:, [0, 2, 3]] = 0.0
    starts = _int32(24 - length + 1, 3, -2, torch.iinfo(torch.int32).max)
    out = kernels.attention_append(qkv, cache, starts, HEADS)
    expected = kernels.attention_append(qkv[1:2], alone, 3, HEADS)
    assert_close("attention", "forward", out[1:2], expected)
    assert torch.equal(cache[:, 1:2].nan_to_num(7), alone.nan_to_num(7))
    assert storage[:, :2].isnan().all()
    assert storage[:, 6:].isnan().all()


@pytest.mark.parametrize("kind", ["left", "inner"])
@pytest.mark.parametrize("new", [1, 4])
@backends
def test_prepared_mask(new: int, kind: str, backend: str) -> None:
    whole, past = _qkv(2, 6 + new), 6
    mask = torch.ones(2, 6 + new, dtype=torch.bool)
    if kind == "left":
        mask[0, :3] = False
    else:
        mask[1, 4] = False
    cache = _poisoned(2, 16)
    kernels.attention_append(whole[:, :past], cache, 0, HEADS)
    prepared = kernels.prepare_mask(mask, new, torch.device(DEVICE))
    expected, _ = oracles.attention(whole.double(), HEADS, mask=mask)
    for form in (mask, prepared):
        out = kernels.attention_append(whole[:, past:], cache, past, HEADS, mask=form)
        assert_close("attention", "forward", out, expected[:, past:])
        _check_slots(cache, whole)


@pytest.mark.parametrize("kind", ["float", "boolean"])
@backends
def test_complete_mask_scale_and_upcast(kind: str, backend: str) -> None:
    whole, cache = _qkv(2, 7), _poisoned(2, 8)
    mask = torch.randn(1, HEADS, 3, 7)
    if kind == "boolean":
        mask = (mask < 0.5) | (torch.arange(7) == 0)
    kernels.attention_append(whole[:, :4], cache, 0, HEADS)
    past = cache[:, :, :, :4].clone()
    new = whole[:, 4:]
    expected, _ = oracles.attention(new.double(), HEADS, past.double(), mask=mask, scale=0.5)
    # Over the whole capacity, the last of which nobody may attend.
    longer = torch.cat((mask, mask[..., :1]), -1)
    for start, form in ((4, mask), (_int32(4, 4), longer)):
        for upcast in (False, True):
            out = kernels.attention_append(
                new, cache, start, HEADS, mask=form, scale=0.5, upcast=upcast
            )
            assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("scale", [0.5, -0.5])
@backends
def test_scale_and_upcast(scale: float, backend: str) -> None:
    for length in (1, 4, 18):
        qkv, cache = _qkv(2, length), _cache([9, 9], 32, torch.float32)
        past = cache[:, :, :, :9].double()
        expected, _ = oracles.attention(qkv.double(), HEADS, past, scale=scale)
        out = kernels.attention_append(qkv, cache, 9, HEADS, scale=scale, upcast=True)
        assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@backends
def test_cache_of_another_dtype(dtype: torch.dtype, backend: str) -> None:
    """The cache keeps its dtype, the result has the projection's."""
    other = torch.float16 if dtype == torch.float32 else torch.float32
    for lengths in ((3, 2), (7, 1), (4, 20)):
        whole = _qkv(1, sum(lengths), torch.float16).to(dtype)
        cache = _poisoned(1, 32, other)
        kernels.attention_append(whole[:, : lengths[0]], cache, 0, HEADS)
        out = kernels.attention_append(whole[:, lengths[0] :], cache, lengths[0], HEADS)
        assert (out.dtype, cache.dtype) == (dtype, other)
        _check_slots(cache, whole)
        expected, _ = oracles.attention(whole.double(), HEADS)
        plain, _ = oracles.attention(whole, HEADS)
        rest = slice(lengths[0], None)
        assert_close("attention", "forward", out, expected[:, rest], plain[:, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@backends
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """The result has autocast's dtype, whatever the projection's."""
    whole, cache = _qkv(1, 9).to(dtype), _poisoned(1, 16)
    with torch.autocast(DEVICE, torch.float16):
        kernels.attention_append(whole[:, :6], cache, 0, HEADS)
        out = kernels.attention_append(whole[:, 6:], cache, 6, HEADS)
    assert out.dtype == torch.float16
    _check_slots(cache, whole)
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole.half(), HEADS)
    assert_close("attention", "forward", out, expected[:, 6:], plain[:, 6:])


@pytest.mark.parametrize("length", [1, 4, 18])
@backends
def test_strided_cache(length: int, backend: str) -> None:
    """A cache that is a part of a larger tensor: nothing outside of it is touched."""
    storage = torch.full((2, 4, HEADS, 40, HEAD_SIZE), NAN)
    cache, qkv = storage[:, 1:3, :, 5:35], _qkv(2, length)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected)
    _check_slots(cache, qkv)
    written = 2 * 2 * HEADS * length * HEAD_SIZE
    assert int(storage.isnan().sum()) == storage.numel() - written


@backends
def test_other_layouts(backend: str) -> None:
    """Slots before heads, as in other libraries' caches; strides that no kernel reads."""
    for length in (1, 3, 17):
        base = _cache([9, 9], 30, torch.float32)
        slots_first = base.transpose(2, 3).contiguous().transpose(2, 3)
        assert not slots_first.is_contiguous()
        wide = torch.full((2, 2, HEADS, 30, HEAD_SIZE + 1), NAN)
        unaligned = wide[..., :HEAD_SIZE].copy_(base)
        qkv = torch.randn(length, 2, 3 * HEADS * HEAD_SIZE + 1)[..., 1:].transpose(0, 1)
        for cache in (slots_first, unaligned):
            _check_append(qkv, cache, [9, 9])
        assert wide[..., HEAD_SIZE].isnan().all()
        table = torch.randint(0, 2, (30, 2), dtype=torch.int32).t()
        mask = (torch.rand(30, 2) < 0.7).t()
        first_keys = torch.arange(8, dtype=torch.int32)[::4].expand(2)
        _check_append(qkv, base, [9, 9], mask=mask, first_keys=first_keys, source_rows=table)


@backends
def test_result_is_no_view_of_the_cache(backend: str) -> None:
    cache, qkv = _poisoned(1, 8), _qkv(1, 1)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    before = out.clone()
    cache.fill_(NAN)
    qkv.fill_(NAN)
    assert torch.equal(out, before)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 20)])
@backends
def test_empty(batch: int, length: int, backend: str) -> None:
    for start in (4, torch.full((batch,), 4, dtype=torch.int32)):
        cache = _poisoned(batch, 32)
        out = kernels.attention_append(_qkv(batch, length), cache, start, HEADS)
        assert out.shape == (batch, length, HEADS * HEAD_SIZE)
        assert cache.isnan().all()


@pytest.mark.parametrize(
    ("length", "start", "message"),
    [
        (3, 6, "no room for 3 positions at 6 in a cache of 8"),
        (9, 0, "no room for 9 positions at 0 in a cache of 8"),
        (1, -1, "no room for 1 positions at -1 in a cache of 8"),
        (9, torch.zeros(1, dtype=torch.int32), "no room for 9 positions in a cache of 8"),
    ],
    ids=str,
)
def test_no_room(length: int, start: int | Tensor, message: str) -> None:
    cache = _poisoned(1, 8)
    with pytest.raises(ValueError, match=f"^{message}$"):
        kernels.attention_append(_qkv(1, length), cache, start, HEADS)
    assert cache.isnan().all()


def test_wrong_shapes_leave_the_cache_alone() -> None:
    cache = _poisoned(2, 8)
    with pytest.raises(ValueError, match=r"^past keys and values must be \[2, 1, 3, 'time', 8\]"):
        kernels.attention_append(_qkv(1, 2), cache, 0, HEADS)
    with pytest.raises(ValueError, match=r"^mask must be \[2, 5\] or .*; got \[2, 2\]$"):
        kernels.attention_append(_qkv(2, 2), cache, 3, HEADS, mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match=r"^mask must be \[2, 8\] or .*; got \[2, 5\]$"):
        kernels.attention_append(
            _qkv(2, 2), cache, _int32(3, 3), HEADS, mask=torch.ones(2, 5).bool()
        )
    with pytest.raises(ValueError, match=r"^qkv must be \[batch, time, .*; got \[3\]$"):
        kernels.attention_append(torch.randn(3), cache, 0, HEADS)
    assert cache.isnan().all()


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("start", torch.zeros(2, dtype=torch.int64), "[2], int32, on cpu; got [2], torch.int64"),
        ("start", torch.zeros((), dtype=torch.int32), "[2], int32, on cpu; got [], torch.int32"),
        ("first_keys", torch.zeros(3).int(), "[2], int32, on cpu; got [3], torch.int32"),
        ("source_rows", torch.zeros(2, 7).int(), "[2, 8], int32, on cpu; got [2, 7], torch.int32"),
        ("source_rows", torch.zeros(2, 8), "[2, 8], int32, on cpu; got [2, 8], torch.float32"),
        ("first_keys", torch.zeros(2, device="meta").int(), "[2], int32, on cpu; got [2], "
         "torch.int32, on meta"),
    ],
)  # fmt: skip
def test_wrong_tables(name: str, table: Tensor, message: str) -> None:
    cache, tables = _poisoned(2, 8), {"start": 0, name: table}
    with pytest.raises(ValueError, match="must be") as error:
        kernels.attention_append(_qkv(2, 2), cache, num_heads=HEADS, **tables)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{name} must be {message}")
    assert cache.isnan().all()


def test_a_complete_mask_leaves_no_room_for_first_keys() -> None:
    with pytest.raises(ValueError, match=r"^first_keys and a complete 4-D mask exclude each other"):
        kernels.attention_append(
            _qkv(1, 2), _poisoned(1, 8), 0, HEADS,
            mask=torch.ones(1, 1, 2, 2).bool(), first_keys=_int32(0),
        )  # fmt: skip


@backends
def test_refuses_gradients(backend: str) -> None:
    cache, qkv = _poisoned(1, 8), _qkv(1, 2).requires_grad_()
    with pytest.raises(RuntimeError) as error:
        kernels.attention_append(qkv, cache, 0, HEADS)
    assert str(error.value) == (
        "attention_append writes in place and has no gradient; use torch.no_grad"
    )
    assert cache.isnan().all()
    with torch.no_grad():
        out = kernels.attention_append(qkv, cache, 0, HEADS)
    assert not out.requires_grad


def test_refuses_a_cache_that_carries_gradients() -> None:
    past = torch.randn(2, 1, HEADS, 8, HEAD_SIZE, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"^attention_append writes in place and has no gradient"
    ):
        kernels.attention_append(_qkv(1, 2), past * 1, 0, HEADS)


@backends
def test_autograd_knows_that_the_cache_has_changed(backend: str) -> None:
    """A gradient that needs the cache's former contents is an error, not a wrong number."""
    weight, cache = torch.ones((), requires_grad=True), torch.zeros(2, 1, HEADS, 8, HEAD_SIZE)
    product = (weight * cache).sum()
    kernels.attention_append(_qkv(1, 2), cache, 0, HEADS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@backends
def test_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        qkv, cache = _qkv(1, 5), _poisoned(1, 8)
        kernels.attention_append(qkv[:, :4], cache, 0, HEADS)
        out = kernels.attention_append(qkv[:, 4:], cache, 4, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected[:, 4:])


@pytest.mark.parametrize("length", [1, 3, 17])
@backends
def test_compiles_as_one_graph(length: int, backend: str) -> None:
    """Traced with its tables; the write to the cache is kept."""
    starts, first_keys = _int32(4, 9), _int32(1, 0)
    rows = torch.arange(2).int()[:, None].repeat(1, 32) if length < 17 else None

    def call(qkv: Tensor, cache: Tensor) -> Tensor:
        out = kernels.attention_append(
            qkv, cache, starts, HEADS, first_keys=first_keys, source_rows=rows
        )
        return out + kernels.attention_append(qkv, cache, 12, HEADS)

    torch._dynamo.reset()
    qkv, caches = _qkv(2, length), [_cache([20, 20], 32, torch.float32)]
    caches.append(caches[0].clone())
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out, expected = compiled(qkv, caches[0]), call(qkv, caches[1])
    assert_close("attention", "forward", out, expected)
    assert torch.equal(caches[0].nan_to_num(7), caches[1].nan_to_num(7))


@pytest.mark.parametrize("length", [1, 3, 17])
@triton_only
def test_opcheck(length: int, backend: str) -> None:
    mask = torch.ones(2, 32, dtype=torch.bool)
    rows = torch.zeros(2, 32, dtype=torch.int32) if length < 17 else None
    tables = (mask, _int32(1, 0), rows)
    for args in ((9, None, HEADS, None, None, None), (0, _int32(4, 9), HEADS, *tables)):
        cache = _cache([32, 32], 32, torch.float32)
        op = torch.ops.gpt2fast.attention_append_fwd.default
        torch.library.opcheck(op, (_qkv(2, length), cache, *args, 0.3))


TINY = (2, 2, 16, 80, torch.float32)
MODELS = [
    pytest.param(batch, heads, 64, 1024, dtype, marks=pytest.mark.gpu)
    for batch, heads in ((1, 12), (33, 12), (8, 16), (1, 20), (4, 25))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize("length", [1, 2, 16, 33])
@pytest.mark.parametrize(("batch", "heads", "size", "capacity", "dtype"), [TINY, *MODELS])
@triton_only
def test_model_sizes(
    batch: int, heads: int, size: int, capacity: int, dtype: torch.dtype, length: int, backend: str
) -> None:
    """One start for all rows, and rows of lengths from none to the last that has room."""
    most = capacity - length
    for starts in ([most] * batch, [most * (i + 1) // batch if i else 0 for i in range(batch)]):
        cache, qkv = _cache(starts, capacity, dtype, heads, size), _qkv(batch, length, dtype)
        qkv = _qkv(batch, length, dtype, heads * size)
        _check_append(qkv, cache, starts, on_device=starts[0] != most)
    tables = {"mask": torch.rand(batch, capacity) < 0.7}
    tables["first_keys"] = torch.arange(batch, dtype=torch.int32) * 3
    if length <= 16:
        tables["source_rows"] = torch.randint(0, batch, (batch, capacity), dtype=torch.int32)
    starts = [most - 5] * batch
    cache = _cache(starts, capacity, dtype, heads, size)
    _check_append(qkv, cache, starts, **tables)


@pytest.mark.parametrize("length", [1, 5, 33])
@pytest.mark.parametrize(
    ("batch", "heads", "size", "capacity"),
    [(3, 2, 16, 70), pytest.param(67, 16, 64, 16000, marks=pytest.mark.gpu)],
)
@triton_only
def test_large_cache(
    batch: int, heads: int, size: int, capacity: int, length: int, backend: str
) -> None:
    """More than 2**31 elements: the last row's last slots are further than int32 reaches."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    cache = torch.zeros(2, batch, heads, capacity, size, dtype=dtype)
    assert DEVICE == "cpu" or cache.numel() > 2**31
    starts = [0] * (batch - 1) + [capacity - length]
    cache[:, -1, :, : starts[-1]] = torch.randn(2, heads, starts[-1], size).to(dtype)
    last = cache[:, -1:].clone()
    qkv = _qkv(batch, length, dtype, heads * size)
    source_rows = None
    if length <= 16:
        source_rows = torch.full((batch, capacity), batch - 1, dtype=torch.int32)
    out = kernels.attention_append(qkv, cache, _int32(*starts), heads, source_rows=source_rows)
    past = last[:, :, :, : starts[-1]]
    expected, _ = oracles.attention(qkv[-1:].double(), heads, past.double())
    plain, _ = oracles.attention(qkv[-1:], heads, past)
    assert_close("attention", "forward", out[-1:], expected, plain)
    new = _heads(qkv, cache)
    assert torch.equal(cache[:, -1, :, starts[-1] :], new[:, -1])
    assert torch.equal(cache[:, :-1, :, :length], new[:, :-1])
    assert not cache[:, :-1, :, length:].any()


@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize(
    ("batch", "heads", "size", "capacity"),
    [(2, 2, 16, 80), pytest.param(4, 12, 64, 1024, marks=pytest.mark.gpu)],
)
@triton_only
def test_one_graph_serves_every_step(
    batch: int, heads: int, size: int, capacity: int, length: int, backend: str
) -> None:
    """Captured once and replayed with other lengths and beams, which stand on the device."""
    dtype = torch.float32
    qkv = _qkv(batch, length, dtype, heads * size)
    cache, starts = _poisoned(batch, capacity, dtype, heads, size), _int32(*[0] * batch)
    rows = torch.arange(batch, dtype=torch.int32)[:, None].repeat(1, capacity)
    first_keys = _int32(*range(batch))
    table = rows if length <= 16 else None

    def step() -> Tensor:
        return kernels.attention_append(
            qkv, cache, starts, heads, first_keys=first_keys, source_rows=table
        )

    if DEVICE == "cuda":
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    for past in (0, 1, capacity // 3, capacity - length):
        lengths = [past // (i + 1) for i in range(batch)]
        cache.copy_(_cache(lengths, capacity, dtype, heads, size))
        starts.copy_(_int32(*lengths))
        qkv.copy_(_qkv(batch, length, dtype, heads * size))
        before = cache.clone()
        if DEVICE == "cuda":
            graph.replay()
        else:
            out = step()
        for i, own in enumerate(lengths):
            kept = (torch.arange(own + length) >= i)[None]
            past_kv = before[:, i : i + 1, :, :own].double()
            one = qkv[i : i + 1].double()
            expected, _ = oracles.attention(one, heads, past_kv, mask=kept)
            assert_close("attention", "forward", out[i : i + 1], expected)
