"""Records of a run, written after every case; what is asked for by the environment."""

import copy
import functools
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpt2fast.benchmark.environment import ROOT, environment
from gpt2fast.version import __version__

RESULTS = ROOT / "bench" / "results" / "cpu"
QUICK = bool(os.environ.get("GPT2FAST_BENCH_QUICK"))
RECORD = bool(os.environ.get("GPT2FAST_BENCH_RECORD"))
STARTED = time.monotonic()
# For all three benchmarks; without, every case runs.
MINUTES = float(os.environ.get("GPT2FAST_BENCH_MINUTES") or "inf")
THREADS = int(os.environ.get("GPT2FAST_BENCH_THREADS") or os.cpu_count() or 1)

_PACKAGES = (
    "pytorch-pretrained-bert",
    "ctranslate2",
    "onnxruntime",
    "llama-cpp-python",
)
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "f16c")


def _flags() -> list[str]:
    """The instructions that decide, of those this processor has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return [platform.machine()]
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return [flag for flag in _FLAGS if flag in line.split()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _first_facts() -> dict[str, Any]:
    return environment()


def _facts() -> dict[str, Any]:
    """Those of the run's beginning: what it writes itself must not count as a changed tree."""
    return copy.deepcopy(_first_facts())


class Record:
    """The cases of one benchmark.

    Args:
        name: of the file.
        until: the share of the minutes given, since the run began, after which no case begins.
        folder: where to write; None writes nothing.
    """

    def __init__(self, name: str, until: float, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{name}.json"
        self._ends = STARTED + 60 * MINUTES * until
        facts = _facts()
        facts["versions"] |= {package: _version(package) for package in _PACKAGES}
        facts["versions"]["gpt2fast"] = __version__
        self.content: dict[str, Any] = {
            **facts,
            "flags": _flags(),
            "threads": THREADS,
            "quick": QUICK,
            "cases": [],
        }
        self._write()

    def time_is_up(self) -> bool:
        return time.monotonic() > self._ends

    def add(self, case: dict[str, Any]) -> None:
        """A case that is finished, or what is known of one that is not."""
        self.content["cases"].append(case)
        self._write()

    def put(self, key: str, value: Any) -> None:
        self.content[key] = value
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rounded(self.content), indent=1, ensure_ascii=False)
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self._path)


def rounded(value: Any) -> Any:
    """Floats to four digits: more of a time means nothing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value
