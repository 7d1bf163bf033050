"""Random inputs of attention, the op and its oracle, for the tests of its kernels."""

from typing import Any

import torch
from torch import Tensor

from gpt2fast import kernels
from tests.kernels import oracles


def tensors_of(
    batch: int, heads: int, new: int, past: int, head_size: int, dtype: torch.dtype
) -> list[Tensor]:
    tensors = [torch.randn(batch, new, 3 * heads * head_size).to(dtype)]
    if past:
        tensors.append(torch.randn(2, batch, heads, past, head_size).to(dtype))
    return tensors


def ours(heads: int, **options: Any) -> Any:
    def call(qkv: Tensor, past: Tensor | None = None) -> Tensor:
        return kernels.causal_attention(qkv, heads, past_kv=past, **options)

    return call


def oracle(heads: int, **options: Any) -> Any:
    return lambda *t: oracles.attention(t[0], heads, *t[1:], **options)[0]
