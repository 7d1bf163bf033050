"""The kernels under lm_head_loss: every tile, chunk and step, compilation, and what needs a GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2fast import kernels
from gpt2fast.kernels._triton import configs, target
from tests.kernels import oracles
from tests.kernels.devices import DEVICE, TRITON_DTYPES, triton_only
from tests.kernels.test_lm_head import REDUCTIONS, compare_losses, loss_inputs
from tests.tolerances import assert_close


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 50, 130])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_every_tile(
    chip: int, rows: int, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pointers and by descriptors, several tiles a program; float32, left to cuBLAS else."""
    monkeypatch.setattr(configs, "LM_HEAD_TILE_DTYPES", (dtype,))
    (hidden, weight), labels = loss_inputs(rows, 24, 600, dtype)
    labels[[0, rows - 1]] = -1
    labels[1] = 599
    with target.assume(dataclasses.replace(target.CHIPS[chip], multiprocessors=1)):
        losses = torch.ops.gpt2fast.lm_head_loss_fwd(hidden, weight, labels, -1)
    truth = hidden.double() @ weight.double().t()
    truth = torch.nn.functional.cross_entropy(truth, labels, ignore_index=-1, reduction="none")
    # Logits are not rounded: in 16 bits as exact as in 32.
    assert_close("lm_head_loss", "forward", losses, truth)


@triton_only
def test_losses_over_many_tiles_and_a_wide_row(backend: str) -> None:
    """More than are combined at a time: 32 of 128 columns of the vocabulary, 128 of the width."""
    (hidden, weight), labels = loss_inputs(3, 129, 4200, torch.float16)
    weight[4096:] *= 2  # the largest logits come last
    losses = torch.ops.gpt2fast.lm_head_loss_fwd(hidden, weight, labels, -100)
    truth = hidden.double() @ weight.double().t()
    truth = torch.nn.functional.cross_entropy(truth, labels, reduction="none")
    assert_close("lm_head_loss", "forward", losses, truth)


@triton_only
def test_a_sure_label_loses_nothing(backend: str) -> None:
    """Its logit is summed apart from the others, and may come out above their logsumexp."""
    hidden, weight = torch.randn(64, 300).half(), torch.randn(100, 300).half()
    labels = (hidden @ weight.t()).argmax(1)
    losses = torch.ops.gpt2fast.lm_head_loss_fwd(hidden * 8, weight * 8, labels, -100)
    assert (losses >= 0).all()
    assert (losses < 1e-2).any()


@triton_only
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("vocab", [64, 65, 127, 128, 129, 300])
def test_rows_in_several_steps(
    vocab: int, reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "LM_HEAD_CROSS_ENTROPY", (64, 4))
    tensors, labels = loss_inputs(5, 8, vocab)
    labels[[0, 1, 2]] = torch.tensor([0, vocab - 1, -100])
    compare_losses(tensors, labels, reduction)


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_padding_is_never_read(backend: str, dtype: torch.dtype) -> None:
    """Columns past the vocabulary hold NaN here, and no row is at a boundary of 16 bytes."""
    hidden, weight = torch.randn(9, 20).to(dtype)[:, 1:20], torch.randn(70, 21).to(dtype)[:, 1:20]
    labels = torch.randint(70, (9,))
    compare_losses([hidden, weight], labels, "mean")
    with torch.no_grad():
        losses = kernels.lm_head_loss(hidden, weight, labels, reduction="none")
    truth = oracles.lm_head_loss(hidden.double(), weight.double(), labels, reduction="none")
    assert_close("lm_head_loss", "forward", losses, truth, losses, dtype)


@triton_only
def test_padding_becomes_zero(backend: str) -> None:
    """Whatever a matrix product reads at the end of a row, it is not NaN."""
    from gpt2fast.kernels._triton.lm_head import _cross_entropy_kernel

    logits, losses = torch.randn(2, 128), torch.empty(2)
    logits[:, 70:] = float("nan")
    labels = torch.tensor([3, -1])
    expected = logits[0, :70].softmax(0) - torch.nn.functional.one_hot(labels[0], 70)
    _cross_entropy_kernel[(2,)](
        logits, labels, losses, -1, 70, 128, WRITE_GRADIENT=True, BLOCK_V=64, num_warps=4
    )
    torch.testing.assert_close(logits[0, :70], expected)
    assert (logits[0, 70:] == 0).all()
    assert (logits[1] == 0).all()
    assert losses[1] == 0


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_unchecked_label_out_of_range_gives_nan(backend: str, dtype: torch.dtype) -> None:
    """Nobody checks labels inside a compiled graph: no read out of bounds, no silent loss."""
    (hidden, weight), labels = loss_inputs(4, 8, 11, dtype)
    labels[[1, 3]] = torch.tensor([11, -5])
    ops, bad = torch.ops.gpt2fast, torch.tensor([False, True, False, True])
    assert torch.equal(ops.lm_head_loss_fwd(hidden, weight, labels, -100).isnan(), bad)
    losses, grad_hidden, grad_weight = ops.lm_head_loss_fwd_bwd(
        hidden, weight, labels, None, -100, True, True
    )
    assert torch.equal(losses.isnan(), bad)
    assert torch.equal(grad_hidden.isnan().all(1), bad)
    assert grad_weight.isnan().all()


