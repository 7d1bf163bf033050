"""What `tests.kernels.offline` compiles: calls of the launchers on meta tensors.

A case calls a launcher of `gpt2fast.kernels._triton` (not an op: on meta tensors that would only
give shapes) with sizes of a published model. Together the cases reach every kernel, and every entry
of the tables in ``configs.py`` on every chip that may select it.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CASES: dict[str, Callable[[], None]] = {}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def has_dependent_launch() -> bool:
    """Whether steps on the chip run under programmatic dependent launch, as engines decide."""
    from gpt2fast.kernels._triton.target import current_target

    return current_target(torch.device("meta")).capability >= (9, 0)


def _decode(
    batch: int,
    heads: int,
    length: int,
    capacity: int,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False,
) -> None:
    """A step behind capacity - length positions; a ragged one with all tables and a mask."""
    from gpt2fast.kernels._triton.decode import attention_append

    tables = {"dtype": torch.int32}
    attention_append(
        empty(batch, length, 3 * heads * head_size, dtype=dtype),
        empty(2, batch, heads, capacity, head_size, dtype=dtype),
        capacity - length,
        empty(batch, **tables) if ragged else None,
        heads,
        empty(batch, capacity, dtype=torch.bool) if ragged else None,
        empty(batch, **tables) if ragged else None,
        empty(batch, capacity, **tables) if ragged else None,
        0.125,
    )


CASES["decode 1 token, split"] = lambda: _decode(1, 12, 1, 1024)
CASES["decode 1 token, direct, head size 128"] = lambda: _decode(64, 8, 1, 1024, 128, torch.float16)
CASES["decode 1 token, ragged"] = lambda: _decode(4, 12, 1, 1024, ragged=True)
CASES["decode 1 token, float32, head size 80"] = lambda: _decode(
    1, 20, 1, 8192, 80, torch.float32, ragged=True
)
CASES["decode 16 tokens, split"] = lambda: _decode(1, 25, 16, 1024)
CASES["decode 4 tokens, direct, head size 128, ragged"] = lambda: _decode(
    64, 8, 4, 1024, 128, ragged=True
)
CASES["decode 16 tokens, float32"] = lambda: _decode(1, 12, 16, 1024, 128, torch.float32)


def _lm_head(
    launch: str,
    rows: int,
    *args: object,
    dtype: torch.dtype = torch.bfloat16,
    row_gap: int = 0,
) -> None:
    from gpt2fast.kernels._triton import lm_head, lm_head_tiles

    module = lm_head if "loss" in launch else lm_head_tiles
    labels = [empty(rows, dtype=torch.int64)] if "loss" in launch else []
    hidden = empty(rows, 768 + row_gap, dtype=dtype)[:, :768]
    getattr(module, f"lm_head_{launch}")(hidden, empty(50257, 768, dtype=dtype), *labels, *args)


CASES["lm_head losses, 16384 rows"] = lambda: _lm_head("loss_fwd", 16384, -100)
CASES["lm_head losses, 16 rows"] = lambda: _lm_head("loss_fwd", 16, -100)
CASES["lm_head losses, 1024 rows unaligned"] = lambda: _lm_head("loss_fwd", 1024, -100, row_gap=1)
CASES["lm_head losses, float32"] = lambda: _lm_head("loss_fwd", 16, -100, dtype=torch.float32)
CASES["lm_head gradients"] = lambda: _lm_head("loss_fwd_bwd", 16384, None, -100, True, True)
CASES["lm_head argmax, 1 row"] = lambda: _lm_head("argmax_fwd", 1)
CASES["lm_head argmax, 64 rows"] = lambda: _lm_head("argmax_fwd", 64)
CASES["lm_head argmax, 1024 rows"] = lambda: _lm_head("argmax_fwd", 1024)
CASES["lm_head argmax, 1024 rows unaligned"] = lambda: _lm_head("argmax_fwd", 1024, row_gap=1)
CASES["lm_head top 50"] = lambda: _lm_head("topk_fwd", 16, 50)


def _matmul(
    rows: int,
    inner: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    residual: torch.dtype | None = None,
    row_gap: int = 0,
    activate: bool = False,
    save_pre: bool = False,
) -> None:
    from gpt2fast.kernels._triton.matmul import matmul

    matmul(
        empty(rows, inner + row_gap, dtype=dtype)[:, :inner],
        empty(inner, columns, dtype=dtype),
        empty(columns, dtype=dtype),
        None if residual is None else empty(rows, columns, dtype=residual),
        activate=activate,
        save_pre=save_pre,
    )


def _gelu_grad(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    from gpt2fast.kernels._triton.matmul import matmul_gelu_grad

    weight, pre = empty(4 * width, width, dtype=dtype), empty(rows, 4 * width, dtype=dtype)
    dout = empty(rows, width, dtype=dtype)
    matmul_gelu_grad(dout, weight.t(), pre, save_gelu=True, sum_rows=True)


CASES |= {
    "matmul linear 1 row": lambda: _matmul(1, 768, 2304, dtype=torch.float16),
    "matmul proj 1 row": lambda: _matmul(1, 3072, 768, residual=torch.bfloat16),
    "matmul fc 64 rows": lambda: _matmul(64, 768, 3072, activate=True, save_pre=True),
    "matmul proj 1024 rows": lambda: _matmul(1024, 3072, 768, residual=torch.bfloat16),
    "matmul fc 64 rows unaligned": lambda: _matmul(64, 768, 3072, row_gap=1, activate=True),
    "matmul fc 640 rows": lambda: _matmul(640, 768, 3072, activate=True),
    "matmul fc 640 rows unaligned": lambda: _matmul(640, 768, 3072, row_gap=1, activate=True),
    "matmul fc 16384 rows": lambda: _matmul(16384, 768, 3072, activate=True, save_pre=True),
    "matmul proj 2000 rows autocast": lambda: _matmul(2000, 6400, 1600, residual=torch.float32),
    "matmul gelu_grad 512 rows": lambda: _gelu_grad(512, 768),
    "matmul gelu_grad 16384 rows": lambda: _gelu_grad(16384, 768),
    "matmul gelu_grad float32": lambda: _gelu_grad(512, 768, torch.float32),
}


def _layer_norm(
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    residual: torch.dtype | None = None,
    rows: int = 16384,
) -> None:
    """add_layer_norm forward and backward; beside a residual of another dtype under autocast."""
    from gpt2fast.kernels._triton.layer_norm import layer_norm_bwd, layer_norm_fwd

    wide = residual or dtype
    x, y = empty(rows, width, dtype=dtype), empty(rows, width, dtype=wide)
    weight, statistics = empty(width, dtype=wide), empty(2, rows, dtype=torch.float32)
    layer_norm_fwd(x, y, weight, weight, 1e-5, wide, True)
    layer_norm_bwd(y, y, y, weight, statistics, True, dtype if residual else None, True)


CASES["layer_norm 768"] = lambda: _layer_norm(768)
CASES["layer_norm 768, autocast"] = lambda: _layer_norm(768, residual=torch.float32)
CASES["layer_norm 1024"] = lambda: _layer_norm(1024)
CASES["layer_norm 1280"] = lambda: _layer_norm(1280)
CASES["layer_norm 1600, float16"] = lambda: _layer_norm(1600, torch.float16)
CASES["layer_norm 1600, float32"] = lambda: _layer_norm(1600, torch.float32)
CASES["layer_norm 64"] = lambda: _layer_norm(64)
CASES["layer_norm 8192, autocast"] = lambda: _layer_norm(8192, residual=torch.float32)


def _embedding(width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A first look-up with token types and its LayerNorm, and the gradient of wte."""
    from gpt2fast.kernels._triton.embedding import embedding_bwd, embedding_fwd

    ids, weight = empty(16, 1024, dtype=torch.int64), empty(width, dtype=dtype)
    wte, wpe = empty(50257, width, dtype=dtype), empty(1024, width, dtype=dtype)
    embedding_fwd(ids, ids[:1], ids, wte, wpe, weight, weight, 1e-5, dtype, True)
    embedding_bwd(empty(16, 1024, width, dtype=dtype), ids, 50257, dtype)


