"""Which implementation serves an op: our Triton kernels or PyTorch's operators. Decided here alone.

By default ("auto") the kernels serve NVIDIA GPUs of compute capability 8.0 and later and PyTorch
everything else. ``GPT2FAST_BACKEND=torch`` or ``=triton`` in the environment, or `backend`, select
by hand.
"""

import functools
import importlib.util
import os
import warnings
from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

CHOICES = ("auto", "torch", "triton")
MINIMUM_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16 matrix instructions
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Selection:
    """The choice of this process. One for all threads: autograd runs backward passes in its own."""

    def __init__(self) -> None:
        self.choice = _checked(os.environ.get("GPT2FAST_BACKEND") or "auto", "GPT2FAST_BACKEND")


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {CHOICES}; got {name!r}")
    return name


_SELECTION = _Selection()


class backend:
    """Select the implementation of the ops, for this process; in a ``with``, until its end.

    Args:
        name: "triton" (our kernels; an error where they cannot run), "torch" (PyTorch's operators),
            or "auto": the kernels where they can run, PyTorch elsewhere.

    Takes effect at once and for all threads. Keep the selection from a forward pass to its backward
    pass where activations are recomputed. What ``torch.compile`` has compiled under another
    selection is compiled again.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        self._previous = _SELECTION.choice
        _SELECTION.choice = _checked(name, "backend")

    def __enter__(self) -> "backend":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _SELECTION.choice = self._previous


def selected_backend() -> str:
    """The choice in force: "auto", "torch" or "triton"."""
    return _SELECTION.choice


def use_triton(tensor: Tensor, choice: str = "") -> bool:
    """Whether our kernels serve an op on this tensor; otherwise as `serves`."""
    if tensor.dtype not in DTYPES or _functional_transform():
        return False
    return serves(tensor.device, choice)


def serves(device: torch.device, choice: str = "") -> bool:
    """Whether our kernels serve this device, for the dtypes they know.

    Args:
        device: where the tensors are.
        choice: the backend; by default the one that is selected.

    Raises:
        RuntimeError: "triton" is selected by hand and cannot run there.
    """
    choice, kind = choice or _SELECTION.choice, device.type
    if choice == "torch" or kind == "meta" or (choice == "auto" and kind != "cuda"):
        return False
    why_not = unavailable(kind, device.index)
    if why_not is None:
        return True
    if choice == "triton":
        raise RuntimeError(f"the triton backend is selected, but {why_not}")
    _warn_once(why_not)
    return False


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at the values now: not while tracing or capturing a CUDA graph."""
    if (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or isinstance(tensor, FakeTensor | FunctionalTensor)
    ):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


@functools.cache
def unavailable(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on a device, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind == "cuda" and torch.version.hip is None:
        gpu = torch.cuda.get_device_properties(index)
        if (gpu.major, gpu.minor) >= MINIMUM_CAPABILITY:
            return None
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}; the kernels need 8.0"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # how the kernels are tested without a GPU
    return f"the tensors are on {kind!r}; the kernels need an NVIDIA GPU"


@functools.cache
def _warn_once(why_not: str) -> None:
    warnings.warn(f"{why_not}: PyTorch's operators serve instead", stacklevel=2)


def _functional_transform() -> bool:
    """Inside ``torch.func``, whose transforms see through PyTorch's operators only."""
    return bool(torch._C._functorch.peek_interpreter_stack())
