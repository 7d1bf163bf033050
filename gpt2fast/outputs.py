"""What the models return: a mapping with attributes that is also a tuple of its present values."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from gpt2fast.config import GPT2Config


class DeferredLogits(NamedTuple):
    """Logits not computed yet: the loss did not need them, and a caller may never look.

    As a named tuple its tensors stay visible to whatever walks through outputs (DDP, FSDP).
    """

    hidden: Tensor
    weight: Tensor
    version: int | None
    grad: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "DeferredLogits":
        return cls(hidden, weight, _version(weight), torch.is_grad_enabled())

    def compute(self) -> Tensor:
        """The logits ``[..., T, V]``.

        Raises:
            RuntimeError: the weight was changed since the forward pass.
        """
        if self.version is not None and _version(self.weight) != self.version:
            raise RuntimeError(
                "the logits were not read before the head's weight changed (an optimizer step?); "
                "read output.logits before it"
            )
        # As in the forward pass, whoever reads them: logging under no_grad must not cost the graph.
        with torch.set_grad_enabled(self.grad):
            return F.linear(self.hidden.to(self.weight.dtype), self.weight)


def _version(weight: Tensor) -> int | None:
    """How often the weight was changed in place, where that is counted and can be told."""
    if torch.compiler.is_compiling() or weight.is_inference():
        return None
    return weight._version


class ModelOutput(OrderedDict[str, Any]):
    """Named outputs in order, without the absent ones.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` read it; ``logits, past = output``
    unpacks it; a name that is absent reads None as an attribute. Logits that the loss left
    uncomputed are computed when first read.
    """

    _fields: tuple[str, ...] = ()

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        # The mapping is how whoever walks through outputs (accelerate, FSDP) rebuilds one.
        values = {**(values or {}), **more}
        unknown = set(values) - set(self._fields)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}")
        super().__init__({n: values[n] for n in self._fields if values.get(n) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            names = tuple(self.keys())[key]  # computes no logits that are not asked for
            return self[names] if isinstance(names, str) else tuple(self[n] for n in names)
        value = super().__getitem__(key)
        if isinstance(value, DeferredLogits):
            value = value.compute()
            self[key] = value
        return value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this defines `get`)

    def values(self) -> Any:
        """The values as they are stored: DDP and FSDP walk here, and need no logits computed."""
        return tuple(self.raw_items().values())

    def items(self) -> Any:
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The present values, in order."""
        return tuple(self[name] for name in self.keys())

    def raw_items(self) -> dict[str, Any]:
        """The values as they are stored, deferred ones not computed."""
        return {name: dict.__getitem__(self, name) for name in self.keys()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.items()))


def _rebuild(cls: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return cls(**values)


class BaseModelOutput(ModelOutput):
    """Outputs of `GPT2Model`: ``last_hidden_state`` ``[..., T, C]``, the past, and details."""

    _fields = ("last_hidden_state", "past_key_values", "hidden_states", "attentions")


class CausalLMOutput(ModelOutput):
    """Outputs of `GPT2LMHeadModel`: the loss for given labels, ``logits`` ``[..., T, V]``."""

    _fields = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class DoubleHeadsOutput(ModelOutput):
    """Outputs of `GPT2DoubleHeadsModel`, with ``mc_logits`` ``[B, choices]``."""

    _fields = (
        "loss",
        "mc_loss",
        "logits",
        "mc_logits",
        "past_key_values",
        "hidden_states",
        "attentions",
    )


def _register(cls: type[ModelOutput]) -> None:
    register_pytree_node(
        cls,
        lambda output: (list(output.raw_items().values()), list(output.keys())),
        lambda values, names: cls(**dict(zip(names, values, strict=True))),
        serialized_type_name=f"gpt2fast.{cls.__name__}",
    )


for _cls in (BaseModelOutput, CausalLMOutput, DoubleHeadsOutput):
    _register(_cls)


def as_returned(output: ModelOutput, return_dict: bool | None, config: GPT2Config) -> Any:
    """The output itself, or a plain tuple where the caller or the configuration wants one."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return output if return_dict else output.to_tuple()
