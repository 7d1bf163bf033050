"""Steps of whole models: the table, that everybody computes the same, and who is not timed."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import step_contest
from bench.suite import step_cases as names
from bench.suite import step_report, step_runner, steps
from bench.suite.gate import WrongAnswer, distance
from bench.suite.step_cases import StepCase, cpu_cases, step_cases
from bench.suite.worker import _Worker
from gpt2fast.benchmark.processes import Failed, Process

CPU = torch.device("cpu")
KINDS = (names.TRAINING, names.PREFILL, names.SCORING, names.PERPLEXITY, names.GENERATE)
EVERYBODY = (names.OURS, names.SDPA, names.EAGER, names.TUNED, names.ACCELERATED)


def tiny(kind: str, contenders: tuple[str, ...] = EVERYBODY, **fields: Any) -> StepCase:
    part = kind if kind in names.STEP_PARTS else names.ACCELERATE
    return StepCase(part, kind, "tiny", 2, 9, contenders, sizes=names.TINY, new_tokens=4, **fields)


def test_table() -> None:
    cases = step_cases("full")
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.contenders[0] in names.OF_OURS and case.seconds > 0 for case in cases)
    # All that takes no compiler's minutes comes before what does, of every part something.
    first = cases[: next(i for i, c in enumerate(cases) if "comp" in c.name)]
    assert {case.part for case in first} == set(names.STEP_PARTS)
    assert sum(case.seconds for case in first) < 100
    prefill = {(c.model, c.batch, c.length) for c in cases if c.part == names.PREFILL}
    assert len(prefill) == 4 * 2 * 3
    accelerated = {case.kind for case in cases if case.part == names.ACCELERATE}
    assert accelerated == {"training", "prefill", "generate", "perplexity"}
    for part in (names.TRAINING, names.SCORING, names.ACCELERATE):
        for scale in ("full", "quick", "tiny"):
            assert all(names.SDPA in case.contenders for case in cpu_cases(part, scale))


def test_work_of_a_case() -> None:
    step = StepCase("training", "training", "gpt2", 2, 1024, ())
    # 2 operations a weight and token (the head's weights included), causal attention; three times.
    weights = 12 * 12 * 768**2 + 50257 * 768
    attention = 12 * 2 * 768 * 1024 * 1025
    assert step.flops == 3 * 2 * (2 * weights * 1024 + attention)
    assert step.tokens == 2048
    prompt = replace(step, part="prefill", kind="prefill")
    head = 2 * 50257 * 768
    assert prompt.flops == step.flops // 3 - head * (2048 - 2)
    mixed = StepCase("scoring", "scoring", "gpt2", 16, 1024, (), mixed=True)
    lengths = mixed.lengths()
    assert len(lengths) == 16
    assert max(lengths) == 1024
    assert min(lengths) < 64
    assert lengths != sorted(lengths)
    assert mixed.tokens == sum(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_computes_the_same(kind: str) -> None:
    case = tiny(kind, mixed=kind == names.SCORING)
    source = steps.source_model(case, torch.float32, CPU)
    inputs = steps.inputs_of(case, CPU)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    gate = step_runner.StepGate(case, source, inputs, torch.float32)
    losses = set()
    everybody = (*EVERYBODY, names.PLAIN_COMPILED) if kind != names.GENERATE else EVERYBODY[1:]
    if kind == names.SCORING:
        everybody = (*everybody, names.SORTED)
    for name in everybody:
        step = steps.set_up(case, name, source, inputs, torch.float32, may_compile=False)
        report = gate.check(name, step.answers())
        assert report["error"] <= report["bound"] + 1e-5
        for _ in range(2):
            step()
        if isinstance(step, steps.Training):
            assert step.loss is not None
            losses.add(round(float(step.loss), 4))
    assert len(losses) == (kind == names.TRAINING)
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("key", ["loss", "transformer.h.0.mlp.c_fc.weight", "missing", "nan"])
def test_gate(key: str) -> None:
    case = tiny(names.TRAINING)
    source, inputs = steps.source_model(case, torch.float32, CPU), steps.inputs_of(case, CPU)
    gate = step_runner.StepGate(case, source, inputs, torch.float32)
    answers = steps.set_up(case, names.SDPA, source, inputs, torch.float32, False).answers()
    if key == "missing":
        del answers["transformer.wpe.weight"]
    elif key == "nan":
        answers["transformer.ln_f.bias"][3] = float("nan")
    else:
        answers[key] = answers[key] * 1.001
    with pytest.raises(WrongAnswer, match="wpe" if key == "missing" else "error|ln_f"):
        gate.check(names.SDPA, answers)


def test_tokens_are_judged() -> None:
    case = tiny(names.GENERATE)
    source, inputs = steps.source_model(case, torch.float32, CPU), steps.inputs_of(case, CPU)
    gate = step_runner.StepGate(case, source, inputs, torch.float32)
    answers = steps.set_up(case, names.SDPA, source, inputs, torch.float32, False).answers()
    gate.check(names.SDPA, answers)
    with pytest.raises(WrongAnswer, match="below the best"):
        gate.check(names.SDPA, {"tokens": (answers["tokens"] + 1) % 97})
    with pytest.raises(WrongAnswer, match="expected 4 tokens"):
        gate.check(names.SDPA, {"tokens": answers["tokens"][:, 1:]})


def test_distance() -> None:
    ones = torch.ones(4)
    assert distance(ones * 1.5, ones) == 0.5
    assert distance(ones[:3], ones) == float("inf")
    assert distance(ones / 0, ones) == float("inf")
    with pytest.raises(WrongAnswer, match="reference is not finite"):
        distance(ones, ones / 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_oracle_that_is_not_finite_fails_the_case(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than let everybody pass: no error is larger than NaN, or than infinity."""
    case, right = tiny(names.TRAINING), step_runner._answers

    def wrong(*args: Any) -> steps.Answers:
        answers = right(*args)
        if args[-1] == dtype:
            answers["transformer.ln_f.bias"][3] = float("nan")
        return answers

    monkeypatch.setattr(step_runner, "_answers", wrong)
    source, inputs = steps.source_model(case, dtype, CPU), steps.inputs_of(case, CPU)
    told: list[dict[str, Any]] = []
    job = {"only": "", "done": [], "deadline": float("inf")}
    worker: Any = SimpleNamespace(_job=job, _dry_run=True, tell=lambda **m: told.append(m))
    measure = partial(step_runner.StepGate, source=source, inputs=inputs, dtype=dtype)
    _Worker._measure(worker, [case], measure)
    record = told[-1]["case"]
    assert record["status"] == "failed"
    assert record["reason"] == "the oracle's transformer.ln_f.bias is not finite"


