"""attention_append as an op: layouts, dtypes, errors, autograd, compilation, CUDA graphs."""

import pytest
import torch
from torch import Tensor

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
    poisoned,
    projection,
)
from tests.kernels.devices import DEVICE, backends, triton_only
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@backends
def test_cache_of_another_dtype(dtype: torch.dtype, backend: str) -> None:
    """The cache keeps its dtype, the result has the projection's."""
    other = torch.float16 if dtype == torch.float32 else torch.float32
    for lengths in ((3, 2), (7, 1), (4, 20)):
        whole = projection(1, sum(lengths), torch.float16).to(dtype)
        cache = poisoned(1, 32, other)
        kernels.attention_append(whole[:, : lengths[0]], cache, 0, HEADS)
        out = kernels.attention_append(whole[:, lengths[0] :], cache, lengths[0], HEADS)
        assert (out.dtype, cache.dtype) == (dtype, other)
        check_slots(cache, whole)
        expected, _ = oracles.attention(whole.double(), HEADS)
        plain, _ = oracles.attention(whole, HEADS)
        rest = slice(lengths[0], None)
        assert_close("attention", "forward", out, expected[:, rest], plain[:, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@backends
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """The result has autocast's dtype, whatever the projection's."""
    whole, cache = projection(1, 9).to(dtype), poisoned(1, 16)
    with torch.autocast(DEVICE, torch.float16):
        kernels.attention_append(whole[:, :6], cache, 0, HEADS)
        out = kernels.attention_append(whole[:, 6:], cache, 6, HEADS)
    assert out.dtype == torch.float16
    check_slots(cache, whole)
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole.half(), HEADS)
    assert_close("attention", "forward", out, expected[:, 6:], plain[:, 6:])


@pytest.mark.parametrize("length", [1, 4, 18])
@backends
def test_strided_cache(length: int, backend: str) -> None:
    """A cache that is a part of a larger tensor: nothing outside of it is touched."""
    storage = torch.full((2, 4, HEADS, 40, HEAD_SIZE), NAN)
    cache, qkv = storage[:, 1:3, :, 5:35], projection(2, length)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected)
    check_slots(cache, qkv)
    written = 2 * 2 * HEADS * length * HEAD_SIZE
    assert int(storage.isnan().sum()) == storage.numel() - written


@backends
def test_other_layouts(backend: str) -> None:
    """Slots before heads, as in other libraries' caches; strides that no kernel reads."""
    for length in (1, 3, 17):
        base = filled_cache([9, 9], 30, torch.float32)
        slots_first = base.transpose(2, 3).contiguous().transpose(2, 3)
        assert not slots_first.is_contiguous()
        wide = torch.full((2, 2, HEADS, 30, HEAD_SIZE + 1), NAN)
        unaligned = wide[..., :HEAD_SIZE].copy_(base)
        qkv = torch.randn(length, 2, 3 * HEADS * HEAD_SIZE + 1)[..., 1:].transpose(0, 1)
        for cache in (slots_first, unaligned):
            check_append(qkv, cache, [9, 9])
        assert wide[..., HEAD_SIZE].isnan().all()
        table = torch.randint(0, 2, (30, 2), dtype=torch.int32).t()
        mask = (torch.rand(30, 2) < 0.7).t()
        first_keys = torch.arange(8, dtype=torch.int32)[::4].expand(2)
        check_append(qkv, base, [9, 9], mask=mask, first_keys=first_keys, source_rows=table)


@backends
def test_result_is_no_view_of_the_cache(backend: str) -> None:
    cache, qkv = poisoned(1, 8), projection(1, 1)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    before = out.clone()
    cache.fill_(NAN)
    qkv.fill_(NAN)
    assert torch.equal(out, before)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 20)])
@backends
def test_empty(batch: int, length: int, backend: str) -> None:
    for start in (4, torch.full((batch,), 4, dtype=torch.int32)):
        cache = poisoned(batch, 32)
        out = kernels.attention_append(projection(batch, length), cache, start, HEADS)
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
    cache = poisoned(1, 8)
    with pytest.raises(ValueError, match=f"^{message}$"):
        kernels.attention_append(projection(1, length), cache, start, HEADS)
    assert cache.isnan().all()