CASES["embedding 768"] = lambda: _embedding(768)
CASES["embedding 1600, float32"] = lambda: _embedding(1600, torch.float32)


def _attention(
    backward: bool,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    past: int = 0,
    dropout: bool = False,
    bounds: bool = False,
    mask: bool = False,
) -> None:
    """Training; with bounds of the keys, or a mask of them."""
    from gpt2fast.kernels._triton.attention_bwd import attention_bwd
    from gpt2fast.kernels._triton.attention_fwd import attention_fwd

    batch, heads, length = 8, 768 // head_size, 1024
    shared = (
        empty(batch, length, 3 * heads * head_size, dtype=dtype),
        heads,
        empty(2, batch, heads, past, head_size, dtype=dtype) if past else None,
        empty(batch, past + length, dtype=torch.bool) if mask else None,
        empty(batch, dtype=torch.int32) if bounds else None,
        empty(batch, dtype=torch.int32) if bounds else None,
        empty(1, dtype=torch.int64) if dropout else None,
    )
    p = 0.1 if dropout else 0.0
    if not backward:
        attention_fwd(*shared, 0.125, p, True)
        return
    out = empty(batch, length, heads * head_size, dtype=dtype)
    lse = empty(batch, heads, length, dtype=torch.float32)
    attention_bwd(out, *shared, out, lse, 0.125, p, past > 0)


