"""Registration of the ops under ``gpt2fast::``: PyTorch's dispatcher picks by device.

An op's PyTorch implementation is registered at the device's key *and* at its autograd key. At the
autograd key it runs as ordinary differentiable PyTorch code, so autograd (of any order), autocast,
``torch.compile`` and ``torch.func`` see the same aten calls as in hand-written code. A device whose
kernels are not traceable (Triton) registers its own pair instead, with a backward op of its own.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gpt2fast", "DEF")
_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "Meta")


def register_op(schema: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``gpt2fast::<schema>`` with ``implementation`` on every device; return the op.

    Args:
        schema: an operator schema, such as ``"layer_norm(Tensor x, ...) -> Tensor"``.
        implementation: differentiable PyTorch code with the schema's signature.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        _LIBRARY.impl(name, implementation, device)
        _LIBRARY.impl(name, implementation, f"Autograd{device}")
    op: Callable[..., Any] = getattr(torch.ops.gpt2fast, name).default
    return op
