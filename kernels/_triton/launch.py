"""Launching a kernel with little work on the host.

Triton derives anew at every launch what a kernel was compiled for: a type and a specialisation of
each argument, and options. For kernels of 20 to 40 arguments that takes longer than many of them
run. Here a launch is looked up by what all of that follows from: the dtypes and alignments of
pointers, constants, and the very numbers, but for those that Triton does not specialise on. What is
not found goes through Triton, and so does everything where somebody has hooked launches.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # bytes: what Triton specialises pointers on
_INT32 = 2**31
_MOST = 4096  # launches of a kernel that are remembered


def cdiv(a: int, b: int) -> int:
    """As `triton.cdiv`, which is made for kernels and takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """As `triton.next_power_of_2`, of a positive number."""
    return 1 << (n - 1).bit_length()


def descriptor(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]
) -> TensorDescriptor:
    """A descriptor whose demands on alignment and strides the caller has checked."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(base=tensor, shape=shape, strides=strides, block_shape=block)
    return made


class _Launches:
    """What one kernel was compiled to, by what it was compiled for."""

    def __init__(self, kernel: Any, pointers: int, numbers: int) -> None:
        self.kernel = kernel
        scalars = kernel.params[pointers : pointers + numbers]
        self.fixed = [i for i, p in enumerate(scalars) if not p.do_not_specialize]
        self.free = [i for i, p in enumerate(scalars) if p.do_not_specialize]
        self.constants = [p.name for p in kernel.params[pointers + numbers :]]
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


# By the kernel's id: its hash is that of its source, behind a lock.
_LAUNCHES: dict[int, _Launches] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: Sequence[Tensor | TensorDescriptor | None],
    numbers: Sequence[int | float],
    **constants: Any,
) -> None:
    """``kernel[grid](*pointers, *numbers, **constants)``.

    Args:
        kernel: takes its arguments in that order, and every constant has to be given.
        grid: one to three numbers of programs.
        pointers: tensors on the current device, and descriptors.
        numbers: each always an int, or always a float.
        constants: ``constexpr`` arguments and Triton's options.
    """
    runtime = knobs.runtime
    known = _LAUNCHES.get(id(kernel))
    if known is None:
        if not isinstance(kernel, JITFunction):  # the interpreter
            kernel[grid](*pointers, *numbers, **constants)
            return
        known = _LAUNCHES[id(kernel)] = _Launches(kernel, len(pointers), len(numbers))
    active = driver.active
    device = active.get_current_device()
    key: list[Any] = [device]
    arguments: list[Any] = []
    for pointer in pointers:
        if pointer is None:
            key.append(None)
            arguments.append(None)
        elif isinstance(pointer, TensorDescriptor):
            key += (TensorDescriptor, pointer.base.dtype, *pointer.block_shape)
            arguments.append(pointer)
        else:
            address = pointer.data_ptr()
            key += (pointer.dtype, address % _ALIGNMENT == 0)
            arguments.append(address)
    key += [numbers[i] for i in known.fixed]
    key += constants.items()
    found = known.compiled.get(tuple(key))
    small = True
    for i in known.free:
        if not -_INT32 <= numbers[i] < _INT32:
            small = False
    if (
        found is None
        or not small
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or kernel.pre_run_hooks
    ):
        compiled = kernel[grid](*pointers, *numbers, **constants)
        # Nothing to remember where launches are only collected (`tests/kernels/offline.py`).
        if small and hasattr(compiled, "packed_metadata"):
            if len(known.compiled) >= _MOST:
                known.compiled.clear()
            known.compiled[tuple(key)] = compiled, tuple(constants[c] for c in known.constants)
        return
    compiled, values = found
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x, y, z, active.get_current_stream(device), compiled.function, compiled.packed_metadata,
        None, None, None, *arguments, *numbers, *values,
    )  # fmt: skip
