"""Keys and values in float8: which caches there may be, and how values come into one.

Half the bytes of 16 bits, for 4 significant bits a value and a range of 448. There is no infinity:
whatever lies beyond the range is written as its end.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2fast.generation.decoding import LanguageModel

FLOAT8 = torch.float8_e4m3fn


def cache_dtype_of(model: "LanguageModel", dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a cache for which ``dtype`` was asked; None is the model's own.

    Raises:
        ValueError: it is neither the model's nor float8.
    """
    if dtype is None:
        return model.dtype
    if dtype not in (model.dtype, FLOAT8):
        raise ValueError(
            f"cache_dtype must be None, the model's {model.dtype} or {FLOAT8}; got {dtype!r}"
        )
    return dtype


def check_device(dtype: torch.dtype, device: torch.device) -> None:
    """Raise a ValueError unless our kernels can keep a cache of this dtype on the device."""
    if dtype == FLOAT8:
        from gpt2fast.kernels._triton.engine.attention import check_cache_dtype
        from gpt2fast.kernels._triton.target import current_target

        check_cache_dtype(dtype, current_target(device))


def raw(cache: Tensor) -> Tensor:
    """A view to copy within: of float8, for which not every copying op exists, its bytes."""
    return cache.view(torch.uint8) if cache.dtype == FLOAT8 else cache


def to_float8(values: Tensor) -> Tensor:
    """float8_e4m3fn, which has no infinity, of what is clamped to its range; NaN stays NaN."""
    most = torch.finfo(FLOAT8).max
    return values.clamp(-most, most).to(FLOAT8)
