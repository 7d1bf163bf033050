"""Cross-entropy over a sample of the vocabulary, for training where the head dominates the cost.

In a small GPT-2 nearly all arithmetic is the tied head: 50,257 columns for every token. Here each
step uses a random subset S of them. Token v is in S with probability pi_v, proportional to a power
of its frequency and 1 for the most frequent; the softmax denominator

    Z = exp(z_target) + sum over v in S, v != target, of exp(z_v) / pi_v

is then an unbiased estimate of the full one (the Horvitz-Thompson estimator; for language models
see Jean et al. 2015, arXiv:1412.2007). Its logarithm is biased slightly downward, so training ends
on the full softmax, and validation always uses that.
"""

from typing import Any

import torch


class VocabularySampler:
    """Draws the step's vocabulary subset.

    ``counts`` int64 ``[V]``: how often each token occurs in the training data. ``size``: the
    expected number of tokens drawn, at most V. Inclusion probabilities are proportional to
    ``(count + 1) ** power``, cut off at 1.
    """

    def __init__(self, counts: torch.Tensor, size: int, power: float = 0.75) -> None:
        if not 1 <= size <= len(counts):
            raise ValueError(f"the sampled head takes 1 to {len(counts)} tokens, got {size}")
        weights = (counts.double() + 1) ** power
        low, high = 0.0, size / weights.min().item()
        for _ in range(100):
            scale = (low + high) / 2
            if (scale * weights).clamp(max=1).sum() < size:
                low = scale
            else:
                high = scale
        self.inclusion = (high * weights).clamp(max=1).float()

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 ``[S]``, ascending, and the log of their inclusion probabilities ``[S]``."""
        chosen = torch.rand(len(self.inclusion), generator=generator) < self.inclusion
        ids = chosen.nonzero().squeeze(1)
        return ids, self.inclusion[ids].log()


class _SampledHeadLoss(torch.autograd.Function):
    """The gradients are computed in the forward, chunk by chunk; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ids: torch.Tensor,
        log_inclusion: torch.Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> torch.Tensor:
        rows = hidden.size(0)
        column = torch.full((weight.size(0),), -1, device=ids.device)
        column[ids] = torch.arange(len(ids), device=ids.device)
        column = column[targets]  # the target's column in the sample, or -1
        target_weight = weight[targets]
        target_logits = (hidden * target_weight).sum(-1)
        sampled = weight[ids].to(dtype)  # [S, C]
        hidden_low = hidden.to(dtype)

        loss = hidden.new_zeros(())
        grad_hidden = torch.empty_like(hidden)
        grad_target = torch.empty_like(target_logits)
        grad_sampled = torch.zeros_like(weight[ids])
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden_low[part] @ sampled.T).float().sub_(log_inclusion)  # [chunk, S]
            own = (column[part] >= 0).nonzero().squeeze(1)
            logits[own, column[part][own]] = -torch.inf
            target = target_logits[part]
            top = torch.maximum(logits.amax(-1), target) if len(ids) else target
            probabilities = logits.sub_(top[:, None]).exp_()
            target_exp = (target - top).exp()
            total = probabilities.sum(-1) + target_exp
            loss += (total.log() + top - target).sum()
            grad_target[part] = target_exp / total - 1
            probabilities = (probabilities / total[:, None]).to(dtype)
            grad_hidden[part] = probabilities @ sampled
            grad_sampled += probabilities.T @ hidden_low[part]

        grad_hidden.addcmul_(grad_target[:, None], target_weight)
        grad_weight = torch.zeros_like(weight)
        grad_weight.index_copy_(0, ids, grad_sampled)
        grad_weight.index_add_(0, targets, grad_target[:, None] * hidden)
        ctx.save_for_backward(grad_hidden.div_(rows), grad_weight.div_(rows))
        return loss / rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None, None, None


def sampled_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    log_inclusion: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    chunk: int = 512,
) -> torch.Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets`` over a vocabulary sample.

    ``hidden`` fp32 ``[N, C]``, ``weight`` fp32 ``[V, C]``, ``targets`` int64 ``[N]``; ``ids`` and
    ``log_inclusion`` ``[S]`` from a VocabularySampler. The matrix products run in ``dtype``, all
    else in fp32, on ``chunk`` rows at a time. A sample of the whole vocabulary gives the ordinary
    loss. Returns a scalar in nats, differentiable in ``hidden`` and ``weight``.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _SampledHeadLoss.apply(hidden, weight, targets, ids, log_inclusion, dtype, chunk)
