"""The pages in the root say what is so: examples run, commands exist, files are there."""

import re
import shlex
from pathlib import Path

import pytest

from gpt2fast.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = blocks("python")[number].replace("path/to/gpt2fast", str(ROOT))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, f"README.md, python example {number}", "exec"), {"__name__": "example"})


def test_shell_examples_are_commands_that_exist() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert lines
    for line in lines:
        for command in re.split(r"[|;&]+", line.partition(" #")[0]):
            words = shlex.split(command)
            if scripts := [word for word in words if word.startswith("examples/")]:
                assert words[0] in {"python", "torchrun"}
                assert (ROOT / scripts[0]).is_file()
            elif words[0] in {"gpt2fast", "torchrun"}:
                build_parser().parse_args(words[words.index("gpt2fast") + 1 :])
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            elif words[:2] == ["pip", "install"]:
                assert words[2] == "." or words[2].startswith(".[")
                for extra in re.findall(r"\w+", words[2]):
                    assert f"\n{extra} = [" in PYPROJECT
            else:
                assert words[0] in {"git", "cd", "echo", "head"}, f"unknown command: {line}"


def test_support_matrix_states_the_ranges_of_the_package() -> None:
    versions = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert f"{versions[0]} to {versions[-1]}" in README
    for package in ("torch", "transformers"):
        lowest = re.search(rf'"{package}>=([\d.]+)"', PYPROJECT)
        assert lowest is not None
        row = next(r for r in README.splitlines() if r.lower().startswith(f"| {_LABEL[package]}"))
        assert f"{lowest[1]} " in row
        tested = re.search(rf"^{package}==(\d+\.\d+)", CONSTRAINTS, re.MULTILINE)
        assert tested is not None
        assert tested[1] in row


_LABEL = {"torch": "pytorch", "transformers": "transformers"}
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert len(named) > 15
    for name in named:
        places = (ROOT / name, ROOT / "gpt2fast" / name, ROOT / "kernels" / name)
        assert any(place.exists() for place in places), f"ARCHITECTURE.md names {name}"
