"""What goes wrong around an engine: threads, callbacks, broken weights."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import Engine, GPT2LMHeadModel, release
from gpt2fast.engine.scheduler import Sequence
from gpt2fast.engine.torch_runner import TorchRunner
from gpt2fast.generation.options import GenerationOptions
from tests.engine.conftest import IDS, PLAIN, POSITIONS, engine_of, general
from tests.engine.reference_runner import ReferenceRunner


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_step(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """It is raised, the engine is gone with its memory, and the next call builds another."""
    expected = model.generate(IDS, **PLAIN)
    first = engine_of(model)
    original, left = TorchRunner.advance, [3]

    def advance(self: TorchRunner, *args: Any, **keywords: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        original(self, *args, **keywords)

    monkeypatch.setattr(TorchRunner, "advance", advance)
    other = model.stream(IDS, **PLAIN)
    next(other)
    with pytest.raises(type(error)):
        model.generate(IDS, **PLAIN)
    assert first.closed
    with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
        list(other)
    assert model.generate(IDS, **PLAIN).equal(expected)
    assert engine_of(model) is not first


@pytest.mark.parametrize("way", ["close", "drop", "throw"])
def test_streams_that_are_left_free_their_slots(model: GPT2LMHeadModel, way: str) -> None:
    expected = model.generate(IDS, **PLAIN)
    engine = engine_of(model)
    for _ in range(3):
        streams: list[Any] = [model.stream(IDS, **PLAIN) for _ in range(engine.slots)]
        for stream in streams:
            next(stream)
        assert not engine.idle
        if way == "close":
            for stream in streams:
                stream.close()
        elif way == "throw":
            for stream in streams:
                with pytest.raises(KeyError):
                    stream.throw(KeyError("reader"))
        del stream, streams
        assert engine.idle
        assert model.generate(IDS, **PLAIN).equal(expected)
        assert engine_of(model) is engine


def test_streams_that_are_never_read_hold_nothing(model: GPT2LMHeadModel) -> None:
    model.generate(IDS, **PLAIN)
    streams = [model.stream(IDS, **PLAIN) for _ in range(10)]
    assert engine_of(model).idle
    del streams


def test_a_collected_stream_inside_a_step(model: GPT2LMHeadModel) -> None:
    """The garbage collector may close a stream while its own engine is at work."""
    expected = model.generate(IDS, **PLAIN)
    streams = [model.stream(IDS, **PLAIN)]
    next(streams[0])
    original = TorchRunner.advance

    def advance(self: TorchRunner, *args: Any, **keywords: Any) -> None:
        streams.clear()
        original(self, *args, **keywords)

    TorchRunner.advance = advance  # type: ignore[method-assign]
    try:
        assert model.generate(IDS, **PLAIN).equal(expected)
    finally:
        TorchRunner.advance = original  # type: ignore[method-assign]
    assert engine_of(model).idle


def test_an_exception_inside_a_callback(model: GPT2LMHeadModel) -> None:
    """A streamer and a tokenizer that raise: the engine and its other rows go on."""
    expected = model.generate(IDS, **PLAIN)
    engine = engine_of(model)

    class Broken:
        calls = 0

        def put(self, value: Tensor) -> None:
            self.calls += 1
            if self.calls == 4:
                raise KeyError("streamer")

        def end(self) -> None:
            pytest.fail("the streamer was ended")

        def decode(self, ids: list[int]) -> str:
            self.put(torch.tensor(ids))
            return "text"

    other = model.stream(IDS, **PLAIN)
    tokens = [next(other).token_ids[0]]
    with pytest.raises(KeyError, match="streamer"):
        model.generate(IDS, streamer=Broken(), **PLAIN)
    with pytest.raises(KeyError, match="streamer"):
        model.generate(IDS, stop_strings="stop", tokenizer=Broken(), **PLAIN)
    tokens += [step.token_ids[0] for step in other]
    assert [*IDS[0], *tokens] == expected[0].tolist()
    assert engine.idle
    assert engine_of(model) is engine


def test_threads_share_an_engine(model: GPT2LMHeadModel) -> None:
    """Each gets its own rows, by calls and by streams, sampled or not."""
    prompts = [torch.randint(8, 97, (2, 3 + n)) for n in range(4)]
    ways: list[dict[str, Any]] = [PLAIN, {**PLAIN, "do_sample": True, "seed": 1}] * 2
    pairs = list(zip(prompts, ways, strict=True))
    expected = [general(model).generate(ids, **way) for ids, way in pairs]
    model.generate(prompts[0].repeat(8, 1), **PLAIN)
    engine = engine_of(model)
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(i: int, streams: bool) -> None:
        ids, way = pairs[i]
        start.wait()
        for _ in range(4):
            if streams:
                steps = [step.token_ids for step in model.stream(ids, **way)]
                result = torch.cat((ids, torch.tensor(steps).T), dim=1)
            else:
                result = model.generate(ids, **way)
            if not result.equal(expected[i]):
                failures.append(f"thread {i}: {result.tolist()}")

    threads = [threading.Thread(target=work, args=(n % 4, n > 3), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert failures == []
    assert engine_of(model) is engine
    assert engine.idle


def test_a_step_serves_all_threads_that_wait(model: GPT2LMHeadModel) -> None:
    """Two that pull at once share the evaluations."""
    runner = ReferenceRunner(model, 4, POSITIONS)
    engine = Engine(model, runner=runner, prefill_tokens=None)
    handles = [engine.submit([9, 10 + n], max_new_tokens=30, eos_token_id=[]) for n in range(2)]
    threads = [threading.Thread(target=engine.pull, args=([h], 30)) for h in handles]
    with engine._lock:
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for n, handle in enumerate(handles):
        expected = general(model).generate([9, 10 + n], max_new_tokens=30, eos_token_id=[])
        assert handle.token_ids == expected[0, 2:].tolist()
    assert sum(call[0] == "advance" for call in runner.calls) < 45


def test_closing(model: GPT2LMHeadModel) -> None:
    """While sequences run and wait; what was generated stays."""
    runner = ReferenceRunner(model, 1, POSITIONS)
    with Engine(model, runner=runner) as engine:
        running = engine.submit(IDS[0], **PLAIN)
        waiting = engine.submit(IDS[0], **PLAIN)
        engine.step()
        assert engine.unfinished == 2
    assert runner.closed
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert len(running.token_ids) == 2
    assert engine.unfinished == 0
    for call in (engine.step, lambda: engine.submit(IDS[0])):
        with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
            call()
    engine.close()


def test_the_state_is_touched_in_order(model: GPT2LMHeadModel) -> None:
    """Only while the runner works: elsewhere the current stream is the caller's."""
    touched: list[bool] = []

    class Watching(ReferenceRunner):
        def __getattribute__(self, name: str) -> Any:
            if name == "state":
                touched.append(self.at_work)
            return super().__getattribute__(name)

    engine = Engine(model, runner=Watching(model, 2, POSITIONS, shares=True), prefill_tokens=4)
    touched.clear()
    engine.submit([9] * 20, **PLAIN)
    engine.submit([9] * 20, **PLAIN).cancel()
    for _ in range(3):
        engine.step()
    for handle in list(engine._batch.scheduler.unfinished()):
        handle.cancel()
    assert engine.idle
    row = Sequence(IDS[0], GenerationOptions(), [], 6, 0, "length", keeps_slot=True)
    assert engine.enter([row])
    engine.pull([row], 8)
    engine.keys_values(row, 6, 0)
    row.cancel()
    assert engine.enter([])
    assert len(touched) > 20
    assert all(touched)


