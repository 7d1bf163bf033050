"""What is measured: an op on one shape, what it must cost, what is right, and who computes it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.suite.work import Work

Select = Callable[[], AbstractContextManager[Any]]  # enters a backend


@dataclass(frozen=True)
class Model:
    """The sizes of a GPT-2 that decide what its ops cost."""

    name: str
    hidden: int
    heads: int
    vocab: int = 50257
    positions: int = 1024


GPT2 = Model("gpt2", 768, 12)
MODELS = (
    GPT2,
    Model("gpt2-medium", 1024, 16),
    Model("gpt2-large", 1280, 20),
    Model("gpt2-xl", 1600, 25),
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of every provider of a case: first those that have a gradient."""

    leaves: tuple[Tensor, ...]
    others: tuple[Any, ...] = ()

    def double(self) -> "Inputs":
        """The same in float64, for the oracle."""
        return Inputs(
            tuple(t.double() for t in self.leaves),
            tuple(
                t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
                for t in self.others
            ),
        )


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the op.

    Attributes:
        run: the case's inputs to its outputs.
        context: entered before the clock starts: selects a backend.
        compile_mode: where given, ``run`` is compiled by ``torch.compile`` in that mode.
    """

    run: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    compile_mode: str | None = None


def _as_they_are(inputs: Inputs, outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _nothing(inputs: Inputs) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op, shape, dtype: what it is; together the name.
        inputs: draws random inputs on the default device.
        oracle: the op in plain PyTorch, which in float64 is the truth.
        tolerance: the op's name in ``tests/tolerances.py``.
        work: by direction ("forward" without autograd, "backward", "full": both); its keys are the
            directions that are measured.
        providers: by name; "ours" is what the others are measured against.
        observe: inputs and outputs to the tensors that are compared with the oracle's.
        poison: spoils what the op has to write in place, before a result is checked.
        memory: whether peak memory is recorded.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], Inputs]
    oracle: Callable[..., Any]
    tolerance: str
    work: dict[str, Work]
    providers: dict[str, Provider]
    observe: Callable[[Inputs, Any], tuple[Tensor, ...]] = _as_they_are
    poison: Callable[[Inputs], None] = _nothing
    memory: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def differentiable(self) -> bool:
        return "full" in self.work


def random_tensor(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """A tensor on the default device, drawn in float32."""
    return (torch.randn(shape) * scale + mean).to(dtype)


def peers(plain: Callable[..., Any]) -> dict[str, Provider]:
    """Plain PyTorch, as it is and compiled."""
    return {"eager": Provider(plain), "compile": Provider(plain, compile_mode="default")}
