"""Tiles of the decode engine's kernels: static tables, as `gpt2fast.kernels._triton.configs`.

All entries are predicted until a recorded run says otherwise.
"""

from dataclasses import dataclass

from gpt2fast.kernels._triton.configs import DecodeConfig, decode_splits
from gpt2fast.kernels._triton.target import Target


def engine_attention(element_size: int, head_size: int) -> DecodeConfig:
    """``engine/attention.py``, by the bytes of the cache's element: as `decode_config`. Predicted.

    Half the keys in float32 and where heads are wider than 64: a key slot's softmax has a float32
    accumulator of its own in registers.
    """
    wide = element_size == 4 or head_size > 64
    return DecodeConfig(32 if wide else 64, warps=4, stages=1)


def engine_attention_few(element_size: int, head_size: int) -> DecodeConfig:
    """As `engine_attention`, of up to four rows: these have fewer programs than there are
    multiprocessors, so each has more warps. Twice the keys would take so many registers that
    no program could start beside those of the phase before. Predicted."""
    config = engine_attention(element_size, head_size)
    return DecodeConfig(config.block_s, warps=8, stages=1)


# Programs a multiprocessor, at most; beyond, each takes several items. Predicted: what its
# registers hold at a time.
ENGINE_ATTENTION_PROGRAMS = 4
# Channels a program: 16 bytes a thread of one warp. Predicted.
ENGINE_COMBINE_BLOCK, ENGINE_COMBINE_WARPS = 128, 1


# Parts of each head that a projection merges in its prologue, of one row. Predicted.
FEW_PARTS = 4


def engine_splits(rows: int, heads: int, keys: int, head_size: int, target: Target) -> int:
    """Into how many parts to split each row's attention where the longest may have ``keys``.

    As `decode_splits`, but of a few rows every warp of the projection behind merges all parts by
    itself, and for that reads 3 KB a part from L1 at width 768. Measured on an H100 where there
    were 16 parts: the merging took four times as long as the attention. Predicted otherwise.
    """
    most = FEW_PARTS // rows if rows <= 2 else 8 if rows == 4 else 16
    config = engine_attention_few if rows <= 4 else engine_attention
    block = config(2, head_size).block_s
    return min(most, 16, decode_splits(rows * heads, keys, block, target.multiprocessors))


@dataclass(frozen=True)
class SelectConfig:
    """`engine/ranking.py`: logits a tile, candidates that are sorted, warps."""

    block: int
    candidates: int
    warps: int


# One program reads a row of 50257 logits from L2 or L1: a tile is 32 KB on its way, which one
# multiprocessor's share of L2 needs. Half of the candidates is the largest top-k that is sure to be
# found among them; sorting 1024 takes about as long as reading the row once. Predicted.
ENGINE_SELECT = SelectConfig(block=8192, candidates=1024, warps=8)
ENGINE_SELECT_BEST_WARPS = 4  # a few hundred maxima
ENGINE_PROPOSE_BLOCK = 1024  # tokens a tile; a context of GPT-2


@dataclass(frozen=True)
class DecodeRowsTile:
    """How ``engine/linear.py`` multiplies a few rows.

    Attributes:
        warps: of a program.
        repeat: outputs that a warp has under way.
        unroll: loads of each of them in a sweep.
        programs: a multiprocessor, at most.
    """

    warps: int
    repeat: int
    unroll: int
    programs: int


def decode_rows_tile(outputs: int, inputs: int, rows: int, target: Target) -> DecodeRowsTile:
    """By the matrix and the rows. All predicted.

    A phase lasts about as long as a load takes, so that all of a matrix should be asked for at
    once: one tile a program, of few outputs, and as many programs as that takes; they are resident
    together. Two outputs a warp read the rows from L1 half as often, but 768 or 1600 outputs are
    then less than two warps on each quarter of a multiprocessor. What is not asked for before the
    wait comes a memory's latency later: of many inputs all are, if the row is one. The head is many
    times as long: programs go over it in a loop, two sweeps of up to 64 KB a multiprocessor under
    way. Of four rows the registers hold one output a warp, in short sweeps: two spill at width
    1600.
    """
    if rows == 4:
        return DecodeRowsTile(warps=4, repeat=1, unroll=2, programs=4)
    if outputs >= 16 * 4 * target.multiprocessors:
        return DecodeRowsTile(warps=4, repeat=2, unroll=3, programs=3)
    if outputs >= 16 * target.multiprocessors:
        return DecodeRowsTile(warps=4, repeat=2, unroll=4, programs=4)
    if inputs <= outputs:
        # The heads' projection: every warp merges the heads' parts for itself, so few of them.
        return DecodeRowsTile(warps=4, repeat=2, unroll=6 if rows == 1 else 4, programs=4)
    return DecodeRowsTile(warps=4, repeat=1, unroll=12 if rows == 1 else 6, programs=4)


def decode_rows_keep(rows: int, inputs: int) -> bool:
    """Whether all rows' inputs stay in registers: up to 64 a thread. Predicted."""
    return rows * inputs <= 64 * 32


