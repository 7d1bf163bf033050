"""``gpt2fast bench`` measures who is here, names who is not, and knows when it is over."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2fast.benchmark import command, companies, table
from gpt2fast.benchmark.processes import Failed
from gpt2fast.cli import build_parser, main
from tests.bench.test_cpu import Fake, InThread

HERE = {table.BASE: 0.02, table.OURS: 0.01, table.AGAIN: 0.01, table.BARE: 0.005}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Contenders of known speeds in threads; others are not installed."""
    fakes: dict[str, Any] = {name: Fake(seconds) for name, seconds in HERE.items()}

    def started(name: str, model: str, threads: int) -> InThread:
        if name not in fakes:
            raise Failed("not installed")
        return InThread(fakes[name])

    monkeypatch.setattr(command, "started", started)
    monkeypatch.setattr(command, "installed", fakes.__contains__)
    return fakes


def test_the_table_has_who_is_here_and_names_the_others(
    machine: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    assert main(["bench", "--size", "tiny", "--threads", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "|  | tiny, 32 + 64 | tiny, 1 x 64 |" in lines
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if "**" in line]
    assert rows == [table.BARE, table.OURS, table.BASE]  # the fastest first
    assert f"| {table.OURS} | 10.0 ms, **2.00** (2.00 to 2.00) | 10.0 ms, **2.00**" in out
    assert "- llama.cpp: not measured: not installed" in lines
    assert "GB/s" in out
    assert "noisy" not in out
    assert f"{table.OURS}: loading" in err
    assert "left]" in err
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [case["base"] for case in written["cases"]] == [table.BASE] * 2
    assert written["threads"] == 1
    assert {"processor", "versions", "commit", "clock_mhz", "load_average"} <= written.keys()


def test_a_noisy_machine_and_a_wrong_answer_of_ours(
    machine: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    machine[table.AGAIN] = Fake(0.02)
    assert main(["bench", "--model", "tiny"]) == 0
    assert "This machine is noisy: the same program against itself differs by 50%" in (
        capsys.readouterr().out
    )
    machine[table.OURS] = Fake(0.01, token=8)
    assert main(["bench", "--model", "tiny"]) == 1
    assert f"- {table.OURS}: wrong: new token 0 is 8" in capsys.readouterr().out


def test_it_ends_when_its_time_is_up(
    machine: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", "tiny", "--minutes", "1e-9"]) == 1
    assert "nothing was measured: no time left" in capsys.readouterr().err
    for bad in (["--minutes", "0"], ["--minutes", "nan"], ["--threads", "0"], ["--model", "gpt5"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["bench", *bad])
        assert bad[1] in capsys.readouterr().err


def test_who_is_not_installed_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_MODULES", {"CTranslate2": "no_such_module"})
    assert table.installed(table.OURS)
    with pytest.raises(Failed, match="not installed"):
        companies.started("CTranslate2 int8", "tiny", 1)
    monkeypatch.setattr(companies, "available_bytes", lambda: 10)
    with pytest.raises(Failed, match=r"0\.0 GB of memory left, 0\.0 needed"):
        companies.started(table.OURS, "tiny", 1)
