"""Tile shapes, warps and pipeline stages of every kernel, as static tables.

Each entry says why it is there. An entry that no recorded run has confirmed says "predicted"; the
runs are in ``bench/results`` and what came of them in ``bench/NOTES.md``. Static tables rather than
autotuning: the same call then runs the same code everywhere, and every entry can be compiled and
checked where there is no GPU.
"""

import functools
from dataclasses import dataclass

import torch

from gpt2fast.kernels._triton.target import Target


@dataclass(frozen=True)
class DecodeConfig:
    """Tile of ``decode.py``: keys a tile, warps, pipeline stages."""

    block_s: int
    warps: int
    stages: int


def decode_config(element_size: int, queries: int) -> DecodeConfig:
    """By the bytes of an element, the cache's or the projection's if larger, and queries a row.

    Keys and values of a tile are 16 KB together at head size 64 in 16 bits: four resident programs
    have more in flight than the 25 KB that a multiprocessor's share of the bandwidth needs. One
    query: no pipeline, because neighbouring programs fill the gaps between tiles; half the bytes in
    float32, of which more programs are resident (32 keys of head size 80 spill on capability 10).
    Several: tiles pass through shared memory to the tensor cores. Float32 has none for them; at
    four warps its products would not fit into registers. Predicted.
    """
    if queries == 1:
        return DecodeConfig(16 if element_size == 4 else 64, warps=4, stages=1)
    if element_size == 4:
        return DecodeConfig(32, warps=8, stages=2)
    return DecodeConfig(64, warps=4, stages=3)


_DECODE_PROGRAMS = 4  # a multiprocessor; predicted: what its registers hold at a time
_DECODE_MOST_SPLITS = 64  # that the merging kernel holds in one tile