DECODE_EMBED_BLOCK = 256  # columns a program; predicted

# The kernel of a whole step, ``engine/persistent.py``. 128 programs divide the models' widths
# evenly where the multiprocessors, 132 or 148, do not; 8 warps may have 255 registers a thread.
# All predicted.
PERSISTENT_PROGRAMS = 128
PERSISTENT_WARPS = 8
# Bytes of the next weights that a program asks for in L2: 8 MB in all, of which nothing that is
# needed before is displaced.
PERSISTENT_AHEAD = 64 << 10
# Registers a thread for weights, sums and inputs; the rest of 255 holds addresses. Compute
# capability 8 has none that a warp's threads share for those.
_PERSISTENT_REGISTERS, _PERSISTENT_REGISTERS_8 = 140, 100


def persistent_tile(
    outputs: int, inputs: int, bits: int, rows: int, programs: int, target: Target
) -> DecodeRowsTile:
    """All that a program multiplies in a phase at once, or in as few parts as registers allow.

    Weights take twice the registers of what is multiplied, for those that are under way; inputs
    half as many again, for LayerNorm's weights. Predicted.
    """
    lanes = 512 if bits == 4 else 4096 // bits
    chunks = -(-inputs // lanes)
    a_warp = -(-outputs // (programs * PERSISTENT_WARPS))
    tile = lanes // 32  # registers of a float32 tile
    inputs_held = rows * chunks if decode_rows_keep(rows, inputs) else rows + 2
    most = _PERSISTENT_REGISTERS if target.has_tma else _PERSISTENT_REGISTERS_8
    best = (chunks * a_warp + 1, 0, 0)
    for repeat in range(1, min(a_warp, 8) + 1):
        for sweeps in range(1, chunks + 1):
            unroll = -(-chunks // sweeps)
            held = 2 * 4 * repeat * unroll + tile * (repeat * rows + inputs_held * 3 // 2)
            if held <= most or (repeat == 1 and unroll <= 2):
                parts = -(-a_warp // repeat) * -(-chunks // unroll)
                best = min(best, (parts, repeat, unroll))
    return DecodeRowsTile(PERSISTENT_WARPS, *best[1:], programs=1)


def persistent_splits(rows: int, heads: int, positions: int, head_size: int, programs: int) -> int:
    """Into how many parts the persistent kernel splits each row's attention.

    One number for all contexts: each is a kernel of its own, which takes seconds to compile. That
    for which the program that has most to do walks over the fewest tiles of keys, at the longest
    context and at a half and a quarter of it; splits without keys end at once. The larger of
    equals, which serves the contexts in between. Predicted.
    """
    block = engine_attention_few(2, head_size).block_s
    contexts = [-(-positions // (part * block)) for part in (1, 2, 4)]
    most = min(FEW_PARTS // rows if rows <= 2 else 8, contexts[0])

    def walked(splits: int) -> int:
        items = -(-rows * heads * splits // programs)
        return items * sum(-(-tiles // splits) for tiles in contexts)

    return min(range(most, 0, -1), key=walked)


@dataclass(frozen=True)
class DecodeTile:
    """Of ``engine/tiles.py``: outputs, inputs a step, warps, stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def decode_tile(rows: int, bits: int, element_size: int) -> DecodeTile:
    """For 8 rows or more; bits of a weight, bytes of an activation. All predicted.

    Up to 64 rows the weights' bytes set the time: 32 outputs give 72 and 96 programs at width 768,
    each with 32 KB of weights on their way, and enough independent sums for four warps not to wait
    for one another's. 64 outputs beyond, for the large matrix units, which read the rows half as
    often from L2. int4: 128 inputs a step, a group. float32: as other products of it, on plain
    cores, which keep rows of both operands in registers.
    """
    if element_size == 4:
        if bits == 4:
            return DecodeTile(16, 128, warps=8, stages=1)
        return DecodeTile(32, 16, warps=4 if rows <= 32 else 8, stages=3)
    if rows <= 64:
        return DecodeTile(32, 128, warps=4, stages=5 if rows <= 32 else 4)
    if bits == 4:
        return DecodeTile(64, 128, warps=8, stages=2)
    return DecodeTile(64, 64, warps=8, stages=4)


# Rows of a tile, at most: 256 by 64 outputs spill where maxima are chosen. The second tile finds
# the weights in L2, where the first one has just brought them. Predicted.
DECODE_TILE_ROWS = 128


def decode_parts(outputs: int, inputs: int, rows: int, tile: DecodeTile, target: Target) -> int:
    """Into how many parts to divide the inputs, so that there are tiles for the chip. Predicted.

    Parts are two steps or longer, and few where there are many rows: 8 bytes an output and part are
    written and read.
    """
    tiles = -(-outputs // tile.block_n)
    most = 8 if rows <= 64 else 2
    return max(1, min(most, target.multiprocessors // tiles, inputs // (2 * tile.block_k)))


DECODE_HEAD_PROGRAMS = 2  # a multiprocessor, of `head_tiles`; predicted: what shared memory holds
