"""causal_attention and weighted_attention against softmax(q k^T) v in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.kernels.backend import selected_backend
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, backends, backends_and_dtypes
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

# batch, heads, new positions, past positions, head size
SIZES = [
    (1, 1, 1, 0, 1),
    (2, 3, 1, 0, 8),
    (2, 2, 13, 0, 16),
    (1, 3, 63, 0, 64),
    (2, 2, 1, 7, 32),
    (2, 3, 5, 11, 8),
    (1, 1, 3, 0, 128),
]


def _tensors(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, new, past, head_size = size
    tensors = [torch.randn(batch, new, 3 * heads * head_size).to(dtype)]
    if past:
        tensors.append(torch.randn(2, batch, heads, past, head_size).to(dtype))
    return tensors


def _compare(tensors: list[Tensor], heads: int, **options: Any) -> None:
    """Both public functions against the oracle, with the gradient of every tensor.

    `weighted_attention` is the same on both backends.
    """

    def oracle(*t: Tensor) -> tuple[Tensor, Tensor]:
        return oracles.attention(t[0], heads, *t[1:], **options)

    def fused(*t: Tensor) -> Tensor:
        return kernels.causal_attention(t[0], heads, past_kv=_past(t), **options)

    def weighted(*t: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.weighted_attention(t[0], heads, past_kv=_past(t), **options)

    compare("attention", fused, lambda *t: oracle(*t)[0], tensors)
    if selected_backend() != "triton":
        compare("attention", weighted, oracle, tensors)


def _past(tensors: tuple[Tensor, ...]) -> Tensor | None:
    return tensors[1] if len(tensors) > 1 else None


@backends_and_dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_causal(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    _compare(_tensors(size, dtype), size[1])


@backends
def test_bottom_right_alignment(backend: str) -> None:
    """Query t sees keys 0 .. past + t: changing a later key changes nothing."""
    qkv, past = _tensors((1, 1, 3, 2, 8))
    before = kernels.causal_attention(qkv, 1, past_kv=past)
    for position in range(5):
        changed_past, changed = past.clone(), qkv.clone()
        if position < 2:
            changed_past[:, :, :, position] += 1
        else:
            changed[:, position - 2, 8:] += 1
        after = kernels.causal_attention(changed, 1, past_kv=changed_past)
        differs = (after != before).any(-1)[0].tolist()
        assert differs == [query + 2 >= position for query in range(3)]


@backends
@pytest.mark.parametrize("scale", [0.03125, 1.0])
def test_scale(backend: str, scale: float) -> None:
    _compare(_tensors((2, 2, 7, 3, 16)), 2, scale=scale)


@backends
def test_large_scores(backend: str) -> None:
    """Scores around 100: their softmax is all but one-hot and must not overflow."""
    qkv = _tensors((1, 2, 9, 0, 16))[0]
    qkv[..., :32] *= 30
    out = kernels.causal_attention(qkv, 2)
    expected, _ = oracles.attention(qkv.double(), 2)
    assert_close("attention", "forward", out / 30, expected / 30)


def test_unscaled_scores_beyond_float16() -> None:
    """q k^T is near 100,000, past float16's 65,504; with the scale of 1/4 it is not."""
    qkv = _tensors((1, 1, 6, 0, 16), torch.float16)[0]
    qkv[..., :32] = 80 + qkv[..., :32] / 16
    out, weights = kernels.weighted_attention(qkv, 1)
    assert out.isfinite().all()
    assert (weights.sum(-1) - 1).abs().max() < 5e-3  # six weights rounded to float16


