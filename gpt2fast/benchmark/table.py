"""Who takes part, by name."""

from collections.abc import Callable
from functools import partial

from gpt2fast.benchmark.llama import LlamaCpp
from gpt2fast.benchmark.ours import BareLoop, Ours, TorchAlone
from gpt2fast.benchmark.peers import (
    Contender,
    CTranslate2,
    OnnxRuntime,
    PytorchPretrainedBert,
    Transformers,
)

BASE = "transformers SDPA"
OURS = "gpt2fast"
AGAIN = "gpt2fast again"
BARE = "bare loop"
TORCH = "torch alone"

_MAKERS: dict[str, Callable[[str, int], Contender]] = {
    BASE: partial(Transformers, attention="sdpa"),
    "transformers eager": partial(Transformers, attention="eager"),
    "pytorch-pretrained-bert": PytorchPretrainedBert,
    "CTranslate2": partial(CTranslate2, compute_type="float32"),
    "CTranslate2 int8": partial(CTranslate2, compute_type="int8"),
    "ONNX Runtime": partial(OnnxRuntime, bits=32),
    "ONNX Runtime int8": partial(OnnxRuntime, bits=8),
    "llama.cpp": partial(LlamaCpp, kind="F32"),
    "llama.cpp Q8_0": partial(LlamaCpp, kind="Q8_0"),
    "llama.cpp Q4_0": partial(LlamaCpp, kind="Q4_0"),
    BARE: BareLoop,
    TORCH: TorchAlone,
    OURS: Ours,
    AGAIN: Ours,
    "gpt2fast general": partial(Ours, engine=False),
    "gpt2fast bfloat16": partial(Ours, mode="bfloat16"),
    "gpt2fast fp16": partial(Ours, mode="fp16"),
    "gpt2fast int8": partial(Ours, mode="int8"),
}

# What computes in float32 throughout must generate the tokens of transformers. llama.cpp reads its
# GELU from a table of 16-bit values.
EXACT = {
    BASE,
    "transformers eager",
    "pytorch-pretrained-bert",
    "CTranslate2",
    "ONNX Runtime",
    OURS,
    AGAIN,
    "gpt2fast general",
}

# Contenders are measured in two companies, because all of them do not fit into memory. Both have
# the base, the bound and ours.
FLOAT32 = (
    BASE,
    "transformers eager",
    "pytorch-pretrained-bert",
    "CTranslate2",
    "ONNX Runtime",
    "llama.cpp",
    BARE,
    OURS,
    AGAIN,
    "gpt2fast general",
)
SMALLER = (
    BASE,
    "CTranslate2 int8",
    "ONNX Runtime int8",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
    BARE,
    OURS,
    "gpt2fast bfloat16",
    "gpt2fast fp16",
    "gpt2fast int8",
)

# The headline in three minutes.
QUICK_COMPANY = (
    BASE,
    "CTranslate2",
    "CTranslate2 int8",
    "ONNX Runtime",
    BARE,
    OURS,
    AGAIN,
    "gpt2fast fp16",
    "gpt2fast int8",
)
COMPANIES = {"float32": FLOAT32, "smaller": SMALLER, "quick": QUICK_COMPANY}

PREFILL = (
    BASE,
    "transformers eager",
    "CTranslate2",
    "CTranslate2 int8",
    "ONNX Runtime",
    "ONNX Runtime int8",
    "llama.cpp",
    "llama.cpp Q8_0",
    BARE,
    OURS,
    AGAIN,
    "gpt2fast fp16",
    "gpt2fast int8",
)
PREFILL_BATCH = (
    BASE,
    "CTranslate2",
    "CTranslate2 int8",
    "ONNX Runtime",
    BARE,
    OURS,
    AGAIN,
    "gpt2fast int8",
)
LOADING = (
    TORCH,
    BASE,
    "CTranslate2",
    "CTranslate2 int8",
    "ONNX Runtime",
    "llama.cpp",
    OURS,
    "gpt2fast fp16",
    "gpt2fast int8",
)


def make(name: str, model: str, threads: int) -> Contender:
    """A contender, which has loaded nothing yet."""
    return _MAKERS[name](model, threads)
