"""Contenders on one case: gate, warm-up, turns, ratios of neighbours in time."""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2fast.benchmark.cases import DecodeCase, PrefillCase
from gpt2fast.benchmark.ours import agreement
from gpt2fast.benchmark.processes import Failed
from gpt2fast.benchmark.statistics import paired_ratios, quantiles
from gpt2fast.benchmark.table import AGAIN, BARE, BASE, EXACT, OURS

# Of float32 logits, largest difference over largest value: sums in another order, 24 layers deep.
EXACT_TOLERANCE = 1e-4
# Of fewer bits, root mean square over the spread: beyond it, it is another function.
OTHER_TOLERANCE = 0.5
# The same program differs from itself by more than this: the machine does something else besides.
NOISY = 0.05
_GATE_TOKENS = 64
_WARM_UP = 3  # tokens

Say = Callable[[str], None]
Report = dict[str, Any]


class Asked(Protocol):
    """A `gpt2fast.benchmark.processes.Process`."""

    def ask(self, do: str, **request: Any) -> dict[str, Any]: ...

    def close(self) -> None: ...


Start = Callable[[str], Asked]  # by the contender's name


def tokens(count: int, seed: int) -> list[int]:
    """A prompt: words of any kind, the end-of-text aside."""
    return random.Random(seed).choices(range(50256), k=count)


class Company:
    """The processes of the contenders of a model that are here and right, for its cases in turn.

    Args:
        names: of the contenders; the first one in float32 that answers is the reference.
        start: a process by its contender's name; `Failed` says why there is none.
        say: is told what comes next.

    Attributes:
        base: the reference: whose logits and tokens are right, and of whose time ratios are.
        processes: by name.
        reports: for the case at hand, what became of each.

    Raises:
        Failed: there is no reference.
    """

    def __init__(self, names: tuple[str, ...], start: Start, say: Say) -> None:
        self.reports = self._all = {name: Report() for name in names}
        self.processes: dict[str, Asked] = {}
        self.say = say
        self.base: str | None = None
        self._reference: Any = None
        self._measurer = start(BARE)  # a process of its own, which loads no model
        for name in names:
            with self.excluding(name):
                self.processes[name] = start(name)
                say(f"{name}: loading")
                self.processes[name].ask("prepare")
                self.processes[name].ask("load")
                if name != BARE:
                    self._gate(name)
                generated(self.processes[name], tokens(8, seed=3), _WARM_UP)
        if self.base is None:
            self.close()
            raise Failed(f"nobody computes in float32: {self._all}")

    def begin(self, names: tuple[str, ...] | None = None) -> None:
        """A new case: reports of these, with what holds for every case."""
        kept = ("agreement", "wrong", "not measured")
        self.reports = {
            name: {key: report[key] for key in kept if key in report}
            for name, report in self._all.items()
            if names is None or name in names
        }

    @contextmanager
    def excluding(self, name: str) -> Iterator[None]:
        """Leave a contender out from here on if it fails in this block."""
        try:
            yield
        except Failed as error:
            kind = "wrong" if isinstance(error, Wrong) else "not measured"
            self._all[name][kind] = self.reports[name][kind] = str(error)
            if name in self.processes:
                self.processes.pop(name).close()

    def _logits(self, name: str, ids: list[int]) -> Any:
        """Float32 ``[T, V]`` of a contender."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "logits.npy")
            self.processes[name].ask("logits", ids=ids, path=path)
            return np.load(path)

    def _gate(self, name: str) -> None:
        logits = self._logits(name, tokens(_GATE_TOKENS, seed=1))
        if self._reference is None and name not in EXACT:
            raise Failed("nothing to hold it against")
        reference = logits if self._reference is None else self._reference
        found = self.reports[name]["agreement"] = agreement(reference, logits)
        kind, most = ("largest", EXACT_TOLERANCE) if name in EXACT else ("error", OTHER_TOLERANCE)
        if not found[kind] <= most:
            raise Wrong(f"logits differ from those of {self.base}: {kind} {found[kind]:.1e}")
        if self._reference is None:
            self.base, self._reference = name, logits

    def check_tokens(self, made: dict[str, list[int]]) -> None:
        """Exclude who should have generated the reference's tokens and did not."""
        if self.base not in made:
            raise Failed(f"{self.base}, the reference: {self._all[str(self.base)]}")
        right = made[self.base]
        for name in EXACT & made.keys():
            with self.excluding(name):
                for place, (token, expected) in enumerate(zip(made[name], right, strict=True)):
                    if token != expected:
                        raise Wrong(f"new token {place} is {token}, that of {self.base} {expected}")

    def check_choices(self, prompt: list[int], made: dict[str, list[int]]) -> None:
        """Exclude who of fewer bits generated other tokens than the likeliest of its own logits.

        Rounding moves single choices; without the right cache nearly none is near the likeliest.
        """
        for name in [n for n in self.present() if n not in EXACT and n != BARE]:
            with self.excluding(name):
                logits = self._logits(name, [*prompt, *made[name][:-1]])[len(prompt) - 1 :]
                chosen = logits[np.arange(len(logits)), made[name]]
                behind = float((logits.max(-1) - chosen).mean() / logits.std())
                self.reports[name]["choices_behind"] = behind
                if not behind <= OTHER_TOLERANCE:
                    text = "tokens are not the likeliest of its own logits"
                    raise Wrong(f"{text}: behind by {behind:.1e} of their spread")

    def limits(self) -> dict[str, float]:
        """Of the machine, now."""
        return self._measurer.ask("limits")

    def present(self) -> list[str]:
        """Those of the case at hand that are still in it."""
        return [name for name in self.reports if name in self.processes]

    def close(self) -> None:
        for process in (*self.processes.values(), self._measurer):
            process.close()


