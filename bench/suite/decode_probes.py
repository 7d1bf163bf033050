"""What the decode engine's design rests on, measured: each probe answers one question about a GPU.

- ``graph_node_s``, ``graph_node_pdl_s``: the period of a kernel that does nothing in a CUDA graph,
  without and with programmatic dependent launch. A driver of one kernel a phase pays it 63 times a
  token at 12 layers.
- ``barrier_s``: a grid barrier of one cooperative kernel, which pays it instead.
- ``cooperative_node_s``: the period of a cooperative launch in a graph; that graphs take them at
  all.
- ``one_program_read_bytes_per_s``: reading weights with one program a multiprocessor, by bytes
  that each has on their way.
- ``l2_read_bytes_per_s``: reading a buffer again and again, by its size: how much stays in L2.
- ``prefetched_read_bytes_per_s``: reading what was asked into L2 before, beside ``cold``.

Rates are bytes/s and times seconds, as quantiles. A probe that fails leaves ``{"error": reason}``.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.suite.measure import Call, Clock, captured, quantiles
from gpt2fast.kernels._triton.engine.barrier import (
    allow_next,
    arrive,
    first_epoch,
    prefetch,
    wait,
    wait_for_previous,
)

_WARPS = 8
_THREADS_BYTES = _WARPS * 32 * 16  # of one load of 16 bytes by every thread
_PROGRAMS = 128  # divides the widths of the models' matrices; one a multiprocessor

# On a GPU and in a dry run.
_NODES = (200, 2)
_ROUNDS = (1000, 2)
_L2_BYTES = ((20 << 20, 40 << 20, 60 << 20, 100 << 20), (1 << 14,))
_WEIGHT_BYTES = (256 << 20, 1 << 15)  # of a 124M model in 16 bits
_PREFETCHED_BYTES = (4 << 20, 1 << 14)  # one phase's weights


@triton.jit
def _nothing_kernel(x_ptr, PDL: tl.constexpr):
    """Nothing, but for what dependent launches need."""
    allow_next(PDL)
    wait_for_previous(PDL)


@triton.jit(do_not_specialize=["rounds"])
def _barrier_kernel(counter_ptr, rounds, PROGRAMS: tl.constexpr, BARRIER: tl.constexpr):
    """``rounds`` grid barriers and nothing else. counter ``[1]`` int64."""
    epoch = first_epoch(counter_ptr, PROGRAMS)
    for _ in tl.range(0, rounds):
        if BARRIER:
            arrive(counter_ptr)
            epoch = wait(counter_ptr, epoch, PROGRAMS)


@triton.jit
def _read_kernel(x_ptr, out_ptr, share, BLOCK: tl.constexpr):
    """One program's share of x, int32, the next block asked for before one is used.

    share: elements, a multiple of BLOCK. out ``[programs]`` int32, their sums.
    """
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    ptr = x_ptr + program.to(tl.int64) * share + offs
    block = tl.load(ptr)
    total = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(BLOCK, share, BLOCK, num_stages=1):
        next_block = tl.load(ptr + begin)
        total += block
        block = next_block
    tl.store(out_ptr + program, tl.sum(total + block, 0))


@triton.jit
def _prefetch_kernel(x_ptr, share, BULK: tl.constexpr, PREFETCH: tl.constexpr):
    """A program's share of x, int8, into L2; share: bytes, a multiple of 16."""
    if PREFETCH:
        prefetch(x_ptr + tl.program_id(0).to(tl.int64) * share, share, BULK)


