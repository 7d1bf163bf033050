"""The engine's cache in float8: what comes into it, and who may have one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.suite.decode import rounding_model
from gpt2fast import Engine, kernels
from gpt2fast.engine import triton_runner
from gpt2fast.engine.float8 import FLOAT8, to_float8
from gpt2fast.engine.triton_runner import TritonRunner
from gpt2fast.kernels import decode_step
from gpt2fast.kernels._triton.target import CHIPS, assume
from gpt2fast.kernels.decode_state import RUNNING
from tests.engine.runners import (
    POSITIONS,
    fill,
    plain,
    prompt,
    start,
    tiny,
    tokens,
    triton_kernels,
)
from tests.interpreter import round_to_float8
from tests.kernels.devices import DEVICE

LARGEST = 448.0


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our kernels; prompts of more than four tokens go through the ops."""
    monkeypatch.setattr(triton_runner, "ROWS_OF_A_PROMPT", 4)
    if DEVICE == "cpu":
        round_to_float8()
    with triton_kernels(monkeypatch):
        yield


def past_of(model: Any, ids: Any) -> list[torch.Tensor]:
    """What plain PyTorch computes as keys and values, by layer ``[2, H, T, D]``."""
    with kernels.backend("torch"), torch.no_grad():
        past = model(torch.as_tensor(ids, device=model.device)[None], use_cache=True)
        return [layer[:, 0] for layer in past.past_key_values]


def assert_cached(runner: TritonRunner, slot: int, model: Any, ids: Any) -> None:
    """The slot holds what a model computes that rounds its keys and values itself."""
    found = runner.keys_values(slot, len(ids))
    for layer, expected in zip(found, past_of(model, ids), strict=True):
        assert layer.dtype == model.dtype
        # A last bit, either way, where sums that are added in another order round to another value.
        torch.testing.assert_close(layer, expected, rtol=0.126, atol=2.0**-8)
        assert (layer != expected).float().mean() < 0.02


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("slots", "driver"), [(1, "persistent"), (2, "graph")])
def test_tokens_are_those_of_a_model_that_rounds(slots: int, driver: str) -> None:
    """A long prompt, steps behind it, and a prompt as rows in the same slot."""
    model = tiny()
    rounding = rounding_model(model)
    runner = TritonRunner(model, slots, POSITIONS, cache_dtype=FLOAT8, driver=driver)
    assert runner._cache.dtype == FLOAT8
    for length in (9, 4):
        ids = prompt(length)
        start(runner, slots - 1, ids, 6)
        runner.advance([slots - 1], 3, plain=True, context=length)
        got = tokens(runner, slots - 1)
        assert got == plain(rounding, ids, 4)
        assert_cached(runner, slots - 1, rounding, got[:-1])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("length", "dtype"), [(12, torch.float32), (3, torch.float16)], ids=str)
