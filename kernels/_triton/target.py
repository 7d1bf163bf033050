"""The chip that a launcher sizes its tiles and its grid for."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """What the launchers need to know of a chip.

    Attributes:
        capability: (major, minor) compute capability.
        multiprocessors: how many.
        shared_memory: bytes that one program may have.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def has_tma(self) -> bool:
        """Whether tiles can be copied by the tensor memory accelerator (tensor descriptors)."""
        return self.capability >= (9, 0)


# The chips that every configuration is compiled for, by 10 * major + minor.
CHIPS = {
    80: Target((8, 0), 108, 163 << 10),
    90: Target((9, 0), 132, 227 << 10),
    100: Target((10, 0), 148, 227 << 10),
}

_assumed: list[Target] = []


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Size launches for ``target`` whatever the device: for the interpreter and for compiling."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


def current_target(device: torch.device) -> Target:
    """The chip of ``device``, unless another is assumed."""
    if _assumed:
        return _assumed[-1]
    if device.type == "cuda":
        return _of_device(device.index)
    # The interpreter runs programs one after the other: with few of them, each of a persistent
    # kernel's programs visits several tiles, as on a chip.
    return Target((9, 0), 4, 227 << 10)


@functools.cache
def _of_device(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )
