"""The table of op benchmarks: every public op of `gpt2fast.kernels` on GPT-2's shapes.

``op_cases`` orders it: the smallest published model in bfloat16 first, then the larger models, then
the other dtypes, then peers whose preparation takes long. Bytes and operations follow the formulas
of ``bench/NOTES.md``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bench.suite.attention import append_case, attention_case
from bench.suite.cases import (
    GPT2,
    MODELS,
    Case,
    Inputs,
    Model,
    Provider,
    Select,
    peers,
    random_tensor,
)
from bench.suite.head import choice_case, loss_case
from bench.suite.work import OURS, Work
from gpt2fast import kernels
from gpt2fast.kernels import torch_ops
from tests.kernels import oracles

EPS = 1e-5


@dataclass(frozen=True)
class Shapes:
    """Which sizes are measured.

    Attributes:
        training: [batch, length] of a training step.
        rows: how many rows the matrix products are given.
        loss_rows: likewise the loss.
        attention: [batch, length] of causal attention.
        append: (batch, length, positions already in the cache).
        decode_rows: rows of a decode step.
    """

    training: tuple[int, int]
    rows: tuple[int, ...]
    loss_rows: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    append: tuple[tuple[int, int, int], ...]
    decode_rows: tuple[int, ...]


_ONE_TOKEN = tuple((batch, 1, context - 1) for context in (512, 1024) for batch in (1, 8, 32))
# Training steps of 8 full contexts, a prompt of one, and decoding.
FULL = Shapes(
    training=(8, 1024),
    rows=(8192, 1024, 1),
    loss_rows=(16384, 8192),
    attention=((8, 1024), (1, 1024)),
    append=((1, 1024, 0), (8, 128, 512), *_ONE_TOKEN),
    decode_rows=(1, 8, 32),
)
# For larger models and other dtypes: the shapes that tell most.
BRIEF = Shapes((8, 1024), (8192,), (8192,), ((8, 1024),), ((8, 1, 1023),), (1,))
# On a CPU in a normal dtype.
CPU = Shapes((1, 128), (128, 1), (128,), ((1, 128),), ((1, 128, 0), (1, 1, 127)), (1,))
# Under a memory checker, where everything takes a hundred times longer: odd sizes, several tiles.
SMALL = Shapes((2, 67), (67, 1), (67,), ((2, 67),), ((2, 67, 0), (2, 5, 67), (2, 1, 67)), (3,))
# In Triton's interpreter.
TINY = Shapes((1, 5), (5,), (5,), ((1, 5),), ((2, 1, 4),), (2,))
TINY_MODEL = Model("tiny", 64, 2, vocab=37, positions=16)  # heads of 32: the least that is served
SMALL_MODEL = Model("small", 128, 2, vocab=517, positions=96)


def _affine(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm."""
    return (
        random_tensor(width, dtype=dtype, scale=0.2, mean=1.0),
        random_tensor(width, dtype=dtype, scale=0.2),
    )


def _layer_norm(model: Model, rows: int, dtype: torch.dtype, select: Select) -> Case:
    width, size = model.hidden, dtype.itemsize
    row = rows * width * size
    forward, backward = Work(2 * row), Work(3 * row)
    return Case(
        op="layer_norm",
        shape=f"{rows}x{width}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype, mean=0.5),
                *_affine(width, dtype),
            ),
            (EPS,),
        ),
        oracle=oracles.layer_norm,
        tolerance="layer_norm",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={OURS: Provider(kernels.layer_norm, select), **peers(torch_ops.layer_norm)},
    )


def _add_layer_norm(model: Model, rows: int, dtype: torch.dtype, select: Select) -> Case:
    width, size = model.hidden, dtype.itemsize
    row = rows * width * size
    forward, backward = Work(4 * row), Work(4 * row)
    return Case(
        op="add_layer_norm",
        shape=f"{rows}x{width}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype),
                random_tensor(rows, width, dtype=dtype, mean=0.5),
                *_affine(width, dtype),
            ),
            (EPS,),
        ),
        oracle=oracles.add_layer_norm,
        tolerance="layer_norm",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={
            OURS: Provider(kernels.add_layer_norm, select),
            **peers(torch_ops.add_layer_norm),
        },
    )