class _Clock:
    """Calls everybody twice."""

    def device(self, calls: dict[str, Any], contexts: dict[str, Any]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [2.0 + i, 4.0] for i, name in enumerate(calls)}

    def host(self, calls: dict[str, Any], contexts: dict[str, Any]) -> dict[str, Any]:
        times = self.device(calls, contexts)
        return {name: {"host": values, "issue": values} for name, values in times.items()}


def measured(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[str, Any], None],
    without: dict[str, str] | None = None,
) -> dict[str, Any]:
    def set_up(case: StepCase, name: str, *args: Any, **options: Any) -> Any:
        step = steps.set_up(case, name, *args, **options)
        change(name, step)
        return step

    monkeypatch.setattr(step_runner, "set_up", set_up)
    monkeypatch.setattr(step_runner, "peak_bytes", lambda step: step() or 2 * 10**9)
    monkeypatch.setattr(step_runner.kernels, "backend", lambda name: step_runner.nullcontext())
    case = tiny(names.TRAINING, (names.OURS, names.SDPA, names.TUNED, names.EAGER))
    clock: Any = _Clock()
    record = step_runner.measure_steps(
        case, CPU, clock, lambda phase, seconds: None, without or {}, True
    )
    step_report.add_rates(record, {"matmul_flop_per_s": {"float32": {"p50": 1e9}}})
    return record


def test_who_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(name: str, step: Any) -> None:
        if name == names.SDPA:  # answers right, and learns something else
            step._optimizer.param_groups[0]["lr"] = 0.3
        if name == names.TUNED:
            step.model.transformer.ln_f.bias.data += 0.1

    record = measured(monkeypatch, change, {names.EAGER: "exit status 11"})
    assert record["status"] == "measured"
    assert list(record["times"]) == [names.OURS]
    assert "after the same steps" in record["providers"][names.SDPA]["wrong"]
    assert "error" in record["providers"][names.TUNED]["wrong"]
    assert "exit status 11" in record["providers"][names.EAGER]["not measured"]
    assert record["times"][names.OURS]["again"]["p50"] == 0.5
    [row] = step_report.rows([record])
    assert row.startswith("| training tiny B2 T9: gpt2fast | 2000.00 |")
    assert f"| {names.SDPA}, {names.TUNED}, {names.EAGER} |" in row


