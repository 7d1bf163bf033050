"""What the device can do at best, measured in the same run as the ops that are held against it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from bench.suite.measure import Call, Clock, captured, quantiles

# Sizes on a GPU and in a dry run. The buffers are many times any L2 cache.
COPY_BYTES = (2 << 30, 1 << 12)
GEMM_SIZE = (8192, 32)
_MATRIX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _rate(amount: float, samples: list[float]) -> dict[str, float]:
    """Amount a second; p20 is the slow end, as for times."""
    rates = quantiles([amount / seconds for seconds in samples])
    return {**rates, "seconds_p50": quantiles(samples)["p50"]}


def _timed(clock: Clock, call: Call) -> list[float]:
    return clock.device({"it": call}, {"it": nullcontext})["it"]


def measure_limits(
    device: torch.device, clock: Clock, say: Callable[[str, float], None], dry_run: bool
) -> dict[str, Any]:
    """Bandwidths in bytes/s, matrix products in FLOP/s on random data, launches in seconds."""
    limits: dict[str, Any] = {"device": _device(device)}
    say("bandwidth", 60)
    count = COPY_BYTES[dry_run] // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copied = _timed(clock, lambda: target.copy_(source))
    limits["copy_bytes_per_s"] = _rate(2 * COPY_BYTES[dry_run], copied)
    # The best of two reductions of PyTorch: neither is written to reach the limit.
    readers = (lambda: source.sum(), lambda: torch.mv(source.view(-1, 1024), target[:1024]))
    read = min((_timed(clock, reader) for reader in readers), key=lambda s: quantiles(s)["p50"])
    limits["read_bytes_per_s"] = _rate(COPY_BYTES[dry_run], read)

    size = GEMM_SIZE[dry_run]
    limits["matmul_flop_per_s"] = {}
    for dtype in _MATRIX_DTYPES:
        say(f"matmul {dtype}", 60)
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        product = lambda out=out, left=left, right=right: torch.mm(left, right, out=out)  # noqa: E731
        name = str(dtype).removeprefix("torch.")
        limits["matmul_flop_per_s"][name] = _rate(2 * size**3, _timed(clock, product))
        if dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = True
            limits["matmul_flop_per_s"]["tf32"] = _rate(2 * size**3, _timed(clock, product))
            torch.backends.cuda.matmul.allow_tf32 = False

    say("launches", 60)
    from bench.suite.probes import launch_empty

    empty = torch.empty(1, device=device)

    def launch() -> None:
        launch_empty(empty)

    launch()
    graph, _ = captured(launch)
    host = clock.host({"it": launch}, {"it": nullcontext})["it"]
    limits["empty_launch_s"] = {
        "device": quantiles(_timed(clock, graph.replay)),
        **{kind: quantiles(samples) for kind, samples in host.items()},
    }
    return limits


def _device(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
