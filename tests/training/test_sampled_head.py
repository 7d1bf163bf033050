import pytest
import torch
from torch.nn import functional as F

from gpt2fast.training.sampled_head import VocabularySampler, sampled_head_loss


def _problem(rows=37, vocab_size=50, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocab_size, width, generator=g) * 0.5
    targets = torch.randint(vocab_size, (rows,), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _oracle(hidden, weight, targets, ids, log_inclusion):
    """The module's formula for Z, in float64, written with the whole logits."""
    logits = hidden.double() @ weight.double().T
    target = logits.gather(1, targets[:, None])
    corrected = logits[:, ids] - log_inclusion.double()
    corrected = corrected.masked_fill(ids[None] == targets[:, None], -torch.inf)
    return (torch.logsumexp(torch.cat([target, corrected], 1), 1) - target[:, 0]).mean()


def test_the_whole_vocabulary_gives_the_ordinary_loss():
    hidden, weight, targets = _problem()
    loss = sampled_head_loss(hidden, weight, targets, torch.arange(50), torch.zeros(50), chunk=8)
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    expected_loss = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    expected = torch.autograd.grad(expected_loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected_loss.float(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_sample_of_nothing_leaves_the_target_alone():
    hidden, weight, targets = _problem()
    none = torch.empty(0, dtype=torch.int64)
    loss = sampled_head_loss(hidden, weight, targets, none, torch.empty(0), chunk=8)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_over_a_sample(dtype, tolerance):
    hidden, weight, targets = _problem()
    sampler = VocabularySampler(torch.bincount(targets, minlength=50), size=20)
    sample = sampler.draw(torch.Generator().manual_seed(1))
    inside = torch.isin(targets, sample[0])
    assert inside.any()
    assert not inside.all()
    loss = sampled_head_loss(hidden, weight, targets, *sample, dtype=dtype, chunk=10)
    got = torch.autograd.grad(loss, (hidden, weight))
    expected_loss = _oracle(hidden, weight, targets, *sample)
    expected = torch.autograd.grad(expected_loss, (hidden, weight))
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_denominator_is_unbiased():
    hidden, weight, targets = _problem(rows=3)
    hidden, weight = hidden.detach(), weight.detach()
    sampler = VocabularySampler(torch.arange(50) ** 2, size=25)
    logits = hidden @ weight.T
    generator = torch.Generator().manual_seed(2)
    estimates = []
    for _ in range(1500):
        ids, log_inclusion = sampler.draw(generator)
        loss = [
            sampled_head_loss(hidden[i : i + 1], weight, targets[i : i + 1], ids, log_inclusion)
            for i in range(3)
        ]
        estimates.append((torch.stack(loss) + logits[torch.arange(3), targets]).exp())
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - logits.exp().sum(1)
    # Five standard errors of the mean: a wrong weight on any part of Z is many times that.
    assert (error.abs() < 5 * estimates.std(0) / 1500**0.5).all()


def test_inclusion_follows_frequency_and_adds_up_to_the_size():
    counts = torch.tensor([10_000, 1_000, 500, 100, 10, 1, 0, 0, 0, 0])
    sampler = VocabularySampler(counts, size=5)
    inclusion = sampler.inclusion
    assert inclusion.sum().item() == pytest.approx(5, rel=1e-4)
    assert inclusion.tolist() == sorted(inclusion.tolist(), reverse=True)
    assert inclusion[0] == 1
    assert inclusion[-1] > 0
    assert inclusion[4] / inclusion[5] == pytest.approx((11 / 2) ** 0.75, rel=1e-4)
    assert VocabularySampler(counts, size=10).inclusion.tolist() == [1.0] * 10
    with pytest.raises(ValueError, match="1 to 10 tokens, got 11"):
        VocabularySampler(counts, size=11)
