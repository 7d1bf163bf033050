"""The models that are measured: built here from a seed, and written in every peer's format.

A folder of a model holds our checkpoint, which transformers reads as it is, and below it what was
converted from it. Each is made when it is first asked for, and kept.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2fast.benchmark.environment import IN_CHECKOUT
from gpt2fast.benchmark.environment import ROOT as CHECKOUT
from gpt2fast.config import PRESETS, GPT2Config

if TYPE_CHECKING:
    from gpt2fast import GPT2LMHeadModel

_KEPT = CHECKOUT / "build" if IN_CHECKOUT else Path("~/.cache/gpt2fast").expanduser()
ROOT = Path(os.environ.get("GPT2FAST_BENCH_MODELS") or _KEPT / "bench").absolute()
# A model of the tests' own.
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 96}


def config_of(name: str) -> GPT2Config:
    """Of "tiny" or a preset."""
    return GPT2Config(**(TINY if name == "tiny" else PRESETS[name]))


def weight_bytes(name: str, bits: int) -> int:
    """What a token's matrix products read: the blocks' matrices and the head."""
    c = config_of(name)
    return (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) * bits // 8


def weights(name: str) -> "GPT2LMHeadModel":
    """A model with seeded random weights, biases and LayerNorms included.

    They are larger as a fresh model's: with those the token embedding outweighs the
    blocks, and every greedy token repeats the last, which proves nothing about the blocks.
    """
    import torch

    from gpt2fast import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(config_of(name)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.normal_(0, 0.1)
            elif ".ln_" in key:
                value.normal_(1, 0.1)
            elif ".h." in key:
                value.normal_(0, 0.05 * (768 / value.shape[0]) ** 0.5)
            else:
                value.normal_(0, 0.02)
    return model


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made under another name first, so that what is there is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            make(unfinished)
            with suppress(OSError):  # somebody else was faster
                unfinished.rename(path)
        finally:
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink(missing_ok=True)
    return path


def checkpoint(name: str) -> Path:
    """Our checkpoint, with the vocabulary, which converters ask for."""

    def make(path: Path) -> None:
        from gpt2fast.tokenizer import GPT2Tokenizer

        weights(name).save_pretrained(path)
        GPT2Tokenizer().save_vocabulary(path)

    return _made(ROOT / name / "checkpoint", make)


def quantized(name: str, mode: str) -> Path:
    """A checkpoint of ours in a quantised mode."""

    def make(path: Path) -> None:
        from gpt2fast import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(checkpoint(name), quantize=mode)
        model.save_pretrained(path)

    return _made(ROOT / name / mode, make)


def ctranslate2(name: str, quantization: str) -> Path:
    """A folder of CTranslate2."""

    def make(path: Path) -> None:
        from gpt2fast.benchmark.to_ctranslate2 import convert

        convert(checkpoint(name), path, quantization)

    return _made(ROOT / name / f"ctranslate2-{quantization}", make)


def onnx(name: str, bits: int) -> Path:
    """A folder with ``model.onnx``, of 32, 8 or 4 bits."""

    def make(path: Path) -> None:
        from gpt2fast.benchmark.to_onnx import convert

        convert(checkpoint(name), path, bits)

    return _made(ROOT / name / f"onnx-{bits}", make)


def gguf(name: str, kind: str) -> Path:
    """A file of llama.cpp; ``kind`` is the name of a format, such as Q8_0."""

    def make(path: Path) -> None:
        from gpt2fast.benchmark.to_gguf import convert

        convert(checkpoint(name), path, kind)

    return _made(ROOT / name / f"model-{kind}.gguf", make)
