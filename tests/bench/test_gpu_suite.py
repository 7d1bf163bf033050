"""The GPU suite in a dry run: all of its parts, and what it does with what goes wrong."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTY = ("--table", "tests.bench.planted_ops:faulty")


def start(out: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "bench/gpu_suite.py", "--dry-run", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, record and output."""
    process = start(out, *arguments)
    try:
        output, errors = process.communicate(timeout=500)
    finally:
        process.terminate()  # which ends its parts too
    record = json.loads(out.read_text()) if out.exists() else {}
    return process.returncode, record, output + errors


def test_walks_through_every_part(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    steps = ("training", "prefill", "scoring", "accelerate")
    parts = ("parity", "sanitize:layer_norm", "limits", "decode", *steps, "ops")
    status, record, output = run(out, "--only", *parts)
    assert status == 0, output
    assert record["status"] == "complete"
    assert record["dry_run"]
    assert record["failures"] == []
    assert {"commit", "dirty", "date", "versions", "gpu"} <= set(record["environment"])
    tests = record["parts"]["parity"]["tests"]
    assert record["parts"]["parity"]["status"] == "passed"
    assert any(test["outcome"] == "passed" for test in tests.values())
    sanitize = record["parts"]["sanitize"]
    assert any("layer_norm" in name for name in sanitize["exercised"])
    assert sanitize["tools"]["memcheck"]["status"] == "skipped"
    assert "--error-exitcode" in sanitize["tools"]["racecheck"]["command"]
    limits = record["parts"]["limits"]
    assert "bfloat16" in limits["limits"]["matmul_flop_per_s"]
    assert {"graph_node_s", "barrier_s", "cooperative_node_s"} <= set(limits["probes"])
    assert not [probe for probe in limits["probes"].values() if "error" in probe]
    cases = record["parts"]["ops"]["cases"]
    assert {case["op"] for case in cases} >= {
        "add_layer_norm",
        "attention_append",
        "causal_attention",
        "embedding",
        "embedding_layer_norm",
        "gelu_mlp",
        "layer_norm",
        "linear",
        "lm_head_argmax",
        "lm_head_loss",
    }
    for case in cases:
        assert case["status"] == "measured", case
        for direction, times in case["times"].items():
            assert times["ours"]["device"]["p20"] <= times["ours"]["device"]["p80"]
            assert times["ours"]["issue"]["p50"] <= times["ours"]["host"]["p80"]
            assert times["ours"]["share_of_limit"] > 0
            assert case["work"][direction]["bytes"] > 0
    ladder = record["parts"]["decode"]
    assert [case["status"] for case in ladder["cases"]] == ["measured"] * 2
    first, second = ladder["cases"]
    assert set(first["times"]) == {
        "generate",
        "graph",
        "int4",
        "int8",
        "loop",
        "persistent",
        "transformers",
        "transformers static",
        "transformers tuned",
    }
    for name, times in first["times"].items():
        assert times["token"]["p50"] > 0
        assert ("token_ratio" in times) == (name != "graph")
        assert first["providers"][name]["shortfall"] <= first["providers"][name]["allowed"] + 1e-5
    assert first["times"]["int8"]["bytes"] < first["times"]["graph"]["bytes"]
    assert first["times"]["graph"]["share_of_read"] > 0
    assert first["providers"]["persistent"]["driver"] == "persistent"
    assert first["providers"]["int8"]["driver"] == "graph"  # in the interpreter
    assert second["times"]["fp8 cache"]["bytes"] < second["times"]["graph"]["bytes"]
    for name in steps:
        part = record["parts"][name]
        assert part["status"] == "measured"
        assert part["missing"] == []
        for case in part["cases"]:
            check_step(name, case)
    assert len(record["parts"]["accelerate"]["cases"]) == 4
    # This text is all that is sure to be seen of a run elsewhere.
    assert "DRY RUN" in output
    assert len(output) < 12_000
    assert "| layer_norm 5x64 float32 | full |" in output
    assert "| decode tiny B1 after 1 |" in output
    assert "| training tiny B2 T8 compiled: gpt2fast |" in output


def check_step(part: str, case: dict[str, Any]) -> None:
    """A case of whole models: everybody was judged, and then timed."""
    assert case["case"].startswith(f"{part} ")
    assert case["status"] == "measured", case
    ours, *others = case["providers"]
    assert ours == ("accelerated" if part == "accelerate" else "gpt2fast")
    assert list(case["times"]) == [ours, *others]
    for name, times in case["times"].items():
        assert times["tokens_per_s"] > 0
        assert times["mfu"] > 0
        assert case["providers"][name]["error"] <= case["providers"][name]["bound"] + 1e-5
        assert ("device_ratio" in times) == ("host_ratio" in times) == (name != ours)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """As `run`, of cases with faults, interrupted at the last, which would wait for ever."""
    out = tmp_path_factory.mktemp("faulty") / "record.json"
    process = start(out, "--only", "ops", *FAULTY)
    deadline = time.time() + 300
    try:
        while time.time() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            part = json.loads(out.read_text())["parts"].get("ops", {}) if out.exists() else {}
            if len(part.get("cases", [])) == 6:
                break
            time.sleep(0.2)
    finally:
        process.terminate()  # with SIGTERM, as an interruption comes
    output, errors = process.communicate(timeout=60)
    return process.returncode, json.loads(out.read_text()), output + errors


def test_wrong_answers_are_not_timed_and_crashes_harm_nothing_else(
    faulty: tuple[int, dict[str, Any], str],
) -> None:
    _, record, output = faulty
    cases = {case["case"].split()[0]: case for case in record["parts"]["ops"]["cases"]}
    assert {name: case["status"] for name, case in cases.items()} == {
        "right": "measured",
        "wrong": "failed",
        "wrong_gradient": "failed",
        "dies": "failed",
        "peer_dies": "measured",
        "peer_fails_in_a_graph": "measured",
    }
    assert set(cases["right"]["times"]) == {"forward", "backward", "full"}
    for times in cases["right"]["times"].values():
        assert set(times) == {"ours", "ours again", "eager"}, "a wrong peer was timed"
    assert "error" in cases["right"]["providers"]["wrong"]["wrong"]
    assert cases["wrong"]["times"] == {}
    assert cases["wrong_gradient"]["times"] == {}
    assert "linear backward" in cases["wrong_gradient"]["providers"]["ours"]["wrong"]
    assert "11" in cases["dies"]["reason"]
    assert cases["peer_dies"]["providers"]["deadly"] == {"not measured": "exit status 11"}
    graph = cases["peer_fails_in_a_graph"]["times"]["full"]
    assert graph["ours"]["device_source"] == graph["eager"]["device_source"] == "graph"
    assert graph["peer"]["device_source"] == "events"
    assert "RuntimeError: planted" in graph["peer"]["not captured"]
    assert "device_ratio" not in graph["peer"], "times of two kinds were compared"
    assert len(record["failures"]) == 3
    assert output.count("FAILED ops: ") == 3


def test_interrupted_run_keeps_what_it_has(faulty: tuple[int, dict[str, Any], str]) -> None:
    status, record, output = faulty
    assert status == 130
    assert record["status"] == "interrupted"
    names = [case["case"].split()[0] for case in record["parts"]["ops"]["cases"]]
    assert (len(names), names[0]) == (6, "right")
    assert f"record: {record['arguments'][2]}" in output


@pytest.mark.parametrize(
    ("failures", "parity", "status"),
    [([], "passed", 0), (["ops: one"], "passed", 1), ([], "incomplete", 3)],
)
def test_exit_status(
    failures: list[str], parity: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script's own folder is taken from it
    from bench import gpu_suite

    def fill(suite: Any) -> None:
        suite._record["failures"] += failures
        suite._record["parts"]["parity"] = {"status": parity, "counts": {}}

    monkeypatch.setattr(gpu_suite.Suite, "run", fill)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry-run", "--out", str(tmp_path / "record")])
    assert gpu_suite.main() == status
    assert json.loads((tmp_path / "record").read_text())["status"] == "complete"


def test_budget(tmp_path: Path) -> None:
    start = time.time()
    status, record, output = run(tmp_path / "record.json", "--budget-seconds", "0.3", *FAULTY)
    assert status == 3, output  # parity was to be shown, and was not
    assert {part["status"] for part in record["parts"].values()} == {"incomplete"}
    assert record["seconds"] < 0.3 + 15 + 10
    assert time.time() - start < 60


def test_dry_run_stays_out_of_the_results() -> None:
    out = ROOT / "bench" / "results" / "dry.json"
    status, record, output = run(out)
    assert status == 2
    assert record == {}
    assert "does not write into bench/results" in output


def test_failing_test_fails_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.suite import parts, processes

    tests = tmp_path / "test_planted.py"
    tests.write_text(
        "import pathlib\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_victim():\n"
        "    marker = pathlib.Path(__file__).with_suffix('.seen')\n"
        "    seen = marker.exists(); marker.touch()\n"
        "    assert seen, 'CUDA error: out of memory'\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(parts, "_DRY_TESTS", [tests.name])
    monkeypatch.setattr(parts, "_tests_with", lambda text: [])
    record: dict[str, Any] = {"parts": {}, "failures": []}
    options = argparse.Namespace(
        only={"parity": ""}, dry_run=True, budget_seconds=200.0, table="bench.suite.ops:op_cases"
    )
    suite = parts.Suite(record, lambda: None, tmp_path / "log", options, time.time() + 200)
    suite.run()
    parity = record["parts"]["parity"]
    assert parity["status"] == "failed"
    assert parity["counts"] == {"passed": 2, "failed": 1}
    assert [failure.rpartition("::")[2] for failure in record["failures"]] == ["test_wrong"]
    victim = next(test for name, test in parity["tests"].items() if "victim" in name)
    assert "out of memory" in victim["first"], "a test that failed for another was not run again"


def test_run_begins_with_an_empty_compiler_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.suite import parts

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "stale"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    folders = []

    def limits(suite: parts.Suite, *_: Any) -> None:
        script = "import os; print(*map(os.environ.get, %r), sep='\\n', file=open(%r, 'w'))"
        names = [
            "TORCHINDUCTOR_CACHE_DIR",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
            "TRITON_CACHE_DIR",
        ]
        out = tmp_path / "variables"
        command = [sys.executable, "-c", script % (names, str(out))]
        with parts.Process(command, suite._log, suite._variables) as process:
            assert process.wait(time.time() + 60) == 0
        folder, disabled, triton = out.read_text().split()
        assert list(Path(folder).iterdir()) == []
        assert disabled == "0"
        assert not triton.startswith(folder)  # torch.compile would put it there
        folders.append(Path(folder))

    monkeypatch.setattr(parts.Suite, "_limits", limits)
    options = argparse.Namespace(only={"limits": ""}, dry_run=False, budget_seconds=100.0)
    for _ in range(2):
        record: dict[str, Any] = {"parts": {}, "failures": []}
        parts.Suite(record, lambda: None, tmp_path / "log", options, time.time() + 100).run()
    assert folders[0] != folders[1]
    assert not folders[0].exists()


def test_bfloat16_comes_first_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.suite.order import pytest_collection_modifyitems

    def ordered(processes: int) -> list[str]:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(processes))
        names = ["a[float32]", "a[bfloat16]", "b", "c", "c[bfloat16]"]
        items: Any = [argparse.Namespace(nodeid=name) for name in names]
        pytest_collection_modifyitems(items)
        return [item.nodeid for item in items]

    assert ordered(1) == ["a[bfloat16]", "c[bfloat16]", "a[float32]", "b", "c"]
    assert ordered(2) == ["a[bfloat16]", "a[float32]", "c[bfloat16]", "b", "c"]
    assert len(ordered(14)) == 5


def test_kernels_are_known_by_their_decorator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.suite import sanitizer

    assert {"_layer_norm_fwd_kernel", "_matmul_kernel"} <= sanitizer.our_kernels()
    folder = tmp_path / "kernels" / "_triton"
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(
        "@triton.jit\ndef public_kernel(x_ptr): pass\n"
        "@triton.jit(\n    do_not_specialize=NAMES,\n)\n"
        "def _private_kernel(\n    x_ptr,\n): pass\n"
        "@triton.jit\ndef device_function(x): pass\n"
        "def launches_a_kernel(x): pass\n"
    )
    monkeypatch.setattr(sanitizer, "ROOT", tmp_path)
    assert sanitizer.our_kernels() == {"public_kernel", "_private_kernel"}


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x120 in planted.py:17
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f0000001000 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {kernel}+0x90 in planted.py:9
=========     and Read access at {kernel}+0xb0 in planted.py:10 [256 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN_RACECHECK = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "report", "expected"),
    [
        ("memcheck", MEMCHECK.format(kernel="_layer_norm_fwd_kernel"), "failed"),
        ("memcheck", MEMCHECK.format(kernel="_planted_write_kernel"), "passed"),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", "not available"),  # saw no fault
        ("memcheck", "========= Error: Device not supported\n", "not available"),
        ("racecheck", RACECHECK.format(kernel="_layer_norm_fwd_kernel"), "failed"),
        ("racecheck", RACECHECK.format(kernel="some_gemm_of_a_library"), "passed"),
        ("racecheck", CLEAN_RACECHECK, "passed"),
        ("racecheck", "", "not available"),
    ],
)
def test_reports_of_the_checkers(tmp_path: Path, tool: str, report: str, expected: str) -> None:
    from bench.suite.parts import Suite

    record: dict[str, Any] = {"parts": {}, "failures": []}
    suite = Suite(record, lambda: None, tmp_path / "log", argparse.Namespace(dry_run=False), 0.0)
    result = suite._judged(tool, tool == "memcheck", ["a case"], "", report)
    assert result["status"] == expected
    assert bool(record["failures"]) == (expected == "failed")


def test_summary_has_a_length() -> None:
    from bench.suite.report import summary

    quantiles = {"p20": 1e-6, "p50": 1e-6, "p80": 1e-6, "samples": 3}
    ours = {"device": quantiles, "host": quantiles, "device_source": "graph"}
    ours |= {"flop_per_s": 1.0, "bytes_per_s": 1.0}
    case = {
        "case": "op 8x8 float32",
        "work": {"full": {"bytes": 1, "flops": 1}},
        "providers": {"ours": {"error": {"forward": 1e-7}}},
        "times": {"full": {"ours": ours, "eager": {"host_ratio": quantiles}}},
    }
    record = {
        "dry_run": False,
        "status": "complete",
        "seconds": 500.0,
        "parts": {"ops": {"status": "measured", "cases": [case] * 500}},
        "failures": ["ops: " + "x" * 1000] * 30,
    }
    text = summary(record)
    assert len(text) < 11_500
    assert "more rows in the record" in text
    assert text.endswith("complete after 500 s")
