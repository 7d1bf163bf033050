"""lm_head_loss against logits and cross-entropy in float64."""

import pytest
import torch
from torch import Tensor

import gpt2fast.kernels.lm_head as lm_head
from gpt2fast import kernels
from gpt2fast.kernels import torch_ops
from gpt2fast.kernels._triton import configs
from tests.kernels import oracles
from tests.kernels.devices import (
    DEVICE,
    TRITON_DTYPES,
    backends,
    backends_and_dtypes,
)
from tests.kernels.oracles import compare
from tests.tolerances import assert_close

REDUCTIONS = ["mean", "sum", "none"]


def loss_inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    tensors = [torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) / 2).to(dtype)]
    return tensors, torch.randint(vocab, (rows,))


def compare_losses(
    tensors: list[Tensor], labels: Tensor, reduction: str, ignore_index: int = -100
) -> None:
    options = {"reduction": reduction, "ignore_index": ignore_index}
    compare(
        "lm_head_loss",
        lambda *t: kernels.lm_head_loss(*t, labels, **options),
        lambda *t: oracles.lm_head_loss(*t, labels, **options),
        tensors,
    )


@backends_and_dtypes
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 5), (7, 63, 131), (37, 16, 50)], ids=str)
def test_loss(
    shape: tuple[int, int, int], reduction: str, backend: str, dtype: torch.dtype
) -> None:
    tensors, labels = loss_inputs(*shape, dtype)
    compare_losses(tensors, labels, reduction)


@backends_and_dtypes
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows(ignore_index: int, reduction: str, backend: str, dtype: torch.dtype) -> None:
    tensors, labels = loss_inputs(19, 16, 50, dtype)
    labels[labels == 3] = 4
    labels[[0, 3, 4, 18]] = ignore_index
    compare_losses(tensors, labels, reduction, ignore_index)
    if reduction == "none":
        losses = kernels.lm_head_loss(*tensors, labels, ignore_index=ignore_index, reduction="none")
        assert (losses[[0, 3, 4, 18]] == 0).all()
        assert (losses[5:18] > 0).all()


