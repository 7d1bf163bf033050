"""attention_append: the result, the cache's new slots, and its untouched ones."""

import pytest
import torch

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.appending import (
    HEAD_SIZE,
    HEADS,
    NAN,
    check_append,
    check_slots,
    filled_cache,
    int32,
    keys_and_values,
    poisoned,
    projection,
)
from tests.kernels.devices import DEVICE, backends, backends_and_dtypes, triton_only
from tests.tolerances import assert_close

CHUNKS = [[7], [1] * 4, [5, 1, 1], [4, 3, 5], [16], [13, 18, 2], [33, 1]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@backends_and_dtypes
def test_chunks(batch: int, chunks: list[int], backend: str, dtype: torch.dtype) -> None:
    """Prompt, chunks and tokens one by one are one causal pass."""
    whole = projection(batch, sum(chunks), dtype)
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole, HEADS)
    cache, start, outputs = poisoned(batch, sum(chunks) + 3, dtype), 0, []
    for chunk in whole.split(chunks, dim=1):
        outputs.append(kernels.attention_append(chunk, cache, start, HEADS))
        start += chunk.shape[1]
        check_slots(cache, whole[:, :start])
    assert_close("attention", "forward", torch.cat(outputs, 1), expected, plain)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("start", [63, 64, 65, 150, 256])
@backends
def test_split_keys(start: int, length: int, on_device: bool, backend: str) -> None:
    """Few heads and a long context: several programs share a head's keys."""
    qkv, cache = (
        projection(1, length, width=16),
        filled_cache([start], start + 70, torch.float32, 1, 16),
    )
    check_append(qkv, cache, [start], on_device=on_device)


@pytest.mark.parametrize("length", [1, 3, 16, 19])
@pytest.mark.parametrize("starts", [[0, 7, 130], [64, 0, 1], [0, 0, 0]], ids=str)
@backends_and_dtypes
def test_ragged(starts: list[int], length: int, backend: str, dtype: torch.dtype) -> None:
    """Rows of different lengths; of the programs that the capacity asks for, some have no keys."""
    check_append(projection(3, length, dtype), filled_cache(starts, 200, dtype), starts)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 4, 18])
