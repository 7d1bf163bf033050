"""The runner on PyTorch's operators: for CPUs, and wherever no kernel of ours runs.

A step costs what reading the weights costs: they are read where the model has them, keys and values
are written into the cache in place and attended to there, and no work in Python grows with the
context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.engine.cpu_linear import Linear, Linears
from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.kernels.decode_state import RUNNING, DecodeState
from gpt2fast.layers import GPT2Block, LayerNorm

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

_CHUNK = 512  # tokens of a prompt that are evaluated at once


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: LayerNorm, dtype: torch.dtype) -> "_Norm":
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Layer:
    ln_1: _Norm
    qkv: Linear
    scale: float
    out: Linear
    ln_2: _Norm
    fc: Linear
    proj: Linear

    @classmethod
    def of(cls, block: GPT2Block, linears: Linears) -> "_Layer":
        return cls(
            ln_1=_Norm.of(block.ln_1, linears.dtype),
            qkv=linears.layer(block.attn.c_attn),
            scale=block.attn.scaling,
            out=linears.layer(block.attn.c_proj),
            ln_2=_Norm.of(block.ln_2, linears.dtype),
            fc=linears.layer(block.mlp.c_fc),
            proj=linears.layer(block.mlp.c_proj),
        )


@dataclass(frozen=True)
class _Span:
    """Consecutive rows of a step: n tokens of one slot.

    Attributes:
        rows: which rows of the step.
        new: for each layer, where the keys and values go: ``[2, H, n, D]``.
        keys, values: for each layer, what is attended to: ``[1, H, start + n, D]``.
        mask: ``[n, start + n]``, or None where one token sees everything.
    """

    rows: slice
    new: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None


class TorchRunner:
    """`gpt2fast.engine.runner.Runner` on PyTorch's operators.

    Args:
        model: one that `gpt2fast.engine.weights.why_not` has nothing against. Its parameters are
            kept, not the model.
        slots: sequences at once.
        capacity: positions of each, at most the model's.
    """

    shares_prefix = False
    proposes = False
    look_every = 1

    def __init__(self, model: "LanguageModel", slots: int, capacity: int) -> None:
        body = model.transformer
        wte = body.wte.weight.detach()
        device, width = wte.device, wte.shape[1]
        self.slots, self.capacity = slots, capacity
        self.state = DecodeState.empty(slots, capacity, len(wte), device)
        linears = Linears(wte.dtype, device)
        self._heads = model.config.n_head
        self._wte, self._wpe = wte, body.wpe.weight.detach()
        self._dtype, self._cached_dtype = linears.dtype, wte.dtype
        self._layers = [
            _Layer.of(block, linears) for block in body.h if isinstance(block, GPT2Block)
        ]
        self._ln_f = _Norm.of(body.ln_f, linears.dtype)
        self._head = linears.head(model.lm_head.weight)
        # Zeros cost nothing before they are written: the system maps memory when it is touched.
        self._cache = torch.zeros(
            (len(self._layers), 2, slots, self._heads, capacity, width // self._heads),
            dtype=linears.dtype,
            device=device,
        )

    def prefill(self, slot: int, start: int, end: int) -> None:
        with torch.inference_mode():
            hidden = self._wte[:0]
            for first in range(start, end, _CHUNK):
                last = min(first + _CHUNK, end)
                hidden = self._evaluate([slot], [first], last - first)
            if int(self.state.status[slot]) != RUNNING:
                self.state.lengths[slot] = end
                return
            self.state.lengths[slot] = end - 1
            select_and_commit(self.state, [slot], 0, self._logits(hidden[-1:]))

    def advance(
        self,
        slots: Sequence[int],
        steps: int,
        drafts: int = 0,
        ngram: int = 0,
        *,
        plain: bool = False,
        context: int = 0,
    ) -> None:
        state = self.state
        with torch.inference_mode():
            for _ in range(steps):
                status = state.status.tolist()
                running = [slot for slot in slots if status[slot] == RUNNING]
                if not running:
                    return
                lengths = state.lengths.tolist()
                hidden = self._evaluate(running, [lengths[s] for s in running], drafts + 1)
                select_and_commit(state, running, drafts, self._logits(hidden))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        with torch.inference_mode():
            self._cache[:, :, target, :, :length] = self._cache[:, :, source, :, :length]

    def keys_values(self, slot: int, length: int) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [
                layer[:, slot, :, :length].to(self._cached_dtype, copy=True)
                for layer in self._cache
            ]

    def close(self) -> None:
        self._layers.clear()
        self._cache = self._cache.new_empty(0)

    def _evaluate(self, slots: Sequence[int], starts: Sequence[int], count: int) -> Tensor:
        """Hidden states ``[len(slots) * count, C]`` of ``count`` tokens of each slot, cached."""
        tokens = [
            self.state.tokens[slot, start : start + count]
            for slot, start in zip(slots, starts, strict=True)
        ]
        positions = [self._wpe[start : start + count] for start in starts]
        hidden = F.embedding(_joined(tokens), self._wte) + _joined(positions)
        spans = [
            self._span(i * count, slot, start, count)
            for i, (slot, start) in enumerate(zip(slots, starts, strict=True))
        ]
        hidden = hidden.to(self._dtype)
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.ln_1(hidden))
            hidden += layer.out(self._attend(i, qkv, spans, layer.scale))
            inner = layer.fc(layer.ln_2(hidden))
            hidden += layer.proj(torch.ops.aten.gelu_(inner, approximate="tanh"))
        return hidden

    def _span(self, row: int, slot: int, start: int, count: int) -> _Span:
        end = start + count
        new = self._cache[:, :, slot, :, start:end].unbind(0)
        context = self._cache[:, :, slot : slot + 1, :, :end]
        mask = None
        if count > 1:
            mask = torch.ones(count, end, dtype=torch.bool, device=context.device).tril(start)
        return _Span(
            slice(row, row + count), new, context[:, 0].unbind(0), context[:, 1].unbind(0), mask
        )

    def _attend(self, index: int, qkv: Tensor, spans: Sequence[_Span], scale: float) -> Tensor:
        """Write the keys and values of layer ``index`` and attend: ``[M, 3C]`` to ``[M, C]``."""
        packed = qkv.view(len(qkv), 3, self._heads, -1).permute(1, 2, 0, 3)  # [3, H, M, D]
        merged = []
        for span in spans:
            own = packed if len(spans) == 1 else packed[:, :, span.rows]
            span.new[index].copy_(own[1:])
            out = F.scaled_dot_product_attention(
                own[:1], span.keys[index], span.values[index], attn_mask=span.mask, scale=scale
            )
            merged.append(out[0].transpose(0, 1).flatten(1))
        return _joined(merged)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._ln_f(hidden))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