def test_what_is_too_large_saturates(length: int, dtype: torch.dtype) -> None:
    """Keys and values beyond the range, either way, of prompts and of steps of one row and many."""
    model = tiny(n_layer=1)
    with torch.no_grad():  # keys beyond it on one channel only, or all weight goes to one token
        model.transformer.h[0].attn.c_attn.bias[[32, 64, 65, 66]] = torch.tensor(
            [-500.0, 470.0, 3e4, -3e4], device=model.device
        )
    model = model.to(dtype)
    runner = TritonRunner(model, 5, POSITIONS, cache_dtype=FLOAT8)
    for slot in range(5):
        start(runner, slot, prompt(length), 8)
    runner.advance([0], 2, plain=True)
    runner.advance(range(5), 1)
    for slot in range(5):
        (layer,) = runner.keys_values(slot, int(runner.state.lengths[slot]))
        assert layer.dtype == dtype
        assert layer.shape[2] == length + (3 if slot == 0 else 1)
        assert layer.isfinite().all()
        assert (layer[0, 0, :, 0] == -LARGEST).all()
        for channel, expected in enumerate((LARGEST, LARGEST, -LARGEST)):
            assert (layer[1, 0, :, channel] == expected).all()
        assert (layer[:, 1].abs() < 20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_saturates(dtype: torch.dtype) -> None:
    values = [0.3, 448, 449, 465, 6e4, -1e3, float("inf"), -float("inf"), float("nan")]
    rounded = to_float8(torch.tensor(values, dtype=dtype)).float()
    assert rounded[:-1].tolist() == [
        0.3125,
        *[LARGEST] * 4,
        -LARGEST,
        LARGEST,
        -LARGEST,
    ]
    assert rounded[-1].isnan()


@pytest.mark.usefixtures("triton")
def test_beginnings_are_shared_and_copied() -> None:
    model, ids = tiny(n_layer=1), prompt(11)
    rounding = rounding_model(model)
    runner = TritonRunner(model, 3, POSITIONS, cache_dtype=FLOAT8)
    start(runner, 2, ids, 4)
    start(runner, 0, ids, 4, at=6, prefix_slots=2, prefix_lengths=6)
    before = runner._cache.clone().view(torch.uint8)
    runner.copy_prefix(2, 1, 8)
    fill(runner, 1, ids, 4)
    runner.state.lengths[1] = 8
    runner.state.status[1] = RUNNING
    runner.prefill(1, 8, 11)
    for slot in range(3):
        assert_cached(runner, slot, rounding, ids)
        assert tokens(runner, slot) == plain(rounding, ids, 1)
    after = runner._cache.view(torch.uint8)
    for slot in (0, 2):
        assert torch.equal(after[:, :, slot], before[:, :, slot])


@pytest.mark.usefixtures("triton")
def test_the_drivers_agree() -> None:
    runner = TritonRunner(tiny(n_layer=1), 1, POSITIONS, cache_dtype=FLOAT8)
    start(runner, 0, prompt(5), 4)
    buffers = runner._rows([0], [0], 6)
    assert runner._agrees(buffers, decode_step.persistent_buffers(buffers), True, 0, 0)
    assert runner.served_by == "graph"


@pytest.mark.usefixtures("triton")
def test_an_engine_with_it() -> None:
    """However its prompts are divided, and with as many bytes."""
    model, ids = tiny(n_layer=1), prompt(13)
    expected = plain(rounding_model(model), ids, 5)[13:]
    for budget in (None, 9):
        with Engine(model, 2, 24, prefill_tokens=budget, cache_dtype=FLOAT8) as engine:
            sequence = engine.submit(ids, max_new_tokens=5, eos_token_id=[])
            while engine.unfinished:
                engine.step()
            assert sequence.token_ids == expected
            runner = engine._runner
            assert isinstance(runner, TritonRunner)
            assert runner._cache.nbytes == 2 * 2 * 24 * 32


def test_who_has_none() -> None:
    model = tiny().cpu()
    with kernels.backend("torch"):
        with pytest.raises(ValueError, match=r"^cache_dtype=torch.float8_e4m3fn is for .*: our ke"):
            Engine(model, 1, cache_dtype=FLOAT8)
        message = r"None, the model's torch.float32 or torch.float8_e4m3fn; got torch.float16$"
        with pytest.raises(ValueError, match=message):
            Engine(model, 1, cache_dtype=torch.float16)
        with Engine(model, 1, cache_dtype=torch.float32) as engine:
            message = r"^a runner has a cache of its own; got cache_dtype=torch.float8_e4m3fn$"
            with pytest.raises(ValueError, match=message):
                Engine(model, runner=engine._runner, cache_dtype=FLOAT8)


@pytest.mark.usefixtures("triton")
def test_our_kernels_without_it() -> None:
    with assume(CHIPS[80]), pytest.raises(ValueError, match=r"8\.9 or later; this GPU has 8\.0"):
        Engine(tiny(), 1, cache_dtype=FLOAT8)
    with pytest.raises(
        ValueError, match=r"is for the engine on our kernels.*: widths must be mult"
    ):
        Engine(tiny(n_embd=36), 1, cache_dtype=FLOAT8)
    with pytest.raises(ValueError, match="cache_dtype must be"):
        TritonRunner(tiny(), 1, 8, cache_dtype=torch.float16)
