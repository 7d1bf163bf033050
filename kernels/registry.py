"""Registration of the ops under ``gpt2fast::``: PyTorch's dispatcher picks by device.

Two kinds of op:

- The public ones (`register_op`), each with a PyTorch implementation and, for most, a Triton one.
  Both are registered at the device's key *and* at its autograd key. At the autograd key they run
  as ordinary differentiable code, so autograd, autocast, ``torch.compile`` and FSDP see what they
  would see in hand-written code; the Triton implementation is an autograd function over kernels.
- The kernels (`register_kernel`): launchers that nothing traces into, with a function that gives
  their outputs' shapes. They take no gradient and see no autocast.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2fast.kernels.backend import selected_backend, use_triton

# Public op -> whether it has a Triton implementation.
OPS: dict[str, bool] = {}

_LIBRARY = torch.library.Library("gpt2fast", "DEF")
_KERNEL_DEVICES = ("CUDA", "CPU")  # the CPU for Triton's interpreter
_PLAIN_DEVICES = ("MPS", "XPU", "Meta")


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``gpt2fast::<schema>`` on every device; return a function that calls it.

    The op has one more argument than the schema, which that function gives: the backend selected
    (where it is not given, as when the op is called directly, the selection counts all the same).
    As part of a traced graph it keeps one selection's compiled code, in memory or on disk, from
    serving another's.

    Args:
        schema: an operator schema, such as ``"layer_norm(Tensor x, ...) -> Tensor"``, whose first
            argument is a tensor; the first floating one says where and in what dtype it runs.
        implementation: differentiable PyTorch code with the schema's signature.
        triton: the same on our kernels; returns NotImplemented for what they do not cover, which
            PyTorch then serves.
    """
    name, arguments, returns = schema.partition("(")[0], *schema.split("(", 1)[1].split(") -> ")
    _LIBRARY.define(
        f"{name}({arguments}, str backend='') -> {returns}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    op = getattr(torch.ops.gpt2fast, name).default
    arity = len(op._schema.arguments) - 1

    def choose(first: Tensor, *rest: Any) -> Any:
        # The dispatcher leaves trailing arguments out where they have their default.
        args, selected = rest[: arity - 1], rest[-1] if len(rest) == arity else ""
        # What is computed, not indices, has the dtype that counts.
        data = first if first.is_floating_point() else next(filter(_is_float, args))
        if triton is not None and use_triton(data, selected):
            result = triton(first, *args)
            if result is not NotImplemented:
                return result
        return implementation(first, *args)

    def plain(*args: Any) -> Any:
        return implementation(*args[:arity])

    OPS[name] = triton is not None
    for devices, function in ((_KERNEL_DEVICES, choose), (_PLAIN_DEVICES, plain)):
        for device in devices:
            _LIBRARY.impl(name, function, device)
            _LIBRARY.impl(name, function, f"Autograd{device}")

    def call(*args: Any) -> Any:
        return op(*args, selected_backend())

    return call


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def register_kernel(schema: str, launcher: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``gpt2fast::<schema>`` by a launcher in `gpt2fast.kernels._triton`; return the op.

    Args:
        schema: an operator schema whose first argument is a tensor.
        launcher: ``"module:function"``, imported at the first call.
        fake: allocates the outputs, with their shapes, dtypes and strides, for tracing.
    """
    module, function = launcher.split(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        loaded = importlib.import_module(f"gpt2fast.kernels._triton.{module}")
        found: Callable[..., Any] = getattr(loaded, function)
        return found

    def launch(first: Tensor, *args: Any) -> Any:
        kind = first.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return launch(first, *args)
        if kind == "cuda" and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current device
                return load()(first, *args)
        return load()(first, *args)

    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for device in _KERNEL_DEVICES:
        _LIBRARY.impl(name, launch, device)
    _LIBRARY.impl(name, fake, "Meta")
    op: Callable[..., Any] = getattr(torch.ops.gpt2fast, name).default
    return op


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_inputs(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on, as PyTorch casts those of a matrix product.

    float64 stays, as it does there.
    """
    kind = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def casts_weights(*weights: Tensor) -> bool:
    """Whether autocast would cast any of these.

    PyTorch's operators cast a parameter once a region of autocast, and we would at every call: with
    no gradient to fuse for, as in decoding, those serve better.
    """
    kind = weights[0].device.type
    if not torch.is_autocast_enabled(kind):
        return False
    dtype = torch.get_autocast_dtype(kind)
    return any(weight.dtype != dtype for weight in weights)


def forbid_second_derivative(name: str) -> None:
    """To be called first in a backward pass made of kernels, which autograd cannot see through.

    PyTorch's ``once_differentiable`` would let a pass through whose upstream needs no gradient.

    Raises:
        RuntimeError: the backward pass is itself being recorded (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once on the triton backend; for create_graph=True select "
            'gpt2fast.backend("torch")'
        )