@backends
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 50])
def test_chunk_boundaries(
    rows: int, reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "_CHUNK_ELEMENTS", 1)  # the smallest chunk: 16 rows
    monkeypatch.setattr(configs, "LM_HEAD_CHUNK_BYTES", 1)
    monkeypatch.setattr(configs, "LM_HEAD_CHUNK_TILE", 16)
    tensors, labels = loss_inputs(rows, 8, 40)
    labels[rows // 2] = -100 if rows > 1 else 0
    assert len(lm_head.row_chunks(rows, 40)) == -(-rows // 16)
    compare_losses(tensors, labels, reduction)


@backends
def test_the_default_reduction_is_the_mean_with_ignore_index_minus_100(backend: str) -> None:
    (hidden, weight), labels = loss_inputs(5, 8, 11)
    labels[2] = -100
    explicit = kernels.lm_head_loss(hidden, weight, labels, ignore_index=-100, reduction="mean")
    assert torch.equal(kernels.lm_head_loss(hidden, weight, labels), explicit)


@backends
@pytest.mark.parametrize(("reduction", "value"), [("mean", float("nan")), ("sum", 0.0)])
@pytest.mark.parametrize("rows", [3, 0])
def test_nothing_kept(rows: int, reduction: str, value: float, backend: str) -> None:
    """As PyTorch's cross_entropy: the mean of nothing is NaN, its gradients are zero."""
    (hidden, weight), labels = loss_inputs(rows, 8, 11)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = kernels.lm_head_loss(hidden, weight, torch.full_like(labels, -100), reduction=reduction)
    assert torch.equal(loss, torch.tensor(value)) or (loss.isnan() and value != value)
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


@backends
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_wanted_gradients(reduction: str, frozen: str, backend: str) -> None:
    (hidden, weight), labels = loss_inputs(6, 8, 11)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = kernels.lm_head_loss(hidden, weight, labels, reduction=reduction)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.sum().backward()
    reference = [t.detach().requires_grad_() for t in (hidden, weight)]
    oracles.lm_head_loss(*reference, labels, reduction=reduction).sum().backward()
    for ours, wanted in zip((hidden, weight), reference, strict=True):
        assert (ours.grad is not None) == ours.requires_grad
        if ours.requires_grad:
            assert_close("lm_head_loss", "backward", ours.grad, wanted.grad)  # type: ignore[arg-type]


@backends
def test_tied_weight(backend: str) -> None:
    """The same tensor as hidden states' source and as head: both gradients add up."""
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (5,))
    kernels.lm_head_loss(weight[:5], weight, labels).backward()
    reference = weight.detach().double().requires_grad_()
    oracles.lm_head_loss(reference[:5], reference, labels, reduction="mean").backward()
    assert_close("lm_head_loss", "backward", weight.grad, reference.grad)  # type: ignore[arg-type]


@backends
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_extreme_logits(reduction: str, backend: str) -> None:
    """Logits of +-1e4, where a naive exp overflows: rows that are wrong by far, and sure."""
    hidden = torch.tensor([[100.0], [-100.0], [100.0]])
    weight = torch.tensor([[100.0], [0.0], [-100.0]])
    compare_losses([hidden, weight], torch.tensor([0, 0, 1]), reduction)


def test_a_gradient_scaler_saves_float16_from_underflow() -> None:
    """Probabilities / N of 3e-8 are nothing in float16, unless the scaler's factor comes first."""
    rows, vocab, scale = 16384, 2048, 2.0**16
    hidden, weight = torch.zeros(rows, 1).half(), 1 + torch.randn(vocab, 1).half() / 16
    labels = torch.arange(rows) % vocab
    leaf = hidden.clone().requires_grad_()
    (kernels.lm_head_loss(leaf, weight, labels) * scale).backward()
    truth = scale / rows * (weight.double().mean() - weight.double()[labels])
    assert leaf.grad is not None
    assert (leaf.grad.double() - truth).abs().max() / truth.abs().max() < 0.01


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.bfloat16), *(("triton", dtype) for dtype in TRITON_DTYPES[1:])],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction: str, backend: str, dtype: torch.dtype) -> None:
    """float32 inputs under autocast: products in 16 bits, the loss and its gradients float32."""
    (hidden, weight), labels = loss_inputs(9, 16, 50)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype):
        loss = kernels.lm_head_loss(hidden, weight, labels, reduction=reduction)
        reference = [t.detach().requires_grad_() for t in (hidden, weight)]
        plain = oracles.lm_head_loss(*reference, labels, reduction=reduction)
    assert loss.dtype == torch.float32
    upstream = torch.randn(loss.shape)
    loss.backward(upstream)
    plain.backward(upstream)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    oracle = oracles.lm_head_loss(*exact, labels, reduction=reduction)
    oracle.backward(upstream.double())

    def error(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth).abs().max() / truth.abs().max())

    eps = torch.finfo(dtype).eps / 2
    oracle = oracle.detach()
    assert error(loss.detach(), oracle) <= 2 * error(plain.detach(), oracle) + eps
    for ours, same, truth in zip((hidden, weight), reference, exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        assert error(ours.grad, truth.grad) <= 2 * error(same.grad, truth.grad) + eps  # type: ignore[arg-type]


@backends
def test_backward_twice_and_scaled(backend: str) -> None:
    """The gradients formed in the forward pass are scaled, never written to."""
    (hidden, weight), labels = loss_inputs(6, 8, 11)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = kernels.lm_head_loss(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, tripled, again, strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(b, 3 * a)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    (hidden, weight), labels = loss_inputs(5, 3, 4)
    labels[1] = -100
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    # The loss is computed in float32: coarse steps, and a tolerance to match.
    assert torch.autograd.gradcheck(
        lambda h, w: kernels.lm_head_loss(h, w, labels, reduction=reduction),
        (hidden, weight),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


@backends
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(reduction: str, backend: str) -> None:
    """Silently missing terms would be worse: autograd itself would not notice."""
    (hidden, weight), labels = loss_inputs(5, 3, 4)
    hidden.requires_grad_()
    loss = kernels.lm_head_loss(hidden, weight, labels, reduction=reduction).sum()
    with pytest.raises(
        RuntimeError, match=r"^lm_head_loss is differentiable once; for create_graph"
    ):
        torch.autograd.grad(loss, hidden, create_graph=True)


@backends
def test_inputs_are_not_changed_and_may_be_strided(backend: str) -> None:
    hidden, weight = torch.randn(8, 6).t(), torch.randn(11, 16)[:, ::2]
    labels = torch.randint(11, (12,))[::2]
    before = hidden.clone(), weight.clone(), labels.clone()
    compare_losses([hidden, weight], labels, "mean")
    for now, then in zip((hidden, weight, labels), before, strict=True):
        assert torch.equal(now, then)


@backends
def test_int32_labels(backend: str) -> None:
    (hidden, weight), labels = loss_inputs(5, 8, 11)
    assert torch.equal(
        kernels.lm_head_loss(hidden, weight, labels.int()),
        kernels.lm_head_loss(hidden, weight, labels),
    )


@backends_and_dtypes
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients(reduction: str, backend: str, dtype: torch.dtype) -> None:
    """As in scoring: under no_grad, although the parameters could have gradients."""
    tensors, labels = loss_inputs(35, 24, 300, dtype)
    labels[[0, 7, 34]] = -100
    plain = oracles.lm_head_loss(*tensors, labels, reduction=reduction)
    truth = oracles.lm_head_loss(*(t.double() for t in tensors), labels, reduction=reduction)
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        losses = kernels.lm_head_loss(*tensors, labels, reduction=reduction)
    assert losses.dtype == torch.float32
    assert_close("lm_head_loss", "forward", losses, truth, plain, dtype)


def test_slow_16_bit_products_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "multiplies_fast", lambda *_: False)
    tensors, labels = loss_inputs(20, 8, 11, torch.bfloat16)
    results = []
    for inputs in (tensors, [t.float() for t in tensors]):
        leaves = [t.requires_grad_() for t in inputs]
        for reduction in REDUCTIONS:
            with torch.no_grad():
                results.append([kernels.lm_head_loss(*leaves, labels, reduction=reduction)])
            loss = kernels.lm_head_loss(*leaves, labels, reduction=reduction)
            grads = torch.autograd.grad(loss.sum(), leaves)
            assert {grad.dtype for grad in grads} == {leaves[0].dtype}
            results[-1] += [loss, *(grad.bfloat16() for grad in grads)]
    for ours, exact in zip(results[:3], results[3:], strict=True):
        assert all(map(torch.equal, ours, exact))


@backends
def test_nan_is_passed_on(backend: str) -> None:
    """A row of NaN gives NaN, and spoils no other row."""
    (hidden, weight), labels = loss_inputs(20, 8, 11, torch.float16)
    hidden[3] = float("nan")
    expected = torch.arange(20) == 3
    for needed in (False, True):
        leaf = hidden.clone().requires_grad_(needed)
        losses = kernels.lm_head_loss(leaf, weight, labels, reduction="none")
        assert torch.equal(losses.isnan(), expected)
        if needed:
            losses.sum().backward()
            assert leaf.grad is not None
            assert torch.equal(leaf.grad.isnan().any(1), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 11], "labels must be in [0, 11) or -100; got 11"),
        ([0, -1], "labels must be in [0, 11) or -100; got -1"),
        ([-100, -101], "labels must be in [0, 11) or -100; got -101"),
        ([0, 1, 2], "expected labels [2]; got [3]"),
        ([[0, 1]], "expected labels [2]; got [1, 2]"),
        ([0.0, 1.0], "labels must be integers; got torch.float32"),
        ([True, False], "labels must be integers; got torch.bool"),
    ],
)
def test_wrong_labels(labels: list[int], message: str) -> None:
    (hidden, weight), _ = loss_inputs(2, 8, 11)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kernels.lm_head_loss(hidden, weight, torch.tensor(labels))
    assert str(error.value) == message


def test_wrong_shapes_and_reduction() -> None:
    (hidden, weight), labels = loss_inputs(2, 8, 11)
    with pytest.raises(ValueError, match=r"^expected hidden \[N, C\] and weight \[V, C\]; got "):
        kernels.lm_head_loss(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"got \[1, 2, 8\] and \[11, 8\]$"):
        kernels.lm_head_loss(hidden[None], weight, labels)
    with pytest.raises(ValueError, match=r"^reduction must be one of \('mean', 'sum', 'none'\); "):
        kernels.lm_head_loss(hidden, weight, labels, reduction="batchmean")
