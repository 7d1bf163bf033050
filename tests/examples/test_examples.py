"""Every example runs, offline, and does what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast import GPT2LMHeadModel
from tests.examples.runs import EXAMPLES, run_example

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
IDS = [json.loads(line)["id"] for line in (EXAMPLES / "texts.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_short_and_in_the_readme(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("\n") < 60
    assert f"examples/{name}.py" in text.partition('"""\n\n')[0]
    assert f"examples/{name}.py" in README


def test_generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(monkeypatch, "generate", "--max-new-tokens", "5", "The captain", "She")
    first, second, streamed = capsys.readouterr().out.rstrip("\n").split("\n\n")
    for prompt, text in [("The captain", first), ("She", second), ("The captain", streamed)]:
        assert text.startswith(prompt)
        assert len(text) > len(prompt)


def test_score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(monkeypatch, "score")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    perplexities = [float(row[0]) for row in rows]
    assert perplexities == sorted(perplexities)
    assert 1 < perplexities[0] < perplexities[-1] < 1000
    assert sorted(row[-1] for row in rows) == sorted(IDS)


def test_score_of_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One is empty, and one begins with a byte order mark, which is no text."""
    texts = {"empty": b"", "plain": b"The captain", "marked": b"\xef\xbb\xbfThe captain"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    run_example(monkeypatch, "score", *(str(tmp_path / name) for name in texts))
    plain, marked, empty = (row.rsplit("  ", 1) for row in capsys.readouterr().out.splitlines()[1:])
    assert plain[0] == marked[0]
    assert empty[0].split() == ["nan", "0", "-"]
    assert [Path(row[1]).name for row in (plain, marked, empty)] == ["plain", "marked", "empty"]


def test_fine_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_example(monkeypatch, "fine_tune", "--steps", "3", "--out", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    GPT2LMHeadModel.from_pretrained(tmp_path)


def test_accelerate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(monkeypatch, "accelerate_transformers", "--max-new-tokens", "6")
    assert "the same tokens: True" in capsys.readouterr().out


def test_scoring_of_two_ranks_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    source, out = str(EXAMPLES / "texts.jsonl"), tmp_path / "scored.jsonl"
    for rank in range(2):
        assert not out.exists()
        monkeypatch.setenv("RANK", str(rank))
        run_example(monkeypatch, "torchrun_score", source, str(out))
    rows = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert [row["id"] for row in rows] == IDS
    assert all(row["log_prob"] < 0 < row["n_scored"] for row in rows)


def test_torchrun_generates_with_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "written.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", EXAMPLES / "torchrun_score.py", EXAMPLES / "texts.jsonl"]
    command += [out, "--task", "generate", "--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert [row["id"] for row in rows] == IDS
    assert all(row["generated_text"] and row["finish_reason"] == "length" for row in rows)
    parts = sorted(path.name for path in (tmp_path / "written.jsonl.parts").iterdir())
    assert parts == ["0-of-2.jsonl", "1-of-2.jsonl", "settings.json"]
