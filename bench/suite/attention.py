"""The cases of the two attention ops. Their peers are PyTorch's backends, each pinned.

Peers get what ours gets, a packed projection, and return what ours returns, merged heads: both are
views for them in the forward pass. In the backward pass they put the gradient of the projection
together from three, which is one more copy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.suite.cases import Case, Inputs, Model, Provider
from bench.suite.work import OURS, Work
from gpt2fast import kernels
from gpt2fast.kernels import torch_ops
from tests.kernels import oracles

_PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _pinned(function: Callable[..., Any]) -> dict[str, Provider]:
    return {
        name: Provider(function, partial(sdpa_kernel, backend)) for name, backend in _PINNED.items()
    }


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    # Split, not unbound from one view: the backward pass is then one concatenation.
    query, key, value = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
    )
    return query, key, value


def _merged(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def attention_case(
    model: Model,
    batch: int,
    length: int,
    dtype: torch.dtype,
    select: Callable[[], AbstractContextManager[Any]],
) -> Case:
    """`causal_attention` of whole sequences."""
    width, heads = model.hidden, model.heads
    row = batch * length * width * dtype.itemsize
    # Two products over the lower triangle; five in the backward pass.
    product = batch * width * length * (length + 1)
    forward = Work(4 * row, 2 * product)
    backward = Work(8 * row, 5 * product)

    def plain(qkv: Tensor) -> Tensor:
        return _merged(F.scaled_dot_product_attention(*_heads(qkv, heads), is_causal=True))

    return Case(
        op="causal_attention",
        shape=f"B{batch} T{length} {heads}x{width // heads}",
        dtype=dtype,
        inputs=lambda: Inputs((torch.randn(batch, length, 3 * width).to(dtype),)),
        oracle=lambda qkv: oracles.attention(qkv, heads)[0],
        tolerance="attention",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={
            OURS: Provider(lambda qkv: kernels.causal_attention(qkv, heads), select),
            **_pinned(plain),
        },
    )


def append_case(
    model: Model,
    batch: int,
    length: int,
    start: int,
    dtype: torch.dtype,
    select: Callable[[], AbstractContextManager[Any]],
) -> Case:
    """`attention_append` of a prompt (start 0), a chunk, or one token."""
    width, heads, end = model.hidden, model.heads, start + length
    # Read: the projection and what the cache holds; written: its new positions and the output.
    moved = batch * width * (3 * length + 2 * start + 2 * length + length) * dtype.itemsize
    seen = length * start + length * (length + 1) // 2
    capacity = max(model.positions, end)

    def inputs() -> Inputs:
        cache = torch.randn(2, batch, heads, capacity, width // heads).to(dtype)
        return Inputs((torch.randn(batch, length, 3 * width).to(dtype), cache))

    def ours(qkv: Tensor, cache: Tensor) -> Tensor:
        return kernels.attention_append(qkv, cache, start, heads)

    def plain(qkv: Tensor, cache: Tensor) -> Tensor:
        query, kv = torch_ops.split_heads(qkv, heads)
        cache[:, :, :, start:end].copy_(kv)
        key, value = (kv if start == 0 else cache[:, :, :, :end]).unbind(0)
        if length == 1 or start == 0:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        else:
            bias = causal_lower_right(length, end)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return _merged(out)

    def oracle(qkv: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        _, key, value = _heads(qkv, heads)
        written = cache.clone()
        written[:, :, :, start:end] = torch.stack((key, value))
        past = cache[:, :, :, :start] if start else None
        return oracles.attention(qkv, heads, past)[0], written

    def observe(inputs: Inputs, outputs: Any) -> tuple[Tensor, ...]:
        # The cache is part of the result: what was written, and what had to be left alone.
        return outputs if isinstance(outputs, tuple) else (outputs, inputs.leaves[1].clone())

    def poison(inputs: Inputs) -> None:
        inputs.leaves[1][:, :, :, start:end] = float("nan")

    return Case(
        op="attention_append",
        shape=f"B{batch} T{length} after {start} {heads}x{width // heads}",
        dtype=dtype,
        inputs=inputs,
        oracle=oracle,
        tolerance="attention",
        work={"forward": Work(moved, 4 * batch * width * seen)},
        providers={OURS: Provider(ours, select), **_pinned(plain)},
        observe=observe,
        poison=poison,
    )
