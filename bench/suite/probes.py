"""Two kernels that compute nothing: one to weigh a launch, one to test a memory checker."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _empty_kernel(x_ptr):
    """One program that does nothing; x_ptr: ``[1]``."""


@triton.jit
def _planted_write_kernel(x_ptr, offset):
    """One program that writes one element at ``offset``, beyond the end if that is asked for."""
    tl.store(x_ptr + offset, 1.0)


def launch_empty(x: Tensor) -> None:
    _empty_kernel[(1,)](x)


def write_at(x: Tensor, offset: int) -> None:
    """Write x[offset] without looking whether x is that long."""
    _planted_write_kernel[(1,)](x, offset)
