"""One command runs every benchmark, the most important first, within the time given."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, bool]]:
    """Name, minutes and whether it records, of every benchmark that would have run; each takes as
    long as it may, and decode fails."""
    ran: list[tuple[str, float, bool]] = []
    now = [0.0]

    def finished(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        files = [word for word in command if word.startswith("bench/bench_")]
        if not files:
            assert "gpt2fast.benchmark.prepare" in command
            now[0] += 1000  # is not of the time given
            return subprocess.CompletedProcess(command, 0)
        assert (ROOT / files[0]).is_file()
        minutes = float(options["env"]["GPT2FAST_BENCH_MINUTES"])
        now[0] += 60 * minutes
        name = files[0].removeprefix("bench/bench_").removesuffix(".py")
        ran.append((name, minutes, options["env"].get("GPT2FAST_BENCH_RECORD") == "1"))
        return subprocess.CompletedProcess(command, int(name == "decode"))

    monkeypatch.setattr(run.subprocess, "run", finished)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("GPT2FAST_BENCH_RECORD", raising=False)
    return ran


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench.run", *words])
    return run.main()


def test_everything_in_forty_minutes(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--record") == 1
    assert [name for name, _, _ in ran] == list(run.SHARES)
    assert [minutes for _, minutes, _ in ran] == pytest.approx(list(run.SHARES.values()))
    assert all(record for _, _, record in ran)
    err = capsys.readouterr().err
    assert "[0:00 of 40:00] decode: 1 of 8, up to 11:00; all ends within 40:00" in err
    assert "[11:00 of 40:00] prefill: 2 of 8" in err
    assert "failed: decode" in err


def test_some_of_them_in_less(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(monkeypatch, "--minutes", "4", "scoring", "loading") == 0
    assert [name for name, _, _ in ran] == ["loading", "scoring"]
    assert sum(minutes for _, minutes, _ in ran) == pytest.approx(4)
    assert not any(record for _, _, record in ran)
    for bad in (["nothing"], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            main(monkeypatch, *bad)
