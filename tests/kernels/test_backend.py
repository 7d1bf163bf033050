"""Which implementation serves: the default, the environment, and the choice by hand."""

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gpt2fast
from gpt2fast.kernels import backend as module_function
from gpt2fast.kernels.backend import (
    _Selection,
    readable,
    selected_backend,
    serves,
    unavailable,
    use_triton,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    unavailable.cache_clear()
    yield
    unavailable.cache_clear()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("GPT2FAST_BACKEND", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-c", f"import torch; from gpt2fast import kernels\n{code}"],
        capture_output=True,
        text=True,
        env={**kept, **environment},
    )


LAYER_NORM = "print(kernels.layer_norm(torch.ones(2, 8), torch.ones(8), torch.zeros(8)).shape)"


def test_a_cpu_is_served_by_pytorch_unless_chosen() -> None:
    assert selected_backend() == "auto"
    assert not serves(CPU)
    with gpt2fast.backend("torch"):
        assert not serves(CPU)


def test_the_choice_by_hand_nests_and_is_undone() -> None:
    assert gpt2fast.backend is module_function
    with gpt2fast.backend("triton"):
        assert selected_backend() == "triton"
        with pytest.raises(ValueError, match="other"), gpt2fast.backend("torch"):
            gpt2fast.backend("other")
        assert selected_backend() == "triton"
    assert selected_backend() == "auto"


def test_the_choice_holds_without_a_with_and_in_every_thread() -> None:
    seen = []
    chosen = gpt2fast.backend("torch")
    thread = threading.Thread(target=lambda: seen.append(selected_backend()))
    thread.start()
    thread.join()
    chosen.__exit__(None, None, None)
    assert seen == ["torch"]
    assert selected_backend() == "auto"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of .*'auto'.*'triton'.*'cuda'"):
        gpt2fast.backend("cuda")
    assert selected_backend() == "auto"


def test_the_environment_is_read_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the package is imported, which makes the selection."""
    for name in ("torch", "triton", "auto"):
        monkeypatch.setenv("GPT2FAST_BACKEND", name)
        assert _Selection().choice == name
    monkeypatch.setenv("GPT2FAST_BACKEND", "")
    assert _Selection().choice == "auto"
    monkeypatch.delenv("GPT2FAST_BACKEND")
    assert _Selection().choice == "auto"
    monkeypatch.setenv("GPT2FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"GPT2FAST_BACKEND must be one of .* got 'cuda'"):
        _Selection()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")
def test_kernels_chosen_where_they_cannot_run_are_an_error() -> None:
    code = f"""
try: {LAYER_NORM}
except RuntimeError as error: print(error)
with kernels.backend("torch"): {LAYER_NORM}"""
    done = _python(code, GPT2FAST_BACKEND="triton")
    refused, served = done.stdout.splitlines()
    assert "the triton backend is selected, but the tensors are on 'cpu'" in refused
    assert served == "torch.Size([2, 8])"
    done = _python(LAYER_NORM, GPT2FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout == "torch.Size([2, 8])\n"


@pytest.mark.parametrize(
    ("capability", "why"),
    [((7, 5), "Old GPU has compute capability 7.5; the kernels need 8.0"), ((8, 0), None)],
)
def test_a_gpu_too_old_is_served_by_pytorch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], why: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    gpu = SimpleNamespace(name="Old GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    _expect(why)


def test_no_triton_is_served_by_pytorch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _expect("Triton is not installed")


def _expect(why: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [serves(GPU) for _ in range(3)] == 3 * [why is None]
    assert len(caught) == (why is not None)
    if why is not None:
        assert why in str(caught[0].message)
        with gpt2fast.backend("triton"), pytest.raises(RuntimeError, match=why):
            serves(GPU)


def test_what_the_kernels_do_not_know_is_left_to_pytorch() -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(use_triton(x))
        return x.sum()

    seen: list[Any] = []
    with gpt2fast.backend("triton"):
        assert use_triton(torch.ones(1))
        assert not use_triton(torch.ones(1, dtype=torch.float64))
        assert not use_triton(torch.ones(1, device="meta"))
        torch.func.grad(inside)(torch.ones(1))
    assert seen == [False]


def test_values_are_looked_at_only_where_there_are_any() -> None:
    assert readable(torch.ones(1))
    assert not readable(torch.ones(1, device="meta"))
    with FakeTensorMode() as mode:
        assert not readable(mode.from_tensor(torch.ones(1)))
