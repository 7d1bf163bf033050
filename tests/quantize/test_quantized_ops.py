"""Linear layers with low-bit weights against float64 products of the weights they stand for."""

import pytest
import torch
from torch import Tensor

from gpt2fast.kernels import packing, quantized
from tests.tolerances import INT8_SPREAD, assert_close, relative_error

SHAPES = [(1, 1, 1), (3, 63, 769), (17, 64, 5), (5, 768, 130)]
KINDS = [quantized.Fbgemm, quantized.Onednn]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _weights(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights of outputs that differ in size, and biases."""
    weight = torch.randn(outputs, inputs) * torch.logspace(-3, 1, outputs)[:, None]
    return *packing.quantize_int8(weight), torch.randn(outputs)


def _levels(kind: type[quantized.Fbgemm] | type[quantized.Onednn]) -> int:
    if kind.name not in quantized.int8_ops():
        pytest.skip(f"this machine has no {kind.name}")
    return int(quantized.int8_ops()[kind.name]["levels"])


def _steps(x: Tensor, levels: int) -> Tensor:
    """Of each row's activations: its range, which holds 0, in so many steps."""
    return (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)).double() / levels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_errs_by_the_rounding_of_its_activations(
    kind: type[quantized.Fbgemm] | type[quantized.Onednn], shape: tuple[int, int, int]
) -> None:
    levels = _levels(kind)
    rows, inputs, outputs = shape
    weight, scale, bias = _weights(outputs, inputs)
    # Rows of any size and mean; one of zeros.
    x = torch.randn(rows, inputs) * torch.logspace(-1, 3, rows)[:, None] + torch.randn(rows, 1)
    x[-1] = 0 if rows > 1 else x[-1]
    out = kind(weight, scale, bias, levels)(x)
    exact = packing.dequantize(weight, scale, 8).double()
    error = out.double() - (x.double() @ exact.t() + bias)
    # A rounded activation is uniformly wrong by up to half a step.
    steps = _steps(x, levels)[:, None].clamp_min(1e-12)
    bound = steps / 2 * exact.abs().sum(1) + 1e-6 * (out.abs().double() + 1)
    assert (error.abs() <= bound).all()
    if inputs > 1:
        spread = steps / 12**0.5 * exact.norm(dim=1)
        kept = error[:-1] if rows > 1 else error
        usual = (kept / spread[: len(kept)]).square().mean().sqrt()
        assert usual < INT8_SPREAD


@pytest.mark.parametrize("kind", KINDS)
def test_int8_does_not_saturate(kind: type[quantized.Fbgemm] | type[quantized.Onednn]) -> None:
    levels = _levels(kind)
    weight = torch.full((32, 512), 127, dtype=torch.int8)
    weight[::2] = -127
    op = kind(weight, torch.full((32,), 0.01), None, levels)
    x = torch.full((2, 512), 3.0)
    expected = x.double() @ (weight.double() * 0.01).t()
    for rows in (x[:1], x):
        assert relative_error(op(rows), expected[: len(rows)]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_top_of_a_range_may_lie_half_a_level_above_the_last(
    kind: type[quantized.Fbgemm] | type[quantized.Onednn],
) -> None:
    """With a step of 1, -1.5 is rounded to a zero of -2, and 253.5 lies at 255.5 from there."""
    _levels(kind)
    # Weights so small saturate nowhere, whatever the levels.
    op = kind(torch.ones(4, 2, dtype=torch.int8), torch.ones(4), None, 255)
    out = op(torch.tensor([[-1.5, 253.5]]).repeat(2, 1))
    assert ((out - 252).abs() < 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_comes_out_as_it_would_alone(
    kind: type[quantized.Fbgemm] | type[quantized.Onednn],
) -> None:
    weight, scale, bias = _weights(70, 96)
    op = kind(weight, scale, bias, _levels(kind))
    x = torch.randn(6, 96) * torch.logspace(-1, 2, 6)[:, None]
    together = op(x)
    for i, row in enumerate(x):
        assert relative_error(op(row[None])[0], together[i]) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_hides_no_row_that_is_not_finite(bad: float) -> None:
    weight, scale, bias = _weights(40, 64)
    op = quantized.Fbgemm(weight, scale, bias, _levels(quantized.Fbgemm))
    x = torch.randn(3, 64)
    x[1] = bad
    assert not op(x[1:2]).isfinite().any()
    together = op(x)
    assert not together[1].isfinite().any()
    assert together[0].isfinite().all()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 9000)], ids=str)
def test_fp16_weights_in_float32_arithmetic(shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, inputs, outputs = shape
    weight = torch.randn(outputs, inputs).half()
    bias = torch.randn(outputs) if with_bias else None
    x = torch.randn(rows, inputs)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias)
    assert_close("linear", "forward", quantized.Fp16(weight, bias)(x), expected)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("outputs", [5, 9000])
def test_plain_linear_is_the_form_s_definition(bits: int, outputs: int) -> None:
    weight = torch.randn(outputs, 130)
    forms = {16: lambda w: (w.half(), None), 8: packing.quantize_int8, 4: packing.quantize_int4}
    data, scale = forms[bits](weight)
    x = torch.randn(3, 130)
    expected = x.double() @ packing.dequantize(data, scale, bits).double().t()
    assert_close("linear", "forward", quantized.plain_linear(x, data, scale, bits), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_comes_back(
    kind: type[quantized.Fbgemm] | type[quantized.Onednn],
) -> None:
    weight, scale, bias = _weights(33, 70)
    assert torch.equal(kind(weight, scale, bias, _levels(kind)).weight(), weight)
    halves = torch.randn(9000, 24).mul(1e-5).half()  # some of them subnormal
    assert torch.equal(quantized.Fp16(halves, None).weight(), halves)


def test_the_defaults_of_a_process_do_not_matter() -> None:
    cached = (quantized.int8_op, quantized.int8_ops, quantized.fp16_packs)
    expected = quantized.int8_ops().keys(), quantized.fp16_packs()
    for function in cached:
        function.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = quantized.int8_ops().keys(), quantized.fp16_packs()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        for function in cached:
            function.cache_clear()
    assert found == expected


def test_an_op_that_is_missing_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise AttributeError("no such op")

    for cached in (quantized.int8_op, quantized.int8_ops):
        cached.cache_clear()
    try:
        monkeypatch.setattr(quantized.Fbgemm, "_pack", missing)
        assert quantized.Fbgemm.name not in quantized.int8_ops()
        monkeypatch.setattr(quantized.Onednn, "_pack", missing)
        for cached in (quantized.int8_op, quantized.int8_ops):
            cached.cache_clear()
        weight, scale, bias = _weights(8, 16)
        assert quantized.pack(weight, scale, bias, 8) is None
    finally:
        for cached in (quantized.int8_op, quantized.int8_ops):
            cached.cache_clear()
