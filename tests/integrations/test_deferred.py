"""Logits that are computed when somebody reads them, and are logits in every other way."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast.integrations.deferred import DeferredLogits

ROWS, WIDTH, VOCAB = (2, 5), 8, 11


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    hidden = torch.randn(*ROWS, WIDTH, requires_grad=True)
    return hidden, torch.randn(VOCAB, WIDTH, requires_grad=True)


def computed(logits: Tensor) -> bool:
    assert isinstance(logits, DeferredLogits)
    return logits._value is not None


def test_metadata_computes_nothing(factors: tuple[Tensor, Tensor]) -> None:
    logits = DeferredLogits.of(*factors)
    assert logits.shape == (*ROWS, VOCAB)
    assert (logits.dtype, logits.device, logits.ndim) == (torch.float32, torch.device("cpu"), 3)
    assert logits.size(-1) == VOCAB
    assert logits.dim() == 3
    assert logits.numel() == 2 * 5 * VOCAB
    assert logits.requires_grad
    assert torch.is_floating_point(logits)
    assert not computed(logits)


READS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "add": lambda x: x + 1,
    "radd": lambda x: 1 - x,
    "index": lambda x: x[0, 1],
    "slice": lambda x: x[..., 2:4],
    "array": lambda x: x[..., np.array([2, 3])],
    "transpose": lambda x: x.view(-1, 5),
    "float": lambda x: x.float() * 2,
    "double": lambda x: x.double(),
    "cat": lambda x: torch.cat([x, x]),
    "list": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "item": lambda x: torch.tensor(x.max().item()),
    "softmax": lambda x: F.softmax(x[:, :-1, :].contiguous().view(-1, VOCAB), dim=-1),
    "weighted": lambda x: F.cross_entropy(
        x.view(-1, VOCAB), torch.arange(10), weight=torch.linspace(0, 1, VOCAB)
    ),
    "smoothed": lambda x: F.cross_entropy(x.view(-1, VOCAB), torch.arange(10), label_smoothing=0.1),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, VOCAB), torch.ones(10, VOCAB) / VOCAB),
}


@pytest.mark.parametrize("read", READS)
def test_reading_gives_the_logits(read: str, factors: tuple[Tensor, Tensor]) -> None:
    wanted = READS[read](F.linear(*factors))
    got = READS[read](DeferredLogits.of(*factors))
    torch.testing.assert_close(got, wanted)
    assert type(got) is Tensor
    assert got.requires_grad == wanted.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_stores_no_logits(reduction: str, factors: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([[1, 2, -100, 4, 5], [0, 10, 9, -100, 3]])
    results = []
    for make in (F.linear, DeferredLogits.of):
        logits = make(*factors)
        shifted = logits[..., :-1, :].contiguous().float()
        loss = F.cross_entropy(
            shifted.view(-1, VOCAB), labels[..., 1:].reshape(-1), reduction=reduction
        )
        gradients = torch.autograd.grad(loss, factors, torch.ones_like(loss) * 0.7)
        results.append((loss, *gradients))
    torch.testing.assert_close(results[1], results[0])
    assert not computed(logits)


def test_logits_are_computed_once_and_may_be_written(factors: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        logits = DeferredLogits.of(*factors)
        logits[:, :, 3] = float("-inf")
        assert (logits.float()[:, :, 3] == float("-inf")).all()
        assert (logits.argmax(-1) != 3).all()


def test_the_graph_is_that_of_the_forward_pass(factors: tuple[Tensor, Tensor]) -> None:
    logits = DeferredLogits.of(*factors)
    with torch.no_grad():
        logits.argmax()
    assert logits.sum().requires_grad
    with torch.no_grad():
        logits = DeferredLogits.of(*factors)
        assert not DeferredLogits.of(*factors).float().requires_grad
    assert not logits.requires_grad
    assert not logits.float().requires_grad
    assert not F.cross_entropy(logits.view(-1, VOCAB), torch.arange(10)).requires_grad
    assert not logits.sum().requires_grad


@pytest.mark.parametrize("read", ["argmax", "float", "softmax", "weighted"])
def test_a_changed_weight_is_an_error(read: str, factors: tuple[Tensor, Tensor]) -> None:
    logits = DeferredLogits.of(*factors)
    derived = logits.float()
    with torch.no_grad():
        factors[1].add_(1)
    for stale in (logits, derived):
        with pytest.raises(RuntimeError, match=r"read output\.logits before it"):
            READS[read](stale)
    with pytest.raises(RuntimeError, match=r"read output\.logits before it"):
        F.cross_entropy(derived.view(-1, VOCAB), torch.arange(10))


def test_copies_and_files_hold_the_logits(factors: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        logits, wanted = DeferredLogits.of(*factors), F.linear(*factors)
    torch.testing.assert_close(copy.deepcopy(logits), wanted)
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), wanted)


def test_autocast_of_the_forward_pass_counts(factors: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, wanted = DeferredLogits.of(*factors), F.linear(*factors)
        loss = F.cross_entropy(logits.view(-1, VOCAB), torch.arange(10))
        assert loss.dtype == torch.float32
    assert logits.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(logits + 0, wanted)


def test_code_below_torch_function_reads_them_too(factors: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        logits, wanted = DeferredLogits.of(*factors), F.linear(*factors)
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(torch.add(logits, 1), wanted + 1)
