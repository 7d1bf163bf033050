"""gpt2fast score: files in, JSON Lines out, and going on after a kill."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer, Scorer
from gpt2fast.cli import main
from gpt2fast.scoring import scorer as scoring
from gpt2fast.scoring.results import SavedResults

OPTIONS = ("--device", "cpu", "--threads", "1", "--batch-tokens", "32")


def command(tiny: Path, *words: object) -> list[str]:
    return ["score", "--model", str(tiny), *OPTIONS, *map(str, words)]


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Some strings, some ids, some empty; and three documents, one longer than the context."""
    lines = [
        {"text": "The captain of the ship", "id": "a"},
        {"token_ids": [464, 10654], "id": 2, "other": None},
        {"text": ""},
        {"text": "A\u2028B\x85 \ud83d\ude42", "id": None},
    ]
    first, second = tmp_path / "lines.jsonl", tmp_path / "documents.txt"
    first.write_text("\n\n".join(map(json.dumps, lines)))  # blank lines, and none at the end
    second.write_text(f"One.\r\n<|endoftext|>\n\n<|endoftext|>\n{'Two and ' * 40}\n")
    return [first, second]


@pytest.mark.parametrize("bos", [False, True])
def test_records_in_order_and_the_summary(
    tiny: Path, texts: list[Path], bos: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "--stride", 8, "--max-length", 20, *(["--bos"] if bos else [])]
    assert main(command(tiny, *texts, *options)) == 0
    out, summary = capsys.readouterr()
    found = records(out)
    inputs = ["The captain of the ship", [464, 10654], "", "A\u2028B\x85 \U0001f642", "One.\r\n",
              "Two and " * 40 + "\n"]  # fmt: skip
    expected = Scorer(tiny, stride=8, max_length=20, batch_tokens=32, add_bos=bos)(inputs)
    first, second = map(str, texts)
    labels = [
        {"file": first, "line": 1, "id": "a"},
        {"file": first, "line": 3, "id": 2},
        {"file": first, "line": 5},
        {"file": first, "line": 7, "id": None},
        {"file": second, "document": 1},
        {"file": second, "document": 2},
    ]
    for record, label, score in zip(found, labels, expected, strict=True):
        perplexity = None if math.isnan(score.perplexity) else round(score.perplexity, 6)
        assert record == {
            **label,
            "n_tokens": len(score.token_ids),
            "n_scored": score.n_scored,
            "log_prob": round(score.log_prob, 6),
            "perplexity": perplexity,
            "token_ids": score.token_ids,
            "log_probs": [v if v is None else round(v, 6) for v in score.log_probs],
        }
    n_scored = sum(score.n_scored for score in expected)
    corpus = math.exp(-sum(score.log_prob for score in expected) / n_scored)
    said = re.fullmatch(
        r"6 texts, (\d+) tokens scored: perplexity ([\d,.]+); \1 tokens in .* tokens/s\)\n", summary
    )
    assert said is not None, summary
    assert int(said[1]) == n_scored
    assert float(said[2].replace(",", "")) == pytest.approx(corpus, rel=1e-5)


def test_a_byte_order_mark_is_no_text(
    tiny: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny, *texts, "--tokens")) == 0
    plain = capsys.readouterr().out
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert main(command(tiny, *texts, "--tokens")) == 0
    assert capsys.readouterr().out == plain