def generated(process: Asked, prompt: list[int], new: int) -> dict[str, Any]:
    """The answer at the end of a text that nobody else interrupts."""
    answer = process.ask("generate", prompt=prompt, new=new, chunk=new)
    while "finished" not in answer:
        answer = process.ask("go")
    return answer


class Wrong(Failed):
    """An answer is not the reference's."""


def decode(
    case: DecodeCase, company: Company, time_is_up: Callable[[], bool] = lambda: False
) -> Report:
    """The record of a case.

    Raises:
        Failed: time is up before the text is finished, or the reference failed.
    """
    company.begin()
    prompt = tokens(case.prompt, seed=2)
    limits = []
    answers: dict[str, dict[str, Any]] = {}
    for turn in range(case.turns):
        if time_is_up():
            raise Failed("no time left")
        company.say(f"{case}: turn {turn + 1} of {case.turns}")
        limits.append(company.limits())
        for name in company.present():
            with company.excluding(name):
                request: dict[str, Any] = {"do": "go"}
                if turn == 0:
                    sizes = {"new": case.new, "chunk": case.chunk}
                    request = {"do": "generate", "prompt": prompt, **sizes}
                answers[name] = company.processes[name].ask(**request)
    made = {name: answers[name]["tokens"] for name in company.present()}
    company.check_tokens(made)
    company.check_choices(prompt, made)
    for name in company.present():
        seconds = answers[name]["seconds"]
        parts = [seconds[i : i + case.chunk] for i in range(1, case.new, case.chunk)]
        company.reports[name] |= {
            "first_token_s": seconds[0],
            "token_s": quantiles(seconds[1:]),
            "seconds": [sum(part) / len(part) for part in parts],
        }
    return closed(asdict(case), company.reports, limits, base=str(company.base))


def prefill(
    case: PrefillCase,
    names: tuple[str, ...],
    company: Company,
    time_is_up: Callable[[], bool] = lambda: False,
) -> Report:
    """The record of a case between some of a company; of fewer rounds where time is up.

    Raises:
        Failed: the reference failed.
    """
    company.begin(names)
    rows = [tokens(case.prompt, seed=2 + row) for row in range(case.batch)]
    limits = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[int]] = {}
    for turn in range(case.turns):  # the first is the warm-up
        if turn > 1 and time_is_up():
            break
        company.say(f"{case}: turn {turn + 1} of {case.turns}")
        limits.append(company.limits())
        for name in company.present():
            with company.excluding(name):
                answer = company.processes[name].ask("prefill", rows=rows)
                first[name] = answer["tokens"]
                seconds[name].append(answer["seconds"])
        company.check_tokens({name: first[name] for name in company.present()})
    for name in company.present():
        company.reports[name]["seconds"] = seconds[name][1:]
    return closed(asdict(case), company.reports, limits, base=str(company.base))


def closed(
    case: Report,
    reports: dict[str, Report],
    limits: list[dict[str, float]],
    *,
    base: str = BASE,
    ours: str = OURS,
    again: str = AGAIN,
) -> Report:
    """The case with everybody's report, the ratios of their "seconds", and the limits.

    ``again`` is ``ours`` once more: how far they differ is the noise. Where that is more than
    `NOISY`, the case says so and the bounds of every ratio are wider by it.
    """
    record: Report = {**case, "base": base}
    for report in reports.values():
        if "seconds" in report:
            report["p"] = quantiles(report["seconds"])
            for key, rival in (("times_base", base), ("times_ours", ours), ("share_of_bare", BARE)):
                if "seconds" in reports.get(rival, {}):
                    report[key] = paired_ratios(report["seconds"], reports[rival]["seconds"])
    if spread := reports.get(again, {}).get("times_ours"):
        record["noise"] = max(abs(spread["p20"] - 1), abs(spread["p80"] - 1))
        if record["noise"] > NOISY:
            record["noisy"] = True
            _widen(reports, base, record["noise"])
    record["contenders"] = reports
    if limits:
        record["limits"] = {key: quantiles([limit[key] for limit in limits]) for key in limits[0]}
    return record


def _widen(reports: dict[str, Report], base: str, noise: float) -> None:
    for name, report in reports.items():
        for key in ("times_base", "times_ours", "share_of_bare"):
            if key in report and not (name == base and key == "times_base"):
                report[key]["p20"] /= 1 + noise
                report[key]["p80"] *= 1 + noise
