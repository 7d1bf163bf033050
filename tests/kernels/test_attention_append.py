"""attention_append: the result, the cache's new slots, and its untouched ones."""

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles
from tests.kernels.oracles import DTYPES
from tests.tolerances import assert_close

HEADS, HEAD_SIZE = 3, 8
NAN = float("nan")


def _poisoned(batch: int, capacity: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((2, batch, HEADS, capacity, HEAD_SIZE), NAN, dtype=dtype)


def _qkv(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, 3 * HEADS * HEAD_SIZE).to(dtype)


def _check_slots(cache: Tensor, qkv: Tensor) -> None:
    """The first slots hold qkv's keys and values bit by bit; the others are still poisoned."""
    length = qkv.shape[1]
    for i, part in enumerate(qkv.chunk(3, -1)[1:]):
        heads = part.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)
        assert torch.equal(cache[i, :, :, :length], heads)
    assert cache[:, :, :, length:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [[1], [7], [1] * 5, [5, 1, 1], [4, 3, 5], [1, 6], [13]], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks(batch: int, chunks: list[int], dtype: torch.dtype) -> None:
    whole = _qkv(batch, sum(chunks), dtype)
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole, HEADS)
    cache, start, outputs = _poisoned(batch, sum(chunks) + 3, dtype), 0, []
    for chunk in whole.split(chunks, dim=1):
        outputs.append(kernels.attention_append(chunk, cache, start, HEADS))
        start += chunk.shape[1]
        _check_slots(cache, whole[:, :start])
    assert_close("attention", "forward", torch.cat(outputs, 1), expected, plain)


def test_fills_the_cache_to_the_last_slot() -> None:
    qkv, cache = _qkv(1, 6), _poisoned(1, 6)
    kernels.attention_append(qkv[:, :5], cache, 0, HEADS)
    out = kernels.attention_append(qkv[:, 5:], cache, 5, HEADS)
    _check_slots(cache, qkv)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected[:, 5:])


@pytest.mark.parametrize("kind", ["left", "inner"])
@pytest.mark.parametrize("new", [1, 4])
def test_key_mask(new: int, kind: str) -> None:
    whole, past = _qkv(2, 6 + new), 6
    mask = torch.ones(2, 6 + new, dtype=torch.bool)
    if kind == "left":
        mask[0, :3] = False
    else:
        mask[1, 4] = False
    cache = _poisoned(2, 16)
    kernels.attention_append(whole[:, :past], cache, 0, HEADS)
    prepared = kernels.prepare_mask(mask, new, torch.device("cpu"))
    expected, _ = oracles.attention(whole.double(), HEADS, mask=mask)
    for form in (mask, prepared):
        out = kernels.attention_append(whole[:, past:], cache, past, HEADS, mask=form)
        assert_close("attention", "forward", out, expected[:, past:])
        _check_slots(cache, whole)


def test_complete_mask_scale_and_upcast() -> None:
    whole, cache = _qkv(2, 7), _poisoned(2, 8)
    mask = torch.randn(1, HEADS, 3, 7)
    kernels.attention_append(whole[:, :4], cache, 0, HEADS)
    past = cache[:, :, :, :4].clone()
    expected, _ = oracles.attention(
        whole[:, 4:].double(), HEADS, past.double(), mask=mask, scale=0.5
    )
    for upcast in (False, True):
        out = kernels.attention_append(
            whole[:, 4:], cache, 4, HEADS, mask=mask, scale=0.5, upcast=upcast
        )
        assert_close("attention", "forward", out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_of_another_dtype(dtype: torch.dtype) -> None:
    """The cache keeps its dtype, the result has the projection's."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    whole, cache = _qkv(1, 5, torch.bfloat16).to(dtype), _poisoned(1, 8, other)
    kernels.attention_append(whole[:, :3], cache, 0, HEADS)
    out = kernels.attention_append(whole[:, 3:], cache, 3, HEADS)
    assert (out.dtype, cache.dtype) == (dtype, other)
    _check_slots(cache, whole.to(other))
    expected, _ = oracles.attention(whole.double(), HEADS)
    plain, _ = oracles.attention(whole, HEADS)
    assert_close("attention", "forward", out, expected[:, 3:], plain[:, 3:])


def test_strided_cache() -> None:
    """A cache that is a part of a larger tensor: nothing outside of it is touched."""
    storage = torch.full((2, 4, HEADS, 20, HEAD_SIZE), NAN)
    cache, qkv = storage[:, 1:3, :, 5:15], _qkv(2, 4)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected)
    _check_slots(cache, qkv)
    assert int(storage.isnan().sum()) == storage.numel() - 2 * 2 * HEADS * 4 * HEAD_SIZE


def test_result_is_no_view_of_the_cache() -> None:
    cache, qkv = _poisoned(1, 8), _qkv(1, 1)
    out = kernels.attention_append(qkv, cache, 0, HEADS)
    before = out.clone()
    cache.fill_(NAN)
    qkv.fill_(NAN)
    assert torch.equal(out, before)


@pytest.mark.parametrize(
    ("length", "start", "message"),
    [
        (3, 6, "no room for 3 positions at 6 in a cache of 8"),
        (9, 0, "no room for 9 positions at 0 in a cache of 8"),
        (1, -1, "no room for 1 positions at -1 in a cache of 8"),
    ],
)
def test_no_room(length: int, start: int, message: str) -> None:
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
    assert cache.isnan().all()


def test_refuses_gradients() -> None:
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


def test_inference_mode() -> None:
    with torch.inference_mode():
        qkv, cache = _qkv(1, 5), _poisoned(1, 8)
        kernels.attention_append(qkv[:, :4], cache, 0, HEADS)
        out = kernels.attention_append(qkv[:, 4:], cache, 4, HEADS)
    expected, _ = oracles.attention(qkv.double(), HEADS)
    assert_close("attention", "forward", out, expected[:, 4:])
