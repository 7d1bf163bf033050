"""Attention in blocks of queries, for training on a CPU."""

import pytest
import torch

from gpt2fast import kernels
from gpt2fast.kernels import blocked_attention
from tests.kernels.oracles import attention
from tests.tolerances import assert_close


@pytest.mark.parametrize("length", [1, 63, 65, 130])
def test_values_and_gradients_are_those_of_the_oracle(length: int) -> None:
    qkv = torch.randn(2, length, 3 * 24, requires_grad=True)
    upstream = torch.randn(2, length, 24)
    out = blocked_attention.blocked_attention(qkv, 3, 0.3, 0.0)
    out.backward(upstream)
    exact = qkv.detach().double().requires_grad_()
    wanted, _ = attention(exact, 3, scale=0.3)
    wanted.backward(upstream.double())
    assert_close("attention", "forward", out, wanted)
    assert qkv.grad is not None
    assert exact.grad is not None
    assert_close("attention", "backward", qkv.grad, exact.grad)


def test_one_head_of_one_row_does_not_write_into_its_input() -> None:
    qkv = torch.randn(1, 70, 3 * 8, requires_grad=True)
    before = qkv.detach().clone()
    blocked_attention.blocked_attention(qkv, 1, 0.5, 0.25).sum().backward()
    assert torch.equal(qkv, before)


def test_dropout_drops_its_share_and_gradients_belong_to_the_mask_drawn() -> None:
    """With values of one the output is each row's kept weight: 1 on average."""
    qkv = torch.randn(2, 200, 3 * 16, dtype=torch.float32)
    qkv[..., 32:] = 1
    qkv.requires_grad_()
    torch.manual_seed(1)
    out = blocked_attention.blocked_attention(qkv, 2, 0.1, 0.3)
    assert abs(out.mean().item() - 1) < 0.02
    assert out.std() > 0.02
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert qkv.grad is not None
    # Along a direction, by central differences under the same mask.
    direction, step = torch.randn_like(qkv), 1e-3
    sides = []
    for sign in (1, -1):
        torch.manual_seed(1)
        moved = qkv.detach() + sign * step * direction
        sides.append((blocked_attention.blocked_attention(moved, 2, 0.1, 0.3) * upstream).sum())
    slope = ((sides[0] - sides[1]) / (2 * step)).item()
    assert slope == pytest.approx((qkv.grad * direction).sum().item(), rel=2e-2)


def test_op_uses_it_to_train_long_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    blocked = blocked_attention.blocked_attention

    def spy(*args: object) -> torch.Tensor:
        calls.append(args[1:])
        return blocked(*args)

    monkeypatch.setattr(blocked_attention, "blocked_attention", spy)
    qkv = torch.randn(1, 400, 3 * 8, requires_grad=True)
    with kernels.backend("torch"):
        kernels.causal_attention(qkv, 2).sum().backward()
        assert calls == [(2, 0.5, 0.0)]
        kernels.causal_attention(qkv.detach(), 2)
        kernels.causal_attention(qkv[:, :50], 2, dropout_p=0.1)
        kernels.causal_attention(qkv.double(), 2)
        mask = torch.ones(1, 400, dtype=torch.bool)
        kernels.causal_attention(qkv, 2, mask=mask)
        assert len(calls) == 1
        kernels.causal_attention(qkv, 2, dropout_p=0.1)
    assert calls[1:] == [(2, 0.5, 0.1)]
