"""A process with one contender, which does what it is told on a pipe.

    python -m gpt2fast.benchmark.worker CONTENDER MODEL THREADS IN OUT

Every contender has a process of its own: libraries bring thread pools and runtimes that disturb
each other, memory and loading are its own, and a crash is one contender's. Requests and answers are
lines of JSON. While a text is generated, an answer after every chunk of tokens waits for the word
to go on, so that contenders can take turns within a text.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def _kilobytes(field: str) -> int | None:
    """Of /proc/self/status; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields[field].split()[0])
    except (OSError, KeyError):
        return None


class Worker:
    """Answers requests; see the methods for what there is."""

    def __init__(
        self,
        contender: Any,
        threads: int,
        requests: Any,
        answers: Any,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._contender, self._threads = contender, threads
        self._requests, self._answers, self._clock = requests, answers, clock
        self._limits: Any = None

    def serve(self) -> None:
        for line in self._requests:
            request = json.loads(line)
            try:
                answer = getattr(self, request.pop("do"))(**request)
            except Exception as error:
                text = (str(error).strip() or "?").splitlines()[0]
                answer = {
                    "error": f"{type(error).__name__}: {text}"[:300],
                    "missing": isinstance(error, ImportError),
                    "traceback": traceback.format_exc(),
                }
            self._say(answer)

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def prepare(self) -> dict[str, Any]:
        self._contender.prepare()
        return {}

    def load(self) -> dict[str, Any]:
        """Loading times: seconds of this call, imports included."""
        start = self._clock()
        self._contender.load()
        return {"seconds": self._clock() - start}

    def logits(self, ids: list[int], path: str) -> dict[str, Any]:
        import numpy as np

        np.save(path, self._contender.logits(ids))
        return {}

    def generate(self, prompt: list[int], new: int, chunk: int) -> dict[str, Any]:
        """Tokens, and the seconds that each took; pauses after the first and every chunk."""
        tokens: list[int] = []
        seconds: list[float] = []
        since = self._clock()

        def on_token(token: int) -> None:
            nonlocal since
            now = self._clock()
            tokens.append(token)
            seconds.append(now - since)
            if (len(tokens) - 1) % chunk == 0 and len(tokens) < new:
                self._say({"tokens": tokens, "seconds": seconds})
                word = json.loads(self._requests.readline())
                if word != {"do": "go"}:
                    raise RuntimeError(f"expected the word to go on; got {word}")
                now = self._clock()
            since = now

        self._contender.generate(prompt, new, on_token)
        return {"tokens": tokens, "seconds": seconds, "finished": True}

    def prefill(self, rows: list[list[int]]) -> dict[str, Any]:
        start = self._clock()
        tokens = self._contender.prefill(rows)
        return {"seconds": self._clock() - start, "tokens": tokens}

    def memory(self) -> dict[str, Any]:
        """The largest resident memory so far, mapped files included."""
        peak = _kilobytes("VmHWM")
        return {"peak_bytes": None if peak is None else 1024 * peak}

    def limits(self) -> dict[str, Any]:
        """What the machine does at most: see `gpt2fast.benchmark.limits`."""
        if self._limits is None:
            from gpt2fast.benchmark.limits import Limits

            self._limits = Limits(self._threads)
        return self._limits.measure()


def main() -> None:
    from gpt2fast.benchmark.table import make

    contender, model, threads, requests, answers = sys.argv[1:]
    with os.fdopen(int(requests)) as source, os.fdopen(int(answers), "w") as sink:
        Worker(make(contender, model, int(threads)), int(threads), source, sink).serve()


if __name__ == "__main__":
    main()
