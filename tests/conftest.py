"""What every test gets: no network, a fixed seed, and GPU tests skipped where there is no GPU."""

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interpreter import prepare_once_a_launch

# Set before anything imports huggingface_hub, and inherited by subprocesses: no test reaches the
# Hub or reads the user's cache and token. Tests of the Hub path set HF_ENDPOINT to a loopback
# server of their own.
_hf_home = tempfile.TemporaryDirectory(prefix="gpt2fast-tests-")
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_hf_home.name, HF_HUB_CACHE=f"{_hf_home.name}/hub")

# Without a GPU the kernels run in Triton's interpreter, which must be known before Triton is
# imported.
if not any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    # Not imported here, so that tests of the tokenizer alone run without torch.
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    if "triton.runtime.interpreter" in sys.modules:
        prepare_once_a_launch()


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes test on one GPU: what one of them caches is missing in another."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


# Files of long tests, which start first: with one of them at the end a process would wait for the
# other alone. That the order is kept, `make test` asks of xdist.
_LONG = {
    "test_offline.py",
    "test_train_run.py",
    "test_triton_backend.py",
    "test_train_distributed.py",
    "test_compiled.py",
    "test_engine_dependent.py",
    "test_gpu_suite.py",
    "test_distribution.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
