"""The two backends, and outputs poisoned so that a value nobody wrote is seen."""

from collections.abc import Iterator

import pytest
import torch

from gpt2fast import kernels
from gpt2fast.kernels._triton import configs
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