def test_without_tokens_low_bits_and_dtypes(
    tiny: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for words in ((), ("--quantize", "int8"), ("--dtype", "bfloat16")):
        assert main(command(tiny, texts[0], *words)) == 0
        found[words] = records(capsys.readouterr().out)
        assert found[words][0].keys() == {
            *("file", "line", "id", "n_tokens", "n_scored", "log_prob", "perplexity")
        }
    sums = [found[words][0]["log_prob"] for words in found]
    assert len(set(sums)) == 3
    assert max(sums) - min(sums) < 0.05 * abs(sums[0])


def many(tmp_path: Path, count: int) -> Path:
    rng = random.Random(0)
    file = tmp_path / "many.jsonl"
    with file.open("w") as lines:
        for i in range(count):
            ids = [rng.randrange(97) for _ in range(rng.randrange(60))]
            lines.write(json.dumps({"token_ids": ids, "id": i}) + "\n")
    return file


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before the lines", "after them", "in the middle of a line"])
def test_interrupted_anywhere_it_ends_with_the_same_file(
    small: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_LOOK_AHEAD", 4)
    file, whole, out = many(tmp_path, 20), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(command(small, file, "--out", whole, "--tokens")) == 0
    write, save = SavedResults._write, SavedResults._save
    groups = 0

    def fail(*_: object) -> None:
        raise Killed

    def interrupted(self: SavedResults, lines: str) -> None:
        nonlocal groups
        groups += 1
        if groups % 2:
            write(self, lines)
        elif moment == "before the lines":
            raise Killed
        elif moment == "after them":
            with monkeypatch.context() as patch:
                patch.setattr(SavedResults, "_save", fail)
                write(self, lines)
        else:
            self._file.write(lines[: len(lines) // 2].encode())
            raise Killed

    monkeypatch.setattr(SavedResults, "_write", interrupted)
    kills = 0
    while True:
        try:
            assert main(command(small, file, "--out", out, "--tokens", "--resume")) == 0
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert save is SavedResults._save
    assert out.read_bytes() == whole.read_bytes()
    progress = [path.with_name(f"{path.name}.progress").read_text() for path in (out, whole)]
    assert progress[0] == progress[1]
    # Going on with what is finished changes nothing.
    assert main(command(small, file, "--out", out, "--tokens", "--resume")) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_killed_by_a_signal_it_goes_on(small: Path, tmp_path: Path) -> None:
    file, whole, out = many(tmp_path, 300), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2fast", *command(small, file, "--out", out)]
    )
    progress = tmp_path / "out.jsonl.progress"
    try:
        deadline = time.monotonic() + 100
        while not (progress.exists() and json.loads(progress.read_text())["texts"]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert json.loads(progress.read_text())["texts"] < 300
    assert main(command(small, file, "--out", out, "--resume")) == 0
    assert main(command(small, file, "--out", whole)) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert [record["id"] for record in records(out.read_text())] == [*range(300)]


def failure(capsys: pytest.CaptureFixture[str], words: list[str], status: int = 1) -> str:
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpt2fast: error: ")
    return err.removeprefix("gpt2fast: error: ").rstrip("\n")


def test_it_goes_on_only_as_it_began(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = many(tmp_path, 3), tmp_path / "out.jsonl"
    begin = command(tiny, file, "--out", out)
    assert main(begin) == 0
    capsys.readouterr()
    kept = out.read_bytes()
    assert failure(capsys, begin) == f"{out} exists: add --resume, or choose another --out"
    for words, name in (
        (["--stride", "4"], "stride 16, now it is 4"),
        (["--max-length", "30", "--stride", "16"], "max_length 32, now it is 30"),
        (["--batch-tokens", "64"], "batch_tokens 32, now it is 64"),
        (["--bos"], "bos False, now it is True"),
        (["--tokens"], "tokens False, now it is True"),
        (["--dtype", "float16"], "model '"),
        (["--quantize", "int8"], "model '"),
    ):
        message = failure(capsys, [*begin, *words, "--resume"])
        assert message.startswith(f"{out} was begun with {name}"), message
        assert message.endswith(": choose another --out")
    other = GPT2LMHeadModel.from_pretrained(tiny)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.bias.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    GPT2LMHeadModel.from_pretrained(tiny, n_head=4).save_pretrained(tmp_path / "heads")
    for name in ("other", "heads"):
        words = command(tmp_path / name, file, "--out", out, "--resume")
        assert failure(capsys, words).startswith(f"{out} was begun with model '")
    words = command(tmp_path / "same", file, "--out", out, "--resume")
    GPT2LMHeadModel.from_pretrained(tiny).save_pretrained(tmp_path / "same")
    GPT2Tokenizer().save_pretrained(tmp_path / "same")
    assert main(words) == 0
    capsys.readouterr()
    for name in ("vocab.json", "merges.txt"):  # GPT-2's, but for two tokens, or the last merge
        GPT2Tokenizer().save_vocabulary(tmp_path / "same")
        (tmp_path / "same" / "tokenizer.json").unlink(missing_ok=True)
        path = tmp_path / "same" / name
        text = path.read_text("utf-8")
        if name == "vocab.json":
            path.write_text(json.dumps({**json.loads(text), "!": 1, '"': 0}))
        else:
            path.write_text("\n".join(text.rstrip("\n").split("\n")[:-1]) + "\n")
        assert failure(capsys, words).startswith(f"{out} was begun with tokenizer '")
    file.write_text(file.read_text() + '{"text": "more"}\n')
    words = command(tiny, file, "--out", out, "--resume")
    assert failure(capsys, words).startswith(f"{out} was begun with files '")
    assert out.read_bytes() == kept


@pytest.mark.skipif(os.name != "posix", reason="locks files as POSIX does")
def test_two_runs_do_not_write_one_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = many(tmp_path, 3), tmp_path / "out.jsonl"
    words = command(tiny, file, "--out", out, "--resume")
    assert main(words) == 0
    settings = json.loads((tmp_path / "out.jsonl.progress").read_text())["settings"]
    capsys.readouterr()
    kept = out.read_bytes()
    with SavedResults(out, settings, resume=True):
        assert failure(capsys, words) == f"{out}: another run is writing it"
    assert out.read_bytes() == kept
    assert main(words) == 0


def test_damaged_outputs(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = many(tmp_path, 3), tmp_path / "out.jsonl"
    progress = tmp_path / "out.jsonl.progress"
    words = command(tiny, file, "--out", out, "--resume")
    assert main(words) == 0  # nothing to go on with: begun
    capsys.readouterr()
    size, state = out.stat().st_size, progress.read_text()
    os.truncate(out, size - 1)
    assert failure(capsys, words) == f"{out} has lost lines: {size - 1} bytes of {size} are left"
    for text in ("{", "[]", '{"texts": 3}', "\xff"):
        progress.write_text(text, encoding="latin-1")
        assert failure(capsys, words).startswith(f"{progress} is damaged: ")
    progress.unlink()
    assert failure(capsys, words) == f"{out} cannot be gone on with: {progress} is gone"
    out.unlink()
    progress.write_text(state)
    assert failure(capsys, words).startswith(f"{out} has lost lines: 0 bytes of ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\xff"}', "not UTF-8: byte 0xff, invalid start byte"),
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b"[" * 100000, "not JSON: maximum recursion depth exceeded"),
        (b'"text"', 'expected an object with "text" or "token_ids"; got str'),
        (b'{"tex": "a"}', 'expected an object with "text" or "token_ids"; got [\'tex\']'),
        (b'{"text": "a", "token_ids": [1]}', 'expected an object with "text" or "token_ids"; got '),
        (b'{"text": null}', '"text" must be a string; got NoneType'),
        (b'{"text": NaN}', '"text" must be a string; got float'),
        (b'{"token_ids": "a"}', '"token_ids" must be a list; got str'),
        (b'{"token_ids": [1, 50257]}', "token ids must be integers in [0, 50257); got 50257 at "),
        (
            b'{"token_ids": [NaN]}',
            "token ids must be integers in [0, 50257); got nan at position 0",
        ),
        (b'{"token_ids": [true]}', "token ids must be integers in [0, 50257); got True at "),
        (b'{"text": "a", "id": NaN}', '"id" cannot be written as JSON: Out of range float values'),
        (b'{"text": "a", "id": [1e999]}', '"id" cannot be written as JSON: Out of range float '),
    ],
    ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_a_bad_line_is_named_before_anything_is_scored(
    tiny: Path, tmp_path: Path, line: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' * 50 + line + b'\n{"text": "good"}\n')
    words = command(tiny, file, "--out", out)
    assert failure(capsys, words).startswith(f"{file}:101: {message}")
    assert [*tmp_path.iterdir()] == [file]


def test_bad_files_and_options(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"one\ntwo \xe9t\xe9\n")
    message = failure(capsys, command(tiny, bad))
    assert message == f"{bad}:2: not UTF-8: byte 0xe9, invalid continuation byte"
    bad.write_text(" \n<|endoftext|>\n")
    assert failure(capsys, command(tiny, bad)) == f"no text in {bad}"
    absent = tmp_path / "absent.txt"
    assert failure(capsys, command(tiny, absent)).startswith(f"{absent} is no file")
    assert failure(capsys, command(tiny, tmp_path), 2).startswith("texts come from .txt and .jsonl")
    bad.write_text("one")
    assert failure(capsys, command(tiny, bad, "--resume"), 2).startswith("--resume goes on with")
    message = failure(capsys, command(tiny, bad, "--stride", "33"))
    assert message == "stride must be from 1 to 32; got 33"
    assert failure(capsys, command(tiny, bad, "--device", "mps"), 2).startswith("--device must be")
    assert "absent" in failure(capsys, command(tmp_path / "absent", bad))
    with pytest.raises(SystemExit):
        main(command(tiny, bad, "--batch-tokens", "0"))


def test_what_is_not_finite_is_an_error(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny)
    (token,) = GPT2Tokenizer().encode(" cat")
    with torch.no_grad():
        model.transformer.wte.weight[token] = math.nan
    model.save_pretrained(tmp_path / "nan")
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": ""}\n{"text": "A cat"}\n')
    message = failure(capsys, command(tmp_path / "nan", file))
    assert message.startswith(f"{file}:2: the log-probability of token 1 is nan: the weights, or ")