class _Probes:
    def __init__(self, device: torch.device, clock: Clock, dry_run: bool) -> None:
        self._device, self._clock, self._dry_run = device, clock, dry_run
        properties = torch.cuda.get_device_properties(device)
        self._hopper = properties.major >= 9
        self._programs = 1 if dry_run else min(_PROGRAMS, properties.multi_processor_count)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._sums = torch.empty(_PROGRAMS, dtype=torch.int32, device=device)

    def _period(self, launch: Call, few: int, many: int) -> dict[str, float]:
        """Seconds of one more launch in a graph."""

        def repeated(count: int) -> Any:
            def run() -> None:
                for _ in range(count):
                    launch()

            run()
            return captured(run)[0].replay

        return self._difference({"few": repeated(few), "many": repeated(many)}, many - few)

    def _difference(self, calls: dict[str, Call], more: int) -> dict[str, float]:
        times = self._clock.device(calls, dict.fromkeys(calls, nullcontext))
        pairs = zip(times["few"], times["many"], strict=True)
        return quantiles([(many - few) / more for few, many in pairs])

    def _nothing(self, pdl: bool) -> dict[str, float]:
        if pdl and not self._hopper:
            raise NotImplementedError("no dependent launch before compute capability 9.0")
        pdl = pdl and not self._dry_run
        grid = (self._programs,)
        return self._period(
            lambda: _nothing_kernel[grid](
                self._counter, PDL=pdl, num_warps=_WARPS, **({"launch_pdl": True} if pdl else {})
            ),
            1,
            _NODES[self._dry_run],
        )

    def graph_node_s(self) -> dict[str, float]:
        return self._nothing(False)

    def graph_node_pdl_s(self) -> dict[str, float]:
        return self._nothing(True)

    def _barriers(self, rounds: int) -> None:
        options = {} if self._dry_run else {"launch_cooperative_grid": True}
        _barrier_kernel[(self._programs,)](
            self._counter, rounds, PROGRAMS=self._programs, BARRIER=not self._dry_run,
            num_warps=_WARPS, **options,
        )  # fmt: skip

    def cooperative_node_s(self) -> dict[str, float]:
        return self._period(lambda: self._barriers(0), 1, _NODES[self._dry_run])

    def barrier_s(self) -> dict[str, float]:
        rounds = _ROUNDS[self._dry_run]
        self._barriers(rounds)
        count = self._counter.item()
        if count != (0 if self._dry_run else rounds * self._programs):
            raise RuntimeError(f"{rounds} barriers of {self._programs} programs counted {count}")
        calls = {"few": lambda: self._barriers(0), "many": lambda: self._barriers(rounds)}
        return self._difference(calls, rounds)

    def _reader(self, x: Tensor, programs: int, loads: int) -> Call:
        """Reads x with so many loads of 16 bytes of every thread on their way."""
        block = loads * _THREADS_BYTES // 4
        share = x.numel() // programs // block * block
        return lambda: _read_kernel[(programs,)](
            x, self._sums, share, BLOCK=block, num_warps=_WARPS
        )

    def one_program_read_bytes_per_s(self) -> dict[str, Any]:
        x = torch.ones(_WEIGHT_BYTES[self._dry_run] // 4, dtype=torch.int32, device=self._device)
        found = {}
        for loads in (1, 2, 4, 8)[: 1 if self._dry_run else None]:
            read = self._reader(x, self._programs, loads)
            read()
            self._check_sum(x)
            times = self._clock.device({"it": read}, {"it": nullcontext})["it"]
            found[f"2 x {loads * _THREADS_BYTES >> 10} KiB"] = _rate(x, times)
        return found

    def _check_sum(self, x: Tensor) -> None:
        total = self._sums[: self._programs].sum().item()
        if not 0.98 * x.numel() <= total <= x.numel():  # all but the rest of a share
            raise RuntimeError(f"{x.numel()} ones add up to {total}")

    def l2_read_bytes_per_s(self) -> dict[str, Any]:
        found = {}
        for size in _L2_BYTES[self._dry_run]:
            x = torch.ones(size // 4, dtype=torch.int32, device=self._device)
            period = self._period(self._reader(x, self._programs, 1 if self._dry_run else 4), 2, 12)
            found[f"{size >> 10} KiB"] = {
                name: value if name == "samples" else size / max(value, 1e-9)
                for name, value in period.items()
            }
        return found

    def prefetched_read_bytes_per_s(self) -> dict[str, Any]:
        size = _PREFETCHED_BYTES[self._dry_run]
        x = torch.ones(size // 4, dtype=torch.int32, device=self._device)
        read = self._reader(x, self._programs, 1 if self._dry_run else 2)
        grid, share = (self._programs,), size // self._programs // 16 * 16

        def prefetch(bulk: bool) -> None:
            _prefetch_kernel[grid](
                x.view(torch.int8), share, BULK=bulk, PREFETCH=not self._dry_run, num_warps=_WARPS
            )
            self._barriers(50)  # some time for it to arrive

        before: dict[str, Call] = {"cold": lambda: None, "lines": lambda: prefetch(False)}
        if self._hopper:
            before["bulk"] = lambda: prefetch(True)
        reads = dict.fromkeys(before, read)
        times = self._clock.device(reads, dict.fromkeys(reads, nullcontext), before)
        return {name: _rate(x, samples) for name, samples in times.items()}


def _rate(x: Tensor, samples: list[float]) -> dict[str, float]:
    return quantiles([x.numel() * x.element_size() / seconds for seconds in samples])


# Those last after which others may fail: a barrier that does stops the kernel with an error, and a
# capture that does leaves PyTorch in the middle of it.
_ORDER = (
    "graph_node_s",
    "one_program_read_bytes_per_s",
    "l2_read_bytes_per_s",
    "graph_node_pdl_s",
    "barrier_s",
    "prefetched_read_bytes_per_s",
    "cooperative_node_s",
)


def decode_probes(
    device: torch.device, clock: Clock, say: Callable[[str, float], None], dry_run: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each probe's name and result, one after the other."""
    probes = _Probes(device, clock, dry_run)
    for name in _ORDER:
        say(name, 30)
        try:
            yield name, getattr(probes, name)()
        except Exception as error:
            yield name, {"error": f"{type(error).__name__}: {error}"[:300]}
