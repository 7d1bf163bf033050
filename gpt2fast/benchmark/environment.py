"""Where and with what a record was made. Reads settings of the GPU and changes none."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Of a checkout its root, of an installation the folder that the package stands in.
ROOT = Path(__file__).resolve().parents[2]
IN_CHECKOUT = (ROOT / "bench").is_dir() and (ROOT / "setup.py").is_file()
PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest")
# As nvidia-smi names them.
GPU_FIELDS = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "utilization.gpu",
    "mig.mode.current",
)


def cores() -> int:
    """Those that this process may use, of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def gpu_state() -> dict[str, str] | None:
    """The first GPU as nvidia-smi shows it at this moment; None where there is none."""
    query = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    if not query:
        return None
    values = (value.strip() for value in query.splitlines()[0].split(","))
    return dict(zip(GPU_FIELDS, values, strict=False))


def commit() -> dict[str, Any]:
    """The commit measured. A copy without its history is told it by GPT2FAST_COMMIT."""
    # An installation may stand within somebody else's history.
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if IN_CHECKOUT else None
    if revision is None:
        return {"commit": os.environ.get("GPT2FAST_COMMIT", "unknown"), "dirty": None}
    # What a run of several benchmarks has recorded so far changes nothing that the next measures.
    measured = ("status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": revision, "dirty": bool(_output("git", "-C", str(ROOT), *measured))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _clocks() -> dict[str, float] | None:
    """The slowest and the fastest core's clock at this moment; None where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return {"least": min(clocks), "most": max(clocks)} if clocks else None


def environment() -> dict[str, Any]:
    """Everything that is known without loading PyTorch."""
    return {
        "date": now(),
        **commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "clock_mhz": _clocks(),
        "gpu": gpu_state(),
    }
