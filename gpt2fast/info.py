"""What this machine would use, and why: the facts behind ``gpt2fast info``."""

import importlib.util
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt2fast.version import __version__


def collect() -> dict[str, Any]:
    """Versions, devices, the implementation of every op, and the checkpoints at hand.

    Loads torch and asks for CUDA devices; takes no memory on one. The values are those that
    ``json.dumps`` takes.
    """
    import torch

    import gpt2fast.kernels  # noqa: F401  (registers the ops)
    from gpt2fast.engine.compiled import compiler
    from gpt2fast.kernels.backend import selected_backend
    from gpt2fast.kernels.registry import OPS

    devices = _devices()
    backend = selected_backend()
    own, why = _implementation(backend, devices)
    others = {name: _version(name) for name in ("triton", "transformers")}
    return {
        "gpt2fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"torch": torch.__version__, **others},
        "cpu": _cpu(),
        "cuda": devices,
        "default_device": "cuda" if devices else "cpu",
        "backend": backend,
        "ops": {op: "Triton" if kernel and own else "PyTorch" for op, kernel in OPS.items()},
        "why": why,
        "engine": _engine("cuda" if devices else "cpu"),
        "int8": _int8(),
        "compiler": compiler(),
        "checkpoints": {"bundled": _bundled(), **_cached()},
    }


def report(facts: dict[str, Any]) -> str:
    """The facts as lines for people to read."""
    packages = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in facts["packages"].items()
    )
    cpu = facts["cpu"]
    ops_of: dict[str, list[str]] = {}
    for op, implementation in facts["ops"].items():
        ops_of.setdefault(implementation, []).append(op)
    lines = [
        f"gpt2fast {facts['gpt2fast']}, Python {facts['python']}, {facts['platform']}",
        packages,
        f"CPU: {cpu['capability']}, {cpu['cores']} cores, "
        f"threads: {cpu['threads']} ({cpu['threads_why']})",
        *(
            f"GPU {i}: {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
            for i, gpu in enumerate(facts["cuda"])
        ),
        f"device: {facts['default_device']}, backend: {facts['backend']}",
        *(f"ops by {name}: {', '.join(ops)}" for name, ops in ops_of.items()),
        f"why: {facts['why']}",
        f"decode engine of generate: {facts['engine']}",
        f"int8 on the CPU: {facts['int8'] or 'no op of this PyTorch: dequantised at every call'}",
        f"C++ compiler for compile_decoding: {facts['compiler'] or 'none: steps are not compiled'}",
        "checkpoints:",
        *(f"  {name}: {path or 'not there'}" for name, path in facts["checkpoints"].items()),
    ]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    """The installed version, read without importing the package."""
    if importlib.util.find_spec(distribution) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"  # importable, but never installed


def _cpu() -> dict[str, Any]:
    import torch

    why = "PyTorch's choice; OMP_NUM_THREADS or --threads change it"
    if value := os.environ.get("OMP_NUM_THREADS"):
        why = f"OMP_NUM_THREADS={value}"
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads_why": why,
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _implementation(backend: str, devices: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether our kernels run on the default device, and why."""
    import torch

    from gpt2fast.kernels.backend import unavailable

    kind = "cuda" if devices else "cpu"
    why_not = unavailable(kind, 0 if devices else None)
    if backend == "torch":
        return False, "the torch backend is selected by hand: PyTorch's operators run everywhere"
    if why_not is None and (devices or backend == "triton"):
        where = "the GPU" if devices else "the CPU, in Triton's interpreter"
        return True, f"our kernels run on {where}"
    if devices:
        return False, f"{why_not}: PyTorch's operators run instead"
    sees = "was built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
    return False, f"this PyTorch {sees}: its operators run on the CPU"


def _engine(kind: str) -> str:
    """What runs the steps of `generate` on the default device."""
    import torch

    from gpt2fast.engine.kept import why_not_on

    try:
        why_not = why_not_on(torch.device(kind))
    except RuntimeError as error:
        why_not = str(error)
    if why_not is not None:
        return f"none ({why_not}): the model's forward pass, token by token"
    runner = "our kernels in CUDA graphs" if kind == "cuda" else "PyTorch's operators"
    return f"{runner}, for models without hooks, adapters or dropout"


def _int8() -> str | None:
    """The op that int8 weights are multiplied by on the CPU, as a short measurement chooses it."""
    from gpt2fast.kernels.quantized import int8_op

    op = int8_op()
    if op is None:
        return None
    kind, levels = op
    return f"{kind.name}, {levels} levels of activations"


def _bundled() -> str | None:
    from gpt2fast.checkpoint.sources import BUNDLED_FOLDER

    return str(BUNDLED_FOLDER) if _is_gpt2(BUNDLED_FOLDER) else None


def _cached() -> dict[str, str]:
    """Repository -> folder, for every GPT-2 in the Hub client's cache."""
    from huggingface_hub import constants

    found = {}
    for snapshot in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")):
        if _is_gpt2(snapshot):
            folder = snapshot.parent.parent.name
            found[folder.removeprefix("models--").replace("--", "/")] = str(snapshot)
    return found


def _is_gpt2(folder: Path) -> bool:
    from gpt2fast.checkpoint.weights import CONFIG_FILE, WEIGHT_FILES

    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The first published configurations have no model_type.
    return (
        isinstance(config, dict)
        and config.get("model_type", "gpt2") == "gpt2"
        and "n_embd" in config
        and any((folder / name).is_file() for name in WEIGHT_FILES)
    )
