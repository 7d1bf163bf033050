"""Attention over the cache, on PyTorch's operators: which rows go together, and what they read.

A cache is one tensor ``[2 L, S, H, capacity, D]``: keys and values of each layer, position after
position for each head, so that what a head reads for one token is one stretch of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Rows of a step that are attended to at once: n tokens each of B neighbouring slots, which are
    all as long.

    Everything but the tensors' contents is fixed for all layers, so the views are made once a step.

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
        return out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])

    def last(self) -> "Span":
        """Of one slot: only the last token attends, all are written."""
        return Span(
            self.query[:, :, -1:], self.fresh, self.targets, self.context, mask=None, causal=False
        )


def spans_of(
    cache: Tensor, qkv: Tensor, slots: Sequence[int], starts: Sequence[int], count: int
) -> list[Span]:
    """Arrange ``count`` tokens of each of ``slots``, the first of them at positions ``starts``.

    Args:
        cache: see above.
        qkv: ``[len(slots) * count, 3 C]``, where the projection will be.
    """
    heads = cache.shape[2]
    layers = cache.unflatten(0, (-1, 2))
    spans = []
    for first, end in _runs(slots, starts):
        batch, low = end - first, starts[first]
        high, slot = low + count, slots[first]
        packed = qkv[first * count : end * count].view(batch, count, 3, heads, -1)
        packed = packed.permute(2, 0, 3, 1, 4)
        rows = slice(slot, slot + batch)
        mask = None
        if count > 1 and low > 0:
            mask = qkv.new_full((count, high), -torch.inf).triu_(low + 1)
        spans.append(
            Span(
                query=packed[0],
                fresh=packed[1:],
                targets=layers[:, :, rows, :, low:high].unbind(0),
                context=cache[:, rows, :, :high].unbind(0),
                mask=mask,
                causal=count > 1 and low == 0,
            )
        )
    return spans


def _runs(slots: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int]]:
    """Where neighbours with the same start begin and end."""
    borders = [
        i
        for i in range(1, len(slots))
        if slots[i] != slots[i - 1] + 1 or starts[i] != starts[i - 1]
    ]
    return list(zip([0, *borders], [*borders, len(slots)], strict=True))
