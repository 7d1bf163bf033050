"""The runner on PyTorch's operators: for CPUs, and wherever no kernel of ours runs.

A step costs what reading the weights costs: they are read where the model has them, keys and values
are written into the cache in place and attended to there, and no work in Python grows with the
context. The buffers that a step's rows pass through are kept for the next one: between products
that stream through the caches, every allocation and every view is felt.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2fast.engine.compiled import CompiledStep
from gpt2fast.engine.cpu_attention import Piece, spans_of
from gpt2fast.engine.cpu_linear import Buffers, Linear, Linears, RowLinear
from gpt2fast.engine.sampling import select_and_commit
from gpt2fast.kernels.decode_state import RUNNING, DecodeState
from gpt2fast.layers import GPT2Block, LayerNorm

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

_gelu: Any = F.gelu  # whose stub does not know `out`
_CHUNK = 512  # tokens of prompts that are evaluated at once


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: LayerNorm, dtype: torch.dtype) -> "_Norm":
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)[0]


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


class _Rows:
    """Buffers for the rows of a step: what is wide is never needed at once, and shares memory."""

    def __init__(self, like: Tensor, width: int, inner: int) -> None:
        self._width, self._inner = width, inner
        self._hidden = like.new_empty(0, width)
        self._wide = like.new_empty(0)

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """For ``count`` rows: hidden states, projected to 3 C, and inside the perceptron."""
        if count > len(self._hidden):
            self._hidden = self._hidden.new_empty(count, self._width)
            self._wide = self._wide.new_empty(count * max(3 * self._width, self._inner))
        shapes = (count, 3 * self._width), (count, self._inner)
        qkv, inner = (self._wide[: rows * size].view(rows, size) for rows, size in shapes)
        return self._hidden[:count], qkv, inner


@dataclass(frozen=True)
class _RowLayer:
    """Of `_RowStep`: ``ln_1`` and ``ln_2`` are arguments of a LayerNorm."""

    ln_1: tuple[Any, ...]
    qkv: RowLinear
    scale: float
    out: RowLinear
    ln_2: tuple[Any, ...]
    fc: RowLinear
    proj: RowLinear

    @classmethod
    def of(cls, layer: _Layer, buffers: Buffers) -> "_RowLayer | None":
        qkv, out = layer.qkv.for_a_row(buffers), layer.out.for_a_row(buffers)
        fc, proj = layer.fc.for_a_row(buffers), layer.proj.for_a_row(buffers)
        if qkv is None or out is None or fc is None or proj is None:
            return None
        shape = qkv.shape
        ln_1, ln_2 = (
            (shape, norm.weight.view(shape), norm.bias.view(shape), norm.eps)
            for norm in (layer.ln_1, layer.ln_2)
        )
        return cls(ln_1, qkv, layer.scale, out, ln_2, fc, proj)


class _RowStep:
    """`TorchRunner._evaluate` for one token, by the present number of threads.

    In as few calls as PyTorch allows: between products that sweep the caches each of them costs
    several microseconds, whatever it does.

    Args:
        wte, wpe: embeddings of tokens and positions.
        cache: of `TorchRunner`.
    """

    @classmethod
    def of(
        cls, layers: Sequence[_Layer], wte: Tensor, wpe: Tensor, cache: Tensor
    ) -> "_RowStep | None":
        """None where the layers are not in float32 on a CPU, as they lie."""
        buffers: Buffers = {}
        prepared = [_RowLayer.of(layer, buffers) for layer in layers]
        found = [layer for layer in prepared if layer is not None]
        whole = found and len(found) == len(prepared)
        return cls(found, wte, wpe, cache) if whole else None

    def __init__(
        self, layers: Sequence[_RowLayer], wte: Tensor, wpe: Tensor, cache: Tensor
    ) -> None:
        self._layers, self._wte, self._wpe = layers, wte, wpe
        self._shape = layers[0].qkv.shape
        heads, size, inner = cache.shape[2], cache.shape[4], layers[0].proj.shape
        width = heads * size
        self._hidden, self._qkv = cache.new_empty(1, width), cache.new_empty(1, 3 * width)
        self._inner = cache.new_empty(1, prod(inner))
        self._hidden_parts = self._hidden.view(self._shape)
        self._inner_parts = self._inner.view(inner)
        self._query = self._qkv[0, :width].view(heads, 1, size)
        self._fresh = self._qkv[0, width:].view(2, heads, size)
        self._merged, self._nothing = cache.new_empty(heads, 1, size), cache.new_zeros(1, 1, 1)
        self._merged_parts = self._merged.view(self._shape)
        layered = cache.unflatten(0, (-1, 2))
        self._keys, self._values = layered[:, 0].mT.unbind(1), layered[:, 1].unbind(1)
        self._targets = layered.unbind(2)

    def __call__(self, slot: int, position: int, token: int) -> Tensor:
        """The hidden state ``[1, C]``, until the next call; caches the token's keys and values."""
        hidden, hidden_parts, inner, qkv = self._hidden, self._hidden_parts, self._inner, self._qkv
        torch.add(self._wte.select(0, token), self._wpe.select(0, position), out=hidden[0])
        length = position + 1
        keys = self._keys[slot].narrow(3, 0, length).unbind(0)
        values = self._values[slot].narrow(2, 0, length).unbind(0)
        targets = self._targets[slot].select(3, position).unbind(0)
        scores, weights = hidden.new_empty(2, len(self._query), 1, length).unbind(0)
        for i, layer in enumerate(self._layers):
            layer.qkv.into(torch.native_layer_norm(hidden_parts, *layer.ln_1)[0], qkv)
            targets[i].copy_(self._fresh)
            # `scaled_dot_product_attention` takes a sixth to a third longer for one query.
            torch.baddbmm(
                self._nothing, self._query, keys[i], beta=0, alpha=layer.scale, out=scores
            )
            torch._softmax(scores, -1, False, out=weights)
            torch.bmm(weights, values[i], out=self._merged)
            layer.out.accumulate(self._merged_parts, hidden)
            layer.fc.into(torch.native_layer_norm(hidden_parts, *layer.ln_2)[0], inner)
            _gelu(inner, approximate="tanh", out=inner)
            layer.proj.accumulate(self._inner_parts, hidden)
        return hidden


