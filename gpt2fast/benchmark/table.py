"""Who takes part, by name."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from gpt2fast.benchmark.compiled import CompiledLoop, CompiledTransformers
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
    "transformers tuned": partial(Transformers, attention="sdpa", gelu="gelu_pytorch_tanh"),
    "transformers compiled": CompiledTransformers,
    "compiled loop": CompiledLoop,
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
    "gpt2fast int8 compiled": partial(Ours, mode="int8", compiled=True),
}

# What computes in float32 throughout must generate the tokens of transformers. llama.cpp reads its
# GELU from a table of 16-bit values.
EXACT = {
    BASE,
    "transformers eager",
    "transformers tuned",
    "transformers compiled",
    "compiled loop",
    "pytorch-pretrained-bert",
    "CTranslate2",
    "ONNX Runtime",
    OURS,
    AGAIN,
    "gpt2fast general",
}

# Contenders are measured in companies, because all of them do not fit into memory. Each has the
# base, the bound and ours twice. Who must not be missing comes first: memory may end.
FLOAT32 = (
    BASE,
    OURS,
    AGAIN,
    BARE,
    "CTranslate2",
    "ONNX Runtime",
    "llama.cpp",
    "transformers tuned",
    "transformers eager",
    "gpt2fast general",
    "pytorch-pretrained-bert",
)
SMALLER = (
    BASE,
    OURS,
    AGAIN,
    BARE,
    "gpt2fast int8",
    "gpt2fast int8 compiled",
    "CTranslate2 int8",
    "ONNX Runtime int8",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
    "gpt2fast fp16",
    "gpt2fast bfloat16",
)
# The headline in three minutes.
QUICK = (
    BASE,
    OURS,
    AGAIN,
    BARE,
    "CTranslate2",
    "ONNX Runtime",
    "llama.cpp",
    "gpt2fast int8",
    "CTranslate2 int8",
    "ONNX Runtime int8",
    "llama.cpp Q8_0",
    "gpt2fast fp16",
    "gpt2fast int8 compiled",
    "transformers tuned",
    "transformers eager",
    "pytorch-pretrained-bert",
)
PREFILL = (
    BASE,
    OURS,
    AGAIN,
    BARE,
    "gpt2fast int8",
    "CTranslate2",
    "ONNX Runtime",
    "CTranslate2 int8",
    "ONNX Runtime int8",
    "llama.cpp",
    "llama.cpp Q8_0",
    "gpt2fast fp16",
    "transformers tuned",
    "transformers eager",
)
BATCHES = (
    BASE,
    OURS,
    AGAIN,
    BARE,
    "gpt2fast int8",
    "CTranslate2",
    "CTranslate2 int8",
    "ONNX Runtime",
)
COMPILED = (BASE, "transformers compiled", "compiled loop", BARE, OURS, AGAIN)
COMPANIES = {
    "float32": FLOAT32,
    "smaller": SMALLER,
    "quick": QUICK,
    "prefill": PREFILL,
    "batches": BATCHES,
    "compiled": COMPILED,
}
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
    "gpt2fast int8 compiled",
)


# Rival -> the module that it is imported as; other contenders need nothing more than we do.
_MODULES = {
    "transformers": "transformers",
    "pytorch-pretrained-bert": "pytorch_pretrained_bert",
    "CTranslate2": "ctranslate2",
    "ONNX Runtime": "onnxruntime",
    "llama.cpp": "llama_cpp",
}


def installed(name: str) -> bool:
    """Whether a contender can be loaded at all."""
    needed = (module for rival, module in _MODULES.items() if name.startswith(rival))
    return all(find_spec(module) is not None for module in needed)


def make(name: str, model: str, threads: int) -> Contender:
    """A contender, which has loaded nothing yet."""
    return _MAKERS[name](model, threads)
