"""gpt2fast: GPT-2 as a custom-kernel performance library.

Importing this package loads neither torch nor any kernel: every public name is resolved on first
use, so ``import gpt2fast.tokenizer`` stays free of torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2fast.version import __version__

_ROOT = Path(__file__).resolve().parent
if not (_ROOT / "kernels").is_dir() and (_ROOT.parent / "setup.py").is_file():
    # A bare checkout (torch.hub): kernels/ and tokenizer/ stand beside this folder. In an
    # installation setup.py maps them below it and this does nothing.
    __path__.append(str(_ROOT.parent))

# Public name -> the module that defines it.
_EXPORTS = {
    "GPT2Config": "gpt2fast.config",
    "GPT2Model": "gpt2fast.transformer",
    "GPT2LMHeadModel": "gpt2fast.model",
    "GPT2DoubleHeadsModel": "gpt2fast.model",
    "KVCache": "gpt2fast.cache",
    "Engine": "gpt2fast.engine",
    "release": "gpt2fast.engine",
    "compile_decoding": "gpt2fast.engine",
    "CheckpointError": "gpt2fast.checkpoint.weights",
    "GPT2Tokenizer": "gpt2fast.tokenizer",
    "backend": "gpt2fast.kernels",
    "quantize": "gpt2fast.quantization",
    "accelerate": "gpt2fast.integrations.accelerate",
    "restore": "gpt2fast.integrations.accelerate",
    "score": "gpt2fast.scoring.scorer",
    "Scorer": "gpt2fast.scoring.scorer",
    "Score": "gpt2fast.scoring.scorer",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from gpt2fast.cache import KVCache as KVCache
    from gpt2fast.checkpoint.weights import CheckpointError as CheckpointError
    from gpt2fast.config import GPT2Config as GPT2Config
    from gpt2fast.engine import Engine as Engine
    from gpt2fast.engine import compile_decoding as compile_decoding
    from gpt2fast.engine import release as release
    from gpt2fast.integrations.accelerate import accelerate as accelerate
    from gpt2fast.integrations.accelerate import restore as restore
    from gpt2fast.kernels import backend as backend
    from gpt2fast.model import GPT2DoubleHeadsModel as GPT2DoubleHeadsModel
    from gpt2fast.model import GPT2LMHeadModel as GPT2LMHeadModel
    from gpt2fast.quantization import quantize as quantize
    from gpt2fast.scoring.scorer import Score as Score
    from gpt2fast.scoring.scorer import Scorer as Scorer
    from gpt2fast.scoring.scorer import score as score
    from gpt2fast.tokenizer import GPT2Tokenizer as GPT2Tokenizer
    from gpt2fast.transformer import GPT2Model as GPT2Model


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gpt2fast' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
