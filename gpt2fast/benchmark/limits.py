"""What this machine does at most, with the threads that the contenders have."""

import time
from collections.abc import Callable
from typing import Any

_BYTES = 256 << 20  # beyond every cache
_WIDTH = 1024


def _best(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Limits:
    """A contender that only measures: bytes read, and float32 multiplied, in a second."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._data = torch.ones(_BYTES // 4)
        # Two threads reach more by a matrix-vector product than by a sum on some machines.
        self._matrix = self._data.view(-1, 4096)
        self._vector = torch.ones(4096)
        self._square = torch.randn(_WIDTH, _WIDTH)

    def measure(self, repeats: int = 2) -> dict[str, float]:
        reading = min(
            _best(self._data.sum, repeats), _best(lambda: self._matrix.mv(self._vector), repeats)
        )
        product = _best(lambda: self._square.mm(self._square), 4 * repeats)
        return {
            "read_bytes_per_s": _BYTES / reading,
            "matmul_flop_per_s": 2 * _WIDTH**3 / product,
        }
