"""The engine that is kept for a model, between threads and processes."""

import os
import signal
import sys
import threading
from typing import Any

import pytest
from torch import Tensor, set_num_threads

from gpt2fast import Engine, GPT2LMHeadModel, release
from gpt2fast.engine import engine as engine_module
from gpt2fast.engine import kept
from gpt2fast.engine.scheduler import Sequence
from gpt2fast.generation.options import GenerationOptions
from tests.engine.conftest import IDS, PLAIN, engine_of, general


def test_nobody_enters_an_engine_that_gives_way(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was found idle is closed before another thread gets in, not under it."""
    model.generate(IDS, **PLAIN)
    small = engine_of(model)
    row = Sequence([9], GenerationOptions(), [], limit=9, least=0, at_limit="length")
    entered: list[bool] = []
    other = threading.Thread(target=lambda: entered.append(small.enter([row])), daemon=True)
    original = Engine.close

    def close(self: Engine) -> None:
        if self is small:
            other.start()
            other.join(0.2)
            assert entered == []
        original(self)

    monkeypatch.setattr(Engine, "close", close)
    model.generate(IDS * 9, **PLAIN)
    other.join(60)
    assert entered == [False]
    assert small.closed
    assert engine_of(model) is not small


def test_an_engine_in_use_does_not_give_way(model: GPT2LMHeadModel) -> None:
    engine = Engine(model, 2)
    handle = engine.submit(IDS[0], **PLAIN)
    assert not engine.close_if_idle()
    assert not engine.closed
    handle.cancel()
    assert engine.close_if_idle()
    assert engine.closed
    assert engine.close_if_idle()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_locks_are_held(model: GPT2LMHeadModel) -> None:
    """By a thread that the new process has not got: it makes an engine of its own."""
    expected = model.generate(IDS, **PLAIN)
    engine = engine_of(model)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with kept._TABLE, kept._KEPT[model].lock, engine._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)  # ends it if it waits
            set_num_threads(1)  # the parent's other threads are not here either
            same = model.generate(IDS, **PLAIN).equal(expected)
            code = 0 if same and engine_of(model) is not engine else 2
        finally:
            os._exit(code)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine_of(model) is engine


def test_a_release_inside_a_build(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the garbage collector may bring about in the thread that builds."""
    expected = general(model).generate(IDS, **PLAIN)
    original = engine_module.build_runner

    def build(*args: Any) -> Any:
        with kept._TABLE:
            release(model)
        return original(*args)

    monkeypatch.setattr(engine_module, "build_runner", build)
    outputs: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: outputs.append(model.generate(IDS, **PLAIN)), daemon=True
    )
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert outputs[0].equal(expected)
    assert model not in kept._KEPT


def test_a_release_inside_a_step_while_another_thread_wants_more_rows(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the garbage collector may bring about: neither waits for a lock that the other has."""
    expected = general(model).generate(IDS * 9, **PLAIN)
    model.generate(IDS, **PLAIN)
    batch = engine_of(model)._batch
    step, close_if_idle = batch.step, Engine.close_if_idle
    outputs: list[Tensor] = []
    grows = threading.Event()

    def grow() -> None:
        outputs.append(model.generate(IDS * 9, **PLAIN))

    def close_or_not(self: Engine) -> bool:
        grows.set()
        return close_if_idle(self)

    def release_within() -> Any:
        growing.start()
        assert grows.wait(20)
        release(model)
        return step()

    def run() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            model.generate(IDS, **PLAIN)

    growing = threading.Thread(target=grow, daemon=True)
    running = threading.Thread(target=run, daemon=True)
    monkeypatch.setattr(Engine, "close_if_idle", close_or_not)
    monkeypatch.setattr(batch, "step", release_within)
    running.start()
    for thread in (running, growing):
        thread.join(20)
        assert not thread.is_alive()
    assert outputs[0].equal(expected)
