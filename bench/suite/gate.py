"""The parity gate: nothing that computes a wrong answer is timed.

A provider's outputs and gradients are held against the case's oracle in float64, on the inputs that
are timed afterwards, by the rule of ``tests/tolerances.py``. Its bounds for float32 are those of
short sums; at a model's sizes twice the error of plain PyTorch in float32 will do, as it does in 16
bits.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.suite.cases import Case, Inputs
from tests.tolerances import BUDGET, assert_close, relative_error

_FULL_PRECISION = (torch.float32, torch.float64)


class WrongAnswer(Exception):
    """A result lies further from its oracle than the tolerances allow."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, every ``torch.empty`` is filled with NaN: what nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(
    outputs: Any, leaves: tuple[Tensor, ...], upstream: tuple[Tensor, ...], again: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of the leaves; ``again`` keeps the graph for another pass."""
    tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
    return torch.autograd.grad(tensors, leaves, upstream, retain_graph=again)


def with_gradients(inputs: Inputs) -> Inputs:
    """The same tensors as leaves of a new autograd graph."""
    return Inputs(tuple(t.detach().requires_grad_() for t in inputs.leaves), inputs.others)


def distance(value: Tensor, exact: Tensor) -> float:
    """``|value - exact| / |exact|``, infinite where the value is not finite or of another shape.

    Raises WrongAnswer where ``exact`` is not finite: there is nothing to hold a value against, and
    NaN would be larger than no bound.
    """
    if value.shape != exact.shape:
        return float("inf")
    value, exact = value.detach().double(), exact.detach().to(value.device).double()
    if not bool(torch.isfinite(exact).all()):
        raise WrongAnswer("the reference is not finite")
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))


class Gate:
    """What is right for one case, and how far from it plain PyTorch ends in the same dtype."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        exact = inputs.double()
        if case.differentiable:
            exact = with_gradients(exact)
        outputs = case.oracle(*exact.leaves, *exact.others)
        self._expected = self._observed(exact, outputs)
        self._expected_gradients: tuple[Tensor, ...] = ()
        plain_inputs = with_gradients(inputs) if case.differentiable else inputs
        plain_outputs = case.oracle(*plain_inputs.leaves, *plain_inputs.others)
        self._plain = self._observed(inputs, plain_outputs)
        self._plain_gradients: tuple[Tensor, ...] = ()
        self.upstream: tuple[Tensor, ...] = ()
        if case.differentiable:
            self.upstream = tuple(torch.randn(o.shape).to(o.dtype) for o in self._plain)
            upstream = tuple(u.double() for u in self.upstream)
            self._expected_gradients = gradients(outputs, exact.leaves, upstream)
            self._plain_gradients = gradients(plain_outputs, plain_inputs.leaves, self.upstream)

    def _observed(self, inputs: Inputs, outputs: Any) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in self._case.observe(inputs, outputs))

    def forward_error(self, outputs: Any) -> float:
        """The largest relative error of the outputs; `WrongAnswer` beyond the tolerance."""
        observed = self._observed(self._inputs, outputs)
        return self._error("forward", observed, self._expected, self._plain)

    def backward_error(self, grads: tuple[Tensor, ...]) -> float:
        """Likewise of the gradients."""
        return self._error("backward", grads, self._expected_gradients, self._plain_gradients)

    def _error(
        self,
        direction: str,
        got: tuple[Tensor, ...],
        expected: tuple[Tensor, ...],
        plain: tuple[Tensor, ...],
    ) -> float:
        case = self._case
        worst = 0.0
        try:
            for ours, oracle, same in zip(got, expected, plain, strict=True):
                # A peer may return a loss in 16 bits where ours is float32: compare as values.
                ours = ours.to(same.dtype) if case.dtype not in _FULL_PRECISION else ours
                error = relative_error(ours, oracle)
                worst = max(worst, error)
                if not math.isfinite(error) or error > BUDGET * relative_error(same, oracle):
                    assert_close(case.tolerance, direction, ours, oracle, same, case.dtype)
        except (AssertionError, ValueError) as error:
            raise WrongAnswer(str(error)) from None
        return worst