def _attention_chunk(length: int, head_size: int = 64) -> None:
    """A chunk appended to a cache, its length on the device, with a mask of keys."""
    from gpt2fast.kernels._triton.attention_fwd import launch_attention_fwd

    heads = 768 // head_size
    launch_attention_fwd(
        empty(4, length, 2304),
        heads,
        scale=0.125,
        past=empty(2, 4, heads, 1024, head_size),
        start=empty(4, dtype=torch.int32),
        key_mask=empty(4, 1024, dtype=torch.bool),
        write_cache=True,
    )


for _backward, _name in ((False, "forward"), (True, "backward")):
    for _label, _options in (
        ("64", {}),
        ("64 mask", {"mask": True}),
        ("64 past dropout bounds", {"past": 512, "dropout": True, "bounds": True}),
        ("128 dropout", {"head_size": 128, "dropout": True}),
        (
            "64 float32 past dropout mask",
            {"dtype": torch.float32, "past": 512, "dropout": True, "mask": True},
        ),
        ("128 float32", {"head_size": 128, "dtype": torch.float32}),
    ):
        CASES[f"attention {_name} {_label}"] = partial(_attention, _backward, **_options)
CASES["attention chunk 64"] = lambda: _attention_chunk(64)
CASES["attention chunk 128"] = lambda: _attention_chunk(64, 128)


