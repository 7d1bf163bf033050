"""Attention over the cache, on PyTorch's operators: which rows go together, and what they read.

A cache is one tensor ``[2 L, S, H, capacity, D]``: keys and values of each layer, position after
position for each head, so that what a head reads for one token is one stretch of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Rows of a step that attend at once: n tokens each of B neighbouring slots, all as long.

    All layers use the same views, so they are made once a step.

    Attributes:
        query: ``[B, H, n, D]``, a view of the projection.
        fresh: ``[2, B, H, n, D]``, keys and values there.
        targets: for each layer, where those go in the cache.
        context: ``[B, H, start + n, D]``, keys of the first layer, its values, keys of the second
            and so on.
        mask: ``[n, start + n]``, added to the scores, or None.
        causal: whether there is no past, and more than one token.
    """

    query: Tensor
    fresh: Tensor
    targets: Sequence[Tensor]
    context: Sequence[Tensor]
    mask: Tensor | None
    causal: bool

    def attend(self, layer: int, scale: float) -> Tensor:
        """Write this layer's keys and values, and attend: ``[B * n, C]``."""
        self.targets[layer].copy_(self.fresh)
        out = F.scaled_dot_product_attention(
            self.query,
            self.context[2 * layer],
            self.context[2 * layer + 1],
            attn_mask=self.mask,
            is_causal=self.causal,
            scale=scale,
        )
        if self.query.shape[2] > 1:
            out = out.transpose(1, 2)
        return out.reshape(len(out) * self.query.shape[2], -1)

    def last(self) -> "Span":
        """Only the last token of each slot attends; all are written."""
        return replace(self, query=self.query[:, :, -1:], mask=None, causal=False)


Piece = tuple[int, int, int]  # slot, start, end: tokens of a slot


def spans_of(cache: Tensor, qkv: Tensor, pieces: Sequence[Piece]) -> list[Span]:
    """Arrange the rows of a step.

    Args:
        cache: see above.
        qkv: ``[M, 3 C]``, where the projection will be: the rows of each piece, one after another.
    """
    heads = cache.shape[2]
    layers = cache.unflatten(0, (-1, 2))
    spans, row = [], 0
    for batch, (slot, start, end) in _runs(pieces):
        count = end - start
        packed = qkv[row : row + batch * count].view(batch, count, 3, heads, -1)
        packed = packed.permute(2, 0, 3, 1, 4)
        slots = slice(slot, slot + batch)
        mask = None
        if count > 1 and start > 0:
            mask = qkv.new_full((count, end), -torch.inf).triu_(start + 1)
        spans.append(
            Span(
                query=packed[0],
                fresh=packed[1:],
                targets=layers[:, :, slots, :, start:end].unbind(0),
                context=cache[:, slots, :, :end].unbind(0),
                mask=mask,
                causal=count > 1 and start == 0,
            )
        )
        row += batch * count
    return spans


def _runs(pieces: Sequence[Piece]) -> list[tuple[int, Piece]]:
    """The first of neighbouring slots with the same start and end, and how many there are."""
    runs: list[tuple[int, Piece]] = []
    for slot, start, end in pieces:
        if runs and (slot - runs[-1][0], start, end) == runs[-1][1]:
            runs[-1] = runs[-1][0] + 1, runs[-1][1]
        else:
            runs.append((1, (slot, start, end)))
    return runs
