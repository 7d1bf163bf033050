"""Tables of op cases with faults in them, for the tests of the suite."""

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.suite.cases import Case, Inputs, Provider
from bench.suite.work import Work


def _double(x: Tensor) -> Tensor:
    return 2 * x


def _almost_double(x: Tensor) -> Tensor:
    return 2.001 * x


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def _die(x: Tensor) -> Tensor:
    os._exit(11)


def _double_but_in_a_graph(x: Tensor) -> Tensor:
    if any(frame.name == "captured" for frame in traceback.extract_stack()):
        raise RuntimeError("planted")
    return 2 * x


def _case(op: str, ours: Callable[..., Any], **peers: Callable[..., Any]) -> Case:
    return Case(
        op=op,
        shape="8",
        dtype=torch.float32,
        inputs=lambda: Inputs((torch.randn(8),)),
        oracle=_double,
        tolerance="linear",
        work={"forward": Work(64), "backward": Work(64), "full": Work(128)},
        providers={"ours": Provider(ours), "eager": Provider(_double)}
        | {name: Provider(run) for name, run in peers.items()},
    )


def _wait() -> Inputs:
    time.sleep(300)
    raise AssertionError


def faulty(scale: str) -> list[Case]:
    waits = _case("waits", _double)
    return [
        _case("right", _double, wrong=_almost_double),
        _case("wrong", _almost_double),
        _case("wrong_gradient", _WrongGradient.apply),
        _case("dies", _die),
        _case("peer_dies", _double, deadly=_die),
        _case("peer_fails_in_a_graph", _double, peer=_double_but_in_a_graph),
        Case(**{**vars(waits), "inputs": _wait}),
    ]
