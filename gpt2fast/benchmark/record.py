"""Records of a run, written after every case; what is asked for by the environment."""

import copy
import functools
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpt2fast.benchmark.environment import ROOT, cores, environment
from gpt2fast.benchmark.processes import Failed
from gpt2fast.benchmark.progress import Progress
from gpt2fast.version import __version__

RESULTS = ROOT / "bench" / "results" / "cpu"
QUICK = bool(os.environ.get("GPT2FAST_BENCH_QUICK"))
RECORD = bool(os.environ.get("GPT2FAST_BENCH_RECORD"))
STARTED = time.monotonic()
# Of this process; without, every case runs.
MINUTES = float(os.environ.get("GPT2FAST_BENCH_MINUTES") or "inf")
THREADS = int(os.environ.get("GPT2FAST_BENCH_THREADS") or cores())

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
        name: of the benchmark.
        folder: where to write NAME.json; None writes nothing.
        cases: how many will be added: after each, the time left is said.
        path: where to write instead.
        threads: that the contenders have.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        *,
        cases: int = 0,
        path: Path | None = None,
        threads: int = THREADS,
    ) -> None:
        self._path = folder / f"{name}.json" if folder is not None else path
        self._name, self._expected = name, cases
        self._progress = Progress(cases, 60 * MINUTES)
        facts = _facts()
        facts["versions"] |= {package: _version(package) for package in _PACKAGES}
        facts["versions"]["gpt2fast"] = __version__
        self.content: dict[str, Any] = {
            **facts,
            "flags": _flags(),
            "threads": threads,
            "quick": QUICK,
            "cases": [],
        }
        self._write()

    def time_is_up(self) -> bool:
        return time.monotonic() > STARTED + 60 * MINUTES

    def add(self, case: dict[str, Any]) -> None:
        """A case that is finished, or what is known of one that is not."""
        self.content["cases"].append(case)
        self._write()
        if self._expected:
            done = len(self.content["cases"])
            self._progress(f"{self._name}: {done} of {self._expected} cases")

    @contextmanager
    def naming_failure(self, known: dict[str, Any]) -> Iterator[None]:
        """Where the case fails in this block, the record says of it why."""
        try:
            yield
        except Failed as error:
            self.add({**known, "not measured": str(error)})
            raise

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
