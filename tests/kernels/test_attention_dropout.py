"""Dropout in the attention kernels: which weights are kept, and what comes of them."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt2fast import kernels
from gpt2fast.kernels._triton import attention_fwd
from gpt2fast.kernels._triton.configs import AttentionConfig
from tests.kernels import oracles
from tests.kernels.attending import ours, tensors_of
from tests.kernels.devices import triton_only
from tests.kernels.oracles import compare


def _kept(batch: int, heads: int, new: int, past: int, p: float, seed: int) -> Tensor:
    """Which weights the kernel keeps, ``[B, H, T, S]``: equal scores, and values one-hot."""
    keys = past + new
    head_size = 64 if keys <= 64 else 128
    one_hot = torch.eye(keys, head_size)
    qkv = torch.zeros(batch, new, 3, heads, head_size)
    qkv[:, :, 2] = one_hot[past:, None]
    past_kv = torch.zeros(2, batch, heads, past, head_size)
    past_kv[1] = one_hot[:past]
    torch.manual_seed(seed)
    out = kernels.causal_attention(
        qkv.flatten(2), heads, past_kv=past_kv if past else None, dropout_p=p
    )
    weights = out.unflatten(-1, (heads, head_size)).transpose(1, 2)[..., :keys]
    kept = weights > 0
    seen = oracles.allowed_keys(new, keys)
    factor = 2**16 / (2**16 - round(p * 2**16))
    expected = kept * factor / seen.sum(-1, keepdim=True)
    assert torch.allclose(weights, expected, rtol=1e-5)
    return kept


@triton_only
@pytest.mark.parametrize(("past", "dtype"), [(0, torch.float32), (21, torch.float16)], ids=str)
def test_exactly(backend: str, small_tiles: AttentionConfig, past: int, dtype: torch.dtype) -> None:
    """Forward and backward with the mask read off the kernel, in float64."""
    kept = _kept(1, 2, 40, past, 0.3, seed=5)
    scaled = kept * 2**16 / (2**16 - round(0.3 * 2**16))

    def seeded(*t: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ours(2, dropout_p=0.3)(*t)

    compare(
        "attention",
        seeded,
        lambda *t: oracles.attention(t[0], 2, *t[1:], head_mask=scaled.to(t[0].dtype))[0],
        tensors_of(1, 2, 40, past, 16, dtype),
    )


@triton_only
def test_mask_is_one_of_position_not_of_tiles(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    for tiles in ((16, 16), (64, 32), (32, 64)):
        config = AttentionConfig(*tiles, 4, 2)
        monkeypatch.setattr(attention_fwd, "attention_fwd_config", lambda *_, c=config, **__: c)
        masks.append(_kept(1, 1, 60, 30, 0.4, seed=1))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@triton_only
def test_draws_are_independent(backend: str) -> None:
    """Rate and correlations of Bernoulli draws, all within five standard errors."""
    p = 0.25
    kept = torch.cat([_kept(2, 2, 64, 0, p, seed) for seed in (1, 2)])
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    draws = kept[..., seen].double()
    assert abs(float(draws.mean()) - (1 - p)) < 5 * (p * (1 - p) / draws.numel()) ** 0.5
    flat = draws.flatten(0, 1)  # of every seed, batch row and head
    correlation = torch.corrcoef(flat) - torch.eye(len(flat), device=flat.device)
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
    kept = kept.double() - (1 - p)
    for rows, columns in ((1, 0), (0, 1), (8, 0), (0, 8), (8, 8), (16, 0), (0, 2), (1, 1)):
        here, there = kept[..., rows:, columns:], kept[..., : 64 - rows, : 64 - columns]
        both = seen[rows:, columns:] & seen[: 64 - rows, : 64 - columns]
        products = (here * there)[..., both]
        assert abs(float(products.mean())) < 5 * p * (1 - p) / products.numel() ** 0.5


@triton_only
def test_checkpointing_replays_the_mask(backend: str) -> None:
    qkv = torch.randn(1, 9, 48)

    def grad(recompute: bool) -> Tensor:
        leaf = qkv.clone().requires_grad_()
        torch.manual_seed(3)
        call = ours(2, dropout_p=0.5)
        out = checkpoint(call, leaf, use_reentrant=False) if recompute else call(leaf)
        torch.rand(3)  # the generator moves on before backward
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        return gradient

    assert torch.equal(grad(True), grad(False))
