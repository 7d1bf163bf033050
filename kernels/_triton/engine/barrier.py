"""How programs that run at the same time wait for each other, and have weights brought closer.

A grid barrier is a counter that only grows: every program adds one, and waits until the count has
reached the next multiple of the number of programs. All programs must be resident, or the first
ones would wait for programs that cannot start: launch with ``launch_cooperative_grid=True``, which
refuses a grid that is not.

Arriving and waiting are two functions, so that a program can ask for what it needs next, and what
does not depend on the others, in between:

    epoch = first_epoch(counter_ptr, programs)
    ...
    arrive(counter_ptr)
    tile = tl.load(weights)
    epoch = wait(counter_ptr, epoch, programs)

Memory (PTX model): `arrive` is a barrier of the program's threads and then a release by one of
them, `wait` an acquire by one of them and then a barrier. So what any thread wrote before it
arrived is seen by every thread of every program behind its `wait`. The acquire also empties the L1
cache of its multiprocessor.

None of this runs in Triton's interpreter, which has no inline assembly and runs programs one after
the other: there a kernel has one program and leaves these calls out.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Reads of the counter before a program gives up, which ends the kernel with an error instead of a
# hang. A read takes some hundred nanoseconds and a phase microseconds. Reads are counted, not time:
# a program that is suspended counts nothing.
_MOST_POLLS = tl.constexpr(1 << 24)
_LINE = tl.constexpr(128)  # bytes of a cache line


@triton.jit
def first_epoch(counter_ptr, programs):
    """The count from which this launch goes on; to be called before the first `arrive`.

    counter_ptr: int64 ``[1]``, a multiple of ``programs`` when the launch begins, zero at first.
    It may have been increased by programs that have arrived already, but not by all of them.
    """
    count = tl.load(counter_ptr, volatile=True)
    return count - count % programs


@triton.jit
def arrive(counter_ptr):
    """Tell the others that this program has written what they wait for."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            .reg .u64 one;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            mov.u64 one, 1;
            @first red.release.gpu.global.add.u64 [$1], one;
            mov.u32 $0, 0;
        }
        """,
        "=r,l",
        [counter_ptr],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait(counter_ptr, epoch, programs):
    """Wait for all programs' `arrive`; returns the next epoch.

    One thread reads the counter, the others wait for it: a loop of ``tl.atomic_add`` would take
    two barriers of all threads a turn.
    """
    epoch += programs
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred stop;
            .reg .u32 thread, polls;
            .reg .u64 count;
            mov.u32 thread, %tid.x;
            setp.ne.u32 stop, thread, 0;
            @stop bra DONE;
            mov.u32 polls, 0;
        POLL:
            ld.acquire.gpu.global.u64 count, [$1];
            setp.ge.u64 stop, count, $2;
            @stop bra DONE;
            add.u32 polls, polls, 1;
            setp.lt.u32 stop, polls, $3;
            @stop bra POLL;
            trap;
        DONE:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,l,r",
        [counter_ptr, epoch, _MOST_POLLS],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
    return epoch


@triton.jit
def hold(tile):
    """The tile itself, but nothing that is computed from it stands before this call.

    Without it the compiler takes loaded registers apart where they were loaded, before the wait,
    and the polling thread would first wait for the load. 1 to 4 bytes an element.
    """
    PACK: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=PACK
    )


@triton.jit
def prefetch(ptr, size, BULK: tl.constexpr):
    """Ask for ``size`` bytes from ``ptr`` to be brought into L2; for none if it is not positive.

    ptr: to int8, aligned to 16 bytes; size: a multiple of 16. BULK: one instruction for all of
    them, from compute capability 9.0 on; otherwise one for every line.
    """
    if BULK:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                setp.gt.and.s32 first, $2, 0, first;
                @first cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [ptr, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        offs = tl.arange(0, 128) * _LINE
        for line in tl.range(0, size, 128 * _LINE):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [ptr + tl.minimum(line + offs, size - 1)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def allow_next(PDL: tl.constexpr):
    """Let the next kernel of the stream start when all programs have come here.

    What it reads of this kernel's results it reads behind its own `wait_for_previous`.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the previous kernel of the stream has ended and its writes are seen.

    Before the first read of what it wrote and the first write of what it may still read. No loop
    that Triton pipelines may stand behind it without a use of what was waited for: its first loads
    would be moved before the wait.
    """
    if PDL:
        gdc_wait()
