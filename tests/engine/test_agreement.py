"""The persistent kernel is tried out before it is used, in Triton's interpreter."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt2fast.engine.runner import OutOfMemory
from gpt2fast.engine.triton_runner import TritonRunner
from gpt2fast.kernels import decode_step
from tests.engine.runners import POSITIONS, prompt, start, tiny, triton_kernels
from tests.kernels.devices import DEVICE


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_kernels(monkeypatch):
        yield


@pytest.mark.parametrize("of", ["residual", "best_value"])
@pytest.mark.parametrize("error", [None, 0.01, float("nan"), RuntimeError("not resident")])
def test_persistent_kernel_is_not_trusted_blindly(
    error: Any, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TritonRunner(tiny(n_layer=1), 1, POSITIONS)
    start(runner, 0, prompt(1), 4)
    before = copy.deepcopy(runner.state)
    buffers = runner._rows([0], [0], 1)
    persistent = decode_step.persistent_buffers(buffers)

    def decode(
        weights: Any, state: Any, cache: Any, own: Any, steps: int, greedy: bool, **_: int
    ) -> None:
        if isinstance(error, Exception):
            raise error
        runner._evaluate(buffers, greedy)
        own.best_value.fill_(buffers.best_value.max())
        if error is not None:
            wrong = getattr(own, of)
            wrong[0, -1] += error * wrong.abs().max()
        state.tokens.zero_()  # it chooses and commits

    monkeypatch.setattr(decode_step, "decode_persistent", decode)
    if error is None:
        assert runner._agrees(buffers, persistent, True, 0, 0)
    else:
        with pytest.warns(UserWarning, match="a kernel a phase instead of one kernel: "):
            assert not runner._agrees(buffers, persistent, True, 0, 0)
    assert runner._trusted == (error is None)
    assert torch.equal(runner.state.tokens, before.tokens)
    assert torch.equal(runner.state.lengths, before.lengths)


def test_each_persistent_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts it is another one, which meets the same drafts as the kernels by phases."""
    runner = TritonRunner(tiny(n_layer=1), 2, POSITIONS)
    runner._pdl = False  # where a GPU has dependent launch it is not used by itself
    for slot in (0, 1):
        start(runner, slot, torch.tensor([5, 7, 8, 5], device=DEVICE), 9)
        runner.state.tokens[slot, 4:9] = torch.tensor([7, 1, 1, 1, 1])
    before = copy.deepcopy(runner.state)
    tried: list[tuple[int, int]] = []

    def decode(*args: Any, drafts: int, ngram: int, **_: Any) -> None:
        _, state, _, own, _ = args
        if drafts:
            assert state.tokens[0, 4:6].tolist() == [7, 8]
        tried.append((drafts, ngram))
        own.best_value.copy_(buffers.best_value.amax(1, keepdim=True))

    monkeypatch.setattr(decode_step, "decode_persistent", decode)
    for slots, drafts, ngram in (([0, 1], 0, 0), ([0, 0], 1, 2), ([0, 0], 1, 2), ([0, 0], 1, 3)):
        offsets = [0, 1] if drafts else [0, 0]
        monkeypatch.setattr(runner, "_device", torch.device(DEVICE))
        buffers = runner._rows(slots, offsets, 9)
        monkeypatch.setattr(runner, "_device", SimpleNamespace(type="cuda"))
        assert runner._persistent(buffers, True, drafts, ngram) is not None
    assert tried == [(0, 0), (1, 2), (1, 3)]
    assert torch.equal(runner.state.tokens, before.tokens)


def test_no_memory_to_try_the_persistent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TritonRunner(tiny(n_layer=1), 1, POSITIONS)
    buffers = runner._rows([0], [0], 1)

    def decode(*_: Any, **__: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(decode_step, "decode_persistent", decode)
    with pytest.raises(OutOfMemory, match="out of memory"):
        runner._agrees(buffers, decode_step.persistent_buffers(buffers), True, 0, 0)
    assert runner._trusted