def test_ours_wrong_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(name: str, step: Any) -> None:
        if name == names.OURS:
            step.model.transformer.ln_f.bias.data += 0.1

    record = measured(monkeypatch, change)
    assert record["status"] == "failed"
    assert names.OURS not in record["times"]
    assert record["reason"].startswith("gpt2fast: ")
    assert set(record["times"]) == {names.SDPA, names.TUNED, names.EAGER}


class Fake:
    """A process that takes so long for a step; its answer and its loss are off by so much."""

    def __init__(self, seconds: float = 1.0, answer: float = 0.0, loss: float = 0.0) -> None:
        self.seconds, self.answer, self.loss, self.steps, self.closed = seconds, answer, loss, 0, 0

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if do == "set_up":
            if self.seconds < 0:
                raise Failed("not installed: ImportError: x")
            gradient: Tensor = torch.ones(3) + self.answer
            torch.save({"loss": torch.tensor(2.0), "w": gradient}, request["path"])
            return {}
        if do == "step":
            self.steps += 1
            return {"seconds": self.seconds, "loss": 2.0 / self.steps + self.loss}
        return {"memory": {"peak_bytes": 5}, "limits": {"read_bytes_per_s": 1e10}}[do]

    def close(self) -> None:
        self.closed += 1


def held(fakes: dict[str, Fake], **options: Any) -> dict[str, Any]:
    measurer, started = Fake(), []

    def start(name: str) -> Fake:
        started.append(name)
        return measurer if started.count(name) > 1 else fakes[name]

    case = tiny(names.TRAINING, tuple(fakes), rounds=3)
    try:
        return step_contest.contest(case, start, lambda text: None, **options)
    finally:
        assert all(fake.closed for fake in fakes.values() if fake.steps)


def test_contest() -> None:
    ours, again = names.OURS, names.again(names.OURS)
    fakes = {
        ours: Fake(2.0),
        again: Fake(2.2),
        names.SDPA: Fake(3.0),
        names.EAGER: Fake(answer=1e-3),
        names.TUNED: Fake(loss=0.01),
        names.ACCELERATED: Fake(-1.0),
    }
    record = held(fakes)
    assert record["name"] == "tiny, 2 x 9"
    reports = record["contenders"]
    assert reports[ours]["times_base"]["p50"] == 1.5
    assert reports[ours]["seconds"] == [2.0] * 3
    assert reports[ours]["tokens_per_s"] == 9.0
    assert reports[ours]["peak_bytes"] == 5
    assert record["noise"] == pytest.approx(1 - 1 / 1.1)
    assert "w differs" in reports[names.EAGER]["wrong"]
    assert "after the same steps" in reports[names.TUNED]["wrong"]
    assert "not installed" in reports[names.ACCELERATED]["not measured"]
    assert not any("p" in reports[n] for n in (names.EAGER, names.TUNED, names.ACCELERATED))
    assert fakes[ours].steps == 4  # the optimizer's state comes with the first
    assert len(held({ours: Fake(), names.SDPA: Fake()}, time_is_up=lambda: True)["contenders"]) == 2
    with pytest.raises(Failed, match="ImportError"):
        held({ours: Fake(), names.SDPA: Fake(-1.0)})


def test_worker(tmp_path: Path) -> None:
    case = cpu_cases(names.TRAINING, "tiny")[0]
    path = tmp_path / "answers"
    with closing(Process("gpt2fast again", "tiny", 1, worker="bench.step_worker")) as process:
        process.ask("set_up", case=asdict(case), path=str(path))
        losses = [process.ask("step")["loss"] for _ in range(2)]
        assert process.ask("memory")["peak_bytes"] > 10**7
        with pytest.raises(Failed, match="AttributeError"):
            process.ask("dance")
    answers = torch.load(path)
    assert answers.keys() > {"loss", "transformer.wte.weight"}
    assert losses[0] == pytest.approx(float(answers["loss"]))
    assert losses[1] != losses[0]


def test_every_benchmark_has_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import bench_accelerate, bench_scoring, bench_training

    for module in (bench_accelerate, bench_scoring, bench_training):
        assert len(module.CASES) >= 1
    monkeypatch.setenv("GPT2FAST_BENCH_COMPILED", "1")
    assert any("compiled" in case.name for case in step_contest.cases(names.TRAINING))
