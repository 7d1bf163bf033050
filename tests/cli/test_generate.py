"""`gpt2fast generate`: what it prints, where, and with which exit status."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2LMHeadModel, GPT2Tokenizer
from gpt2fast.cli import main

Run = Callable[..., tuple[int, str, str]]
PROMPT = "It was a dark night"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny: Path) -> Run:
    """Run `generate` on the tiny model: (exit status, standard output, standard error)."""

    def generate(*words: str, model: str | Path = tiny) -> tuple[int, str, str]:
        try:
            status = main(["generate", "--model", str(model), *words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return generate


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_greedy_text_is_what_the_model_generates(run: Run, tiny: Path) -> None:
    status, out, err = run(PROMPT, "--greedy", "--max-new-tokens", "12")
    tokenizer = GPT2Tokenizer()
    model = GPT2LMHeadModel.from_pretrained(tiny)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    expected = model.generate(ids, max_new_tokens=12)[0]
    assert (status, out) == (0, tokenizer.decode(expected) + "\n")
    assert "prefill 5 tokens" in err
    assert "decode 11 tokens" in err
    assert "ended by length" in err


def test_seed_repeats_and_another_differs(run: Run) -> None:
    first, again, other = (run(PROMPT, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_prompt_lookup_changes_no_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("one two one two", "--seed", "1")[1]
    lookups = []
    original = GPT2LMHeadModel.stream

    def stream(self: GPT2LMHeadModel, *args: object, **options: object) -> object:
        lookups.append(options["prompt_lookup_num_tokens"])
        return original(self, *args, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "stream", stream)
    assert run("one two one two", "--seed", "1", "--prompt-lookup", "5")[1] == plain
    assert lookups == [5]
    assert run(PROMPT, "--prompt-lookup", "0")[0] == 2


def test_a_drawn_seed_is_told_and_repeats(run: Run) -> None:
    _, out, err = run(PROMPT)
    seed = re.search(r"seed (\d+)", err)
    assert seed is not None
    assert run(PROMPT, "--seed", seed[1])[1] == out


def test_json(run: Run) -> None:
    words = (PROMPT, "--seed", "3", "--max-new-tokens", "7")
    status, out, err = run(*words, "--json")
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert PROMPT + result["text"] + "\n" == run(*words)[1]
    assert {"prompt": PROMPT, "prompt_tokens": 5, "tokens": 7, "seed": 3}.items() <= result.items()
    assert result["ended"] == "length"
    assert result["prefill_seconds"] > 0
    assert result["decode_seconds"] > 0


def test_no_prompt(run: Run) -> None:
    _, out, _ = run(PROMPT, "--greedy")
    assert run(PROMPT, "--greedy", "--no-prompt")[1] == out.removeprefix(PROMPT)


def test_stop_text_ends_the_output(run: Run) -> None:
    _, out, _ = run(PROMPT, "--greedy", "--no-prompt")
    stop = out[5:8]
    _, stopped, err = run(PROMPT, "--greedy", "--no-prompt", "--stop", "nowhere", "--stop", stop)
    assert "ended by stop_string" in err
    assert stop in stopped
    assert out.startswith(stopped.rstrip("\n"))
    assert len(stopped) < len(out)


def test_a_full_context_ends_or_slides(run: Run) -> None:
    words = (PROMPT, "--greedy", "--max-new-tokens", "60", "--json")
    ended = json.loads(run(*words)[1])
    assert (ended["ended"], ended["tokens"]) == ("context", 32 - 5 + 1)
    slid = json.loads(run(*words, "--slide")[1])
    assert (slid["ended"], slid["tokens"]) == ("length", 60)


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"Once upon a time", "Once upon a time"),
        (b"Once upon\na time\n", "Once upon\na time"),
        (b"Once\r\n", "Once"),
        (b"Once\n\n", "Once\n"),
        (b"\xef\xbb\xbfOnce", "Once"),
        ("na\u00efve \U0001f600".encode(), "na\u00efve \U0001f600"),
    ],
)
def test_prompt_from_a_pipe_or_a_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes, prompt: str
) -> None:
    stdin(monkeypatch, data)
    assert json.loads(run("--json", "--max-new-tokens", "1")[1])["prompt"] == prompt
    (tmp_path / "prompt.txt").write_bytes(data)
    status, out, _ = run("--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "1")
    assert status == 0
    assert out.startswith(prompt)


class Terminal(io.StringIO):
    """Remembers what a reader has seen after each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [""]

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def test_text_is_shown_as_it_comes_and_characters_never_by_halves(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\U0001f600\u4e2d\u00e9"
    ids = GPT2Tokenizer().encode(text)
    assert len(ids) > len(text)
    coming = iter(ids)

    def say(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(module, torch.nn.Linear):
            return None
        logits = torch.zeros_like(logits)
        logits[..., next(coming)] = 1
        return logits

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    handle = torch.nn.modules.module.register_module_forward_hook(say)
    try:
        assert run(PROMPT, "--greedy", "--max-new-tokens", str(len(ids)))[0] == 0
    finally:
        handle.remove()
    shown = sorted(set(terminal.seen), key=len)
    ends = range(len(text) + 1)
    assert shown == ["", *(PROMPT + text[:end] for end in ends), f"{PROMPT}{text}\n"]


def test_the_tokenizer_of_the_folder_is_used(run: Run, tiny: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel.from_pretrained(tiny).save_pretrained(tmp_path)
    assert GPT2Tokenizer().tokenize("dark") == ["dark"]
    assert json.loads(run("darker", "--json", model=tmp_path)[1])["prompt_tokens"] == 2
    GPT2Tokenizer(add_prefix_space=True).save_pretrained(tmp_path)
    assert json.loads(run("darker", "--json", model=tmp_path)[1])["prompt_tokens"] == 1


def test_a_terminal_that_lacks_a_character_shows_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert run("caf\u00e9", "--max-new-tokens", "1")[0] == 0
    assert b"caf?" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature must be a finite number above 0; got -1.0"),
        (["--temperature", "nan"], "got nan"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--top-k", "-3"], "top_k must be an integer of at least 0; got -3"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1; got 1.5"),
        (["--min-p", "-0.1"], "min_p must be between 0 and 1; got -0.1"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a finite number above 0"),
        (["--max-new-tokens", "0"], "must be from 1 to 2147483647; got 0"),
        (["--max-new-tokens", "9" * 20], "must be from 1 to 2147483647; got 99999"),
        (["--threads", "-2"], "must be from 1 to 2147483647; got -2"),
        (["--stop", ""], "stop_strings must be non-empty"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N; got 'abacus'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N; got 'meta'"),
        (["--file", "x"], "not allowed with argument PROMPT"),
        (["--tempo", "3"], "unrecognized arguments: --tempo 3"),
    ],
)
def test_mistakes_in_the_options_exit_with_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(
        GPT2LMHeadModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    status, out, err = run(PROMPT, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def check_failure(result: tuple[int, str, str], message: str) -> None:
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.startswith("gpt2fast: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_no_prompt_at_all_is_a_usage_mistake(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "give a PROMPT, a --file, or text through a pipe" in err


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_empty_prompts_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes
) -> None:
    check_failure(run(""), "the prompt is empty: PROMPT holds no text")
    stdin(monkeypatch, data)
    check_failure(run(), "the prompt is empty: standard input holds no text")
    (tmp_path / "empty.txt").write_bytes(data)
    check_failure(run("--file", str(tmp_path / "empty.txt")), "empty.txt holds no text")


def test_prompts_that_are_not_utf8_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_failure(run("caf\udce9"), "PROMPT is not UTF-8: byte 0xe9 at 3")
    stdin(monkeypatch, b"ab\x80")
    check_failure(run(), "standard input is not UTF-8: byte 0x80 at 2")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    check_failure(run("--file", str(tmp_path / "latin.txt")), "latin.txt is not UTF-8: byte 0xff")


def test_missing_files_fail(run: Run, tmp_path: Path) -> None:
    check_failure(run("--file", str(tmp_path / "gone")), "No such file or directory")
    check_failure(run("--file", str(tmp_path)), "Is a directory")
    check_failure(run(PROMPT, model=tmp_path / "gone"), f"no folder or file {tmp_path / 'gone'}")
    check_failure(run(PROMPT, model=tmp_path), f"found no config.json in the folder {tmp_path}")


def test_an_unknown_model_offline_points_to_the_bundled_one(run: Run) -> None:
    for model in ("gpt2", "gpt2-xl", "somebody/something"):
        status, _, err = run(PROMPT, model=model)
        assert status == 1
        assert "'bundled' comes with this package and needs no network" in err


def test_prompts_beyond_the_context_fail(run: Run) -> None:
    check_failure(
        run("dark " * 40), "the prompt has 41 tokens and the model's context 32 positions"
    )


def test_a_prompt_beyond_the_context_slides(run: Run) -> None:
    words = ("dark " * 40, "--slide", "--max-new-tokens", "3", "--greedy", "--json")
    status, out, err = run(*words)
    result = json.loads(out)
    assert (status, err) == (0, "")
    # Half of the 32 positions are read, and nothing else is counted as read.
    assert result["prompt_tokens"] == 16
    last = GPT2Tokenizer().decode(GPT2Tokenizer().encode("dark " * 40)[-16:])
    assert json.loads(run(last, *words[1:])[1])["text"] == result["text"]


def test_ids_outside_the_models_vocabulary_fail(run: Run, tiny: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    check_failure(run(PROMPT, model=tmp_path), "input_ids must be in [0, 100); got 3223")


def test_damaged_checkpoints_fail(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    check_failure(run(PROMPT, model=tmp_path), "model.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_fails(run: Run) -> None:
    check_failure(run(PROMPT, "--device", "cuda:1"), "--device cuda:1: PyTorch sees 0 CUDA devices")


def test_warnings_are_one_line(run: Run, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    status, _, err = run(PROMPT, model=tmp_path)
    assert status == 0
    warning, _, _ = err.partition("\n")
    assert re.fullmatch(r"gpt2fast: warning: .*not used: extra\.weight", warning)


def test_interrupt_keeps_the_text_and_exits_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = run(PROMPT, "--greedy")
    stream = GPT2LMHeadModel.stream

    def interrupted(*args: object, **options: object) -> object:
        for i, step in enumerate(stream(*args, **options)):
            if i == 4:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(GPT2LMHeadModel, "stream", interrupted)
    status, out, err = run(PROMPT, "--greedy")
    assert status == 130
    assert whole.startswith(out.rstrip("\n"))
    assert PROMPT < out.rstrip("\n") < whole
    assert "ended by interrupted" in err
    assert json.loads(run(PROMPT, "--greedy", "--json")[1])["tokens"] == 4


def test_dtype_and_threads_reach_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stream = GPT2LMHeadModel.stream

    def spy(self: GPT2LMHeadModel, *args: object, **options: object) -> object:
        seen.append((self.dtype, self.device.type, torch.get_num_threads()))
        return stream(self, *args, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "stream", spy)
    threads = torch.get_num_threads()
    try:
        run(PROMPT, "--max-new-tokens", "2")
        run(PROMPT, "--max-new-tokens", "2", "--dtype", "bfloat16", "--threads", "1")
    finally:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert seen == [(torch.float32, device, threads), (torch.bfloat16, device, 1)]


def test_the_bundled_model_writes_words(run: Run) -> None:
    status, out, _ = run(PROMPT, "--seed", "0", "--max-new-tokens", "60", model="bundled")
    assert status == 0
    words = out.removeprefix(PROMPT).split()
    # English prose: mostly short words, and the commonest ones among them.
    assert len(words) > 30
    assert sum(map(len, words)) / len(words) < 7
    assert len({"the", "of", "and", "a", "to", "in", "was"} & set(words)) >= 3


def test_only_steps_of_int8_are_compiled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = run(PROMPT, "--compile", "--max-new-tokens", "2")
    assert (status, out) == (1, "")
    assert "cannot be compiled: it is not quantised to int8" in err
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, out, err = run(PROMPT, "--compile", "--quantize", "int8", "--max-new-tokens", "2")
    assert status == 0
    assert out.startswith(PROMPT)
    assert "warning: decoding is not compiled: there is no C++ compiler" in err
