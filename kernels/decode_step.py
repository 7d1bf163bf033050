"""One step of decoding on our kernels: token rows in, logits or maxima out.

A *token row* is one token to be evaluated: the one at position ``lengths[slot] + offset`` of a slot
(`gpt2fast.kernels.decode_state`). A step evaluates M of them, and writes their keys and values into
the cache before anything attends to it, so rows of one slot at offsets 0, 1, 2, ... see each other
as a sequence would. M comes in buckets, for each of which there are static buffers: nothing is
allocated in a step and nothing is read on the host, so that a CUDA graph can hold it.

The cache is one tensor ``[L, 2, S, H, capacity, D]``: ``cache[l]`` is what
`gpt2fast.kernels.attention_append` takes. It is of the embeddings' dtype, or of
`torch.float8_e4m3fn`: read as it stands, written with what is beyond its range saturated.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels.backend import DTYPES
from gpt2fast.kernels.decode_state import DecodeState
from gpt2fast.kernels.packing import DecodeWeights, Matrix

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a step
FEW_ROWS = 4  # up to so many are multiplied one by one; more are tiles of matrix products


def bucket(rows: int) -> int:
    """The smallest of `BUCKETS` that holds so many rows.

    Raises:
        ValueError: none does.
    """
    for size in BUCKETS:
        if 1 <= rows <= size:
            return size
    raise ValueError(f"a step evaluates 1 to {BUCKETS[-1]} rows; got {rows}")


@dataclass(frozen=True)
class StepBuffers:
    """What the phases of a step of M rows hand to each other, and its results.

    C is the width, F the inner width, H the heads, D their size, V the vocabulary. "activations"
    are of the embeddings' dtype.

    Attributes:
        splits: among how many programs the keys of a head are divided.
        slots, offsets: int32 ``[M]``, the rows; slot -1 for none. For the caller to write.
        residual: float32 ``[M, C]``.
        normed: activations ``[M, C]``; only beyond `FEW_ROWS`.
        query, merged: activations ``[M, C]``.
        inner: activations ``[M, F]``.
        parts: float32 ``[parts, M, C]``, sums of a product over parts of its inputs; only beyond
            `FEW_ROWS`.
        partial, sums: activations ``[M, H, splits, D]`` and float32 ``[M, H, splits]``: attention
            over a part of the keys and the base-2 logarithm of its sum of exponentials.
        logits: float32 ``[M, V]``.
        best_value, best_index, best_sum: float32, int32, float32 ``[M, programs]``: of each
            program's share of a row's logits the largest, its first place, and the sum of
            exp(logit - largest). A share without logits: -inf, 0, 0.
        chosen, chosen_log_probs: int64 and float32 ``[M]``, each row's token, or -1 where no score
            is finite, and its logarithm of the probability, where somebody reads it.
        scores, candidates: float32 ``[M, V]`` and int64 ``[M, candidates]``, room for the choice.
        arrivals: int64 ``[1]``, how often a program of `decode_persistent` has come to a barrier.
    """

    splits: int
    slots: Tensor
    offsets: Tensor
    residual: Tensor
    normed: Tensor
    query: Tensor
    merged: Tensor
    inner: Tensor
    parts: Tensor
    partial: Tensor
    sums: Tensor
    logits: Tensor
    best_value: Tensor
    best_index: Tensor
    best_sum: Tensor
    chosen: Tensor
    chosen_log_probs: Tensor
    scores: Tensor
    candidates: Tensor
    arrivals: Tensor

    @property
    def rows(self) -> int:
        """M."""
        return self.slots.shape[0]

    @classmethod
    def allocate(cls, weights: DecodeWeights, rows: int, splits: int) -> "StepBuffers":
        """Buffers on the weights' device; every row unused.

        Raises:
            ValueError: rows is none of `BUCKETS`, or the weights are not as the kernels read them.
        """
        from gpt2fast.kernels._triton.engine import configs, graph

        if rows not in BUCKETS:
            raise ValueError(f"rows must be one of {BUCKETS}; got {rows}")
        if splits < 1:
            raise ValueError(f"splits must be at least 1; got {splits}")
        check_weights(weights)
        device = weights.wte.device
        (vocab_size, width), heads = weights.wte.shape, weights.heads
        parts, programs = graph.shares(weights, rows)
        many = rows > FEW_ROWS

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        dtype = weights.wte.dtype
        return cls(
            splits=splits,
            slots=zeros(rows, dtype=torch.int32) - 1,
            offsets=zeros(rows, dtype=torch.int32),
            residual=zeros(rows, width),
            normed=zeros(rows if many else 0, width, dtype=dtype),
            query=zeros(rows, width, dtype=dtype),
            merged=zeros(rows, width, dtype=dtype),
            inner=zeros(rows, weights.fc.outputs, dtype=dtype),
            parts=zeros(parts if many else 0, rows, width),
            partial=zeros(rows, heads, splits, width // heads, dtype=dtype),
            sums=zeros(rows, heads, splits),
            logits=zeros(rows, vocab_size),
            best_value=zeros(rows, programs),
            best_index=zeros(rows, programs, dtype=torch.int32),
            best_sum=zeros(rows, programs),
            chosen=zeros(rows, dtype=torch.int64),
            chosen_log_probs=zeros(rows),
            scores=zeros(rows, vocab_size),
            candidates=zeros(rows, configs.ENGINE_SELECT.candidates, dtype=torch.int64),
            arrivals=zeros(1, dtype=torch.int64),
        )

    def with_splits(self, splits: int) -> "StepBuffers":
        """The same buffers, but for those that attention leaves its splits in."""
        rows, heads, _, head_size = self.partial.shape
        return replace(
            self,
            splits=splits,
            partial=self.partial.new_zeros(rows, heads, splits, head_size),
            sums=self.sums.new_zeros(rows, heads, splits),
        )


def evaluate(
    weights: DecodeWeights,
    state: DecodeState,
    cache: Tensor,
    buffers: StepBuffers,
    *,
    greedy: bool,
    pdl: bool = False,
) -> None:
    """Evaluate the rows of ``buffers``: a kernel a phase, nothing but launches.

    Reads ``tokens``, ``lengths``, ``prefix_slots`` and ``prefix_lengths`` of the state and changes
    none of it. Writes the rows' keys and values into the cache.

    Args:
        cache: ``[L, 2, S, H, capacity, D]``, contiguous.
        greedy: leave the maxima of the logits in ``best_*``; otherwise all ``logits``.
        pdl: start each kernel while the one before is ending (programmatic dependent launch, from
            compute capability 9.0 on).
    """
    from gpt2fast.kernels._triton.engine import graph

    graph.evaluate(weights, state, cache, buffers, greedy, pdl)


def evaluate_head(
    weights: DecodeWeights, buffers: StepBuffers, *, greedy: bool, pdl: bool = False
) -> None:
    """The last phase of `evaluate` alone: from ``residual``, of up to `FEW_ROWS` rows."""
    from gpt2fast.kernels._triton.engine import graph

    if buffers.rows > FEW_ROWS:
        raise ValueError(f"the head alone takes up to {FEW_ROWS} rows; got {buffers.rows}")
    graph.launch_head(weights, buffers, greedy, pdl)


def select_and_commit(
    state: DecodeState, buffers: StepBuffers, drafts: int, *, greedy: bool, pdl: bool = False
) -> None:
    """Choose a token for each row and commit those that count; nothing but launches.

    As `gpt2fast.engine.sampling.select_and_commit` defines it. Rows are grouped by slot,
    ``drafts`` + 1 each.

    Args:
        greedy: choose by ``best_*``: for rows of temperature 0, without a penalty and without
            an id of ``eos`` that is forbidden yet; otherwise by ``logits``.
    """
    from gpt2fast.kernels._triton.engine import sampling

    sampling.launch_select(state, buffers, drafts, greedy, pdl)


def propose(
    state: DecodeState, buffers: StepBuffers, drafts: int, ngram: int, pdl: bool = False
) -> None:
    """Write ``drafts`` tokens behind the newest one of each running slot; only launches.

    They are what followed the last occurrence of the longest n-gram that ends the sequence, of up
    to ``ngram`` tokens; or the newest token again. Rows are grouped as for `select_and_commit`.
    """
    from gpt2fast.kernels._triton.engine import sampling

    sampling.launch_propose(state, buffers, drafts, ngram, pdl)


def persistent_buffers(buffers: StepBuffers) -> StepBuffers:
    """The buffers as `decode_persistent` takes them: the same, but for ``best_*``."""
    from gpt2fast.kernels._triton.engine.persistent import persistent_programs

    shape = (buffers.rows, persistent_programs(buffers.slots.device))
    own = {name: getattr(buffers, name) for name in ("best_value", "best_index", "best_sum")}
    return replace(buffers, **{name: tensor.new_zeros(shape) for name, tensor in own.items()})


def decode_persistent(
    weights: DecodeWeights,
    state: DecodeState,
    cache: Tensor,
    buffers: StepBuffers,
    steps: int,
    *,
    greedy: bool,
    drafts: int = 0,
    ngram: int = 0,
) -> None:
    """Whole steps in one launch of a kernel that keeps all its programs resident.

    Without ``greedy`` two launches a step, of which the second chooses and commits.

    Leaves the state, the cache and the buffers as ``steps`` times `propose`, with ``ngram``,
    `evaluate` and `select_and_commit` do, up to the order in which sums are added; ends sooner
    where no slot of the rows is RUNNING any longer.

    Args:
        buffers: of `persistent_buffers`; up to `FEW_ROWS` rows.
        steps: at least 1.
        drafts, ngram: as for `propose`; without ``ngram`` the drafts are what stands in
            ``tokens``, and ``steps`` is 1.

    Raises:
        ValueError: too many rows, weights of several formats, or drafts for one step of several.
        RuntimeError: the GPU cannot keep all programs at a time.
    """
    from gpt2fast.kernels._triton.engine import persistent

    if buffers.rows > FEW_ROWS:
        raise ValueError(f"the persistent kernel takes up to {FEW_ROWS} rows; got {buffers.rows}")
    bits = [matrix.bits for matrix in (weights.qkv, weights.out, weights.fc, weights.proj)]
    if len(set(bits)) > 1:
        raise ValueError(f"the blocks' matrices must be of one format; got bits {bits}")
    if steps != 1 and drafts and not ngram:
        raise ValueError(f"drafts that are not proposed serve one step; got {steps} steps")
    persistent.launch_decode(weights, state, cache, buffers, steps, greedy, drafts, ngram)


def check_weights(weights: DecodeWeights) -> None:
    """Raise a ValueError for weights that the kernels would misread."""
    vocab_size, width = weights.wte.shape
    layers, inner = weights.fc.data.shape[0], weights.fc.outputs
    if width % 8 or inner % 8 or width % weights.heads:
        raise ValueError(
            "widths must be multiples of 8, and of the heads; "
            f"got {width}, {inner} and {weights.heads} heads"
        )
    dtype = weights.wte.dtype
    if dtype not in DTYPES:
        raise ValueError(f"embeddings must be in one of {DTYPES}; got {dtype}")
    for name, outputs, inputs in (
        ("qkv", 3 * width, width),
        ("out", width, width),
        ("fc", inner, width),
        ("proj", width, inner),
        ("head", vocab_size, width),
    ):
        matrix: Matrix = getattr(weights, name)
        of_layers = 1 if name == "head" else layers
        found = (matrix.data.shape[0], matrix.outputs, matrix.inputs)
        if found != (of_layers, outputs, inputs) or not matrix.data.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {[of_layers, outputs, inputs]}; got {list(found)} with "
                f"strides {matrix.data.stride()}"
            )
        if outputs * inputs >= 1 << 31:
            raise ValueError(f"{name} has {outputs * inputs} weights a layer, more than 2^31 - 1")
        stored: Any = {32: torch.float32, 8: torch.int8, 4: torch.uint8}.get(matrix.bits, dtype)
        if matrix.data.dtype != stored or (matrix.bits == 32) != (stored == torch.float32):
            raise ValueError(f"{name} has {matrix.bits} bits in {matrix.data.dtype}")