class TorchRunner:
    """`gpt2fast.engine.runner.Runner` on PyTorch's operators.

    Args:
        model: one that `gpt2fast.engine.weights.why_not` has nothing against. Its parameters are
            kept, not the model.
        slots: sequences at once.
        capacity: positions of each, at most the model's.
        step: what evaluates a token where one sequence runs; None for what evaluates several.
    """

    shares_prefix = False
    proposes = False
    look_every = 1

    def __init__(
        self,
        model: "LanguageModel",
        slots: int,
        capacity: int,
        step: CompiledStep | None = None,
    ) -> None:
        body, config = model.transformer, model.config
        linears = Linears(model)
        self.slots, self.capacity = slots, capacity
        self.state = DecodeState.empty(slots, capacity, config.vocab_size, model.device)
        self._embed, self._wpe = linears.embedding(body.wte), body.wpe.weight.detach()
        self._wte = body.wte.weight.detach() if isinstance(body.wte, nn.Embedding) else None
        self._cached_dtype = model.dtype
        self._layers = [
            _Layer.of(block, linears) for block in body.h if isinstance(block, GPT2Block)
        ]
        self._ln_f = _Norm.of(body.ln_f, linears.dtype)
        self._head = linears.head(model.lm_head)
        # Costs nothing before it is written, which zeros would be: the system maps memory when it
        # is touched. Nothing is read before it was written.
        self._cache = torch.empty(
            (2 * len(self._layers), slots, config.n_head, capacity, config.head_size),
            dtype=linears.dtype,
            device=model.device,
        )
        self._rows = _Rows(self._cache, config.n_embd, config.inner_size)
        self._step = step
        self._row_steps: dict[int, _RowStep | None] = {}  # by the number of threads

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prefill(self, slot: int, start: int, end: int) -> None:
        self.prefill_many([(slot, start, end)])

    def prefill_many(self, pieces: Sequence[Piece]) -> None:
        """`prefill` for several (slot, start, end), of different slots, in few passes over the
        weights: short prompts cost hardly more together than one of them alone."""
        state = self.state
        with torch.inference_mode():
            for passed in _passes(pieces):
                hidden = self._evaluate(passed, last=True)
                ends = {slot: end for slot, _, end in pieces}
                status = state.status.tolist()
                chosen = []
                for i, (slot, _, end) in enumerate(passed):
                    chooses = end == ends[slot] and status[slot] == RUNNING
                    state.lengths[slot] = end - 1 if chooses else end
                    if chooses:
                        chosen.append(i)
                if chosen:
                    slots = [passed[i][0] for i in chosen]
                    select_and_commit(state, slots, 0, self._logits(hidden[chosen]))

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
                step, first = self._step, running[0]
                alone = len(running) == 1 and not drafts
                if step and alone and step.serves(lengths[first], self.capacity):
                    logits = self._one(step, first, lengths[first])
                elif alone and (row_step := self._row_step()):
                    token = int(state.tokens[first, lengths[first]])
                    logits = self._logits(row_step(first, lengths[first], token))
                else:
                    pieces = [(s, lengths[s], lengths[s] + 1 + drafts) for s in running]
                    logits = self._logits(self._evaluate(pieces))
                select_and_commit(state, running, drafts, logits)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        with torch.inference_mode():
            self._cache[:, target, :, :length] = self._cache[:, source, :, :length]

    def keys_values(self, slot: int, length: int) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            context = self._cache[:, slot, :, :length].unflatten(0, (-1, 2))
            return [layer.to(self._cached_dtype, copy=True) for layer in context]

    def close(self) -> None:
        self._layers.clear()
        self._step = None
        self._row_steps.clear()
        self._cache = self._cache.new_empty(0)
        self._rows = _Rows(self._cache, 0, 0)

    def _evaluate(self, pieces: Sequence[Piece], last: bool = False) -> Tensor:
        """Hidden states of the pieces' tokens, whose keys and values are cached.

        Returns:
            ``[M, C]`` of all tokens, until the next call; with ``last``, of each piece's last one.
        """
        ends = list(accumulate(end - start for _, start, end in pieces))
        hidden, qkv, inner = self._rows.first(ends[-1])
        ids = [self.state.tokens[slot, start:end] for slot, start, end in pieces]
        positions = [self._wpe[start:end] for _, start, end in pieces]
        torch.add(self._embed(_joined(ids)), _joined(positions), out=hidden)
        spans = spans_of(self._cache, qkv, pieces)
        final = len(self._layers) - 1
        last = last and len(pieces) < len(hidden)
        for i, layer in enumerate(self._layers):
            projected = layer.qkv.into(layer.ln_1(hidden), qkv)
            if projected is not qkv:
                qkv.copy_(projected)
            if last and i == final:
                # Nobody reads the other rows any more.
                spans = [span.last() for span in spans]
                hidden, inner = hidden[[end - 1 for end in ends]], inner[: len(pieces)]
            merged = _joined([span.attend(i, layer.scale) for span in spans])
            layer.out.accumulate(merged, hidden)
            expanded = layer.fc.into(layer.ln_2(hidden), inner)
            _gelu(expanded, approximate="tanh", out=expanded)
            layer.proj.accumulate(expanded, hidden)
        return hidden

    def _one(self, step: CompiledStep, slot: int, position: int) -> Tensor:
        """Cache the slot's token at ``position``: its logits ``[1, V]``."""
        token = self.state.tokens[slot, position : position + 1]
        hidden = (self._embed(token) + self._wpe[position]).float()
        return step(hidden[0], self._cache[:, slot], position)[None]

    def _row_step(self) -> _RowStep | None:
        threads = torch.get_num_threads()
        if threads not in self._row_steps:
            step = None
            if self._wte is not None:
                step = _RowStep.of(self._layers, self._wte, self._wpe, self._cache)
            self._row_steps[threads] = step
        return self._row_steps[threads]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._ln_f(hidden))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _passes(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces, or parts of them, that are evaluated at once: up to `_CHUNK` tokens."""
    passes: list[list[Piece]] = []
    room = 0
    for slot, start, end in pieces:
        while start < end:
            if room == 0:
                passes.append([])
                room = _CHUNK
            part = min(room, end - start)
            passes[-1].append((slot, start, start + part))
            start, room = start + part, room - part
    return passes