def _engine(
    rows: int,
    splits: int,
    launch: Callable[..., None],
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """Phases of a decoding step of gpt2, on buffers for so many rows: what ``launch`` launches.

    It gets weights of which only what attention reads is there, state, cache and buffers.
    """
    from gpt2fast.kernels._triton.engine import configs
    from gpt2fast.kernels.decode_state import DecodeState
    from gpt2fast.kernels.decode_step import StepBuffers

    heads, vocab_size, capacity = 768 // head_size, 50257, 1024
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    row, wide = empty(rows, 768, dtype=dtype), empty(rows, vocab_size, dtype=f32)
    best = empty(rows, 264, dtype=f32)
    used: dict[str, Any] = {
        "splits": splits,
        "slots": empty(rows, dtype=i32),
        "offsets": empty(rows, dtype=i32),
        "query": row,
        "merged": row,
        "partial": empty(rows, heads, splits, head_size, dtype=f32),
        "sums": empty(rows, heads, splits, dtype=f32),
        "logits": wide,
        "scores": wide,
        "best_value": best,
        "best_index": best.int(),
        "best_sum": best,
        "chosen": empty(rows, dtype=i64),
        "chosen_log_probs": empty(rows, dtype=f32),
        "candidates": empty(rows, configs.ENGINE_SELECT.candidates, dtype=i64),
    }
    unused = {f.name: empty(0) for f in fields(StepBuffers) if f.name not in used}
    buffers = StepBuffers(**used, **unused)
    state = DecodeState.empty(rows, capacity, vocab_size, torch.device("meta"))
    cache = empty(12, 2, rows, heads, capacity, head_size, dtype=cache_dtype or dtype)
    weights = SimpleNamespace(scales=empty(12, dtype=f32), heads=heads)
    launch(weights, state, cache, buffers)


def _engine_attention(*args: Any, **options: Any) -> None:
    from gpt2fast.kernels._triton.engine import attention
    from gpt2fast.kernels._triton.target import current_target

    def launch(weights: Any, state: Any, cache: Tensor, buffers: Any) -> None:
        if cache.dtype == torch.float8_e4m3fn and current_target(cache.device).capability < (8, 9):
            return
        pdl = has_dependent_launch()
        attention.launch_attend(weights, state, cache, buffers, 3, pdl)
        if buffers.splits > 1:
            attention.launch_combine(weights, buffers, pdl)

    _engine(*args, launch=launch, **options)


def _engine_sampling(rows: int, drafts: int, greedy: bool) -> None:
    from gpt2fast.kernels._triton.engine import sampling

    def launch(_: Any, state: Any, cache: Tensor, buffers: Any) -> None:
        pdl = has_dependent_launch()
        if drafts:
            sampling.launch_propose(state, buffers, drafts, 2, pdl)
        sampling.launch_select(state, buffers, drafts, greedy, pdl)

    _engine(rows, 1, launch=launch)


CASES |= {
    "engine attention 1 row, split": lambda: _engine_attention(1, 8),
    "engine attention 64 rows, direct": lambda: _engine_attention(64, 1, dtype=torch.float16),
    "engine attention head size 128": lambda: _engine_attention(8, 4, head_size=128),
    "engine attention float32": lambda: _engine_attention(4, 8, dtype=torch.float32),
    "engine attention float8 cache": lambda: _engine_attention(
        64, 2, cache_dtype=torch.float8_e4m3fn
    ),
    "engine sampling greedy": lambda: _engine_sampling(1, 0, True),
    "engine sampling greedy, 3 drafts": lambda: _engine_sampling(8, 3, True),
    "engine sampling": lambda: _engine_sampling(1, 0, False),
}


def _engine_persistent(width: int, rows: int, drafts: int = 0) -> None:
    """Whole greedy steps in one kernel."""
    from gpt2fast.kernels.decode_state import DecodeState
    from gpt2fast.kernels.decode_step import StepBuffers, decode_persistent, persistent_buffers
    from tests.kernels.dependent import weights

    model = weights(width, 12, width // 64, 50257)
    state = DecodeState.empty(rows, 1024, 50257, torch.device("meta"))
    cache = empty(12, 2, rows, width // 64, 1024, 64)
    buffers = persistent_buffers(StepBuffers.allocate(model, rows, 4))
    decode_persistent(model, state, cache, buffers, 8, greedy=True, drafts=drafts, ngram=2)


CASES["engine persistent"] = lambda: _engine_persistent(768, 1)
CASES["engine persistent, 4 rows"] = lambda: _engine_persistent(768, 4)
CASES["engine persistent, a draft"] = lambda: _engine_persistent(768, 2, drafts=1)
