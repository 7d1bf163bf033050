"""The decode engine's cases of `tests.kernels.offline`: phases around its matrix products."""

from collections.abc import Callable

import torch

from tests.kernels.offline_cases import empty, has_dependent_launch

CASES: dict[str, Callable[[], None]] = {}


def _launch(
    phases: str,
    rows: int,
    width: int = 768,
    bits: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> None:
    """The named phases of layer 1 of a step of a model of the width, of two layers."""
    from gpt2fast.kernels._triton.engine import attention, graph, graph_tiles
    from gpt2fast.kernels._triton.target import current_target
    from gpt2fast.kernels.decode_state import DecodeState
    from gpt2fast.kernels.decode_step import FEW_ROWS, StepBuffers
    from gpt2fast.kernels.packing import DecodeWeights, Matrix

    layers, vocab_size, inner, heads = 2, 50257, 4 * width, width // 64
    f32 = torch.float32

    def matrix(outputs: int, inputs: int, of_layers: int = layers) -> Matrix:
        stored = {8: torch.int8, 4: torch.uint8}.get(bits, dtype)
        data = empty(of_layers, outputs, inputs // 2 if bits == 4 else inputs, dtype=stored)
        groups = {8: (), 4: (-(-inputs // 128),)}.get(bits)
        scale = None if groups is None else empty(of_layers, outputs, *groups, dtype=f32)
        return Matrix(data, scale, empty(of_layers, outputs, dtype=dtype), bits)

    def rows_of(*shape: int) -> torch.Tensor:
        return empty(*shape, width, dtype=dtype)

    weights = DecodeWeights(
        wte=rows_of(vocab_size),
        wpe=rows_of(1024),
        ln_1=rows_of(layers, 2),
        ln_2=rows_of(layers, 2),
        ln_f=rows_of(2),
        qkv=matrix(3 * width, width),
        out=matrix(width, width),
        fc=matrix(inner, width),
        proj=matrix(width, inner),
        head=matrix(vocab_size, width, 1),
        heads=heads,
        eps=1e-5,
        scales=empty(layers, dtype=f32),
    )
    state = DecodeState.empty(4, 1024, vocab_size, torch.device("meta"))
    cache = empty(layers, 2, 4, heads, 1024, 64, dtype=cache_dtype or dtype)
    try:
        attention.check_cache_dtype(cache.dtype, current_target(cache.device))
    except ValueError:
        return  # no such cache on this chip
    buffers = StepBuffers.allocate(weights, rows, 8)
    pdl = has_dependent_launch()
    few: dict[str, Callable[[], None]] = {
        "embed": lambda: graph.launch_embed(weights, state, buffers, pdl),
        "qkv": lambda: graph.launch_qkv(weights, state, cache, buffers, 1, pdl),
        "merge": lambda: graph.launch_add(weights.out, heads, buffers.partial, buffers, 1, pdl),
        "fc": lambda: graph.launch_fc(weights, buffers, 1, pdl),
        "proj": lambda: graph.launch_add(weights.proj, heads, buffers.inner, buffers, 1, pdl),
        "head": lambda: graph.launch_head(weights, buffers, False, pdl),
        "greedy head": lambda: graph.launch_head(weights, buffers, True, pdl),
    }
    many: dict[str, Callable[[], None]] = {
        "normalize": lambda: graph_tiles.launch_normalize(
            buffers, weights.out, 1, weights.ln_2, 1, 1e-5, pdl
        ),
        "qkv": lambda: graph_tiles.launch_qkv_tiles(weights, state, cache, buffers, 1, pdl),
        "fc": lambda: graph_tiles.launch_fc_tiles(weights, buffers, 1, pdl),
        "proj": lambda: graph_tiles.launch_parts(weights.proj, buffers.inner, buffers, 1, pdl),
        "head": lambda: graph_tiles.launch_head_tiles(weights, buffers, False, pdl),
        "greedy head": lambda: graph_tiles.launch_head_tiles(weights, buffers, True, pdl),
    }
    for phase in phases.split(", "):
        (few if rows <= FEW_ROWS else many)[phase]()


_SIXTEEN, _THIRTY_TWO = {"dtype": torch.float16}, {"dtype": torch.float32, "bits": 32}
for _phases, _rows, _width, _options in (
    ("embed, qkv, merge, fc, proj, greedy head, head", 1, 768, {}),
    ("qkv, head", 4, 1600, {"bits": 8, **_SIXTEEN}),
    ("fc", 1, 1600, {"bits": 4}),
    ("qkv, greedy head", 4, 1600, {}),
    ("qkv", 4, 768, {"cache_dtype": torch.float8_e4m3fn}),
    ("qkv", 128, 768, {"cache_dtype": torch.float8_e4m3fn}),
    ("proj", 2, 768, _THIRTY_TWO),
    ("normalize, qkv, fc, proj, greedy head", 8, 768, {}),
    ("head", 8, 768, {}),
    ("fc", 64, 1600, {"bits": 8, **_SIXTEEN}),
    ("qkv", 64, 1600, {"bits": 4}),
    ("qkv, greedy head", 128, 768, {}),
    ("greedy head", 256, 1600, {"bits": 4}),
    ("qkv", 16, 768, _THIRTY_TWO),
    ("greedy head", 256, 768, _THIRTY_TWO),
    ("fc", 8, 768, {**_THIRTY_TWO, "bits": 4}),
):
    _label = ", ".join(str(value).removeprefix("torch.") for value in _options.values())
    _name = f"engine {_phases}: {_rows} rows, width {_width}, {_label or 'bfloat16'}"
    CASES[_name] = lambda p=_phases, r=_rows, w=_width, o=_options: _launch(p, r, w, **o)  # type: ignore[misc]
