"""An engine for which there is no memory: while it is built, in a step, for what is returned."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import GPT2LMHeadModel, release
from gpt2fast.engine import engine as engine_module
from gpt2fast.engine import kept
from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.engine.torch_runner import TorchRunner
from tests.engine.conftest import IDS, PLAIN, engine_of, general


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemory("no memory for the cache"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_for_an_engine(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """One warning, the same tokens, nothing left behind; a smaller one is tried later."""
    expected = general(model).generate(IDS, **PLAIN)
    many = general(model).generate(IDS * 20, **PLAIN)
    built: list[int] = []
    taken: list[weakref.ref[Tensor]] = []
    original = engine_module.build_runner

    def build(model: GPT2LMHeadModel, slots: int, capacity: int, dtype: Any) -> Any:
        built.append(slots)
        if slots > 8:
            memory = torch.zeros(1000)
            taken.append(weakref.ref(memory))
            raise error
        return original(model, slots, capacity, dtype)

    monkeypatch.setattr(engine_module, "build_runner", build)
    with pytest.warns(UserWarning, match=r"no memory for a decode engine of 32 x 48") as record:
        assert model.generate(IDS * 20, **PLAIN).equal(many)
    assert len(record) == 1
    error.__traceback__ = None
    gc.collect()
    assert taken[0]() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(IDS * 20, **PLAIN).equal(many)
        assert built == [32]
        assert model.generate(IDS, **PLAIN).equal(expected)
        assert built == [32, 4]
        small = engine_of(model)
        assert small.slots == 4
        assert model.generate(IDS * 20, **PLAIN).equal(many)
        assert engine_of(model) is small
        assert not small.closed


def test_other_errors_while_building_are_told(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine_module, "build_runner", build)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        model.generate(IDS, **PLAIN)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_for_the_cache_that_is_returned(
    model: GPT2LMHeadModel, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords = {**PLAIN, "return_dict_in_generate": True}
    expected = model.generate(IDS, **keywords)
    engine = engine_of(model)

    def none_left(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(engine._batch, "keys_values", none_left)
    with pytest.warns(UserWarning, match="no memory for a decode engine of 4 x 48 positions"):
        output = model.generate(IDS, **keywords)
    assert output.sequences.equal(expected.sequences)
    assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert engine.closed


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("no memory for a graph"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nof 80"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_for_a_step(
    model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As when it is built: one warning and the same tokens, drawn ones too."""
    keywords = {**PLAIN, "do_sample": True}
    torch.manual_seed(4)
    expected = general(model).generate(IDS, **keywords)
    model.generate(IDS, **PLAIN)
    engine, left = engine_of(model), [3]
    original = TorchRunner.advance

    def advance(self: TorchRunner, *args: Any, **keywords: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        original(self, *args, **keywords)

    monkeypatch.setattr(TorchRunner, "advance", advance)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="no memory for a decode engine of 4 x 48 positions") as w:
        assert model.generate(IDS, **keywords).equal(expected)
    assert len(w) == 1
    assert engine.closed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(IDS, **PLAIN)
    assert kept._KEPT[model].engine is None
    release(model)
    model.generate(IDS, **PLAIN)
    assert engine_of(model) is not engine
