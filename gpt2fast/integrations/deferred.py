"""Logits that are not computed before somebody reads them.

A labelled forward pass of transformers hands its logits to a cross-entropy and then to a caller who
seldom looks. `DeferredLogits` stands in for them: a tensor that holds the hidden states and the
head's weight. What the models do on the way to the loss (upcast, shift, flatten) it does to the
hidden states, `torch.nn.functional.cross_entropy` of it is `gpt2fast.kernels.lm_head_loss`, which
stores no logits, and anything else computes them first.

They are computed as in the forward pass, with a gradient if that had one, once. Where the head's
weight was changed in between (an optimizer step) reading them is an error, not a wrong answer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gpt2fast import kernels
from gpt2fast.transformer import compute_dtype


class _Product(NamedTuple):
    """What logits are the product of.

    Attributes:
        hidden, weight: ``[..., C]`` and ``[V, C]``.
        dtype: what the product is computed in.
        version: how often the weight had been written to, where that is counted.
        graph: whether the product is part of autograd's graph, as far as its factors are.
    """

    hidden: Tensor
    weight: Tensor
    dtype: torch.dtype
    version: int | None
    graph: bool

    def check(self) -> None:
        """Raise a RuntimeError if the weight was changed since the forward pass."""
        if self.version is not None and self.weight._version != self.version:
            raise RuntimeError(
                "the logits were not read before the head's weight changed (an optimizer step?); "
                "read output.logits before it"
            )

    def compute(self) -> Tensor:
        self.check()
        hidden, weight, dtype = self.hidden, self.weight, self.dtype
        # As in the forward pass, whoever reads them: logging under no_grad must not cost the graph.
        with (
            torch.set_grad_enabled(self.graph),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            return F.linear(hidden.to(dtype), weight.to(dtype))


class DeferredLogits(Tensor):
    """A tensor ``[..., V]`` whose values are computed when they are first asked for."""

    _product: _Product
    _value: Tensor | None

    @staticmethod
    def __new__(cls, product: _Product, dtype: torch.dtype) -> "DeferredLogits":
        self: DeferredLogits = Tensor._make_wrapper_subclass(
            cls,
            (*product.hidden.shape[:-1], product.weight.shape[0]),
            dtype=dtype,
            device=product.hidden.device,
        )
        self._product, self._value = product, None
        return self

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "DeferredLogits":
        """What ``F.linear(hidden, weight)`` would give here and now."""
        dtype = compute_dtype(hidden.dtype, hidden.device)
        version = None if weight.is_inference() else weight._version
        return cls(_Product(hidden, weight, dtype, version, torch.is_grad_enabled()), dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and type(args[0]) is cls and args[0]._value is None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Code that calls PyTorch from C++, such as collectives.
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def value(self) -> Tensor:
        """The logits.

        Raises:
            RuntimeError: the weight was changed since the forward pass.
        """
        if self._value is None:
            self._value = self._product.compute().to(self.dtype)
        return self._value

    def derived(self, hidden: Tensor, dtype: torch.dtype) -> "DeferredLogits":
        """The logits of hidden states made from these, in another dtype."""
        self._product.check()
        graph = self._product.graph and torch.is_grad_enabled()
        return DeferredLogits(self._product._replace(hidden=hidden, graph=graph), dtype)


def _getter(name: str) -> Any:
    """What ``__torch_function__`` is told when the attribute is read."""
    return getattr(Tensor, name).__get__


_METADATA = {
    _getter("shape"),
    _getter("dtype"),
    _getter("device"),
    _getter("ndim"),
    _getter("is_cuda"),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    torch.is_floating_point,
}


def _requires_grad(logits: DeferredLogits) -> bool:
    product = logits._product
    return product.graph and (product.hidden.requires_grad or product.weight.requires_grad)


def _float(logits: DeferredLogits) -> Any:
    return logits.derived(logits._product.hidden, torch.float32)


def _contiguous(logits: DeferredLogits, **options: Any) -> Any:
    return NotImplemented if options else logits


def _view(logits: DeferredLogits, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    hidden, width = logits._product.hidden, logits.shape[-1]
    if not shape or shape[-1] != width or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    return logits.derived(hidden.reshape(*shape[:-1], hidden.shape[-1]), logits.dtype)


def _getitem(logits: DeferredLogits, index: Any) -> Any:
    """``[..., :-1, :]`` and the like: slices of positions, the whole vocabulary."""
    if not (
        isinstance(index, tuple)
        and len(index) > 1
        and index[0] is Ellipsis
        and all(isinstance(part, slice) for part in index[1:])
        and index[-1] == slice(None)
    ):
        return NotImplemented
    return logits.derived(logits._product.hidden[index], logits.dtype)


def _cross_entropy(
    input: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or label_smoothing
        or input.dim() != 2
        or target.dim() != 1
        or target.is_floating_point()
        or target.device != input.device
    ):
        return NotImplemented
    product = input._product
    product.check()
    with torch.set_grad_enabled(product.graph and torch.is_grad_enabled()):
        loss = kernels.lm_head_loss(
            product.hidden, product.weight, target, ignore_index=ignore_index, reduction=reduction
        )
    # Autocasting has cross-entropies in float32, whatever the logits are.
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _getter("requires_grad"): _requires_grad,
    Tensor.float: _float,
    Tensor.contiguous: _contiguous,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.__getitem__: _getitem,
    F.cross_entropy: _cross_entropy,
}
