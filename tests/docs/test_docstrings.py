"""Every public name says what it is, and its page is on the site."""

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs import pages

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [(module, name) for module, names in pages.reference().items() for name in names]


def documented(module: str, name: str) -> Iterator[tuple[str, Any, str]]:
    """A public name and, of a class, its public methods, each with its docstring."""
    value = getattr(import_module(module), name)
    # vars, not getdoc: a base class's docstring does not describe this one.
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    yield name, value, own or ""
    if inspect.isclass(value):
        for method, member in vars(value).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not method.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{method}", function, inspect.getdoc(getattr(value, method)) or ""


def section(docstring: str, title: str) -> str:
    """A section of a docstring, without its indentation; "" where there is none."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE)
    return inspect.cleandoc(found[1]) if found else ""


def parameters(value: Callable[..., object]) -> list[str]:
    names = inspect.signature(value).parameters
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_it_has_a_docstring(module: str, name: str) -> None:
    for label, _, docstring in documented(module, name):
        assert len(docstring.split()) >= 4, f"{module}.{label} has no docstring"
    assert len(next(documented(module, name))[2].split()) >= 5


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_parameters_that_it_describes_exist(module: str, name: str) -> None:
    for label, value, docstring in documented(module, name):
        heads = re.findall(r"^(\w[\w, ]*):", section(docstring, "Args"), re.MULTILINE)
        words = [word for head in heads for word in head.split(", ")]
        known = inspect.signature(value).parameters if words else {}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            continue
        assert not {*words} - {*known}, f"{module}.{label} has no such parameters"


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_function_describes_what_goes_in_and_comes_out(module: str, name: str) -> None:
    value = getattr(import_module(module), name)
    if inspect.isclass(value):
        return
    docstring, returned = value.__doc__, inspect.signature(value).return_annotation
    if parameters(value):
        assert section(docstring, "Args")
    if returned not in (None, "None"):
        assert section(docstring, "Returns") or section(docstring, "Yields")
    if "raise " in inspect.getsource(value):
        assert section(docstring, "Raises")


def test_every_page_is_in_the_table_of_contents() -> None:
    found: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(entry)
        for below in entry.values() if isinstance(entry, dict) else entry:
            if not isinstance(entry, str):
                walk(below)

    walk(pages.navigation())
    assert sorted(found) == sorted([*pages.pages(), "commands.md", *pages.ROOT_PAGES.values()])


def test_the_site_has_what_its_pages_link_to() -> None:
    files = pages.repository_files()
    assert files["bench/NOTES.md"] == ROOT / "bench" / "NOTES.md"
    assert "## generate\n" in pages.commands()
    assert "docs/pages.py" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
