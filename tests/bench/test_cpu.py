"""The CPU benchmarks' method: who is timed, who is not, and what the ratios are of."""

import io
import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2fast.benchmark import cases, contest, environment, loading, models, table
from gpt2fast.benchmark.contest import DecodeCase, PrefillCase
from gpt2fast.benchmark.ours import agreement
from gpt2fast.benchmark.processes import Failed, Process
from gpt2fast.benchmark.progress import Progress
from gpt2fast.benchmark.record import Record, rounded
from gpt2fast.benchmark.worker import Worker

NEW, CHUNK = 10, 4
LIMITS = {"read_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11}


class InThread(Process):
    """A worker in a thread of this process, on pipes as always."""

    def __init__(self, contender: Any) -> None:
        source, requests = os.pipe()
        answers, sink = os.pipe()
        self._requests, self._answers = os.fdopen(requests, "w"), os.fdopen(answers)

        def serve() -> None:
            with os.fdopen(source) as theirs, os.fdopen(sink, "w") as ours:
                clock = getattr(contender, "clock", time.perf_counter)
                worker = Worker(contender, 1, theirs, ours, clock)
                worker.limits = lambda: LIMITS  # type: ignore[method-assign]
                worker.serve()

        self._thread = threading.Thread(target=serve)
        self._thread.start()

    def close(self) -> None:
        self._requests.close()
        self._thread.join(30)
        self._answers.close()
        assert not self._thread.is_alive()


class Fake:
    """A contender of a known speed, by a clock of its own, that answers right or as told."""

    def __init__(
        self, seconds: float = 0.0, logits: float = 0.0, token: int = 7, error: str = ""
    ) -> None:
        self.seconds, self.difference, self.token, self.error = seconds, logits, token, error
        self.now, self.prompt = 0.0, 1000

    def clock(self) -> float:
        return self.now

    def prepare(self) -> None:
        pass

    def load(self) -> None:
        self.prompt = 1000
        if self.error == "load":
            raise ModuleNotFoundError("No module named 'rival'")

    def logits(self, ids: list[int]) -> Any:
        values = np.random.default_rng(0).normal(size=(len(ids), 50)).astype(np.float32)
        values[0, 0] += self.difference
        for place in range(self.prompt - 1, len(ids)):  # what it generates is what it finds likely
            values[place, self.token + place + 1 - self.prompt] = 9
        return values

    def generate(self, prompt: list[int], new: int, on_token: Any) -> None:
        self.prompt = len(prompt)
        for i in range(new):
            if self.error == "generate" and i == CHUNK + 2:
                raise RuntimeError("out of memory\nmore")
            self.now += self.seconds
            on_token(self.token + i)

    def prefill(self, rows: list[list[int]]) -> list[int]:
        self.now += self.seconds
        return [self.token + len(row) for row in rows]


def decoded(**fakes: Fake) -> dict[str, Any]:
    names = {"base": table.BASE, "bare": table.BARE, "ours": table.OURS, "again": table.AGAIN}
    named = {names.get(key, key): fake for key, fake in fakes.items()}
    case = DecodeCase("tiny", "float32", 5, NEW, CHUNK)
    with closing(company(*named.items())) as there:
        return contest.decode(case, there)


def company(*named: tuple[str, Any]) -> contest.Company:
    contenders = iter([Fake(), *(contender for _, contender in named)])  # the measurer comes first
    return contest.Company(
        tuple(name for name, _ in named), lambda name: InThread(next(contenders)), lambda text: None
    )


def test_ratios_are_of_turns_and_the_noise_is_known() -> None:
    record = decoded(base=Fake(0.02), bare=Fake(0.005), ours=Fake(0.01), again=Fake(0.01 / 1.1))
    ours = record["contenders"][table.OURS]
    assert len(ours["seconds"]) == 3  # chunks of 4, 4 and 1 after the first token
    assert ours["token_s"]["samples"] == NEW - 1
    assert ours["times_base"]["p50"] == pytest.approx(2)
    assert record["contenders"][table.BASE]["times_base"]["p50"] == 1
    assert record["contenders"][table.BASE]["times_ours"]["p50"] == pytest.approx(0.5)
    assert ours["share_of_bare"]["p50"] == pytest.approx(0.5)
    assert record["noise"] == pytest.approx(0.1)
    assert record["limits"]["read_bytes_per_s"]["p50"] == 1e10


@pytest.mark.parametrize(
    ("rival", "kind", "reason"),
    [
        (Fake(error="load"), "not measured", "No module named 'rival'"),
        (Fake(error="generate"), "not measured", "RuntimeError: out of memory"),
        (Fake(logits=0.1), "wrong", "logits differ"),
        (Fake(logits=float("nan")), "wrong", "logits differ"),
        (Fake(token=8), "wrong", "new token 0 is 8, that of transformers SDPA 7"),
    ],
)
def test_whoever_fails_or_is_wrong_has_no_times(rival: Fake, kind: str, reason: str) -> None:
    record = decoded(base=Fake(), ours=Fake(), **{"CTranslate2": rival})
    report = record["contenders"]["CTranslate2"]
    assert reason in report[kind]
    assert "seconds" not in report
    assert "times_base" in record["contenders"][table.OURS]


def test_fewer_bits_may_choose_other_tokens_within_reason() -> None:
    record = decoded(base=Fake(), **{"CTranslate2 int8": Fake(logits=5.0, token=9)})
    report = record["contenders"]["CTranslate2 int8"]
    assert report["agreement"]["argmax"] >= 0.98
    assert "times_base" in report
    broken = decoded(base=Fake(), **{"CTranslate2 int8": Fake(logits=500.0)})
    assert "wrong" in broken["contenders"]["CTranslate2 int8"]


def test_without_transformers_the_next_in_float32_is_the_reference() -> None:
    fakes = {"CTranslate2 int8": Fake(), "ours": Fake(0.02), "CTranslate2": Fake(0.01, token=8)}
    record = decoded(base=Fake(error="load"), **fakes)
    assert record["base"] == table.OURS
    assert record["contenders"][table.OURS]["times_base"]["p50"] == 1
    assert record["contenders"][table.BASE]["not measured"].startswith("not installed: ")
    assert "nothing to hold it against" in record["contenders"]["CTranslate2 int8"]["not measured"]
    assert f"that of {table.OURS} 7" in record["contenders"]["CTranslate2"]["wrong"]
    with pytest.raises(Failed, match="No module named 'rival'"):
        decoded(base=Fake(error="load"), **{"CTranslate2 int8": Fake()})


def test_a_noisy_machine_says_so_and_widens_every_bound() -> None:
    still = decoded(base=Fake(0.02), ours=Fake(0.01), again=Fake(0.01 / 1.02))
    assert "noisy" not in still
    assert still["contenders"][table.OURS]["times_base"]["p80"] == pytest.approx(2)
    noisy = decoded(base=Fake(0.02), ours=Fake(0.01), again=Fake(0.01 / 1.25))
    assert noisy["noisy"]
    ours = noisy["contenders"][table.OURS]["times_base"]
    assert ours == pytest.approx({"p20": 1.6, "p50": 2, "p80": 2.5, "samples": 3})
    assert noisy["contenders"][table.BASE]["times_base"]["p80"] == 1


def test_time_that_is_up_ends_a_text() -> None:
    with closing(company((table.BASE, Fake(0.02)), (table.OURS, Fake(0.01)))) as there:
        case = DecodeCase("tiny", "float32", 5, NEW, CHUNK)
        with pytest.raises(Failed, match="no time left"):
            contest.decode(case, there, iter([False, True]).__next__)


def test_prefill_takes_turns_after_a_warm_up() -> None:
    named = {
        table.BASE: Fake(0.02),
        table.OURS: Fake(0.01),
        "ONNX Runtime": Fake(token=8),
        "llama.cpp": Fake(),
    }
    with closing(company(*named.items())) as there:
        names = (table.BASE, table.OURS, "ONNX Runtime")
        record = contest.prefill(PrefillCase("tiny", "prefill", 2, 6, 3), names, there)
        hurried = contest.prefill(
            PrefillCase("tiny", "prefill", 1, 6, 3), names, there, lambda: True
        )
    assert record["contenders"].keys() == set(names)
    for name in (table.BASE, table.OURS):
        assert len(record["contenders"][name]["seconds"]) == 3
        assert len(hurried["contenders"][name]["seconds"]) == 1
    assert record["contenders"][table.OURS]["times_base"]["p50"] == pytest.approx(2)
    assert "wrong" in record["contenders"]["ONNX Runtime"]
    assert "wrong" in hurried["contenders"]["ONNX Runtime"]  # once wrong, it stays away


def test_cases_of_a_company_have_reports_of_their_own() -> None:
    with closing(company((table.BASE, Fake(0.02)), (table.OURS, Fake(0.01)))) as there:
        long = contest.decode(DecodeCase("tiny", "float32", 5, NEW, CHUNK), there)
        short = contest.decode(DecodeCase("tiny", "float32", 5, NEW - 5, CHUNK), there)
    assert [len(r["contenders"][table.OURS]["seconds"]) for r in (long, short)] == [3, 1]
    assert short["contenders"][table.OURS]["agreement"]["argmax"] == 1


def test_loading_starts_a_process_each_time() -> None:
    count = 0

    def start(name: str) -> InThread:
        nonlocal count
        count += 1
        return InThread(Fake(error="load" if name == "llama.cpp" else ""))

    names = (table.BASE, table.OURS, "llama.cpp")
    record = loading.loading("tiny", names, table.BASE, 2, start, lambda text: None)
    assert count == 3 + 3 + 3 + 1  # to prepare; and in each turn those that load
    ours = record["contenders"][table.OURS]
    assert ours["first_token"]["samples"] == ours["times_base"]["samples"] == 2
    assert ours["peak_bytes"] > 1e7
    assert "not measured" in record["contenders"]["llama.cpp"]


def test_a_process_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    process = Process("nobody", "tiny", 1)
    try:
        with pytest.raises(Failed, match="KeyError: 'nobody'"):
            process.ask("load")
    finally:
        process.close()


def test_every_name_is_somebody() -> None:
    groups = (*table.COMPANIES.values(), table.LOADING)
    for name in {name for group in groups for name in group} | table.EXACT:
        table.make(name, "tiny", 1)
    for case in (*cases.DECODE, *cases.PREFILL, *cases.COMPILED_DECODE, *cases.COMPILED_PREFILL):
        assert {table.BASE, table.OURS, table.AGAIN} <= set(table.COMPANIES[case.company])
    assert set(table.COMPANIES["batches"]) <= set(table.COMPANIES["prefill"])


def test_progress_foretells_the_rest_from_what_was_seen() -> None:
    now = iter([0.0, 0.0, 10.0, 20.0, 40.0, 50.0])
    progress = Progress(5, most=55, clock=now.__next__)
    lines = [progress.line(text) for text in "abcde"]
    assert lines[0] == "[0:00] a"
    assert lines[1] == "[0:10, about 0:40 left] b"
    assert lines[2] == "[0:20, about 0:30 left] c"
    assert lines[3] == "[0:40, about 0:15 left] d"  # as many more at 13 s a step, but until 0:55
    assert lines[4] == "[0:50, about 0:05 left] e"


def test_memory_that_the_system_does_not_tell_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Worker(Fake(), 1, [], None).memory()["peak_bytes"] > 1e7
    monkeypatch.setattr("builtins.open", lambda *args, **options: io.StringIO("VmRSS:\t12 kB\n"))
    assert Worker(Fake(), 1, [], None).memory() == {"peak_bytes": None}


def test_agreement() -> None:
    reference = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
    assert agreement(reference, reference) == {"error": 0, "largest": 0, "argmax": 1}
    other = np.array([[2.0, 1.0], [3.0, -4.0]], np.float32)
    found = agreement(reference, other)
    assert found["argmax"] == 0.5
    assert found["largest"] == 0.25
    assert found["error"] == pytest.approx(np.sqrt(0.5) / reference.std())


def test_record_is_whole_after_every_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record("decode", tmp_path, cases=2)
    record.add({"model": "tiny", "seconds": [0.123456789]})
    written = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    assert written["cases"] == [{"model": "tiny", "seconds": [0.1235]}]
    assert {"commit", "processor", "versions", "threads", "flags", "clock_mhz"} <= written.keys()
    assert "decode: 1 of 2 cases" in capsys.readouterr().err
    assert not record.time_is_up()
    assert rounded({"a": (1.23456, 7, "x")}) == {"a": [1.235, 7, "x"]}


def test_a_case_that_fails_is_named_in_the_record(tmp_path: Path) -> None:
    record = Record("decode", tmp_path)
    with pytest.raises(Failed), record.naming_failure({"model": "tiny"}):
        raise Failed("no reference")
    assert record.content["cases"] == [{"model": "tiny", "not measured": "no reference"}]


def test_threads_are_those_of_the_cores_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    assert environment.cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert environment.cores() == 3


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(models, "ROOT", tmp_path)
    return "tiny"


def test_ours_and_the_references_pass_their_gate(tiny: str) -> None:
    """The real ones, on a model made as the measured ones are."""
    names = (
        table.BASE,
        "pytorch-pretrained-bert",
        table.BARE,
        table.OURS,
        "gpt2fast general",
        "transformers tuned",
        "gpt2fast bfloat16",
        "gpt2fast int8",
    )
    case = DecodeCase(tiny, "float32", 20, NEW, CHUNK)
    with closing(company(*((name, table.make(name, tiny, 1)) for name in names))) as there:
        record = contest.decode(case, there)
    for name, report in record["contenders"].items():
        assert "times_base" in report, (name, report)
    assert record["contenders"][table.OURS]["agreement"]["largest"] < 1e-5
    assert record["contenders"]["gpt2fast bfloat16"]["agreement"]["error"] < 0.05
    made = {path.name for path in (models.ROOT / "tiny").iterdir()}
    assert made == {"checkpoint", "int8"}  # each made once, and nothing left over


def test_prefill_of_ours_is_transformers(tiny: str) -> None:
    rows = [contest.tokens(12, seed) for seed in (1, 2)]
    first = []
    for name in (table.BASE, table.OURS, "pytorch-pretrained-bert"):
        contender = table.make(name, tiny, 1)
        contender.load()
        first.append(contender.prefill(rows))
    assert first[0] == first[1] == first[2]


def test_compiled_peers_compute_the_model(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have compiled, without the compiler, which takes a minute a function."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    names = (table.BASE, "transformers compiled", "compiled loop")
    with closing(company(*((name, table.make(name, tiny, 1)) for name in names))) as there:
        decoded = contest.decode(DecodeCase(tiny, "compiled", 20, NEW, CHUNK), there)
        filled = contest.prefill(PrefillCase(tiny, "compiled", 2, 20, 1), names, there)
    for record in (decoded, filled):
        for name in names:
            assert "times_base" in record["contenders"][name], record["contenders"][name]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("CTranslate2", "ctranslate2"),
        ("CTranslate2 int8", "ctranslate2"),
        ("ONNX Runtime", "onnxruntime"),
        ("ONNX Runtime int8", "onnxruntime"),
        ("llama.cpp", "llama_cpp"),
        ("llama.cpp Q8_0", "llama_cpp"),
    ],
)
def test_peers_compute_the_model(tiny: str, name: str, module: str) -> None:
    pytest.importorskip(module, reason="make bench installs the peers")
    named = [(each, table.make(each, tiny, 1)) for each in (table.BASE, name)]
    with closing(company(*named)) as there:
        decoded = contest.decode(DecodeCase(tiny, "float32", 20, NEW, CHUNK), there)
        filled = contest.prefill(PrefillCase(tiny, "prefill", 3, 20, 1), (table.BASE, name), there)
    for record in (decoded, filled):
        assert "times_base" in record["contenders"][name], record["contenders"][name]
    assert decoded["contenders"][name]["agreement"]["error"] < 0.3
