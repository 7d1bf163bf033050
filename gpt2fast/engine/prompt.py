"""A whole prompt through the model at once, by the ops that forward passes use.

Reads packed weights: those of low bits are expanded a layer at a time, which for the many rows of a
prompt costs little beside their products.
"""

import torch
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.engine.float8 import FLOAT8, raw, to_float8
from gpt2fast.kernels.packing import DecodeWeights, Matrix, dequantize


class PromptPass:
    """Buffers for prompts of up to ``capacity`` tokens, which go into one slot of a cache.

    Args:
        cache: ``[L, 2, S, H, capacity, D]``, of the weights' dtype or float8.

    Attributes:
        ids: int64 ``[1, capacity]``, the prompt; behind its end any ids of the vocabulary.
        slot: int64 ``[1]``, where its keys and values go.
        last: int64 ``[1]``, the position of its last token.
    """

    def __init__(self, weights: DecodeWeights, cache: Tensor) -> None:
        _, _, slots, heads, capacity, head_size = cache.shape
        self._weights, self._cache = weights, cache
        self._scales = weights.scales.tolist()
        self.ids = torch.zeros(1, capacity, dtype=torch.int64, device=cache.device)
        self.slot = self.ids.new_zeros(1)
        self.last = self.ids.new_zeros(1)
        self._positions = torch.arange(capacity, device=cache.device)[None]
        # A slot that only the device knows cannot be addressed by a view, and the ops know no
        # float8: layers write here first.
        dtype, shape = weights.wte.dtype, (2, 1, heads, capacity, head_size)
        direct = slots == 1 and cache.dtype == dtype
        self._written = None if direct else cache.new_zeros(shape, dtype=dtype)

    def __call__(self, length: int) -> Tensor:
        """Evaluate the first ``length`` ids, of which those behind ``last`` are padding.

        The cache's positions of padding are written as well; who comes to them overwrites them.

        Returns:
            ``[1, C]``, the hidden state at ``last``, before the final LayerNorm.
        """
        weights, eps = self._weights, self._weights.eps
        layers = len(self._scales)
        normed, hidden = kernels.embedding_layer_norm(
            self.ids[:, :length],
            self._positions[:, :length],
            None,
            weights.wte,
            weights.wpe,
            *_pair(weights.ln_1[0]),
            eps,
        )
        for layer in range(layers):
            merged = self._attend(layer, kernels.linear(normed, *self._linear(weights.qkv, layer)))
            if layer == layers - 1:  # of whose result only the last token counts
                merged = merged.index_select(1, self.last)
                hidden = hidden.index_select(1, self.last)
            attended = kernels.linear(merged, *self._linear(weights.out, layer))
            normed, hidden = kernels.add_layer_norm(
                attended, hidden, *_pair(weights.ln_2[layer]), eps
            )
            hidden = kernels.gelu_mlp(
                normed,
                *self._linear(weights.fc, layer),
                *self._linear(weights.proj, layer),
                hidden,
            )
            if layer < layers - 1:
                normed = kernels.layer_norm(hidden, *_pair(weights.ln_1[layer + 1]), eps)
        return hidden[:, 0]

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        length = qkv.shape[1]
        cache = self._cache[layer]
        if cache.dtype == FLOAT8:
            # Before anything attends: however a prompt is divided, its tokens see the same.
            keys_values = qkv[..., qkv.shape[2] // 3 :]
            keys_values.copy_(to_float8(keys_values))
        written = cache if self._written is None else self._written
        merged = kernels.attention_append(
            qkv, written, 0, self._weights.heads, scale=self._scales[layer]
        )
        if self._written is not None:
            target = raw(cache)[:, :, :, :length]
            source = written[:, :, :, :length]
            if cache.dtype == FLOAT8:
                source = raw(source.to(FLOAT8))  # exact: they are rounded
            target.index_copy_(1, self.slot, source)
        return merged

    def _linear(self, matrix: Matrix, layer: int) -> tuple[Tensor, Tensor]:
        """Weight ``[K, N]`` and bias of one layer."""
        assert matrix.bias is not None
        data = matrix.data[layer]
        if matrix.bits < 16:
            scale = None if matrix.scale is None else matrix.scale[layer]
            data = dequantize(data, scale, matrix.bits).to(self._weights.wte.dtype)
        return data.t(), matrix.bias[layer]


def _pair(norm: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's weight and bias from ``[2, C]``."""
    return norm[0], norm[1]
