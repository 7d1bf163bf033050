"""The two backends, and outputs poisoned so that a value nobody wrote is seen."""

from collections.abc import Iterator

import pytest
import torch

from gpt2fast import kernels
from gpt2fast.kernels._triton import attention_bwd, attention_fwd, configs, target
from gpt2fast.kernels._triton.configs import AttentionConfig
from tests.kernels.devices import DEVICE


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one backend, by ``@backends`` or ``@backends_and_dtypes``."""
    # Fills every torch.empty with NaN, or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with kernels.backend(request.param), torch.device(DEVICE):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our matrix product in every role, also where the table prefers cuBLAS."""
    monkeypatch.setattr(configs, "matmul_provider", lambda *_: "triton")


@pytest.fixture(params=[80, 90], ids=["pointers", "tile copies"])
def chip(request: pytest.FixtureRequest) -> Iterator[int]:
    with target.assume(target.CHIPS[request.param]):
        yield request.param


@pytest.fixture(params=[(80, 16, 32), (90, 32, 16)], ids=["pointers", "tile copies"])
def small_tiles(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AttentionConfig]:
    """Many tiles for few tokens, and a last section of heads that is not full."""
    chip, *tiles = request.param
    config = AttentionConfig(*tiles, 4, 2)
    monkeypatch.setattr(attention_fwd, "attention_fwd_config", lambda *_, **__: config)
    monkeypatch.setattr(attention_bwd, "attention_bwd_configs", lambda *_, **__: (config, config))
    for module in (attention_fwd, attention_bwd):
        monkeypatch.setattr(module, "section_heads", lambda *_: 2)
    with target.assume(target.CHIPS[chip]):
        yield config
