"""The ops that linear layers choose from on a CPU: each one forced, on float32 weights."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast.engine import cpu_linear
from gpt2fast.engine.cpu_linear import _Head, _Plain
from gpt2fast.engine.torch_runner import TorchRunner
from tests.engine import runners
from tests.engine.runners import VOCAB, plain, start, tokens
from tests.tolerances import assert_close

ROWS = [0, 1, 2, 5, 16, 17, 40]
OUTPUTS = 301


@pytest.fixture(params=[1, 2, 3])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Choice:
    """Says what is faster; keeps what was asked, and what was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = self.onednn = True
        self.asked: list[tuple[int, int]] = []
        self.taken: list[int] = []  # in how many parts; 0 by oneDNN
        in_parts, onednn = cpu_linear._in_parts, cpu_linear._onednn

        def parts_are_faster(threads: int, rows: int) -> bool:
            self.asked.append((threads, rows))
            return self.parts

        def onednn_is_faster(threads: int, rows: int) -> bool:
            self.asked.append((threads, rows))
            return self.onednn

        def recorded_parts(x: Tensor, weight: Tensor, parts: int) -> Tensor:
            self.taken.append(parts)
            return in_parts(x, weight, parts)

        def recorded_onednn(x: Tensor, weight: Tensor) -> Tensor:
            self.taken.append(0)
            return onednn(x, weight)

        monkeypatch.setattr(cpu_linear, "_parts_are_faster", parts_are_faster)
        monkeypatch.setattr(cpu_linear, "_onednn_is_faster", onednn_is_faster)
        monkeypatch.setattr(cpu_linear, "_in_parts", recorded_parts)
        monkeypatch.setattr(cpu_linear, "_onednn", recorded_onednn)


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Choice:
    torch.manual_seed(0)
    return Choice(monkeypatch)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("inputs", [96, 97, 98])
@pytest.mark.parametrize("rows", ROWS)
def test_layers(choice, threads, rows, inputs, strided):
    weight, bias = torch.randn(inputs, OUTPUTS), torch.randn(OUTPUTS)
    x = torch.randn(rows, 2 * inputs)[:, ::2] if strided else torch.randn(rows, inputs)
    before = torch.randn(rows, OUTPUTS)
    layer = _Plain(weight, bias)
    product = x.double() @ weight.double() + bias.double()
    parts = max(n for n in range(1, threads + 1) if inputs % n == 0)
    for choice.parts in (True, False):
        choice.taken.clear()
        with torch.inference_mode():
            out, total = torch.full_like(before, float("nan")), before.clone()
            found = layer.into(x, out)
            layer.accumulate(x, total)
        in_parts = choice.parts and parts > 1 and 0 < rows <= 16
        assert choice.taken == ([parts, parts] if in_parts else [])
        assert found.shape == out.shape
        if rows:
            assert_close("linear", "forward", found, product)
            assert_close("linear", "forward", total, before.double() + product)


