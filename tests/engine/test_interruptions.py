"""What comes between: memory that runs out, interrupts, a cancellation inside a step, errors."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import Engine, GPT2LMHeadModel
from gpt2fast.engine import kept
from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.engine.scheduler import Scheduler, Sequence
from gpt2fast.engine.torch_runner import TorchRunner, _RowStep
from tests.engine.conftest import IDS, PLAIN, POSITIONS, engine_of, general
from tests.engine.reference_runner import ReferenceRunner

SAMPLED: dict[str, Any] = {**PLAIN, "do_sample": True, "seed": 5}


def without_memory_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations fail once there have been ``steps``."""
    left = [steps]

    def limited(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def evaluate(*args: Any, **keywords: Any) -> Tensor:
            if not left[0]:
                raise OutOfMemory("no memory for a graph")
            left[0] -= 1
            return original(*args, **keywords)

        return evaluate

    for kind, name in ((TorchRunner, "_evaluate"), (_RowStep, "__call__")):
        monkeypatch.setattr(kind, name, limited(getattr(kind, name)))


def assert_remembered(model: GPT2LMHeadModel, expected: Tensor) -> None:
    """The next call does without the engine, and says nothing more."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(IDS, **SAMPLED).equal(expected)
    assert kept._KEPT[model].engine is None


def test_no_memory_for_the_first_step_of_a_stream(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on without the engine, with the same tokens."""
    expected = general(model).generate(IDS, **SAMPLED)
    without_memory_after(0, monkeypatch)
    with pytest.warns(UserWarning, match="no memory for a decode engine of 4 x 48 positions") as w:
        tokens = [step.token_ids[0] for step in model.stream(IDS, **SAMPLED)]
    assert len(w) == 1
    assert [*IDS[0], *tokens] == expected[0].tolist()
    assert_remembered(model, expected)


def test_no_memory_in_the_middle_of_a_stream(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has tokens already is told, and only that once."""
    expected = general(model).generate(IDS, **SAMPLED)
    without_memory_after(2, monkeypatch)
    stream = model.stream(IDS, **SAMPLED)
    assert [next(stream).token_ids[0] for _ in range(2)] == expected[0, 3:5].tolist()
    with (
        pytest.warns(UserWarning, match="no memory for a decode engine of 4 x 48 positions"),
        pytest.raises(OutOfMemory, match="no memory for a graph"),
    ):
        next(stream)
    assert_remembered(model, expected)


def test_no_memory_under_a_streamer(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Streamer:
        def put(self, value: Tensor) -> None:
            pass

    expected = general(model).generate(IDS, **SAMPLED)
    without_memory_after(2, monkeypatch)
    with (
        pytest.warns(UserWarning, match="no memory for a decode engine of 4 x 48 positions"),
        pytest.raises(OutOfMemory, match="no memory for a graph"),
    ):
        model.generate(IDS, streamer=Streamer(), **SAMPLED)
    assert_remembered(model, expected)


def test_an_interrupt_while_rows_enter(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are in already do not keep their slots."""
    expected = model.generate(IDS * 3, **PLAIN)
    engine, original, left = engine_of(model), Scheduler.add, [2]

    def add(self: Scheduler, sequence: Sequence) -> None:
        original(self, sequence)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "add", add)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS * 3, **PLAIN)
    assert engine.idle
    assert model.generate(IDS * 3, **PLAIN).equal(expected)
    assert engine_of(model) is engine


def test_cancelling_in_the_middle_of_a_step(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the slots were taken back: the one that waits for its slot gets it a step later."""
    engine = Engine(model, runner=ReferenceRunner(model, 1, POSITIONS))
    running, waiting = (engine.submit(IDS[0], **PLAIN) for _ in range(2))
    engine.step()
    scheduler = engine._batch.scheduler
    admit = scheduler.admit

    def cancel_first() -> Any:
        running.cancel()
        return admit()

    monkeypatch.setattr(scheduler, "admit", cancel_first)
    assert [event.sequence for event in engine.step()] == [running]
    while engine.unfinished:
        engine.step()
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "length")
    assert [*IDS[0], *waiting.token_ids] == general(model).generate(IDS, **PLAIN)[0].tolist()


def test_a_broken_row_is_told_of_at_once(model: GPT2LMHeadModel) -> None:
    """The others are not run to their end first, unless it is read no further than it got."""
    with torch.no_grad():
        model.transformer.wpe.weight[20] = torch.nan
    engine = Engine(model, runner=ReferenceRunner(model, 3, POSITIONS))
    bad = engine.submit([9] * 20, **PLAIN)
    good = engine.submit([10], **{**PLAIN, "max_new_tokens": 15})
    engine.pull([bad, good], 15)
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 1)
    assert len(good.token_ids) < 5
    late = engine.submit([11], **PLAIN)
    engine.pull([bad, late], 1)
    assert len(late.token_ids) == 1
