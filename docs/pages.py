"""The pages of the site: those of the repository, one for each public name, and the commands.

A hook of MkDocs. Nothing is written by hand and nothing is kept twice: names come from the
``__all__`` of `MODULES`, their text from the docstrings, and that of the commands from the parser.
"""

import argparse
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository, and their paths on the site; what they link to follows by itself.
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
MODULES = (
    "gpt2fast",
    "gpt2fast.generation",
    "gpt2fast.tokenizer",
    "gpt2fast.integrations.batches",
    "gpt2fast.integrations.shards",
    "gpt2fast.kernels",
    "gpt2fast.legacy",
)


def reference() -> dict[str, dict[str, str]]:
    """For each module its public names, and where each is defined.

    A name of several modules is of the first alone.
    """
    found: dict[str, dict[str, str]] = {}
    for module in map(import_module, MODULES):
        names = found[module.__name__] = {}
        known = {place for others in found.values() for place in others.values()}
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, str):  # __version__
                # Not the name itself: kernels share theirs with their modules.
                place = f"{value.__module__}.{value.__qualname__}"
                if place not in known:
                    names[name] = place
    return found


def pages() -> dict[str, str]:
    """Path and text of the reference's pages, which mkdocstrings fills."""
    texts = {}
    for module, names in reference().items():
        for name, place in names.items():
            options = json.dumps({"heading": f"{module}.{name}", "heading_level": 1})
            texts[f"reference/{module}/{name}.md"] = f"::: {place}\n    options: {options}\n"
    return texts


def navigation() -> list[dict[str, Any]]:
    """The table of contents."""
    names = [
        {module: [{name: f"reference/{module}/{name}.md"} for name in names]}
        for module, names in reference().items()
    ]
    root = [{path.removesuffix(".md").capitalize(): path} for path in ROOT_PAGES.values()]
    return [{"gpt2fast": "index.md"}, {"Commands": "commands.md"}, {"Reference": names}, *root[1:]]


def commands() -> str:
    """What ``--help`` says of every command."""
    from gpt2fast.cli import build_parser

    (choices,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    parts = [f"## {name}\n\n```text\n{sub.format_help()}```\n" for name, sub in choices.items()]
    return "\n".join(["# Commands\n", *parts])


def linked(page: Path) -> list[Path]:
    """The files of the repository that a page links to or shows."""
    pattern = r"""(?:\]\(|src=["']|srcset=["'])([^)#:"']+)"""
    targets = re.findall(pattern, page.read_text(encoding="utf-8"))
    return [path for target in targets if (path := (page.parent / target).resolve()).is_file()]


def repository_files() -> dict[str, Path]:
    """Paths on the site of the repository's pages, and of what they link to."""
    found = {path: ROOT / name for name, path in ROOT_PAGES.items()}
    waiting = list(found.values())
    while waiting:
        for path in linked(waiting.pop()):
            if path not in found.values():
                found[path.relative_to(ROOT).as_posix()] = path
                waiting += [path] if path.suffix == ".md" else []
    return found


def on_config(config: Any) -> Any:
    """Called by MkDocs with its settings."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the files it has found."""
    from mkdocs.structure.files import File

    for path, text in {**pages(), "commands.md": commands()}.items():
        files.append(File.generated(config, path, content=text))
    for path, source in repository_files().items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files