@pytest.mark.parametrize("inputs", [96, 97, 98])
def test_layers_of_one_row(choice, threads, inputs):
    """Two that share their buffers."""
    x, before = torch.randn(1, inputs), torch.randn(1, OUTPUTS)
    parts = max(n for n in range(1, threads + 1) if inputs % n == 0)
    for choice.parts in (True, False):
        buffers: cpu_linear.Buffers = {}
        cases = []
        for _ in range(2):
            weight, bias = torch.randn(inputs, OUTPUTS), torch.randn(OUTPUTS)
            layer = _Plain(weight, bias).for_a_row(buffers)
            assert layer is not None
            cases.append((layer, x.double() @ weight.double() + bias.double()))
        assert len(buffers) == 1
        for layer, product in cases:
            in_parts = choice.parts and parts > 1
            assert layer.shape == ((parts, 1, inputs // parts) if in_parts else (1, inputs))
            out, total = torch.full_like(before, float("nan")), before.clone()
            with torch.inference_mode():
                layer.into(x.view(layer.shape), out)
                layer.accumulate(x.view(layer.shape), total)
            assert_close("linear", "forward", out, product)
            assert_close("linear", "forward", total, before.double() + product)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("inputs", [96, 97])
@pytest.mark.parametrize("rows", ROWS)
def test_heads(choice, threads, rows, inputs, strided, monkeypatch):
    weight = torch.randn(OUTPUTS, inputs)
    x = torch.randn(rows, 2 * inputs)[:, ::2] if strided else torch.randn(rows, inputs)
    head = _Head(weight, None)
    product = x.double() @ weight.double().t()
    for choice.onednn, enabled in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        choice.taken.clear()
        with torch.inference_mode():
            found = head(x)
        assert choice.taken == ([0] if choice.onednn and enabled else [])
        assert found.shape == product.shape
        assert found.dtype == torch.float32
        if rows:
            assert_close("linear", "forward", found, product)


def test_what_is_not_dense_float32_has_no_choice(choice):
    for weight in (torch.randn(96, 97).double(), torch.randn(97, 96).t()):
        x = torch.randn(4, 96, dtype=weight.dtype)
        product = _Plain(weight, x.new_zeros(97)).into(x, x.new_empty(4, 97))
        logits = _Head(weight.t().contiguous().t(), None)(product)
        assert _Plain(weight, x.new_zeros(97)).for_a_row({}) is None
        assert_close("linear", "forward", product, x.double() @ weight.double())
        assert_close("linear", "forward", logits, product.double() @ weight.double().t())
    assert not choice.asked


def test_a_few_numbers_of_rows_are_measured(choice):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer, head = _Plain(torch.randn(96, 8), torch.zeros(8)), _Head(torch.randn(8, 96), None)
        for rows, asked in ((1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, None), (512, None)):
            x = torch.randn(rows, 96)
            choice.asked.clear()
            layer.into(x, torch.empty(rows, 8))
            assert choice.asked == ([(2, asked)] if asked else [])
            choice.asked.clear()
            head(x)
            assert choice.asked == [(2, asked or 16)]
    finally:
        torch.set_num_threads(before)


def test_the_faster_is_faster(monkeypatch):
    now = 0.0
    monkeypatch.setattr(cpu_linear, "perf_counter", lambda: now)

    def takes(seconds: float) -> Any:
        runs = 0

        def op(weight: Tensor) -> None:
            nonlocal now, runs
            runs += 1
            now += seconds + (100 if runs % 8 else 0)  # most are disturbed

        return op

    weights = torch.ones(3, 2, 2)
    assert cpu_linear._is_faster(takes(1), takes(1.2), weights)
    assert not cpu_linear._is_faster(takes(1), takes(1.2), weights, 1.3)
    assert cpu_linear._is_faster(takes(1), takes(1.05), weights)
    assert not cpu_linear._is_faster(takes(1.05), takes(1), weights)
    assert not cpu_linear._is_faster(takes(2), takes(1), weights)


@pytest.mark.parametrize("rows", cpu_linear._MEASURED_ROWS)
def test_the_measurements_run(rows, monkeypatch):
    compared = []

    def compare(op: Any, than: Any, weights: Tensor, *_: Any) -> bool:
        for weight in weights:
            compared.append(op(weight).shape)
            assert torch.equal(op(weight), than(weight))  # sums of ones
        return True

    monkeypatch.setattr(cpu_linear, "_is_faster", compare)
    assert cpu_linear._parts_are_faster.__wrapped__(2, rows)
    assert cpu_linear._onednn_is_faster.__wrapped__(2, rows)
    assert set(compared) == {(rows, 2048)}
    assert not cpu_linear._parts_are_faster.__wrapped__(1, rows)


def test_tokens_whatever_is_chosen(choice, threads):
    """Alone, and in a batch with drafts; where the number of threads divides the model's sizes,
    and where only a smaller one does."""
    model = runners.tiny().cpu()
    prompts = [torch.randint(1, VOCAB, (5,)) for _ in range(3)]
    expected = [plain(model, ids, 12) for ids in prompts]
    for choice.parts, choice.onednn in ((True, False), (False, True), (True, True)):
        choice.taken.clear()
        runner = TorchRunner(model, 3, 48)
        for slot, ids in enumerate(prompts):
            start(runner, slot, ids, 12)
        runner.advance([1], 3)
        runner.advance([0, 1, 2], 3)
        runner.advance([0, 1, 2], 12, drafts=2)
        assert [tokens(runner, slot) for slot in range(3)] == expected
        assert (0 in choice.taken) == choice.onednn
        assert (2 in choice.taken) == (choice.parts and threads > 1)
