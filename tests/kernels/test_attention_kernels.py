"""The attention kernels where a plain call of the op would not reach: tiles, the cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.kernels._triton import attention_fwd, attention_tiles
from gpt2fast.kernels._triton.attention_fwd import launch_attention_fwd
from gpt2fast.kernels._triton.configs import AttentionConfig
from tests.kernels import oracles
from tests.kernels.attending import oracle, ours, tensors_of
from tests.kernels.devices import DEVICE, triton_only
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

OPS = torch.ops.gpt2fast


@triton_only
@pytest.mark.parametrize(("new", "past", "head_size"), [(150, 0, 64), (20, 70, 72)])
def test_tiles_of_the_table(backend: str, chip: int, new: int, past: int, head_size: int) -> None:
    compare("attention", ours(1), oracle(1), tensors_of(1, 1, new, past, head_size, torch.float16))


@triton_only
@pytest.mark.parametrize("past", [0, 37])
def test_small_tiles(backend: str, small_tiles: AttentionConfig, past: int) -> None:
    tensors = tensors_of(1, 3, 37, past, 16, torch.float16)
    compare("attention", ours(3, scale=0.4), oracle(3, scale=0.4), tensors)


@triton_only
@pytest.mark.parametrize("past", [0, 37])
def test_bounds_across_tiles(backend: str, small_tiles: AttentionConfig, past: int) -> None:
    """Rows whose keys begin or end within a tile, at its border, far away, or not at all."""
    keys = 71 + past
    first = torch.tensor([0, 5, 16, past + 33, keys], dtype=torch.int32)
    last = torch.tensor([keys - 7, 32, past + 48, keys, past + 3], dtype=torch.int32)
    column = torch.arange(keys)
    mask = (column >= first[:, None]) & (column < last[:, None])
    compare(
        "attention",
        ours(1, first_keys=first, lengths=last),
        oracle(1, mask=mask),
        tensors_of(5, 1, 71, past, 16, torch.float16),
    )


@triton_only
def test_key_mask_across_tiles(backend: str, small_tiles: AttentionConfig) -> None:
    mask, first = torch.rand(2, 70) < 0.7, torch.tensor([20, 0], dtype=torch.int32)
    mask[1, :35] = False
    both = mask & (torch.arange(70) >= first[:, None])
    tensors = tensors_of(2, 1, 40, 30, 16, torch.float16)
    compare("attention", ours(1, mask=mask, first_keys=first), oracle(1, mask=both), tensors)


@triton_only
def test_rows_do_not_leak(backend: str, chip: int) -> None:
    """A tile may reach into the next row of the batch, or behind the past: NaN must not return."""
    qkv, past = tensors_of(2, 1, 70, 9, 16, torch.float16)
    expected = kernels.causal_attention(qkv, 1, past_kv=past)
    qkv[1] = float("nan")
    room = torch.full((2, 2, 1, 80, 16), float("nan"), dtype=past.dtype)
    room[:, :, :, :9] = past
    assert torch.equal(kernels.causal_attention(qkv, 1, past_kv=past)[0], expected[0])
    out, _ = launch_attention_fwd(qkv, 1, scale=0.25, past=room, start=9)
    assert torch.equal(out[0], expected[0])


@triton_only
class TestCache:
    """What `attention_append` asks of the launcher."""

    @pytest.mark.parametrize("start", [0, 37])
    @pytest.mark.parametrize("on_device", [False, True])
    def test_writes_its_keys_and_nothing_else(
        self, backend: str, small_tiles: AttentionConfig, start: int, on_device: bool
    ) -> None:
        qkv, past = tensors_of(2, 2, 40, start + 45, 16, torch.float16)
        starts = torch.tensor([start, max(start - 9, 0)], dtype=torch.int32)
        used = starts.tolist() if on_device else [start, start]
        cache = past.clone()
        for row, length in enumerate(used):
            past[:, row, :, length:] = float("nan")  # nobody may read it
            cache[:, row, :, length:] = float("nan")
        out, lse = launch_attention_fwd(
            qkv,
            2,
            scale=0.25,
            past=cache,
            start=starts if on_device else start,
            write_cache=True,
        )
        assert lse is None
        kv = kernels.packed_kv(qkv, 2)
        for row, length in enumerate(used):
            expected = past[:, row].clone()
            expected[:, :, length : length + 40] = kv[:, row]
            assert torch.equal(cache[:, row].nan_to_num(7), expected.nan_to_num(7))
            context = past[:, row : row + 1, :, :length]
            arguments = (qkv[row : row + 1], 2, context)
            exact = oracles.attention(*(a.double() if isinstance(a, Tensor) else a
                                        for a in arguments))[0]  # fmt: skip
            plain = oracles.attention(*arguments)[0]
            assert_close("attention", "forward", out[row : row + 1], exact, plain)

    def test_cache_of_another_dtype(self, backend: str, chip: int) -> None:
        qkv, past = tensors_of(1, 2, 20, 50, 16, torch.float16)
        cache = past.float()
        out, _ = launch_attention_fwd(qkv, 2, scale=0.25, past=cache, start=30, write_cache=True)
        context = past[:, :, :, :30]
        assert torch.equal(out, kernels.causal_attention(qkv, 2, past_kv=context))
        assert torch.equal(cache[:, :, :, 30:], kernels.packed_kv(qkv, 2).float())


@triton_only
def test_strides(backend: str, chip: int) -> None:
    """A projection within a wider one; a past in another order, expanded, and cut from a cache."""
    qkv = torch.randn(2, 20, 2, 96)[:, :, 1]
    compare("attention", ours(2), oracle(2), [qkv])
    cache = torch.randn(2, 2, 2, 30, 16)
    for past in (
        cache[:, :, :, 3:24],
        cache.transpose(2, 3)[:, :, :2].contiguous().transpose(2, 3)[:, :, [0, 1]],
        cache[:, :1].expand(2, 2, 2, 30, 16),
        cache.transpose(3, 4).contiguous().transpose(3, 4),
    ):
        out = kernels.causal_attention(qkv, 2, past_kv=past)
        expected, _ = oracles.attention(qkv.double(), 2, past.double())
        assert_close("attention", "forward", out, expected)


@triton_only
@pytest.mark.parametrize("wanted", [0, 1], ids=["only qkv", "only past"])
def test_gradient_of_one_input(backend: str, wanted: int) -> None:
    tensors = tensors_of(2, 2, 5, 7, 8, torch.float32)
    tensors[wanted].requires_grad_()
    out = ours(2)(*tensors)
    (got,) = torch.autograd.grad(out.sum(), tensors[wanted])  # an expanded upstream gradient
    exact = [t.detach().double() for t in tensors]
    exact[wanted].requires_grad_()
    (expected,) = torch.autograd.grad(oracle(2)(*exact).sum(), exact[wanted])
    assert_close("attention", "backward", got, expected)
    with torch.no_grad():
        assert torch.equal(ours(2)(*tensors), out)


@triton_only
def test_one_derivative_only(backend: str) -> None:
    leaf = torch.randn(1, 4, 48, requires_grad=True)
    out = ours(2)(leaf)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@triton_only
@pytest.mark.parametrize("kind", ["head size", "4-D mask", "float64", "dropout"])
def test_pytorch_serves_the_rest(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_fwd, "launch_attention_fwd", None)
    width = 36 if kind == "head size" else 48
    qkv = torch.randn(2, 5, width, dtype=torch.float64 if kind == "float64" else torch.float32)
    options: dict[str, Any] = {}
    if kind == "float64":  # and the mask that was prepared for kernels
        options["mask"] = kernels.prepare_mask(torch.rand(2, 5) < 0.5, 5, qkv.device)
    elif kind == "4-D mask":
        options["mask"] = torch.rand(2, 1, 5, 5) < 0.9
        options["mask"][..., 0] = True
    out = kernels.causal_attention(qkv, 2, dropout_p=1.0 if kind == "dropout" else 0.0, **options)
    expected, _ = oracles.attention(qkv.double(), 2, **options)
    assert torch.allclose(out.double(), expected * (kind != "dropout"), atol=1e-5)


@triton_only
def test_autocast(backend: str) -> None:
    tensors = tensors_of(2, 2, 9, 5, 16, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast(DEVICE, torch.float16):
        out = ours(2)(*leaves)
    assert out.dtype == torch.float16
    assert torch.equal(out, ours(2)(*(t.half() for t in tensors)))
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 2


@triton_only
def test_compiles_as_one_graph(backend: str) -> None:
    tensors = tensors_of(2, 1, 4, 5, 8, torch.float32)
    first = torch.tensor([0, 3], dtype=torch.int32)

    def run(call: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(2)
        out = call(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    call = ours(1, dropout_p=0.3, first_keys=first)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run(compiled), run(call), strict=True):
        assert torch.equal(got, expected)


@triton_only
@pytest.mark.parametrize("past", [0, 5])
def test_opcheck(backend: str, past: int) -> None:
    qkv, *rest = tensors_of(1, 2, 3, past, 8, torch.float32)
    past_kv = rest[0] if rest else None
    seed, first = torch.tensor([7]), torch.tensor([1], dtype=torch.int32)
    arguments = (qkv, 2, past_kv, torch.rand(1, 3 + past) < 0.8, first, None, seed, 0.3, 0.2)
    torch.library.opcheck(OPS.causal_attention_fwd.default, (*arguments, bool(past)))
    out, lse = OPS.causal_attention_fwd(*arguments, True)
    backward = (torch.randn_like(out), *arguments[:7], out, lse, 0.3, 0.2, bool(past))
    torch.library.opcheck(OPS.causal_attention_bwd.default, backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(96, 5, 2).transpose(0, 2)}, "qkv must be [2, 5, 96] of"),
        ({"past": torch.zeros(2, 2, 2, 3, 8)}, "the past must be [2, 2, 2, 3, 16] of"),
        ({"start": 9}, "9 rows in a past of 8"),
        ({"start": 4, "write_cache": True}, "4 and 5 new rows in a past of 8"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths must be [2] int32, contiguous; "
         "got [3] torch.int32"),
        ({"start": torch.zeros(2)}, "start must be [2] int32, contiguous; got [2] torch.float32"),
        ({"key_mask": torch.zeros(2, 9)}, "key_mask must be boolean"),
    ],
)  # fmt: skip
def test_launcher_refuses(change: dict[str, Any], message: str) -> None:
    good = {"qkv": torch.zeros(2, 5, 96), "past": torch.zeros(2, 2, 2, 8, 16), "scale": 1.0}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        launch_attention_fwd(num_heads=2, **{**good, **change})  # type: ignore[arg-type]
    assert message in str(error.value)


def test_sections_cover_every_tile_once() -> None:
    """`scheduled` in Python: every tile of every head has one program, the heaviest come first."""
    schedule = attention_tiles.scheduled.fn
    for tiles, heads, section in ((1, 1, 1), (3, 5, 2), (4, 6, 64), (2, 7, 7)):
        pairs = [
            tuple(map(int, schedule(torch.tensor(i), tiles, heads, section)))
            for i in range(tiles * heads)
        ]
        assert len(set(pairs)) == tiles * heads
        assert all(0 <= tile < tiles and 0 <= head < heads for tile, head in pairs)
        assert [tile for tile, head in pairs if head == heads - 1] == list(range(tiles))


GPU_SIZES = [(heads, length) for heads in (12, 16, 20, 25) for length in (1, 17, 1024)]


def _check_model_size(heads: int, length: int, head_size: int, dtype: torch.dtype) -> None:
    """Training, then a chunk behind a past with padding on both sides."""
    tensors = tensors_of(2, heads, length, 0, head_size, dtype)
    compare("attention", ours(heads), oracle(heads), tensors)
    past = length // 2 + 1
    first = torch.tensor([0, past - 1], dtype=torch.int32)
    last = torch.tensor([past + length, past + length // 3], dtype=torch.int32)
    column = torch.arange(past + length)
    mask = (column >= first[:, None]) & (column < last[:, None])
    compare(
        "attention",
        ours(heads, first_keys=first, lengths=last),
        oracle(heads, mask=mask),
        tensors_of(2, heads, length, past, head_size, dtype),
    )


@triton_only
def test_body_of_model_sizes(backend: str) -> None:
    _check_model_size(1, 9, 16, torch.float32)


@pytest.mark.gpu
@triton_only
@pytest.mark.parametrize("dtype", oracles.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "length"), GPU_SIZES)
def test_model_sizes(backend: str, heads: int, length: int, dtype: torch.dtype) -> None:
    _check_model_size(heads, length, 64, dtype)


@pytest.mark.gpu
@triton_only
@pytest.mark.parametrize("dtype", oracles.DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 32, 80, 96, 128])
def test_head_sizes(backend: str, head_size: int, dtype: torch.dtype) -> None:
    _check_model_size(4, 257, head_size, dtype)


def _check_far_rows(
    batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype
) -> None:
    """The last row of a batch comes out as it would alone, forward and backward."""
    width = heads * head_size
    qkv = torch.randn(1, length, 3 * width).to(dtype).expand(batch, -1, -1).contiguous()
    upstream = torch.randn(1, length, width).to(dtype).expand(batch, -1, -1).contiguous()
    leaf, last = qkv.requires_grad_(), qkv[-1:].detach().clone().requires_grad_()
    out, alone = ours(heads)(leaf), ours(heads)(last)
    assert torch.equal(out[-1:], alone)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    (grad_alone,) = torch.autograd.grad(alone, last, upstream[-1:])
    assert torch.equal(grad[-1:], grad_alone)
    assert torch.equal(grad[batch // 2], grad_alone[0])


@triton_only
def test_body_of_far_rows(backend: str) -> None:
    _check_far_rows(3, 2, 20, 16, torch.float32)


@pytest.mark.gpu
@triton_only
def test_more_than_2_31_elements(backend: str) -> None:
    """950 rows of 1024 positions of the smallest model's projection are 2.2e9 elements."""
    _check_far_rows(950, 12, 1024, 64, torch.bfloat16)


@triton_only
def test_a_mask_of_one_column_with_any_stride(backend: str) -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)[:, ::2][:, :1]
    assert mask.stride(1) == 2
    qkv = torch.randn(1, 1, 48)
    assert torch.allclose(kernels.causal_attention(qkv, 1, mask=mask), qkv[..., 32:])
