"""The remembered launches: always of the kernel that Triton itself would take."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
launching = pytest.importorskip("gpt2fast.kernels._triton.launch")


def _kernel(
    x_ptr: Any, y_ptr: Any, rows: Any, width: Any, scale: Any, FLAG: Any, BLOCK: Any
) -> None:
    """Nothing compiles it."""


class _Compiled:
    """In place of what Triton compiles; keeps what it was launched with."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launched.append(args)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Compiled]]:
    """A driver without a device; yields what was compiled under it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made: list[_Compiled] = []

    def compile_now(self: Any, key: Any, _: Any, device: int, *__: Any) -> _Compiled:
        made.append(_Compiled())
        self.device_caches[device][0][key] = made[-1]
        return made[-1]

    monkeypatch.setattr(JITFunction, "_do_compile", compile_now)
    before = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 5,
        )
    )
    yield made
    driver._active = before


def _jit() -> Any:
    from triton.runtime.jit import JITFunction

    kernel = JITFunction(_kernel, do_not_specialize=["rows"])
    for parameter in kernel.params[-2:]:  # as tl.constexpr, which an annotation would say
        monkeyed = parameter.__dict__
        monkeyed["is_constexpr"] = True
    return kernel


def test_a_launch_takes_the_kernel_that_triton_would(compiled: list[_Compiled]) -> None:
    kernel = _jit()
    memory = torch.zeros(64, dtype=torch.float16)
    pointers = (memory[:32], memory[1:33], memory[8:40].view(torch.int16), None)
    numbers = (1, 2, 16, 17, 32, 2**31 - 1, 2**31, 2**40, -16)
    arguments = [
        *itertools.product(pointers, pointers[::3], (3, 16, 1, 2**40), (16, 17), (True, False)),
        *itertools.product(pointers[:1], pointers[:1], (3,), numbers, (True,)),
    ]
    for _ in range(2):  # the second time as remembered
        for x, y, rows, width, flag in arguments:
            constants = {"FLAG": flag, "BLOCK": 64, "num_warps": 4}
            launching.launch(kernel, (2, 3), (x, y), (rows, width, 0.5), **constants)
            took = next(c for c in compiled if len(c.launched) > 0)
            own = kernel[2, 3](x, y, rows, width, 0.5, **constants)
            assert own is took
            remembered, direct = (list(launched) for launched in took.launched)
            took.launched.clear()
            for launched in (remembered, direct):
                launched[9:11] = [p if p is None or type(p) is int else p.data_ptr()
                                  for p in launched[9:11]]  # fmt: skip
                launched[6:9] = []  # hooks, of which there are none
            assert remembered == direct
            assert direct[:4] == [2, 3, 1, 5]


def test_descriptors_are_told_apart(compiled: list[_Compiled]) -> None:
    kernel = _jit()
    memory = torch.zeros(64, 64, dtype=torch.float16)
    for tensor, block in itertools.product((memory, memory.bfloat16()), ([16, 64], [32, 64])):
        for _ in range(2):
            made = launching.descriptor(tensor, tensor.shape, tensor.stride(), block)
            launching.launch(kernel, (1,), (made, None), (1, 2, 0.5), FLAG=True, BLOCK=1)
    assert [len(c.launched) for c in compiled] == [2, 2, 2, 2]


def test_hooks_see_every_launch(compiled: list[_Compiled]) -> None:
    from triton import knobs

    kernel, seen = _jit(), []
    hook = lambda *args, **keywords: seen.append(keywords)  # noqa: E731
    x = torch.zeros(4)
    for _ in range(2):
        launching.launch(kernel, (1,), (x, x), (1, 2, 0.5), FLAG=True, BLOCK=1)
    kernel.add_pre_run_hook(hook)
    launching.launch(kernel, (1,), (x, x), (1, 2, 0.5), FLAG=True, BLOCK=1)
    assert len(seen) == 1
    kernel.pre_run_hooks.clear()
    enter = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        launching.launch(kernel, (1,), (x, x), (1, 2, 0.5), FLAG=True, BLOCK=1)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    hooks = [launched[7] for launched in compiled[0].launched]
    assert hooks[1] is None
    assert hooks[3] is knobs.runtime.launch_enter_hook


def test_few_launches_are_remembered(
    compiled: list[_Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel, x = _jit(), torch.zeros(4)
    for width in range(20, 30):
        launching.launch(kernel, (1,), (x, x), (1, width, 0.5), FLAG=True, BLOCK=1)
    assert len(launching._LAUNCHES[id(kernel)].compiled) <= 3
