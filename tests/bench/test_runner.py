"""What is timed is what the case asks for. A GPU is needed for none of it here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.suite import measure, runner
from bench.suite.attention import attention_case
from bench.suite.cases import Model, Provider
from bench.suite.gate import Gate
from gpt2fast import kernels
from gpt2fast.kernels.backend import readable


class _OneRound:
    """A clock that calls everybody once and finds them equal."""

    def device(self, calls: dict[str, Any], contexts: dict[str, Any]) -> dict[str, list[float]]:
        for name, call in calls.items():
            with contexts[name]():
                call()
        return {name: [1.0] for name in calls}

    def host(self, calls: dict[str, Any], contexts: dict[str, Any]) -> dict[str, Any]:
        return {name: {"host": [1.0], "issue": [1.0]} for name in self.device(calls, contexts)}


def _graph(node: Any) -> set[str]:
    """The names of an autograd graph's nodes."""
    names, todo = set(), [node]
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [function for function, _ in node.next_functions if function is not None]
    return names


@pytest.mark.parametrize("direction", ["backward", "full"])
def test_backward_pass_is_that_of_the_pinned_backend(direction: str) -> None:
    torch_backend = lambda: kernels.backend("torch")  # noqa: E731
    model = Model("tiny", 64, 2)
    case = attention_case(model, 2, 5, torch.float32, torch_backend)
    recorded: dict[str, list[set[str]]] = {"math": [], "default": []}

    def recording(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded_run(*arguments: Tensor) -> Any:
            outputs = run(*arguments)
            recorded[name].append(_graph(outputs.grad_fn))
            return outputs

        return recorded_run

    pinned = case.providers["math"]
    providers = {
        "ours": case.providers["ours"],
        "math": replace(pinned, run=recording("math", pinned.run)),
        "default": Provider(recording("default", pinned.run)),
    }
    inputs = case.inputs()
    contenders = {name: runner.Contender(p, inputs, True) for name, p in providers.items()}
    uncaptured = dict.fromkeys(contenders, "there is no GPU")
    clock: Any = _OneRound()
    runner._times(direction, contenders, Gate(case, inputs), clock, uncaptured)
    fused = [any("ScaledDotProduct" in name for name in graph) for graph in recorded["default"]]
    assert fused
    assert all(fused), "without a pin PyTorch takes a fused kernel: the test shows nothing"
    assert recorded["math"]
    for graph in recorded["math"]:
        assert not any("ScaledDotProduct" in name for name in graph)
        assert any("Softmax" in name for name in graph)


def test_compiled_peers_do_not_rely_on_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's configuration is an attribute only once it was imported by somebody.
    monkeypatch.delattr(torch._functorch, "config")
    case = attention_case(
        Model("tiny", 64, 2), 2, 5, torch.float32, lambda: kernels.backend("torch")
    )
    # Its own way to patch: pytest's, undone, leaves a setting that says it does not exist.
    with runner.functorch_config.patch(donated_buffer=True):
        runner.Contender(Provider(torch.add, compile_mode="default"), case.inputs(), dry_run=False)
        assert runner.functorch_config.donated_buffer is False


def test_what_is_left_out_of_a_capture_does_not_prevent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def wait() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand where")

    def looks_when_it_may() -> None:
        if not torch.cuda.is_current_stream_capturing():
            wait()

    assert measure.synchronises(looks_when_it_may) is None
    assert measure.synchronises(wait) == "called a synchronizing CUDA operation"
    assert modes[-1] == "default"
    assert not torch.cuda.is_current_stream_capturing()


class _OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_ops_look_at_values_only_outside_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    labels = torch.zeros(2).as_subclass(_OnGpu)
    seen = []
    assert readable(labels)
    assert measure.synchronises(lambda: seen.append(readable(labels))) is None
    assert seen == [False]
