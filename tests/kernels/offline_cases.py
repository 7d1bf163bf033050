"""What `tests.kernels.offline` compiles: calls of the launchers on meta tensors.

A case calls a launcher of `gpt2fast.kernels._triton` (not an op: on meta tensors that would only
give shapes) with sizes of a published model. Together the cases reach every kernel, and every entry
of the tables in ``configs.py``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CASES: dict[str, Callable[[], None]] = {}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