def test_cancelling(model: GPT2LMHeadModel) -> None:
    """One that runs, one that waits, one in the middle of its prompt, and one that has ended."""
    engine = Engine(model, runner=ReferenceRunner(model, 2, POSITIONS), prefill_tokens=4)
    running = engine.submit(IDS[0], **PLAIN)
    prompt = engine.submit([9] * 20, **PLAIN)
    waiting = engine.submit(IDS[0], **PLAIN)
    last = engine.submit([30, 31, 32], **PLAIN)
    for _ in range(2):
        engine.step()
    kept_tokens = list(running.token_ids)
    for handle in (running, prompt, waiting):
        handle.cancel()
    while engine.unfinished:
        for event in engine.step():
            assert event.sequence is last
    assert [h.finish_reason for h in (running, prompt, waiting)] == ["cancelled"] * 3
    assert running.token_ids == kept_tokens
    last.cancel()
    assert last.finish_reason == "length"
    expected = general(model).generate([30, 31, 32], **PLAIN)[0, 3:].tolist()
    assert last.token_ids == expected


def test_broken_weights(model: GPT2LMHeadModel) -> None:
    """A ValueError as without the engine; of an `Engine`, the end of that sequence alone."""
    model.generate(IDS, **PLAIN)
    engine = Engine(model, 2)
    with torch.no_grad():
        model.transformer.wpe.weight[5] = torch.nan
    message = r"^row 1 has no next token: its scores hold NaN or infinity"
    for m in (model, general(model)):
        with pytest.raises(ValueError, match=message):
            m.generate([[9], [9, 10, 11, 12, 13]], **PLAIN)
        stream = m.stream([[9], [9, 10, 11, 12, 13]], **PLAIN)
        next(stream)
        with pytest.raises(ValueError, match=message):
            next(stream)
    assert engine_of(model).idle
    engine = Engine(model, 2)
    bad = engine.submit([9, 10, 11, 12, 13], **PLAIN)
    good = engine.submit([9], **{**PLAIN, "max_new_tokens": 4})
    while engine.unfinished:
        engine.step()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert "NaN" in str(bad.error)


def test_release_under_an_open_stream(model: GPT2LMHeadModel) -> None:
    stream = model.stream(IDS, **PLAIN)
    next(stream)
    release(model)
    with pytest.raises(RuntimeError, match=r"^the engine is closed$"):
        next(stream)
    model.generate(IDS, **PLAIN)


def test_a_runner_that_does_nothing_is_no_hang(model: GPT2LMHeadModel) -> None:
    runner = ReferenceRunner(model, 1, POSITIONS)
    runner.advance = lambda *_, **__: None  # type: ignore[method-assign]
    engine = Engine(model, runner=runner)
    handle = engine.submit(IDS[0], **PLAIN)
    with pytest.raises(RuntimeError, match="the runner brought slot 0 no token"):
        engine.pull([handle], 8)
