"""Recording and replaying, with stand-ins for a CUDA device."""

import contextlib
import gc
import threading
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt2fast.engine import graphs
from gpt2fast.engine.graphs import Replayer


class Device:
    """What `Replayer` asks of ``torch.cuda``. A graph replays by doing its work again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        replacements = {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda: self.stream("own"),
            "current_stream": lambda: self.stream("current"),
            "stream": lambda stream: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, len(self.log)),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.graph,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            synchronize=lambda: self.log.append("synchronize"),
        )

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert stream.name == "own"
        assert pool is not None
        self.log.append("begin")
        yield
        self.log.append("end")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(graphs, "_UNUSED_STREAMS", defaultdict(list))
    return Device(monkeypatch)


def test_first_as_it_is_then_recorded_then_replayed(device: Device) -> None:
    replayer = Replayer(torch.device("cuda", 0))

    def work() -> None:
        device.log.append("work")

    for _ in range(4):
        replayer.run("step", work)
    assert device.log == ["work", "begin", "work", "end", "replay", "replay", "replay"]
    device.log.clear()
    replayer.run("other", work)
    assert device.log == ["work"]
    replayer.forget()
    replayer.run("step", work)
    assert device.log == ["work", "synchronize", "work"]


def test_work_that_fails_is_not_taken_for_done(device: Device) -> None:
    replayer = Replayer(torch.device("cuda", 0))

    def fails() -> None:
        raise torch.OutOfMemoryError("no memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            replayer.run("step", fails)
    replayer.run("step", lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        replayer.run("step", fails)  # while it is recorded
    assert "replay" not in device.log


def test_streams_wait_for_each_other(device: Device) -> None:
    replayer = Replayer(torch.device("cuda", 0))

    def failing() -> None:
        with replayer.stream():
            device.log.append("work")
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert device.log == ["own waits for current", "work", "current waits for own"]


def test_recorded_work_on_streams_of_callers(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, without waiting where that is so anyway."""
    replayer = Replayer(torch.device("cuda", 0))
    first, second = device.stream("first"), device.stream("second")
    for stream in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        with replayer.ordered():
            device.log.append("work")
    waits = ["second waits for first", "first waits for second"]
    assert device.log == ["work", "work", waits[0], "work", "work", waits[1], "work"]


def test_one_graph_is_forgotten(device: Device) -> None:
    replayer = Replayer(torch.device("cuda", 0))
    for key in ("one", "one", "other", "other"):
        replayer.run(key, lambda: None)
    device.log.clear()
    replayer.forget("one")
    for key in ("other", "one"):
        replayer.run(key, lambda: device.log.append("work"))
    assert device.log == ["synchronize", "replay", "work"]


def test_streams_are_used_again(device: Device) -> None:
    """Libraries keep memory for each of them."""
    gpu = torch.device("cuda", 0)
    first, second = Replayer(gpu), Replayer(gpu)
    streams = first._stream, second._stream
    assert streams[0] is not streams[1]
    first.close()
    first.close()
    third, fourth = Replayer(gpu), Replayer(gpu)
    assert third._stream is streams[0]
    assert fourth._stream is not streams[1]
    assert Replayer(torch.device("cuda", 1))._stream is not None


def test_streams_come_back_from_what_was_dropped(device: Device) -> None:
    gpu = torch.device("cuda", 0)
    first = Replayer(gpu)
    stream = first._stream
    del first
    gc.collect()
    second = Replayer(gpu)
    assert second._stream is stream
    second.close()
    del second
    gc.collect()
    third, fourth = Replayer(gpu), Replayer(gpu)
    assert third._stream is stream
    assert fourth._stream is not stream


def test_one_graph_is_recorded_at_a_time(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another thread give memory back meanwhile."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: device.log.append("empty"))
    first, second = (Replayer(torch.device("cuda", 0)) for _ in range(2))
    for replayer in (first, second):
        replayer.run("step", lambda: None)
    recording, go_on = threading.Event(), threading.Event()

    def work() -> None:
        recording.set()
        assert go_on.wait(60)

    recorder = threading.Thread(target=first.run, args=("step", work))
    others = [
        threading.Thread(target=second.run, args=("step", lambda: None)),
        threading.Thread(target=graphs.empty_cache),
    ]
    recorder.start()
    assert recording.wait(60)
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(0.2)
    before = list(device.log)
    go_on.set()
    for thread in (recorder, *others):
        thread.join(60)
    assert before == ["begin"]
    assert device.log.count("end") == 2
    assert device.log.index("end") < device.log.index("empty")


def test_other_devices_record_nothing() -> None:
    replayer = Replayer(torch.device("cpu"))
    done = []
    for _ in range(3):
        with replayer.stream():
            replayer.run("step", lambda: done.append(1))
    assert done == [1, 1, 1]
    replayer.forget()