def decode_splits(heads: int, keys: int, block_s: int, multiprocessors: int) -> int:
    """Among how many programs to divide the ``keys`` of each of all rows' ``heads``.

    As many as the chip holds at a time, with whole tiles, equally many for each. One, which has
    nothing to merge, where the heads alone are more than half of that.
    """
    room = min(_DECODE_PROGRAMS * multiprocessors // heads, _DECODE_MOST_SPLITS)
    tiles = -(-keys // block_s)
    if room <= 1 or tiles <= 1:
        return 1
    share = -(-tiles // room)
    return -(-tiles // share)


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of ``attention_fwd.py`` and ``attention_bwd.py``: queries, keys, warps, stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def attention_fwd_config(
    target: Target, element_size: int, block_d: int, queries: int, crowded: bool
) -> AttentionConfig:
    """Accumulators of scores and output are what registers must hold. Predicted, but for Hopper.

    - float32 multiplies on the plain cores, which keep whole rows of both operands in registers:
      small tiles, or they spill.
    - Up to 64 queries: no larger tile than there are queries.
    - 128 queries halve what is read of keys and values; 64 keys keep the scores in registers. At
      head size 64 one warpgroup does that in about 200 registers a thread, and two programs
      share a multiprocessor: one computes exponentials while the other multiplies. On Hopper 64
      queries, of which more programs are resident, take a tenth less than 128 (measured). Wider
      heads need two warpgroups, and so do dropout with a past (``crowded``), and compute capability
      8, whose operands pass through registers; with wide heads it spills larger tiles.
    """
    if element_size == 4:
        return AttentionConfig(32, 32 if block_d <= 64 else 16, warps=8, stages=2)
    narrow = block_d <= 64 and target.has_tma and not crowded
    if queries <= 64 and block_d <= 64 and not target.has_tma:
        return AttentionConfig(64, 32, warps=4, stages=2)
    if queries <= 64 or (block_d > 64 and not target.has_tma):
        return AttentionConfig(64, 64, warps=4 if narrow else 8, stages=2)
    if narrow and target.capability < (10, 0):
        return AttentionConfig(64, 64, warps=4, stages=3)
    return AttentionConfig(128, 64, warps=4 if narrow else 8, stages=3)


def attention_bwd_configs(
    target: Target, element_size: int, block_d: int
) -> tuple[AttentionConfig, AttentionConfig]:
    """For the tiles of queries (dQ), and for those of keys (dK and dV). Predicted, but for Hopper.

    - float32: as forward, but 16 keys or queries at head size 64 too: 32 of both spill with a mask,
      a past and dropout.
    - Up to head size 64 on Hopper: tiles of 64 in one warpgroup, three stages, of which several
      programs are resident, take a sixth less than twice as large ones in two (measured).
    - Wider heads: dQ holds one accumulator and two tiles of scores: 128 queries in two warpgroups;
      dK and dV are two accumulators: 64 keys.
    - Compute capability 8 spills these tiles with dropout, wide heads or a mask of keys, and 10
      with wide heads or a past (eight warps get 128 registers a thread there).
    """
    if element_size == 4:
        small = AttentionConfig(32, 16, warps=8, stages=2)
        return small, AttentionConfig(16, 32, warps=8, stages=2) if block_d <= 64 else small
    if not target.has_tma:
        small = AttentionConfig(64, 32, warps=8, stages=2)
        return small, small
    if target.capability >= (10, 0):
        small = AttentionConfig(64, 64, warps=4, stages=2)
        return small, small
    if block_d <= 64:
        small = AttentionConfig(64, 64, warps=4, stages=3)
        return small, small
    return AttentionConfig(128, 64, warps=8, stages=2), AttentionConfig(64, 64, warps=8, stages=2)


@dataclass(frozen=True)
class MatmulTile:
    """Tiles of ``matmul.py``: blocks of M, N and K, warps, stages.

    ``programs``: how many run on a multiprocessor at a time. ``use_tma``: blocks are loaded by the
    tensor memory accelerator.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int
    use_tma: bool


MATMUL_GROUP_M = 8  # rows of tiles that share columns of B in L2; predicted
ADD_SPLITS_BLOCK = 512  # 16 bytes a thread of 4 warps; predicted

# All predicted. Largest first: a larger tile reads less from L2 for its arithmetic, and
# `matmul_tile` takes the largest of which there are enough. At full rate 128 x 256 needs 9 TB/s of
# L2, 128 x 128 needs 12. One program of 128 x 256 fills a multiprocessor's registers.
_MATMUL_TILES_TMA = (
    MatmulTile(128, 256, 64, warps=8, stages=3, programs=1, use_tma=True),
    MatmulTile(128, 128, 64, warps=8, stages=4, programs=1, use_tma=True),
    MatmulTile(64, 64, 64, warps=4, stages=4, programs=3, use_tma=True),
)
# Hopper, where the epilogue reads no matrix: two programs, one of which multiplies while the other
# stores. Measured: 7% (8192 rows) to 13% (1024) sooner done than the above; with the derivative of
# GELU in the epilogue it is not.
_MATMUL_TILES_LIGHT = (
    MatmulTile(128, 128, 64, warps=4, stages=3, programs=2, use_tma=True),
    _MATMUL_TILES_TMA[-1],
)
# Of chips without it, or with less than Hopper's shared memory, and of rows that do not start at
# multiples of 16 bytes: 96 KiB of blocks are within every chip's.
_MATMUL_TILES = (
    MatmulTile(128, 128, 64, warps=8, stages=4, programs=1, use_tma=False),
    MatmulTile(64, 64, 64, warps=4, stages=4, programs=2, use_tma=False),
)
# Decoding: the weights are read once, so what counts is bytes on their way: 4 blocks of 8 KiB in
# every program, whose 16 rows are the least that tensor cores take.
_MATMUL_TILE_FEW_ROWS = MatmulTile(16, 32, 128, warps=4, stages=5, programs=4, use_tma=False)
# Fused multiply-add: no tensor cores at full precision.
_MATMUL_TILE_FLOAT32 = MatmulTile(64, 64, 32, warps=8, stages=3, programs=2, use_tma=False)
_MATMUL_FILLED = 0.7  # of the multiprocessors is enough


def matmul_tile(
    rows: int, columns: int, element_size: int, can_copy: bool, target: Target, light: bool = False
) -> MatmulTile:
    """The tile for ``[rows, columns]``.

    can_copy: tile copies can address both operands; light: the epilogue reads no matrix.
    """
    if element_size == 4:
        return _MATMUL_TILE_FLOAT32
    if rows <= _MATMUL_TILE_FEW_ROWS.block_m:
        return _MATMUL_TILE_FEW_ROWS
    roomy = target.shared_memory >= 227 << 10
    tiles = _MATMUL_TILES_TMA if can_copy and roomy else _MATMUL_TILES
    if light and tiles is _MATMUL_TILES_TMA and target.capability < (10, 0):
        tiles = _MATMUL_TILES_LIGHT
    for tile in tiles:
        number = -(-rows // tile.block_m) * -(-columns // tile.block_n)
        if number >= _MATMUL_FILLED * target.multiprocessors:
            return tile
    return tiles[-1]


def matmul_splits(rows: int, columns: int, inner: int, tile: MatmulTile, target: Target) -> int:
    """Into how many parts to split the sums, where there are too few tiles for the chip.

    Each part is at least two blocks long: a shorter one would be no sooner done. Predicted.
    """
    tiles = -(-rows // tile.block_m) * -(-columns // tile.block_n)
    return max(1, min(target.multiprocessors // tiles, inner // (2 * tile.block_k)))


def matmul_provider(role: str, rows: int, element_size: int) -> str:
    """Who multiplies: "triton", our kernel, or "cublas", PyTorch's. All predicted.

    Roles: "linear" (a bias in the epilogue), "fc" (bias and GELU), "proj" (bias and residual) and
    "gelu_grad". cuBLAS is taken to run at 740 TFLOP/s on an H200 for large products and our kernel
    at 600, PyTorch's passes over memory at 4.3 TB/s. Weight gradients and the gradient of x have
    nothing to fuse, and are cuBLAS's without asking.
    """
    if element_size == 4:
        return "cublas"  # no tensor cores: cuBLAS's fused multiply-add kernels are the better ones
    if rows <= 64:
        return (
            "triton"  # the time is that of reading the weights and of launches, and we need fewer
        )
    if role == "linear":
        return "cublas"  # its epilogue adds the bias as well
    if role == "proj":
        # The pass that adds the residual takes 6 bytes an output, less than what the product of
        # 3,072 and more columns is slower here (measured on an H100 from 1024 rows on).
        return "cublas" if rows >= 1024 else "triton"
    # 4 bytes an output for the GELU, worth 1,500 columns of the 768 to 1,600 (at the upper end a
    # tie); 8 for its gradient, the value once more, and the sums for the bias.
    return "triton"


@dataclass(frozen=True)
class LMHeadTile:
    """How ``lm_head_tiles.py`` cuts the logits up.

    Attributes:
        block_rows, block_vocab: a tile of logits.
        block_bytes: bytes of each row and each vocabulary entry in one step of the inner product.
        warps, stages: of a program.
        programs: a multiprocessor, at most.
        tma: whether to copy tiles by descriptors, where the chip has them.
    """

    block_rows: int
    block_vocab: int
    block_bytes: int
    warps: int
    stages: int
    programs: int
    tma: bool


# All predicted; none has run on a GPU. Up to 64 rows the weight's bytes set the time: of up to 16,
# the 393 tiles of 128 columns are all resident at once, three a multiprocessor, each with three
# copies of 16 KB on the way; pointers, because to encode descriptors takes the host longer than a
# launch. 64 rows take 8 warps, as 4 spill on Blackwell, and so two programs. Beyond, the tensor
# cores set the time.
_LM_HEAD_DECODE = LMHeadTile(16, 128, 128, warps=4, stages=4, programs=3, tma=False)
_LM_HEAD_FEW_ROWS = LMHeadTile(64, 128, 128, warps=8, stages=3, programs=2, tma=False)
# 85 operations a byte read from L2, the most that one program's registers allow, on Hopper only.
_LM_HEAD_LOSS = LMHeadTile(128, 256, 128, warps=8, stages=3, programs=1, tma=True)
# Half as wide: sort keys take two registers each beside the logits, and on Blackwell the
# exponentials of a wider tile spill. Two programs at a time: one multiplies, the other reduces.
_LM_HEAD_HALF = LMHeadTile(128, 128, 128, warps=4, stages=3, programs=2, tma=True)
# Chips without descriptors, and rows that they cannot address: with twice the bytes a step, the
# addresses of those spill on compute capability 8. 64 KB are within every chip's.
_LM_HEAD_POINTERS = LMHeadTile(128, 128, 64, warps=8, stages=4, programs=1, tma=False)
# Sorting a tile exchanges copies of it between threads: 16 keys a thread.
_LM_HEAD_TOPK = LMHeadTile(16, 128, 128, warps=4, stages=4, programs=3, tma=False)


def lm_head_tile(rows: int, top: int, can_copy: bool, target: Target) -> LMHeadTile:
    """The tile for so many rows.

    top: logits selected of each row, 0 for a loss; can_copy: descriptors can address the operands.
    """
    if top > 1:
        return _LM_HEAD_TOPK
    if rows <= 16:
        return _LM_HEAD_DECODE
    if rows <= 64:
        return _LM_HEAD_FEW_ROWS
    if not (can_copy and target.has_tma):
        return _LM_HEAD_POINTERS
    return _LM_HEAD_LOSS if top == 0 and target.capability < (10, 0) else _LM_HEAD_HALF


# Tiles of rows that share their columns of the weight in L2: 32 of 128 rows of 768 are 6 MB.
LM_HEAD_GROUP = 32
# Float32 products in Triton are plain multiplications: cuBLAS serves those.
LM_HEAD_TILE_DTYPES = (torch.float16, torch.bfloat16)
LM_HEAD_COMBINE_ROWS = 16  # a program: 1024 programs for 16k rows
# Logits of a chunk: 4096 rows of 50257 in 16 bits. Four chunks of 16k rows, so the weight's
# gradient is read and written four times; a quarter of the 16-bit logits is a sixth of what plain
# PyTorch holds in float32 on top of them, several times.
LM_HEAD_CHUNK_BYTES = 400 << 20
LM_HEAD_CHUNK_TILE = 128  # rows; the tiles of the products
# (columns a step, warps): 512 threads with two loads of 16 bytes each. Two such programs a
# multiprocessor have enough bytes on their way, and few enough rows under way (26 MB) that the
# second pass finds them in L2. Predicted.
LM_HEAD_CROSS_ENTROPY = (8192, 16)


@dataclass(frozen=True)
class RowTile:
    """Whole rows as ``chunks`` tiles ``[block_m, lanes]``, of ``layer_norm.py``."""

    block_m: int
    lanes: int
    chunks: int
    warps: int


def _row_tile(width: int, itemsize: int, most_elements: int, least_elements: int) -> RowTile:
    """Four warps or more, of which a row gets the fewest that hold it in most_elements a thread.

    Narrow rows become more of them, until a thread has about least_elements.
    """
    vector, warps_a_row = 16 // itemsize, 1
    while -(-width // (warps_a_row * 32 * vector)) * vector > most_elements:
        warps_a_row *= 2
    lanes = min(warps_a_row * 32 * vector, max(16, 1 << (width - 1).bit_length()))
    chunks = -(-width // lanes)
    warps = max(4, warps_a_row)
    block_m = warps * 32 * vector // lanes * max(1, least_elements // (chunks * vector))
    return RowTile(block_m, lanes, chunks, warps)


@functools.cache
def row_tile(width: int, itemsize: int) -> RowTile:
    """Forward, for rows of ``width`` elements, the smallest of those read of ``itemsize`` bytes.

    At width 768 in 16 bits a warp has a row, a thread 24 elements of it, and programs of four rows
    keep the number of programs, which start one after the other, low. Predicted.
    """
    return _row_tile(width, itemsize, most_elements=40, least_elements=32)


@functools.cache
def layer_norm_bwd_tile(width: int, smallest: int, largest: int) -> tuple[RowTile, int, int]:
    """Backward: tile, programs a multiprocessor, stages; elements of so many bytes.

    Five numbers a column stay in registers (weight, x, dy and the two sums), so few columns a
    thread. From 513 to 2048 columns a program takes one row at a time, three or four rows ahead,
    as measured on an H100: at width 768 in 16 bits that is 24 us for 8192 rows, where four warps
    with a row each took 44. Other widths are predicted: as many programs as their registers let a
    multiprocessor hold at once, the next rows copied asynchronously meanwhile.
    """
    if 512 < width <= 1024:
        return RowTile(1, 1024, 1, 4), 4, 4
    if 1024 < width <= 2048:
        if largest == 2:
            return RowTile(1, 1024, 2, 4), 4, 3
        return RowTile(1, 512, -(-width // 512), 4), 2, 3
    tile = _row_tile(width, smallest, most_elements=28, least_elements=0)
    if tile.warps > 4:
        return tile, 1, 2 if tile.warps == 8 else 1  # two stages of 16 warps would spill
    most = 4 if largest == 2 else 3
    return tile, most if width <= 512 else 2, 2


# (programs' shares a step, columns, warps): at width 768 96 programs, each with a step or two.
LAYER_NORM_AFFINE_SUM = (256, 16, 8)


@dataclass(frozen=True)
class EmbeddingBwdConfig:
    """`embedding_bwd`: chunks of the sorted ids, and the tiles of its two kernels."""

    shortest_chunk: int
    most_chunks: int
    sum_block_n: int
    sum_warps: int
    sum_stages: int
    join_block_m: int
    join_block_n: int
    join_warps: int


# One warp reads 16 bytes a thread of a 16-bit row, three rows ahead. 16k ids of width 768 are 1024
# chunks by 3 column blocks: 23 warps on each of 132 multiprocessors, 35 KB in flight. Chunks grow
# instead of becoming more than 2048, so one id everywhere leaves at most 64 steps of the join.
# Predicted.
EMBEDDING_BWD = EmbeddingBwdConfig(
    shortest_chunk=16,
    most_chunks=2048,
    sum_block_n=256,
    sum_warps=1,
    sum_stages=4,
    join_block_m=32,
    join_block_n=128,
    join_warps=4,
)
