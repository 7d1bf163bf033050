"""What low-bit weights cost: perplexity of the bundled model, logits of a full-sized one.

    GPT2FAST_BENCH_TEXT=novels.txt pytest bench/bench_accuracy.py

The text (UTF-8, or that compressed by xz) should be one that the model never saw; without one the
perplexities are skipped. It is read in windows of the model's context of which the second half
counts, so every token has at least half a context before it. The losses of two forms are compared
token by token, which is what the standard error beside a difference rests on.

The forms are those that `gpt2fast.quantize` makes, on this machine's ops, and, in float32
arithmetic on rounded weights, those of the GPU's engine; then what was tried and left out. With
``GPT2FAST_BENCH_RECORD=1`` the results are written to ``bench/results/cpu/accuracy.json``.
"""

import copy
import hashlib
import json
import lzma
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.suite.environment import environment
from gpt2fast import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, compile_decoding, quantize
from gpt2fast.engine.compiled import LEAST_PAST, step_of
from gpt2fast.kernels import packing, quantized
from gpt2fast.layers import Conv1D
from gpt2fast.quantized_layers import QuantizedConv1D, QuantizedHead

TOKENS = int(os.environ.get("GPT2FAST_BENCH_TOKENS") or 32_768)
RESULTS = Path(__file__).parent / "results" / "cpu" / "accuracy.json"

Rounding = Callable[[Tensor], Tensor]
Change = Callable[[GPT2LMHeadModel], Any]


def _int8(weight: Tensor) -> Tensor:
    return packing.dequantize(*packing.quantize_int8(weight), 8)


def _int4(weight: Tensor) -> Tensor:
    return packing.dequantize(*packing.quantize_int4(weight), 4)


def _fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def _clipped_int8(weight: Tensor) -> Tensor:
    """The scale of least squared error of each output, instead of its largest value's."""
    best, error = weight, torch.full((len(weight), 1), math.inf)
    for share in torch.linspace(0.5, 1, 21):
        scale = share * weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / scale).round().clamp(-127, 127) * scale
        squares = (rounded - weight).square().sum(1, keepdim=True)
        best = torch.where(squares < error, rounded, best)
        error = torch.minimum(squares, error)
    return best


