"""Test modules as source distributions carry them, imported without what is missing there."""

import importlib
import sys
from types import ModuleType
from typing import Any

from tests.peers.sources import Source, fetch


def import_carried(source: Source, module: str, missing: dict[str, dict[str, Any]]) -> ModuleType:
    """The test module ``module`` of ``source``, as a member of a package ``<name>_tests``.

    Args:
        source: the distribution.
        module: the file's name in ``tests/`` without ``.py``.
        missing: modules beside it that it imports and that are not carried, with the names
            that they are to hold instead.
    """
    package = f"{source.name}_tests"
    folder = fetch(source) / "tests"
    if package not in sys.modules:
        sys.modules[package] = _package(package, [str(folder)])
    for name, contents in missing.items():
        if (folder / f"{name.replace('.', '/')}.py").exists():
            raise FileExistsError(f"{source.name} {source.version} carries {name}: import it")
        parent = f"{package}.{name.rpartition('.')[0]}"
        sys.modules.setdefault(parent, _package(parent, []))
        stand_in = ModuleType(f"{package}.{name}")
        vars(stand_in).update(contents)
        sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module(f"{package}.{module}")


def _package(name: str, path: list[str]) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = path
    return package
