"""GPT-2 as a short PyTorch program has it, for ``torch.compile``: output-major matrices, packed
attention, the fused tanh GELU, and a vocabulary padded to a multiple of 64.

It stands apart from the library, so it is a peer and, in float32, the oracle of whole models.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PADDING = 64  # rows of the head: products of odd widths are slow in 16 bits
_MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class Outputs(NamedTuple):
    """Under the names that transformers gives them; keys and values ``[B, H, T, D]`` a layer."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: tuple[tuple[Tensor, Tensor], ...]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self._heads = heads
        self.ln_1 = nn.LayerNorm(width, eps)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        width = x.shape[-1]
        query, key, value = (
            part.unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(width, -1)
        )
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["c_proj"](heads.transpose(1, 2).flatten(2))
        inner = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](inner), (key, value)


class PlainGPT2(nn.Module):
    """The language model, without dropout.

    Args:
        source: a `gpt2fast.GPT2LMHeadModel`, whose weights are copied.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        config = source.config
        self._vocab = config.vocab_size
        rows = -(-self._vocab // _PADDING) * _PADDING
        width, eps = config.n_embd, config.layer_norm_epsilon
        with source.device:
            self.wte = nn.Embedding(rows, width)
            self.wpe = nn.Embedding(config.n_positions, width)
            self.h = nn.ModuleList(_Block(width, config.n_head, eps) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(width, eps)
        self.to(source.dtype)
        theirs = dict(source.transformer.named_parameters())
        with torch.no_grad():
            self.wte.weight.zero_()
            for name, parameter in self.named_parameters():
                self._published(name, parameter).copy_(theirs[name])

    def _published(self, name: str, tensor: Tensor) -> Tensor:
        """A view of a parameter, or of its gradient, in the published layout."""
        if name.endswith(_MATRICES):
            return tensor.t()
        return tensor[: self._vocab] if name == "wte.weight" else tensor

    def published_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names and gradients as in a published checkpoint."""
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                yield f"transformer.{name}", self._published(name, parameter.grad)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Outputs:
        """As transformers' model: ids ``[B, T]``; the mean loss of labels that are shifted here."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        past = []
        for block in self.h:
            x, pair = block(x)
            if use_cache:
                past.append(pair)
        x = self.ln_f(x[:, -logits_to_keep:])
        logits = F.linear(x, self.wte.weight)[..., : self._vocab]
        loss = None
        if labels is not None:
            # The last position's label is ignored: cheaper than a copy of the logits without it.
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return Outputs(loss, logits, tuple(past))
