"""The decode engine's phases around its matrix products, one by one, against float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gpt2fast.kernels._triton import target
from gpt2fast.kernels._triton.engine import configs, graph, graph_tiles
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.decode_step import FEW_ROWS, StepBuffers
from gpt2fast.kernels.packing import DecodeWeights, Matrix
from tests.kernels.decode_weights import exact, random_weights
from tests.kernels.devices import DEVICE
from tests.kernels.oracles import embedding, gelu_mlp, layer_norm
from tests.tolerances import FLOAT32, relative_error

SLOTS, CAPACITY, VOCAB, LAYER = 3, 10, 43, 1
# Rows that are used, the bucket, bits, activations' dtype, width, inner width. No width is a
# multiple of a tile; inner widths of 280 and 536 are several tiles of K, the last one partly used.
CASES = [
    (1, 1, 32, torch.float32, 40, 280),
    (2, 2, 8, torch.float16, 72, 536),
    (3, 4, 16, torch.float16, 40, 280),
    (1, 1, 4, torch.float32, 72, 536),
    (4, 8, 32, torch.float32, 40, 72),
    (20, 32, 16, torch.float16, 72, 280),
    (8, 8, 4, torch.float16, 40, 280),
    (5, 8, 8, torch.float32, 72, 88),
]
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c[0]} rows of {c[1]}, {c[2]} bits, {c[3]}, {c[4]}, {c[5]}"
)


@dataclass
class Step:
    """Everything that a phase reads; the buffers' contents are random."""

    weights: DecodeWeights
    state: DecodeState
    cache: Tensor
    buffers: StepBuffers
    used: int
    positions: Tensor


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that need a loop over outputs, and sweeps, at these widths; few programs."""
    tile = configs.DecodeRowsTile(warps=8, repeat=2, unroll=2, programs=3)
    monkeypatch.setattr(configs, "decode_rows_tile", lambda *_: tile)
    with target.assume(target.Target((9, 0), 1, 227 << 10)):
        yield


def _step(
    used: int, rows: int, bits: int, dtype: torch.dtype, width: int, inner: int, splits: int = 1
) -> Step:
    heads = width // 8
    weights = random_weights(
        bits, dtype, width=width, inner=inner, heads=heads, vocab=VOCAB, positions=CAPACITY
    )
    state = DecodeState.empty(SLOTS, CAPACITY, VOCAB, torch.device(DEVICE))
    state.tokens.random_(0, VOCAB)
    state.lengths.copy_(torch.tensor([2, 0, 4]))
    buffers = StepBuffers.allocate(weights, rows, splits)
    for tensor in (buffers.residual, buffers.normed, buffers.inner, buffers.merged, buffers.parts):
        tensor.copy_(torch.randn(tensor.shape))
    buffers.residual.add_(20 * torch.randn(rows, 1, device=DEVICE))  # a large mean
    # Slots in turn, each at growing offsets; of 20 rows the last ones are behind the capacity.
    for row in range(used):
        buffers.slots[row], buffers.offsets[row] = row % SLOTS, row // SLOTS
    positions = torch.tensor([2, 0, 4])[torch.arange(used) % SLOTS] + torch.arange(used) // SLOTS
    cache = torch.full((2, 2, SLOTS, heads, CAPACITY, 8), 99.0, dtype=dtype, device=DEVICE)
    return Step(weights, state, cache, buffers, used, positions)


def _assert_close(actual: Tensor, oracle: Tensor) -> None:
    """To float32's accuracy, and half a unit more where it is stored in 16 bits."""
    bound = FLOAT32["decode_phase", "forward"] + torch.finfo(actual.dtype).eps / 2
    assert relative_error(actual, oracle) <= bound


def _normed(step: Step, norm: Tensor) -> Tensor:
    """What the product behind a LayerNorm multiplies, in float64."""
    if step.buffers.rows > FEW_ROWS:
        return step.buffers.normed.double()
    return layer_norm(step.buffers.residual.double(), norm[0].double(), norm[1].double())


