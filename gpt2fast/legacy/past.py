"""The presents: a list of tensors that remembers the cache behind them."""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gpt2fast.cache import KVCache


class Presents(list[Tensor]):
    """Keys and values of every layer, ``[2, B, H, T, D]`` each: what the next call takes as past.

    A list of tensors, and read as one wherever somebody has changed it. As the models return it,
    it also knows the cache behind its tensors, so that continuing from it copies nothing.

    A forward pass never changes it, and any number of continuations may start from it. They share
    its memory: its tensors are for reading.
    """

    def __init__(self, layers: Iterable[Tensor] = ()) -> None:
        super().__init__(layers)
        self._cache = layers if isinstance(layers, KVCache) else None
        self._tensors = tuple(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)

    def cache(self) -> KVCache:
        """The cache of these tensors."""
        same = len(self) == len(self._tensors) and all(map(operator.is_, self, self._tensors))
        return self._cache if same and self._cache is not None else KVCache.from_past(list(self))


def as_cache(past: Iterable[Tensor] | None) -> KVCache | None:
    """Any past as a cache: presents, or one ``[2, B, H, T, D]`` tensor a layer.

    Raises:
        ValueError: it is neither, or its shapes are wrong.
    """
    if past is None or isinstance(past, KVCache):
        return past
    return past.cache() if isinstance(past, Presents) else KVCache.from_past(list(past))