@backends
def test_left_padding(length: int, on_device: bool, backend: str) -> None:
    """First keys in the past, at its end, and among the new ones."""
    starts = [70, 70, 70, 70]
    check_append(
        projection(4, length),
        filled_cache(starts, 90, torch.float32),
        starts,
        on_device=on_device,
        first_keys=int32(0, 66, 70, 70 + length // 2),
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [1, 4, 18])
@backends_and_dtypes
def test_key_mask_and_left_padding(
    length: int, on_device: bool, backend: str, dtype: torch.dtype
) -> None:
    starts = [9, 40] if on_device else [40, 40]
    mask = torch.rand(2, 96) < 0.5
    for first_keys in (None, int32(3, 17)):
        cache = filled_cache(starts, 96, dtype)
        check_append(
            projection(2, length, dtype),
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
    cache = filled_cache([37] * 4, capacity, torch.float32)
    check_append(projection(2, length), cache, starts, on_device=on_device, source_rows=source_rows)


@backends
def test_source_rows_ragged_masked_and_split(backend: str) -> None:
    """All tables together; pairs of rows share their slots, as the beams of one prompt do."""
    starts, capacity = [130, 130, 70, 70], 200
    source_rows = torch.cat(
        (torch.randint(0, 2, (2, capacity)), torch.randint(2, 4, (2, capacity)))
    )
    check_append(
        projection(4, 1, width=8),
        filled_cache(starts, capacity, torch.float32, 1),
        starts,
        mask=torch.rand(4, capacity) < 0.7,
        first_keys=int32(5, 5, 64, 64),
        source_rows=source_rows.int(),
    )


@backends
def test_reordering_beams_by_the_table(backend: str) -> None:
    """Steps of a beam search: gathering rows of the table is gathering rows of the cache."""
    beams, capacity = 3, 12
    whole = projection(1, 4).expand(beams, -1, -1)
    moved = poisoned(beams, capacity)
    kernels.attention_append(whole, moved, 0, HEADS)
    kept, table = moved.clone(), torch.arange(beams)[:, None].repeat(1, capacity).int()
    for step in range(4, 9):
        order = torch.randint(0, beams, (beams,))
        moved, table = moved[:, order], table[order]
        table[:, step:] = torch.arange(beams)[:, None]
        qkv = projection(beams, 1)
        expected = kernels.attention_append(qkv, moved, step, HEADS)
        out = kernels.attention_append(qkv, kept, step, HEADS, source_rows=table)
        assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("length", [1, 4])
@triton_only
def test_masked_slots_may_hold_nan(length: int, backend: str) -> None:
    """The kernel for few queries: zero times NaN is not zero."""
    cache, mask = filled_cache([20, 20], 32, torch.float32), torch.rand(2, 32) < 0.5
    for row in range(2):
        cache[:, row, :, :20][:, :, ~mask[row, :20]] = NAN
    qkv = projection(2, length)
    out = kernels.attention_append(qkv, cache.clone(), int32(20, 20), HEADS, mask=mask)
    zeroed = cache.nan_to_num(0)
    expected = kernels.attention_append(qkv, zeroed, int32(20, 20), HEADS, mask=mask)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [32, 40, 96, 128])
@backends_and_dtypes
def test_head_sizes(size: int, backend: str, dtype: torch.dtype) -> None:
    for length in (1, 3, 17):
        cache = filled_cache([70], 90, dtype, 2, size)
        check_append(projection(1, length, dtype, 2 * size), cache, [70])


@backends
def test_head_size_of_no_kernel(backend: str) -> None:
    """Not a multiple of 8: PyTorch serves."""
    qkv, cache = projection(1, 2, width=20), filled_cache([4], 8, torch.float32, 2, 10)
    check_append(qkv, cache, [4])


@backends
def test_fills_the_cache_to_the_last_slot(backend: str) -> None:
    for starts in (0, 5), (int32(0), int32(5)):
        qkv, cache = projection(1, 6), poisoned(1, 6)
        kernels.attention_append(qkv[:, :5], cache, starts[0], HEADS)
        out = kernels.attention_append(qkv[:, 5:], cache, starts[1], HEADS)
        check_slots(cache, qkv)
        expected, _ = oracles.attention(qkv.double(), HEADS)
        assert_close("attention", "forward", out, expected[:, 5:])


@pytest.mark.parametrize("length", [1, 4, 17])
@backends
def test_rows_without_room_touch_no_other(length: int, backend: str) -> None:
    """Starts are not read on the host; the rows that have room are as they would be alone."""
    storage = torch.full((2, 9, HEADS, 24, HEAD_SIZE), NAN)
    cache = storage[:, 2:7]
    cache[:, 1, :, :3] = torch.randn(2, HEADS, 3, HEAD_SIZE)
    alone, qkv = cache[:, 1:2].clone(), projection(5, length)
    cache[:, [0, 2, 3, 4]] = 0.0
    starts = int32(24 - length + 1, 3, -2, 1000, torch.iinfo(torch.int32).max)
    out = kernels.attention_append(qkv, cache, starts, HEADS)
    expected = kernels.attention_append(qkv[1:2], alone, 3, HEADS)
    assert_close("attention", "forward", out[1:2], expected)
    assert torch.equal(cache[:, 1:2].nan_to_num(7), alone.nan_to_num(7))
    assert storage[:, :2].isnan().all()
    assert storage[:, 7:].isnan().all()


@pytest.mark.parametrize("kind", ["left", "inner"])
@pytest.mark.parametrize("new", [1, 4])
@backends
def test_prepared_mask(new: int, kind: str, backend: str) -> None:
    whole, past = projection(2, 6 + new), 6
    mask = torch.ones(2, 6 + new, dtype=torch.bool)
    if kind == "left":
        mask[0, :3] = False
    else:
        mask[1, 4] = False
    cache = poisoned(2, 16)
    kernels.attention_append(whole[:, :past], cache, 0, HEADS)
    prepared = kernels.prepare_mask(mask, new, torch.device(DEVICE))
    expected, _ = oracles.attention(whole.double(), HEADS, mask=mask)
    for form in (mask, prepared):
        out = kernels.attention_append(whole[:, past:], cache, past, HEADS, mask=form)
        assert_close("attention", "forward", out, expected[:, past:])
        check_slots(cache, whole)


@pytest.mark.parametrize("kind", ["float", "boolean"])
@backends
def test_complete_mask_scale_and_upcast(kind: str, backend: str) -> None:
    whole, cache = projection(2, 7), poisoned(2, 8)
    mask = torch.randn(1, HEADS, 3, 7)
    if kind == "boolean":
        mask = (mask < 0.5) | (torch.arange(7) == 0)
    kernels.attention_append(whole[:, :4], cache, 0, HEADS)
    past = cache[:, :, :, :4].clone()
    new = whole[:, 4:]
    expected, _ = oracles.attention(new.double(), HEADS, past.double(), mask=mask, scale=0.5)
    # Over the whole capacity, the last of which nobody may attend.
    longer = torch.cat((mask, mask[..., :1]), -1)
    for start, form in ((4, mask), (int32(4, 4), longer)):
        for upcast in (False, True):
            out = kernels.attention_append(
                new, cache, start, HEADS, mask=form, scale=0.5, upcast=upcast
            )
            assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@backends
def test_scale_and_upcast(scale: float, backend: str) -> None:
    for length in (1, 4, 18):
        qkv, cache = projection(2, length), filled_cache([9, 9], 32, torch.float32)
        past = cache[:, :, :, :9].double()
        expected, _ = oracles.attention(qkv.double(), HEADS, past, scale=scale)
        out = kernels.attention_append(qkv, cache, 9, HEADS, scale=scale, upcast=True)
        assert_close("attention", "forward", out, expected)


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
        cache = filled_cache(starts, capacity, dtype, heads, size)
        qkv = projection(batch, length, dtype, heads * size)
        check_append(qkv, cache, starts, on_device=starts[0] != most)
    tables = {"mask": torch.rand(batch, capacity) < 0.7}
    tables["first_keys"] = torch.arange(batch, dtype=torch.int32) * 3
    if length <= 16:
        tables["source_rows"] = torch.randint(0, batch, (batch, capacity), dtype=torch.int32)
    starts = [most - 5] * batch
    cache = filled_cache(starts, capacity, dtype, heads, size)
    check_append(qkv, cache, starts, **tables)


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
    assert batch < 67 or cache.numel() > 2**31
    starts = [0] * (batch - 1) + [capacity - length]
    cache[:, -1, :, : starts[-1]] = torch.randn(2, heads, starts[-1], size).to(dtype)
    last = cache[:, -1:].clone()
    qkv = projection(batch, length, dtype, heads * size)
    source_rows = None
    if length <= 16:
        source_rows = torch.full((batch, capacity), batch - 1, dtype=torch.int32)
    out = kernels.attention_append(qkv, cache, int32(*starts), heads, source_rows=source_rows)
    past = last[:, :, :, : starts[-1]]
    expected, _ = oracles.attention(qkv[-1:].double(), heads, past.double())
    plain, _ = oracles.attention(qkv[-1:], heads, past)
    assert_close("attention", "forward", out[-1:], expected, plain)
    new = keys_and_values(qkv, cache)
    assert torch.equal(cache[:, -1, :, starts[-1] :], new[:, -1])
    assert torch.equal(cache[:, :-1, :, :length], new[:, :-1])
    assert not cache[:, :-1, :, length:].any()