def _weights(matrices: Rounding, head: Rounding) -> Change:
    """Only weights are rounded, not activations; the embedding stays."""

    def change(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.weight.data = matrices(module.weight.data.t()).t().contiguous()
        model.lm_head.weight = nn.Parameter(head(model.lm_head.weight.data))
        return model

    return change


def _float_embedding(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    embedding = nn.Embedding.from_pretrained(model.transformer.wte.weight.detach())
    quantize(model, "int8")
    model.transformer.wte = embedding
    return model


def _one_range(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Activations of all rows in one range, as PyTorch's dynamic quantisation has them."""
    quantize(model, "int8")
    for module in model.modules():
        if isinstance(module, QuantizedConv1D | QuantizedHead):
            module.forward = _OneRange(module)
    return model


class _OneRange:
    def __init__(self, module: Any) -> None:
        self._bias, self._scale, self._outputs = module.bias, module.scale, module.outputs
        levels = int(quantized.int8_ops()[quantized.Fbgemm.name]["levels"])
        self._reduced = levels < 255
        self._packed = quantized.Fbgemm(module.weight, module.scale, None, levels)._packed

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # The integers' product; they were laid out without their scales.
        out = torch.ops.quantized.linear_dynamic(rows, self._packed, self._reduced) * self._scale
        if self._bias is not None:
            out += self._bias
        return out.view(*x.shape[:-1], self._outputs)


def _fp8_cache(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    def rounded(module: nn.Module, args: Any, qkv: Tensor) -> Tensor:
        query, kv = qkv.split((qkv.shape[-1] // 3, qkv.shape[-1] * 2 // 3), -1)
        return torch.cat((query, kv.to(torch.float8_e4m3fn).to(kv.dtype)), -1)

    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(rounded)
    return model


class _Steps:
    """A quantised model's logits by compiled steps, token by token."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self._model, self.config = compile_decoding(quantize(model, "int8")), model.config
        self._step = step_of(model)
        if self._step is None:
            pytest.skip("decoding is not compiled here")

    def __call__(self, ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        model, step, config = self._model, self._step, self.config
        assert step is not None
        embedded = model.transformer.wte(ids[0]) + model.transformer.wpe.weight[: ids.shape[1]]
        out = model(ids[:, :LEAST_PAST])
        past = torch.cat([layer[:, 0] for layer in out.past_key_values])
        shape = (len(past), config.n_head, ids.shape[1], config.head_size)
        cache = torch.empty(shape)
        cache[:, :, :LEAST_PAST] = past
        rows = [step(embedded[i], cache, i) for i in range(LEAST_PAST, len(embedded))]
        logits = torch.cat((out.logits[0], torch.stack(rows)))[-logits_to_keep:]
        return SimpleNamespace(logits=logits[None])


def _bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


FORMS: dict[str, Change] = {
    "fp16": lambda model: quantize(model, "fp16"),
    "int8": lambda model: quantize(model, "int8"),
    "int8, compiled steps": _Steps,
    "int4": lambda model: quantize(model, "int4"),
    "GPU: bfloat16 weights": _weights(_bfloat16, _bfloat16),
    "GPU: int8 weights": _weights(_int8, _int8),
    "GPU: int4 weights, int8 head": _weights(_int4, _int8),
    "GPU: fp8 cache": _fp8_cache,
    "not used: int8, float embedding": _float_embedding,
    "not used: int8, one range for all rows": _one_range,
    "not used: int8 weights, clipped": _weights(_clipped_int8, _clipped_int8),
    "not used: fp8 weights": _weights(_fp8, _fp8),
}


@pytest.fixture(scope="module")
def record() -> Any:
    facts: dict[str, Any] = {**environment(), "int8": quantized.int8_ops()}
    yield facts
    print("\n" + json.dumps(facts, indent=2))
    if os.environ.get("GPT2FAST_BENCH_RECORD"):
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _losses(model: Any, ids: Tensor) -> Tensor:
    """Of every token but the first, in nats."""
    context = model.config.n_positions
    losses = []
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, context // 2):
            first = max(0, start + context // 2 - context)
            window = ids[first : start + context // 2 + 1]
            counted = len(window) - 1 - (start - first)
            out = model(window[None, :-1], use_cache=False, logits_to_keep=counted)
            losses.append(F.cross_entropy(out.logits[0], window[-counted:], reduction="none"))
    return torch.cat(losses)


def test_perplexity(record: dict[str, Any]) -> None:
    path = os.environ.get("GPT2FAST_BENCH_TEXT")
    if path is None:
        pytest.skip("GPT2FAST_BENCH_TEXT names no text")
    data = Path(path).read_bytes()
    text = (lzma.decompress(data) if path.endswith(".xz") else data).decode()
    ids = torch.tensor(GPT2Tokenizer().encode(text)[: TOKENS + 1])
    model = GPT2LMHeadModel.from_pretrained("bundled")
    base = _losses(model, ids)
    rows = {"float32": {"perplexity": round(base.mean().exp().item(), 4)}}
    for name, change in FORMS.items():
        losses = _losses(change(copy.deepcopy(model)), ids)
        more = losses - base
        rows[name] = {
            "perplexity": round(losses.mean().exp().item(), 4),
            "percent_more": round(100 * math.expm1(more.mean().item()), 4),
            "standard_error": round(100 * more.std().item() / len(more) ** 0.5, 4),
        }
        print(name, rows[name], flush=True)
    record["perplexity"] = {
        "model": "bundled",
        "text": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(base)},
        "context": model.config.n_positions,
        "forms": rows,
    }
    assert rows["int8"]["percent_more"] < 1
    assert rows["fp16"]["percent_more"] < 0.1


def test_logits_of_124m(record: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config.preset("gpt2")).eval()
    ids = torch.randint(model.config.vocab_size, (1, 64))
    with torch.inference_mode():
        expected = model(ids).logits[0]
        rows = {}
        for name, change in FORMS.items():
            logits = change(copy.deepcopy(model))(ids).logits[0]
            rows[name] = {
                "relative_error": _relative(logits, expected),
                "same_first_choice": (logits.argmax(1) == expected.argmax(1)).float().mean().item(),
            }
            print(name, rows[name], flush=True)
    record["logits"] = {"model": "124M, random weights", "tokens": ids.numel(), "forms": rows}


def _relative(value: Tensor, expected: Tensor) -> float:
    return float(f"{((value - expected).norm() / expected.norm()).item():.3g}")
