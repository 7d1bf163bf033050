"""Inputs for linear and gelu_mlp."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.tolerances import assert_close


def layer(inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        (torch.randn(inputs, outputs) / inputs**0.5).to(dtype),
        torch.randn(outputs).to(dtype),
    ]


def mlp(
    lead: tuple[int, ...], width: int, inner: int, dtype: torch.dtype, with_residual: bool = True
) -> list[Tensor]:
    """Everything that gelu_mlp takes."""
    tensors = [torch.randn(*lead, width).to(dtype)]
    tensors += [*layer(width, inner, dtype), *layer(inner, width, dtype)]
    return [*tensors, torch.randn(*lead, width).to(dtype)] if with_residual else tensors


def compare_forward(
    op: str, ours: Callable[..., Tensor], oracle: Callable[..., Tensor], tensors: list[Tensor]
) -> Tensor:
    """Like `compare`, without gradients."""
    with torch.no_grad():
        got = ours(*tensors)
        assert_close(op, "forward", got, oracle(*(t.double() for t in tensors)), oracle(*tensors))
    return got
