"""A contender's process, from the outside."""

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

from gpt2fast.benchmark import models
from gpt2fast.benchmark.environment import ROOT

PATIENCE = 600.0  # seconds for one answer


class Failed(Exception):
    """A contender cannot go on; the message says why."""


class Process:
    """Asks a `gpt2fast.benchmark.worker` of its own.

    Args:
        contender, model: names of `gpt2fast.benchmark.table` and `gpt2fast.benchmark.models`.
        threads: of every library.
        worker: the module that serves.
    """

    def __init__(
        self,
        contender: str,
        model: str,
        threads: int,
        worker: str = "gpt2fast.benchmark.worker",
    ) -> None:
        source, requests = os.pipe()
        answers, sink = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe would fill up)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": path,
            "GPT2FAST_BENCH_MODELS": str(models.ROOT),
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", worker),
                *(contender, model, str(threads), str(source), str(sink)),
            ],
            cwd=ROOT,
            env=environment,
            pass_fds=(source, sink),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        os.close(source)
        os.close(sink)
        self._requests = os.fdopen(requests, "w")
        self._answers = os.fdopen(answers)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Failed: the contender raised an error, ended or took too long.
        """
        try:
            self._requests.write(json.dumps({"do": do, **request}) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            raise Failed(self._end()) from None
        if not select.select([self._answers], [], [], PATIENCE)[0]:
            self.close()
            raise Failed(f"no answer within {PATIENCE:.0f} s")
        line = self._answers.readline()
        if not line:
            raise Failed(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            reason = "not installed: " if answer["missing"] else ""
            raise Failed(reason + answer["error"])
        return answer

    def _end(self) -> str:
        """The last words of a process that is gone."""
        self._process.wait(30)
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")
        words = text.strip().splitlines() or ["nothing on stderr"]
        return f"the process ended with {self._process.returncode}: {words[-1]}"[:300]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._errors.close()