def _with_ids(function: Callable[..., Any], norm: bool) -> Callable[..., Any]:
    """The op on (weights..., ids, positions): what has a gradient comes first in a case."""

    def embed(wte: Tensor, wpe: Tensor, ids: Tensor, positions: Tensor) -> Any:
        return function(ids, positions, None, wte, wpe)

    def embed_and_norm(
        wte: Tensor, wpe: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, positions: Tensor
    ) -> Any:
        return function(ids, positions, None, wte, wpe, weight, bias, EPS)

    return embed_and_norm if norm else embed


def _plain_embedding_layer_norm(
    ids: Tensor,
    positions: Tensor,
    types: None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden = torch_ops.embedding(ids, positions, types, wte, wpe)
    return torch_ops.layer_norm(hidden, weight, bias, eps), hidden


def _oracle_embedding_layer_norm(
    ids: Tensor,
    positions: Tensor,
    types: None,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden = oracles.embedding(ids, positions, types, wte, wpe)
    return oracles.layer_norm(hidden, weight, bias, eps), hidden


def _embedding(
    model: Model, batch: int, length: int, dtype: torch.dtype, norm: bool, select: Select
) -> Case:
    width, size = model.hidden, dtype.itemsize
    rows, row = batch * length, batch * length * width * size
    tables = (model.vocab + model.positions) * width * size
    forward = Work(2 * row + length * width * size + (row if norm else 0))
    # The gradients of both tables are written whole, though few of their rows are not zero.
    backward = Work((3 * row if norm else row) + tables)
    ours = kernels.embedding_layer_norm if norm else kernels.embedding
    plain = _plain_embedding_layer_norm if norm else torch_ops.embedding
    oracle = _oracle_embedding_layer_norm if norm else oracles.embedding
    return Case(
        op="embedding_layer_norm" if norm else "embedding",
        shape=f"{rows}x{width}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(model.vocab, width, dtype=dtype),
                random_tensor(model.positions, width, dtype=dtype),
                *(_affine(width, dtype) if norm else ()),
            ),
            (torch.randint(model.vocab, (batch, length)), torch.arange(length)[None]),
        ),
        oracle=_with_ids(oracle, norm),
        tolerance="layer_norm" if norm else "embedding",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={
            OURS: Provider(_with_ids(ours, norm), select),
            **peers(_with_ids(plain, norm)),
        },
    )


def _linear(model: Model, rows: int, out_factor: int, dtype: torch.dtype, select: Select) -> Case:
    width, size = model.hidden, dtype.itemsize
    out = out_factor * width
    products = 2 * rows * width * out
    forward = Work((rows * width + width * out + rows * out) * size, products)
    backward = Work((2 * rows * width + 2 * width * out + rows * out) * size, 2 * products)
    return Case(
        op="linear",
        shape=f"{rows}x{width}x{out}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype),
                random_tensor(width, out, dtype=dtype, scale=width**-0.5),
                random_tensor(out, dtype=dtype, scale=0.2),
            )
        ),
        oracle=oracles.linear,
        tolerance="linear",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={OURS: Provider(kernels.linear, select), "eager": Provider(torch_ops.linear)},
    )


def _transformers_mlp(*arguments: Tensor) -> Tensor:
    """As transformers computes it by default: GELU in eight elementwise operations."""
    from transformers.activations import NewGELUActivation

    x, fc_weight, fc_bias, proj_weight, proj_bias, residual = arguments
    hidden = NewGELUActivation()(torch_ops.linear(x, fc_weight, fc_bias))
    return residual + torch_ops.linear(hidden, proj_weight, proj_bias)


