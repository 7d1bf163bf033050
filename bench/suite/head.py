"""The cases of the tied head: the loss, and the choice of the next token."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suite.cases import Case, Inputs, Model, Provider, Select, peers, random_tensor
from bench.suite.work import OURS, Work
from gpt2fast import kernels
from tests.kernels import oracles


def _plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction=reduction)


def loss_case(model: Model, rows: int, reduction: str, dtype: torch.dtype, select: Select) -> Case:
    """`lm_head_loss`; where it is averaged, with its gradients."""
    width, size, vocab = model.hidden, dtype.itemsize, model.vocab
    tensors, products = (rows * width + vocab * width) * size, 2 * rows * width * vocab
    forward = Work(tensors, products)
    # For the mean the gradients are formed with the loss, so there is no backward pass to time.
    training = {"full": Work(2 * tensors, 3 * products)} if reduction == "mean" else {}

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return kernels.lm_head_loss(hidden, weight, labels, reduction=reduction)

    plain = partial(_plain_loss, reduction=reduction)
    return Case(
        op="lm_head_loss",
        shape=f"{reduction} {rows}x{width}x{vocab}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype),
                random_tensor(vocab, width, dtype=dtype, scale=4 * width**-0.5),
            ),
            (torch.randint(vocab, (rows,)),),
        ),
        oracle=partial(oracles.lm_head_loss, reduction=reduction),
        tolerance="lm_head_loss",
        work={"forward": forward, **training},
        providers={
            OURS: Provider(ours, select),
            **peers(plain),
            "chunked eager": Provider(ours, partial(kernels.backend, "torch")),
        },
        memory=True,
    )


def _plain_topk(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (hidden @ weight.t()).topk(k)


def _plain_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.t()).argmax(-1)


def _chosen_logits(inputs: Inputs, outputs: Any) -> tuple[Tensor, ...]:
    """The exact logits of the chosen ids: of two that are as good as equal either may win."""
    ids = outputs if isinstance(outputs, Tensor) else outputs[1]
    hidden, weight = (t.double() for t in inputs.leaves)
    logits = hidden @ weight.t()
    chosen = logits.gather(-1, ids.long().view(len(logits), -1))
    return (chosen,) if isinstance(outputs, Tensor) else (chosen, outputs[0].double())


def choice_case(model: Model, rows: int, k: int | None, dtype: torch.dtype, select: Select) -> Case:
    """`lm_head_argmax`, or `lm_head_topk` where k is given."""
    width, size, vocab = model.hidden, dtype.itemsize, model.vocab
    ours = kernels.lm_head_argmax if k is None else partial(kernels.lm_head_topk, k=k)
    plain = _plain_argmax if k is None else partial(_plain_topk, k=k)
    return Case(
        op="lm_head_argmax" if k is None else f"lm_head_top{k}",
        shape=f"{rows}x{width}x{vocab}",
        dtype=dtype,
        inputs=lambda: Inputs(
            (
                random_tensor(rows, width, dtype=dtype),
                random_tensor(vocab, width, dtype=dtype, scale=4 * width**-0.5),
            )
        ),
        oracle=plain,
        tolerance="linear",
        work={"forward": Work((rows + vocab) * width * size, 2 * rows * width * vocab)},
        providers={OURS: Provider(ours, select), **peers(plain)},
        observe=_chosen_logits,
    )
