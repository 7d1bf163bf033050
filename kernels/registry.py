"""Registration of the ops under ``gpt2fast::``: PyTorch's dispatcher picks by device.

Two kinds of op:

- The public ones (`register_op`), each with a PyTorch implementation and, for most, a Triton one.
  Both are registered at the device's key *and* at its autograd key. At the autograd key they run
  as ordinary differentiable code, so autograd, autocast, ``torch.compile`` and FSDP see what they
  would see in hand-written code; the Triton implementation is an autograd function over kernels.
- The kernels (`register_kernel`): launchers that nothing traces into, with a function that gives
  their outputs' shapes. They take no gradient and see no autocast.

Passing through the dispatcher costs the host more than many of the kernels run. So a call goes
straight to what the dispatcher would arrive at, as long as nothing is there that wants to see it.
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

# What arguments the dispatcher would hand on as they are. Subclasses of tensors see the ops.
_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN_TYPES = frozenset((*_TENSORS, type(None), float, int, bool, str, torch.dtype))


def _included() -> int:
    """The dispatch keys that this thread adds to those of tensors."""
    included: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    return included


with torch.inference_mode():
    _PLAIN_THREADS = frozenset((_included(),))
with torch.inference_mode(False):
    _PLAIN_THREADS |= {_included()}


def _unobserved(args: tuple[Any, ...], floats: tuple[int, ...]) -> bool:
    """Whether an op on these arguments, called outside of the dispatcher, is the same op.

    That is: no compiler or tracer records it, no mode and no transform of ``torch.func`` is active,
    no profiler wants its name, no subclass of tensors takes part, and nothing has to be converted
    (``floats``: which arguments are float in the schema).
    """
    if torch.compiler.is_compiling() or not _PLAIN_TYPES.issuperset(map(type, args)):
        return False
    for i in floats:
        if type(args[i]) is not float:
            return False
    return not (
        _included() not in _PLAIN_THREADS
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _floats(schema: Any) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(schema.arguments) if str(a.type) == "float")


@functools.cache
def _plain_keys(kind: str) -> frozenset[int]:
    """The dispatch keys of tensors on such a device that nothing is special about.

    Others are negated or conjugated without having been computed, sparse, wrapped by a transform.
    """
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensor = torch.empty(0, device=kind)
            keys.append(torch._C._dispatch_keys(tensor).raw_repr())
    return frozenset(keys)


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

    floats = _floats(op._schema)

    def call(*args: Any) -> Any:
        if _unobserved(args, floats):
            return choose(*args, selected_backend())
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
        device = first.device
        kind = device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return launch(first, *args)
        if kind == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current device
                return load()(first, *args)
        return load()(first, *args)

    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for device in _KERNEL_DEVICES:
        _LIBRARY.impl(name, launch, device)
    _LIBRARY.impl(name, fake, "Meta")
    op = getattr(torch.ops.gpt2fast, name).default
    floats = _floats(op._schema)

    def call(first: Tensor, *args: Any) -> Any:
        everything = first, *args
        if _unobserved(everything, floats):
            kind = first.device.type
            if kind != "meta":
                plain, keys = _plain_keys(kind), torch._C._dispatch_keys
                for arg in everything:
                    if type(arg) in _TENSORS and keys(arg).raw_repr() not in plain:
                        break
                else:
                    return launch(first, *args)
        return op(first, *args)

    return call


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what that does anew at every call.

    For functions without default arguments, outside of the transforms of ``torch.func``.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


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