@cases
def test_qkv_fills_queries_and_the_cache(case: tuple) -> None:  # type: ignore[type-arg]
    step = _step(*case)
    weights, buffers, cache = step.weights, step.buffers, step.cache
    few = buffers.rows <= FEW_ROWS
    launch = graph.launch_qkv if few else graph_tiles.launch_qkv_tiles
    launch(weights, step.state, cache, buffers, LAYER, False)
    weight, bias = exact(weights.qkv, LAYER)
    q, k, v = (_normed(step, weights.ln_1[LAYER]) @ weight + bias).chunk(3, -1)
    _assert_close(buffers.query, q)
    expected = torch.full_like(cache, 99.0, dtype=torch.float64)
    written = torch.zeros_like(cache, dtype=torch.bool)
    for row in range(step.used):
        slot, position = row % SLOTS, int(step.positions[row])
        if position < CAPACITY:
            for part, value in enumerate((k, v)):
                expected[LAYER, part, slot, :, position] = value[row].unflatten(-1, (-1, 8))
                written[LAYER, part, slot, :, position] = True
    assert (cache[~written] == 99).all()
    _assert_close(cache[written], expected[written])


@cases
def test_fc_and_head(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    """With the rows in registers, or read again for every output."""
    keep = case[1] != 4
    monkeypatch.setattr(configs, "decode_rows_keep", lambda *_: keep)
    step = _step(*case)
    weights, buffers = step.weights, step.buffers
    few = buffers.rows <= FEW_ROWS
    (graph.launch_fc if few else graph_tiles.launch_fc_tiles)(weights, buffers, LAYER, False)
    weight, bias = exact(weights.fc, LAYER)
    eye, zero = torch.eye(weight.shape[1], dtype=weight.dtype, device=DEVICE), bias.new_zeros(())
    x = _normed(step, weights.ln_2[LAYER])
    _assert_close(buffers.inner, gelu_mlp(x, weight, bias, eye, zero))
    launch_head = graph.launch_head if few else graph_tiles.launch_head_tiles
    launch_head(weights, buffers, False, False)
    logits = _normed(step, weights.ln_f) @ exact(weights.head)[0]
    _assert_close(buffers.logits, logits)
    launch_head(weights, buffers, True, False)
    top, share = buffers.best_value.max(1)
    assert torch.equal(top, buffers.logits.max(1).values)
    rows = torch.arange(buffers.rows, device=DEVICE)
    assert torch.equal(buffers.best_index[rows, share].long(), buffers.logits.argmax(1))
    sums = (buffers.best_value + buffers.best_sum.log()).logsumexp(1)
    torch.testing.assert_close(sums, buffers.logits.logsumexp(1), rtol=2e-6, atol=2e-6)


@cases
def test_products_are_added_to_the_residual_stream(case: tuple) -> None:  # type: ignore[type-arg]
    step = _step(*case)
    weights, buffers = step.weights, step.buffers
    for matrix, inputs in ((weights.out, buffers.merged), (weights.proj, buffers.inner)):
        before = buffers.residual.double()
        weight, bias = exact(matrix, LAYER)
        expected = before + inputs.double() @ weight + bias
        if buffers.rows <= FEW_ROWS:
            graph.launch_add(matrix, weights.heads, inputs, buffers, LAYER, False)
        else:
            graph_tiles.launch_parts(matrix, inputs, buffers, LAYER, False)
            graph_tiles.launch_normalize(
                buffers, matrix, LAYER, weights.ln_2, LAYER, weights.eps, False
            )
            norm = weights.ln_2[LAYER].double()
            y = layer_norm(buffers.residual.double(), norm[0], norm[1])
            _assert_close(buffers.normed, y)
        _assert_close(buffers.residual, expected)


def test_products_of_one_tile_are_divided_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them without inputs: seven steps in parts of two are four, and the fifth is empty."""
    monkeypatch.setattr(configs, "decode_parts", lambda *_: 5)
    step = _step(8, 8, 32, torch.float32, 40, 112)
    weights, buffers = step.weights, step.buffers
    weight, bias = exact(weights.proj, LAYER)
    expected = buffers.residual.double() + buffers.inner.double() @ weight + bias
    graph_tiles.launch_parts(weights.proj, buffers.inner, buffers, LAYER, False)
    graph_tiles.launch_normalize(buffers, weights.proj, LAYER, weights.ln_f, 0, 1e-5, False)
    _assert_close(buffers.residual, expected)


def test_many_rows_are_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "DECODE_TILE_ROWS", 16)
    step = _step(30, 32, 16, torch.float16, 40, 72)
    weights, buffers = step.weights, step.buffers
    graph_tiles.launch_fc_tiles(weights, buffers, LAYER, False)
    weight, bias = exact(weights.fc, LAYER)
    eye, zero = torch.eye(72, dtype=torch.float64, device=DEVICE), bias.new_zeros(())
    _assert_close(buffers.inner, gelu_mlp(buffers.normed.double(), weight, bias, eye, zero))
    graph_tiles.launch_head_tiles(weights, buffers, False, False)
    _assert_close(buffers.logits, buffers.normed.double() @ exact(weights.head)[0])
    graph_tiles.launch_head_tiles(weights, buffers, True, False)
    assert torch.equal(buffers.best_value.max(1).values, buffers.logits.max(1).values)


def test_the_projection_merges_the_parts_of_attention() -> None:
    step = _step(2, 2, 32, torch.float32, 40, 72, splits=3)
    weights, buffers = step.weights, step.buffers
    buffers.partial.normal_()
    buffers.sums.normal_()
    buffers.sums[:, :, 2] = -float("inf")  # a part without keys
    share = torch.softmax(buffers.sums.double() * torch.log(torch.tensor(2.0)), -1)
    merged = (buffers.partial.double() * share[..., None]).sum(2).flatten(1)
    weight, bias = exact(weights.out, LAYER)
    expected = buffers.residual.double() + merged @ weight + bias
    graph.launch_add(weights.out, weights.heads, buffers.partial, buffers, LAYER, False)
    _assert_close(buffers.residual, expected)


def test_embedding_of_rows() -> None:
    """Rows without a slot are 0; ids and positions out of range read the last."""
    step = _step(3, 4, 16, torch.float16, 40, 72)
    weights, state, buffers = step.weights, step.state, step.buffers
    state.tokens[1, 0] = VOCAB + 7
    buffers.offsets[2] = 2 * CAPACITY
    graph.launch_embed(weights, state, buffers, False)
    positions = torch.tensor([2, 0, CAPACITY - 1], device=DEVICE)
    ids = torch.stack((state.tokens[0, 2], state.tokens.new_tensor(VOCAB - 1), state.tokens[2, -1]))
    expected = embedding(ids, positions, None, weights.wte.double(), weights.wpe.double())
    _assert_close(buffers.residual[:3], expected)
    assert not buffers.residual[3].any()


@pytest.mark.parametrize("rows", [2, 8])
def test_the_first_of_equal_logits_is_chosen_and_nan_is_told(rows: int) -> None:
    step = _step(rows, rows, 32, torch.float32, 40, 72)
    weights, buffers = step.weights, step.buffers
    for tensor in (buffers.residual, buffers.normed):
        tensor[rows - 1 :] = float("nan")
    # Logits of the first row: 0 for seven ids, then one number, larger, for all others.
    equal = _normed(step, weights.ln_f)[0].float()
    head = torch.cat((torch.zeros(7, 40, device=DEVICE), equal.expand(VOCAB - 7, 40)))
    weights = replace(weights, head=Matrix(head[None].contiguous(), None, None, 32))
    launch: Callable[..., None] = graph.launch_head if rows == 2 else graph_tiles.launch_head_tiles
    launch(weights, buffers, True, False)
    assert buffers.best_value.shape[1] > 1
    assert (buffers.best_value[0] == buffers.best_value[0, 0]).all()
    assert buffers.best_value[0, 0] > 0
    assert buffers.best_index[0, 0] == 7
    assert torch.isnan(buffers.best_sum[rows - 1]).all()
    assert torch.isfinite(buffers.best_sum[0]).all()