@triton_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str, backend: str) -> None:
    """One node a direction, whatever the number of chunks."""
    (hidden, weight), labels = loss_inputs(20, 16, 40)
    hidden.requires_grad_()
    weight.requires_grad_()

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return kernels.lm_head_loss(hidden, weight, labels, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            got, expected = compiled(hidden, weight), call(hidden, weight)
        assert torch.equal(got, expected)
        if graded:
            upstream = torch.randn(got.shape)
            grads = torch.autograd.grad(got, (hidden, weight), upstream)
            wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
            for ours, theirs in zip(grads, wanted, strict=True):
                assert torch.equal(ours, theirs)


@triton_only
@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("lm_head_loss", (-100, "mean")),
        ("lm_head_loss", (-100, "none")),
        ("lm_head_loss_fwd", (-100,)),
        ("lm_head_loss_fwd_bwd", (None, -100, True, True)),
        ("lm_head_loss_fwd_bwd", (torch.ones(7), -100, True, False)),
        ("lm_head_loss_fwd_bwd", (None, -100, False, True)),
    ],
    ids=str,
)
def test_opcheck(op: str, args: tuple[Any, ...], backend: str) -> None:
    tensors, labels = loss_inputs(7, 16, 40, torch.float16)
    args = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(getattr(torch.ops.gpt2fast, op).default, (*tensors, labels, *args))
    if op == "lm_head_loss":
        tensors = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(torch.ops.gpt2fast, op).default, (*tensors, labels, *args))


@triton_only
def test_the_kernels_refuse_what_does_not_fit(backend: str) -> None:
    (hidden, weight), labels = loss_inputs(4, 8, 11)
    loss = torch.ops.gpt2fast.lm_head_loss_fwd
    with pytest.raises(
        ValueError, match=r"of one dtype and device; got \[4, 8\] torch.float32 on "
    ):
        loss(hidden, weight.half(), labels, -100)
    with pytest.raises(ValueError, match=r"^weight must have rows of unit stride; got \(1, 11\)"):
        loss(hidden, torch.randn(8, 11).t(), labels, -100)
    with pytest.raises(ValueError, match=r"labels \[4\] on \w+(:0)?; got \[4\] torch.int32"):
        loss(hidden, weight, labels.int(), -100)


def _model_size(vocab: int, width: int, rows: int, dtype: torch.dtype) -> None:
    tensors, labels = loss_inputs(rows, width, vocab, dtype)
    labels[::7] = -100
    for reduction in REDUCTIONS:
        compare_losses(tensors, labels, reduction)
    tensors = [t.requires_grad_() for t in tensors]
    once, again = (
        torch.autograd.grad(kernels.lm_head_loss(*tensors, labels), tensors) for _ in range(2)
    )
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)


def _many_logits(rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows' logits at once, and the last rows' results against those of the rows alone."""
    monkeypatch.setattr(configs, "LM_HEAD_CHUNK_BYTES", 1 << 40)
    (hidden, weight), labels = loss_inputs(rows, 64, vocab, torch.float16)
    last = slice(rows - 50, rows)
    with torch.no_grad():
        scores = kernels.lm_head_loss(hidden, weight, labels, reduction="none")
    hidden.requires_grad_()
    losses = kernels.lm_head_loss(hidden, weight, labels, reduction="sum")
    (grad,) = torch.autograd.grad(losses, hidden)
    truth = oracles.lm_head_loss(
        hidden[last].double(), weight.double(), labels[last], reduction="none"
    )
    (truth_grad,) = torch.autograd.grad(truth.sum(), hidden)
    plain = oracles.lm_head_loss(hidden[last], weight, labels[last], reduction="none")
    (plain_grad,) = torch.autograd.grad(plain.sum(), hidden)
    assert_close("lm_head_loss", "forward", scores[last], truth)
    assert_close("lm_head_loss", "backward", grad[last], truth_grad[last], plain_grad[last])


@triton_only
def test_the_bodies_of_the_gpu_tests(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _model_size(40, 16, 9, torch.float16)
    _many_logits(150, 40, monkeypatch)


@pytest.mark.gpu
@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 333])
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
def test_model_sizes(width: int, rows: int, backend: str, dtype: torch.dtype) -> None:
    _model_size(50257, width, rows, dtype)


@pytest.mark.gpu
@triton_only
def test_more_than_2_to_the_31_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _many_logits(2**31 // 50257 + 100, 50257, monkeypatch)


@pytest.mark.gpu
@triton_only
@pytest.mark.parametrize("graded", [True, False])
def test_peak_memory(graded: bool, backend: str) -> None:
    """16k tokens in bfloat16: below a quarter of what plain PyTorch needs beyond its inputs."""
    (hidden, weight), labels = loss_inputs(16384, 768, 50257, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()

    def peak(loss: Callable[..., Tensor]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(graded):
            value = loss(hidden, weight, labels, reduction="mean")
        if graded:
            value.backward()
        used = torch.cuda.max_memory_allocated() - before
        hidden.grad = weight.grad = None
        return used

    assert peak(kernels.lm_head_loss) < 0.25 * peak(oracles.lm_head_loss)
