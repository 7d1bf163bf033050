"""KVCache: the keys and values of the positions already seen, as a value.

A cache is a length and a reference to shared storage: one ``[2, B, H, capacity, D]`` tensor a
layer, keys then values. Appending to the newest cache of a storage writes in place; appending to
an older one (somebody branched) copies first. So no forward pass ever changes the past that it was
given, and the common case still copies nothing.
"""

import threading
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

_GRANULE = 64  # capacities are multiples of this many positions
_CLAIMS = threading.Lock()  # held for two comparisons; one for all storages keeps them traceable


class _Storage:
    """Buffers shared by the caches of one history, and how far they have been written."""

    __slots__ = ("filled", "layers")

    def __init__(self, layers: list[Tensor], filled: int) -> None:
        self.layers = layers
        self.filled = filled

    def claim(self, start: int, end: int) -> bool:
        """Reserve positions start..end for one appender; False if it has to copy."""
        if self.layers[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # such tensors refuse in-place writes outside inference mode
        with _CLAIMS:
            if start != self.filled or end > self.layers[0].shape[3]:
                return False
            self.filled = end
            return True


class KVCache(Sequence[Tensor]):
    """Past keys and values of a model, one ``[2, B, H, T, D]`` tensor a layer.

    As a sequence it yields those stacked tensors. It never changes: forward passes return a new
    cache. Build one with `KVCache.from_past` or let the model do it.
    """

    __slots__ = ("_length", "_storage")

    def __init__(self, layers: Sequence[Tensor]) -> None:
        """Wrap one ``[2, B, H, T, D]`` tensor a layer, without copying.

        Raises:
            ValueError: there is no layer, or the shapes are not such or differ.
        """
        layers = list(layers)
        if not layers:
            raise ValueError("a cache needs at least one layer; got none")
        first = layers[0].shape
        for i, layer in enumerate(layers):
            if layer.dim() != 5 or layer.shape[0] != 2 or layer.shape != first:
                raise ValueError(
                    f"every layer of the past must be [2, batch, heads, time, head size], alike; "
                    f"layer 0 is {list(first)}, layer {i} is {list(layer.shape)}"
                )
        self._storage = _Storage(layers, first[3])
        self._length: int = first[3]

    @classmethod
    def _of(cls, storage: _Storage, length: int) -> "KVCache":
        cache = cls.__new__(cls)
        cache._storage, cache._length = storage, length
        return cache

    @classmethod
    def empty(
        cls,
        layers: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> "KVCache":
        """A cache of length 0 with room for at least ``capacity`` positions.

        Args:
            layers: number of layers.
            shape: (batch, heads, head size).
            capacity: positions to reserve; more are allocated when they are needed.
        """
        batch, heads, head_size = shape
        size = (2, batch, heads, _round_up(capacity), head_size)
        buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(layers)]
        return cls._of(_Storage(buffers, 0), 0)

    @classmethod
    def from_past(cls, past: Any) -> "KVCache":
        """Accept any past: a KVCache, stacked tensors, (key, value) pairs, or transformers' Cache.

        Raises:
            ValueError: it is none of these, or its shapes are wrong.
        """
        if isinstance(past, KVCache):
            return past
        if is_foreign(past):
            length = int(past.get_seq_length())  # a static cache's tensors are longer
            past = [(x.keys[:, :, :length], x.values[:, :, :length]) for x in past.layers]
        if not isinstance(past, Sequence):
            raise ValueError(f"cannot read a past from {type(past).__name__}")
        return cls([_stacked(i, layer) for i, layer in enumerate(past)])

    def __len__(self) -> int:
        return len(self._storage.layers)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [layer[:, :, :, : self._length] for layer in self._storage.layers[index]]
        return self._storage.layers[index][:, :, :, : self._length]

    def __repr__(self) -> str:
        return f"KVCache(layers={len(self)}, shape={list(self[0].shape)}, dtype={self[0].dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        return KVCache, ([layer.clone() for layer in self],)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        return KVCache([layer.clone() for layer in self])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are held."""
        return self._length

    @property
    def batch_size(self) -> int:
        """How many rows it holds."""
        return self._storage.layers[0].shape[1]

    @property
    def capacity(self) -> int:
        """How many positions fit before the storage has to grow."""
        return self._storage.layers[0].shape[3]

    def extended(self, extra: int) -> "KVCache":
        """A cache ``extra`` positions longer whose new positions are yet to be written.

        Shares this one's storage where nobody else has appended to it and there is room; otherwise
        copies, doubling the capacity when it grows. Write the layers through `buffers`.
        """
        end = self._length + extra
        if self._storage.claim(self._length, end):
            return self._of(self._storage, end)
        capacity = self.capacity if end <= self.capacity else max(2 * self._length, end)
        layers = []
        for layer in self:
            size = (*layer.shape[:3], _round_up(capacity), layer.shape[4])
            buffer = layer.new_empty(size)
            buffer[:, :, :, : self._length] = layer
            layers.append(buffer)
        return self._of(_Storage(layers, end), end)

    @property
    def buffers(self) -> list[Tensor]:
        """The ``[2, B, H, capacity, D]`` tensors behind the layers, for the op that writes them."""
        return self._storage.layers

    def select(self, rows: Tensor) -> "KVCache":
        """The cache whose batch row i is this one's row ``rows[i]``: reorders, repeats or drops.

        Args:
            rows: ``[new batch]``, int64.
        """
        if torch.is_grad_enabled() and any(layer.requires_grad for layer in self):
            return KVCache([layer.index_select(1, rows) for layer in self])
        layers = []
        for layer in self:
            size = (2, len(rows), layer.shape[2], self.capacity, layer.shape[4])
            buffer = layer.new_empty(size)
            torch.index_select(layer, 1, rows, out=buffer[:, :, :, : self._length])
            layers.append(buffer)
        return self._of(_Storage(layers, self._length), self._length)

    def crop(self, length: int) -> "KVCache":
        """The first ``length`` positions, sharing storage.

        Raises:
            ValueError: the length is negative or beyond this cache's.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot crop a cache of {self._length} positions to {length}")
        return self._of(self._storage, length)


def is_foreign(past: Any) -> bool:
    """Whether ``past`` is a cache of transformers: told by its shape, so that none is imported."""
    return hasattr(past, "layers") and hasattr(past, "get_seq_length") and hasattr(past, "update")


def _round_up(positions: int) -> int:
    return -(-positions // _GRANULE) * _GRANULE


def _stacked(index: int, layer: Any) -> Tensor:
    if isinstance(layer, Tensor):
        return layer
    if isinstance(layer, list | tuple) and len(layer) == 2:
        key, value = layer
        if isinstance(key, Tensor) and isinstance(value, Tensor) and key.shape == value.shape:
            return torch.stack((key, value))
    raise ValueError(
        f"layer {index} of the past must be a [2, batch, heads, time, head size] tensor or a pair "
        f"of tensors; got {type(layer).__name__}"
    )