def _gelu_mlp(model: Model, rows: int, dtype: torch.dtype, select: Select) -> Case:
    width, size = model.hidden, dtype.itemsize
    inner = 4 * width
    row, weights, products = rows * width * size, 2 * width * inner * size, 4 * rows * width * inner
    forward = Work(3 * row + weights, products)
    # The pre-activations are read, and of the residual nothing: its gradient is the upstream one.
    backward = Work(3 * row + 4 * row + 2 * weights, 2 * products)
    return Case(
        op="gelu_mlp",
        shape=f"{rows}x{width}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype),
                random_tensor(width, inner, dtype=dtype, scale=width**-0.5),
                random_tensor(inner, dtype=dtype, scale=0.2),
                random_tensor(inner, width, dtype=dtype, scale=inner**-0.5),
                random_tensor(width, dtype=dtype, scale=0.2),
                random_tensor(rows, width, dtype=dtype),
            )
        ),
        oracle=oracles.gelu_mlp,
        tolerance="gelu_mlp",
        work={"forward": forward, "backward": backward, "full": forward + backward},
        providers={
            OURS: Provider(kernels.gelu_mlp, select),
            **peers(torch_ops.gelu_mlp),
            "transformers": Provider(_transformers_mlp),
        },
        memory=True,
    )


def model_cases(model: Model, shapes: Shapes, dtype: torch.dtype, select: Select) -> Iterator[Case]:
    """Every op, those first whose speed matters most."""
    batch, length = shapes.training
    for sizes in shapes.attention:
        yield attention_case(model, *sizes, dtype, select)
    for batch_, length_, start in shapes.append:
        yield append_case(model, batch_, length_, start, dtype, select)
    for rows in shapes.loss_rows:
        yield loss_case(model, rows, "mean", dtype, select)
    for rows in shapes.rows:
        yield _gelu_mlp(model, rows, dtype, select)
    yield _add_layer_norm(model, batch * length, dtype, select)
    yield _layer_norm(model, batch * length, dtype, select)
    for rows in shapes.decode_rows:
        yield choice_case(model, rows, None, dtype, select)
    yield choice_case(model, shapes.decode_rows[-1], min(50, model.vocab), dtype, select)
    yield _embedding(model, batch, length, dtype, True, select)
    yield _embedding(model, batch, length, dtype, False, select)
    yield loss_case(model, shapes.loss_rows[-1], "none", dtype, select)
    for rows in shapes.rows:
        yield _linear(model, rows, 3, dtype, select)
    yield _linear(model, shapes.rows[0], 1, dtype, select)


def _tuned(cases: Iterator[Case]) -> Iterator[Case]:
    """The cases with a compiled peer, against that peer with its kernels searched for."""
    for case in cases:
        if "compile" in case.providers:
            peer = replace(case.providers["compile"], compile_mode="max-autotune-no-cudagraphs")
            providers = {OURS: case.providers[OURS], "compile (max-autotune)": peer}
            yield replace(case, shape=f"{case.shape} tuned", providers=providers)


def op_cases(scale: str, backend: str = "triton") -> list[Case]:
    """The cases in the order in which they are measured.

    Args:
        scale: "full" (a GPU), "cpu", "small" (a memory checker) or "tiny" (the interpreter).
        backend: which of our implementations is "ours".
    """
    select = partial(kernels.backend, backend)
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    if scale == "tiny":
        return list(model_cases(TINY_MODEL, TINY, float32, select))
    if scale == "small":
        both = (model_cases(SMALL_MODEL, SMALL, dtype, select) for dtype in (bfloat16, float32))
        return list(chain(*both))
    if scale == "cpu":
        return list(model_cases(GPT2, CPU, float32, select))
    if scale != "full":
        raise ValueError(f"scale must be full, cpu, small or tiny; got {scale!r}")
    return list(
        chain(
            model_cases(GPT2, FULL, bfloat16, select),
            *(model_cases(model, BRIEF, bfloat16, select) for model in MODELS[1:]),
            *(model_cases(GPT2, BRIEF, dtype, select) for dtype in (float16, float32)),
            _tuned(model_cases(GPT2, BRIEF, bfloat16, select)),
        )
    )