def _key_masks(batch: int, keys: int) -> dict[str, Tensor]:
    column = torch.arange(keys)
    rows = torch.arange(batch)[:, None]
    inner = torch.ones(batch, keys, dtype=torch.bool)
    inner[0, keys // 2], inner[1, 1] = False, False
    return {
        "left": column >= 2 * rows + 1,
        "right": column < keys - 1 - 2 * rows,
        "inner": inner,
        "all kept": torch.ones(batch, keys, dtype=torch.bool),
    }


@backends_and_dtypes
@pytest.mark.parametrize("kind", ["left", "right", "inner", "all kept"])
@pytest.mark.parametrize("size", [(2, 1, 7, 0, 8), (2, 2, 3, 5, 8), (2, 1, 1, 6, 8)], ids=str)
def test_key_mask(backend: str, size: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    mask = _key_masks(2, size[2] + size[3])[kind]
    _compare(_tensors(size, dtype), size[1], mask=mask)
    # and the form that a model prepares once for all of its layers
    prepared = kernels.prepare_mask(mask, size[2], torch.device(DEVICE))
    assert prepared is not None
    assert prepared.dim() == (2 if backend == "triton" else 4)
    tensors = tuple(_tensors(size, dtype))
    past = _past(tensors)
    once = kernels.causal_attention(tensors[0], size[1], past_kv=past, mask=mask)
    twice = kernels.causal_attention(tensors[0], size[1], past_kv=past, mask=prepared)
    assert torch.equal(once, twice)


@backends_and_dtypes
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("forms", ["first", "last", "mask too"])
def test_bounds(backend: str, past: int, forms: str, dtype: torch.dtype) -> None:
    """first_keys and lengths mean a key mask, whatever they hold: nothing, all, or beyond all."""
    keys = 6 + past
    first = torch.tensor([0, 3, 6, keys + 2, -1], dtype=torch.int32)
    last = torch.tensor([keys, 4, 7, 0, keys + 3], dtype=torch.int32)
    column = torch.arange(keys)
    options, mask = {}, torch.ones(5, keys, dtype=torch.bool)
    if forms != "last":
        options["first_keys"], mask = first, mask & (column >= first[:, None])
    if forms != "first":
        options["lengths"], mask = last, mask & (column < last[:, None])
    if forms == "mask too":
        options["mask"] = torch.rand(5, keys) < 0.7
        mask = mask & options["mask"]
    compare(
        "attention",
        lambda *t: kernels.causal_attention(t[0], 1, past_kv=_past(t), **options),
        lambda *t: oracles.attention(t[0], 1, *t[1:], mask=mask)[0],
        _tensors((5, 1, 6, past, 8), dtype),
    )


def test_no_key_mask_prepares_nothing() -> None:
    assert kernels.prepare_mask(None, 5, torch.device("cpu")) is None


@backends
def test_everything_masked_stays_finite(backend: str) -> None:
    qkv = _tensors((2, 2, 5, 0, 8))[0].requires_grad_()
    out = kernels.causal_attention(qkv, 2, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert torch.allclose(out, qkv[..., 32:])  # every query is left with itself
    out.sum().backward()
    assert torch.isfinite(qkv.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_complete_masks(form: tuple[int, int], dtype: torch.dtype) -> None:
    """4-D masks replace causality: here some see the future, and rows keep at least one key."""
    tensors = _tensors((2, 3, 5, 4, 8), dtype)
    allowed = torch.rand(*form, 5, 9) < 0.6
    allowed[..., 0] = True
    _compare(tensors, 3, mask=allowed)
    _compare(tensors, 3, mask=torch.randn(*form, 5, 9).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float_mask_of_another_dtype(dtype: torch.dtype) -> None:
    qkv = _tensors((2, 3, 5, 0, 8), dtype)[0]
    mask = torch.randn(2, 1, 5, 5).to(dtype)
    expected = kernels.causal_attention(qkv, 3, mask=mask)
    assert torch.equal(kernels.causal_attention(qkv, 3, mask=mask.float()), expected)


@backends
@pytest.mark.parametrize("past_dtype", [torch.float32, torch.float16], ids=str)
def test_past_of_another_dtype(backend: str, past_dtype: torch.dtype) -> None:
    dtype = torch.float16 if past_dtype == torch.float32 else torch.float32
    qkv, past = _tensors((2, 2, 3, 4, 8), torch.float16)
    qkv, past = qkv.to(dtype), past.to(past_dtype)
    out = kernels.causal_attention(qkv, 2, past_kv=past)
    weighted, _ = kernels.weighted_attention(qkv, 2, past_kv=past)
    assert out.dtype == weighted.dtype == dtype
    expected = kernels.causal_attention(qkv, 2, past_kv=past.to(dtype))
    assert torch.equal(out, expected)


@backends_and_dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_upcast(backend: str, masked: bool, dtype: torch.dtype) -> None:
    """Scores and softmax in float32: closer to the truth than scores rounded to 16 bits."""
    tensors = _tensors((2, 2, 9, 3, 16), dtype)
    tensors[0][..., :64] *= 3
    mask = _key_masks(2, 12)["left"] if masked else None

    def plain(*t: Tensor) -> Tensor:
        if t[0].dtype == torch.float64:
            return oracles.attention(t[0], 2, *t[1:], mask=mask)[0]
        _, weights = oracles.attention(t[0].float(), 2, *(x.float() for x in t[1:]), mask=mask)
        value = t[0].chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
        value = torch.cat((t[1][1], value), 2)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)

    def ours(*t: Tensor) -> Tensor:
        return kernels.causal_attention(t[0], 2, past_kv=t[1], mask=mask, upcast=True)

    compare("attention", ours, plain, tensors)
    weighted, _ = kernels.weighted_attention(
        tensors[0], 2, past_kv=tensors[1], mask=mask, upcast=True
    )
    if backend == "torch" and dtype != torch.float32:
        assert torch.equal(weighted, ours(*tensors))


def test_upcast_is_immune_to_autocast() -> None:
    """Scores of about 1000 with differences of about 1: bfloat16 scores would lose them."""
    qkv = _tensors((1, 1, 6, 0, 16), torch.bfloat16)[0]
    qkv[..., :32] = 8 + qkv[..., :32] / 16
    expected, _ = oracles.attention(qkv.double(), 1, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.causal_attention(qkv, 1, scale=1.0, upcast=True)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() < 0.02


def test_head_mask_multiplies_the_weights() -> None:
    head_mask = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
    qkv = _tensors((2, 3, 5, 0, 8))[0]
    compare(
        "attention",
        lambda qkv: kernels.weighted_attention(qkv, 3, head_mask=head_mask),
        lambda qkv: oracles.attention(qkv, 3, head_mask=head_mask.to(qkv.dtype)),
        [qkv],
    )


def test_head_mask_of_another_dtype() -> None:
    qkv, head_mask = _tensors((2, 3, 5, 0, 8), torch.bfloat16)[0], torch.tensor([1.0, 0.0, 0.5])
    out, weights = kernels.weighted_attention(qkv, 3, head_mask=head_mask.view(1, 3, 1, 1))
    same = head_mask.view(1, 3, 1, 1).bfloat16()
    expected, _ = kernels.weighted_attention(qkv, 3, head_mask=same)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_packed_kv() -> None:
    qkv, past = _tensors((2, 3, 4, 5, 8))
    kv = kernels.packed_kv(qkv, 3)
    assert kv.shape == (2, 2, 3, 4, 8)
    assert kv.data_ptr() == qkv[..., 24:].data_ptr()  # a view
    assert torch.equal(kv[1, 1, 2, 3], qkv[1, 3, 64:72])
    both = kernels.packed_kv(qkv, 3, past)
    assert torch.equal(both[:, :, :, :5], past)
    assert torch.equal(both[:, :, :, 5:], kv)


class TestDropout:
    heads, length = 4, 64

    def _uniform(self) -> Tensor:
        """Equal scores and values of one: without dropout every output is exactly one."""
        qkv = torch.zeros(3, self.length, 3 * self.heads * 8)
        qkv[..., 2 * self.heads * 8 :] = 1
        return qkv

    @backends
    def test_same_seed_same_result(self, backend: str) -> None:
        qkv = torch.randn(2, 9, 48)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(kernels.causal_attention(qkv, 2, dropout_p=0.3))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    @backends
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_keeps_a_share_and_rescales(self, backend: str, p: float) -> None:
        out = kernels.causal_attention(self._uniform(), self.heads, dropout_p=p)
        last = out[:, -1].reshape(-1, 8)[:, 0]  # 12 heads' last queries: means of 64 weights
        kept = last * (1 - p) * self.length
        assert torch.allclose(kept, kept.round(), atol=1e-3)
        # The mean of n Bernoulli draws lies within five standard errors of 1 - p.
        n = kept.numel() * self.length
        error = abs(float(kept.sum()) / n - (1 - p))
        assert error < 5 * (p * (1 - p) / n) ** 0.5

    def test_weights_show_what_was_dropped(self) -> None:
        out, weights = kernels.weighted_attention(self._uniform(), self.heads, dropout_p=0.5)
        values = self._uniform()[..., 2 * self.heads * 8 :].unflatten(-1, (self.heads, 8))
        assert torch.allclose(out, (weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2))
        assert 0.4 < float((weights[:, :, -1] == 0).float().mean()) < 0.6

    def test_gradient_goes_through_the_same_draw(self) -> None:
        qkv = torch.randn(1, 5, 24, dtype=torch.float64, requires_grad=True)

        def seeded(qkv: Tensor) -> Tensor:
            torch.manual_seed(3)
            return kernels.causal_attention(qkv, 1, dropout_p=0.4)

        assert torch.autograd.gradcheck(seeded, (qkv,))

    @backends
    def test_everything_dropped(self, backend: str) -> None:
        out = kernels.causal_attention(torch.randn(1, 5, 24), 1, dropout_p=1.0)
        assert torch.equal(out, torch.zeros(1, 5, 8))


@backends
def test_non_contiguous(backend: str) -> None:
    qkv = torch.randn(5, 2, 2, 48)[:, :, 1].transpose(0, 1)
    past = torch.randn(2, 2, 4, 2, 8).transpose(2, 3)
    assert not qkv.is_contiguous()
    assert not past.is_contiguous()
    _compare([qkv], 2)
    _compare([qkv, past], 2)


@backends
@pytest.mark.parametrize("shape", [(0, 4, 48), (2, 0, 48)], ids=str)
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, requires_grad=True)
    out = kernels.causal_attention(qkv, 2)
    assert out.shape == (*shape[:2], 16)
    out.sum().backward()
    past = torch.randn(2, shape[0], 2, 3, 8, requires_grad=True)
    out = kernels.causal_attention(qkv, 2, past_kv=past)
    assert out.shape == (*shape[:2], 16)
    out.sum().backward()
    assert past.grad is not None
    assert not past.grad.any()


def _mask(shape: tuple[int, ...], dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("qkv", "past", "mask", "message"),
    [
        ((5, 24), None, None, "qkv must be [batch, time, 3 * 2 heads * head size]; got [5, 24]"),
        ((1, 5, 20), None, None, "qkv must be [batch, time, 3 * 2 heads * head size]; "
         "got [1, 5, 20]"),
        ((1, 5, 24), (2, 2, 2, 3, 4), None, "past keys and values must be "
         "[2, 1, 2, 'time', 4]; got [2, 2, 2, 3, 4]"),
        ((1, 5, 24), (1, 2, 3, 4), None, "past keys and values must be "
         "[2, 1, 2, 'time', 4]; got [1, 2, 3, 4]"),
        ((1, 5, 24), (2, 1, 2, 3, 4), _mask((1, 5)), "mask must be [1, 8] or "
         "[1 or 1, 2 or 1, 5, 8]; got [1, 5]"),
        ((3, 5, 24), None, _mask((2, 1, 5, 5)), "mask must be [3, 5] or [3 or 1, 2 or 1, 5, 5]; "
         "got [2, 1, 5, 5]"),
        ((3, 5, 24), None, _mask((3, 5), torch.long), "a 2-D mask must be boolean; "
         "got torch.int64"),
        ((3, 5, 24), None, _mask((1, 1, 5, 5), torch.long), "a 4-D mask must be boolean or float; "
         "got torch.int64"),
    ],
)  # fmt: skip
def test_wrong_inputs(
    qkv: tuple[int, ...], past: tuple[int, ...] | None, mask: Tensor | None, message: str
) -> None:
    past_kv = None if past is None else torch.randn(past)
    for function in (kernels.causal_attention, kernels.weighted_attention):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            function(torch.randn(qkv), 2, past_kv=past_kv, mask=mask)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_keys": torch.zeros(2, dtype=torch.int32)}, "first_keys must be [3], int32, on cpu;"
         " got [2], torch.int32, on cpu"),
        ({"lengths": torch.zeros(3)}, "lengths must be [3], int32, on cpu; got [3], torch.float32, "
         "on cpu"),
        ({"lengths": torch.zeros(3, dtype=torch.int32), "mask": _mask((3, 1, 5, 5))},
         "lengths and a complete 4-D mask exclude each other; got both"),
        ({"scale": 0.0}, "scale must be positive; got 0.0"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1; got 1.5"),
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kernels.causal_attention(torch.randn(3, 5, 24), 2, **options)
    assert str(error.value) == message