def test_wrong_shapes_leave_the_cache_alone() -> None:
    cache = poisoned(2, 8)
    with pytest.raises(ValueError, match=r"^past keys and values must be \[2, 1, 3, 'time', 8\]"):
        kernels.attention_append(projection(1, 2), cache, 0, HEADS)
    with pytest.raises(ValueError, match=r"^mask must be \[2, 5\] or .*; got \[2, 2\]$"):
        kernels.attention_append(projection(2, 2), cache, 3, HEADS, mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match=r"^mask must be \[2, 8\] or .*; got \[2, 5\]$"):
        kernels.attention_append(
            projection(2, 2), cache, int32(3, 3), HEADS, mask=torch.ones(2, 5).bool()
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
    cache, tables = poisoned(2, 8), {"start": 0, name: table}
    with pytest.raises(ValueError, match="must be") as error:
        kernels.attention_append(projection(2, 2), cache, num_heads=HEADS, **tables)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{name} must be {message}")
    assert cache.isnan().all()


def test_a_complete_mask_leaves_no_room_for_first_keys() -> None:
    with pytest.raises(ValueError, match=r"^first_keys and a complete 4-D mask exclude each other"):
        kernels.attention_append(
            projection(1, 2), poisoned(1, 8), 0, HEADS,
            mask=torch.ones(1, 1, 2, 2).bool(), first_keys=int32(0),
        )  # fmt: skip


@backends
def test_refuses_gradients(backend: str) -> None:
    cache, qkv = poisoned(1, 8), projection(1, 2).requires_grad_()
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
        kernels.attention_append(projection(1, 2), past * 1, 0, HEADS)


@backends
def test_autograd_knows_that_the_cache_has_changed(backend: str) -> None:
    """A gradient that needs the cache's former contents is an error, not a wrong number."""
    weight, cache = torch.ones((), requires_grad=True), torch.zeros(2, 1, HEADS, 8, HEAD_SIZE)
    product = (weight * cache).sum()
    kernels.attention_append(projection(1, 2), cache, 0, HEADS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@backends
def test_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        qkv, cache = projection(1, 5), poisoned(1, 8)
        kernels.attention_append(qkv[:, :4], cache, 0, HEADS)
        out = kernels.attention_append(qkv[:, 4:], cache, 4, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected[:, 4:])


@pytest.mark.parametrize("length", [1, 17])
@backends
def test_compiles_as_one_graph(length: int, backend: str) -> None:
    """Traced with its tables; the write to the cache is kept."""
    starts, first_keys = int32(4, 9), int32(1, 0)
    rows = torch.arange(2).int()[:, None].repeat(1, 32) if length < 17 else None

    def call(qkv: Tensor, cache: Tensor) -> Tensor:
        out = kernels.attention_append(
            qkv, cache, starts, HEADS, first_keys=first_keys, source_rows=rows
        )
        return out + kernels.attention_append(qkv, cache, 12, HEADS)

    torch._dynamo.reset()
    qkv, caches = projection(2, length), [filled_cache([20, 20], 32, torch.float32)]
    caches.append(caches[0].clone())
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out, expected = compiled(qkv, caches[0]), call(qkv, caches[1])
    assert_close("attention", "forward", out, expected)
    assert torch.equal(caches[0].nan_to_num(7), caches[1].nan_to_num(7))


@pytest.mark.parametrize("length", [1, 17])
@triton_only
def test_opcheck(length: int, backend: str) -> None:
    mask = torch.ones(2, 32, dtype=torch.bool)
    rows = torch.zeros(2, 32, dtype=torch.int32) if length < 17 else None
    tables = (mask, int32(1, 0), rows)
    for args in ((9, None, HEADS, None, None, None), (0, int32(4, 9), HEADS, *tables)):
        cache = filled_cache([32, 32], 32, torch.float32)
        op = torch.ops.gpt2fast.attention_append_fwd.default
        torch.library.opcheck(op, (projection(2, length), cache, *args, 0.3))


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
    qkv = projection(batch, length, dtype, heads * size)
    cache, starts = poisoned(batch, capacity, dtype, heads, size), int32(*[0] * batch)
    rows = torch.arange(batch, dtype=torch.int32)[:, None].repeat(1, capacity)
    first_keys = int32(*range(batch))
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
        cache.copy_(filled_cache(lengths, capacity, dtype, heads, size))
        starts.copy_(int32(*lengths))
        qkv.copy_(projection(batch, length, dtype, heads * size))
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


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
@backends
def test_scale_that_is_not_positive(backend: str, scale: float) -> None:
    cache = torch.zeros(2, 1, 1, 8, 16)
    with pytest.raises(ValueError, match=f"scale must be positive; got {scale}"):
        kernels.attention_append(torch.zeros(1, 1, 48), cache, 0, 1, scale=scale)
