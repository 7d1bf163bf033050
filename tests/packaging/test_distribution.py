"""One installed package over three source folders: the wheel, the sdist, the editable install and
an uninstalled checkout, each built from a copy of the tree and used in a process of its own.

The processes run with ``-S`` and find the dependencies through PYTHONPATH, where no ``.pth`` file
is read: the editable install that serves this test run is not there to hide a fault.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"gpt2fast": "gpt2fast", "kernels": "gpt2fast/kernels", "tokenizer": "gpt2fast/tokenizer"}
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def run(
    code: str, *, cwd: Path, path: list[Path] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that finds ``path``, then the dependencies alone."""
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path or []), *dependencies]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def build(hook: str, source: Path, target: Path) -> Path:
    """Call the PEP 517 or 660 hook that pip would call, in ``source``."""
    target.mkdir(exist_ok=True)
    done = run(
        f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))", cwd=source
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninstalled copy of what a release holds, with no build left in it."""
    copy = tmp_path_factory.mktemp("checkout dir") / "gpt2fast-main"
    copy.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", checkout, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", checkout, tmp_path_factory.mktemp("dist"))


def installed_name(source: str) -> str:
    """Where a file of the checkout stands in the wheel."""
    room, _, rest = source.partition("/")
    return f"{ROOMS[room]}/{rest}"


def room_files(root: Path) -> set[str]:
    """Every file of the three rooms, under the name that it is installed as."""
    return {
        installed_name(file.relative_to(root).as_posix())
        for room in ROOMS
        for file in (root / room).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


IMPORTS = """
    import sys
    from pathlib import Path
    import gpt2fast, gpt2fast.kernels, gpt2fast.tokenizer
    home = Path({home!r}).resolve()
    files = {{name: module.__file__ for name, module in sys.modules.items()
             if name.split(".")[0] == "gpt2fast"}}
    strays = {{name: file for name, file in files.items()
              if home not in Path(file).resolve().parents}}
    assert not strays, strays
    for name in gpt2fast._EXPORTS:
        getattr(gpt2fast, name)
    print(gpt2fast.__version__, len(gpt2fast.tokenizer.GPT2Tokenizer()))
"""


def check_imports(done: subprocess.CompletedProcess[str], version: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [version, "50257"]


@pytest.fixture(scope="module")
def version() -> str:
    source = (ROOT / "gpt2fast" / "version.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def test_wheel_holds_one_package(wheel: Path, version: str) -> None:
    assert wheel.name == f"gpt2fast-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert archive.read(f"gpt2fast-{version}.dist-info/top_level.txt") == b"gpt2fast\n"
    assert tops == {"gpt2fast", f"gpt2fast-{version}.dist-info"}


def test_wheel_holds_every_file_of_the_rooms(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        merges = archive.read("gpt2fast/tokenizer/data/vocab.bpe")
    assert {name for name in names if name.startswith("gpt2fast/")} == room_files(checkout)
    assert hashlib.sha256(merges).hexdigest() == MERGES_SHA256
    assert "gpt2fast/py.typed" in names


def imported(root: Path) -> set[str]:
    """The top-level names outside the standard library that the rooms import, lazily or not."""
    nodes = [
        node
        for room in ROOMS
        for file in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_wheel_metadata(checkout: Path, wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"gpt2fast-{version}.dist-info"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    required = {
        re.match(r"[\w-]+", line)[0].replace("-", "_")
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }
    optional = {
        "matplotlib",  # the extra `train`
        "triton",  # the kernels', which PyTorch brings
        "transformers",
        # Those that `gpt2fast bench` measures where they are installed.
        *("ctranslate2", "gguf", "llama_cpp", "onnx", "onnxruntime", "pytorch_pretrained_bert"),
    }
    assert required == imported(checkout) - {"gpt2fast"} - optional
    assert {
        "triton",
        "transformers",
        "train",
        "test",
        "bench",
        "peers",
        "dev",
        "ray",
        "docs",
    } == set(metadata.get_all("Provides-Extra"))
    assert metadata["Requires-Python"] == ">=3.10"
    assert any("data" in name for name in metadata.get_all("License-File"))
    assert "gpt2fast = gpt2fast.cli:main" in scripts


def test_wheel_imports(wheel: Path, tmp_path: Path, version: str) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = run(IMPORTS.format(home=str(site)), cwd=tmp_path, path=[site])
    check_imports(done, version)


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("LICENSE", "Makefile", "constraints.txt", "hubconf.py", "README.md"):
        assert (source / name).is_file(), name
    rebuilt = build("build_wheel", source, tmp_path / "dist")
    with zipfile.ZipFile(rebuilt) as ours, zipfile.ZipFile(wheel) as theirs:
        assert set(ours.namelist()) == set(theirs.namelist())


def test_editable_install_imports(checkout: Path, tmp_path: Path, version: str) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path / "dist")) as archive:
        archive.extractall(site)
    # `site` is what reads the .pth file at an interpreter's start.
    start = f"import site\nsite.addsitedir({str(site)!r})\n"
    code = start + textwrap.dedent(IMPORTS.format(home=str(checkout)))
    check_imports(run(code, cwd=tmp_path, path=[site]), version)
    # The repository root is not put on the path: `kernels` and `tokenizer` are other people's.
    code = start + textwrap.dedent(
        f"""
        from importlib.util import find_spec
        for name in ("gpt2fast", "kernels", "tokenizer"):
            spec = find_spec(name)
            print(spec is not None and str(spec.origin).startswith({str(checkout)!r}))
        """
    )
    done = run(code, cwd=tmp_path, path=[site])
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_uninstalled_checkout_imports(checkout: Path, tmp_path: Path, version: str) -> None:
    done = run(IMPORTS.format(home=str(checkout)), cwd=tmp_path, path=[checkout])
    check_imports(done, version)


def test_installed_package_does_not_reach_outside_itself(wheel: Path, tmp_path: Path) -> None:
    """A setup.py that happens to stand beside the installed package changes nothing."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "setup.py").touch()
    done = run("import gpt2fast; print(len(gpt2fast.__path__))", cwd=tmp_path, path=[tmp_path])
    assert done.stdout.split() == ["1"], done.stderr


def test_benchmark_runs_from_an_installation(wheel: Path, tmp_path: Path) -> None:
    """Its processes find the package, its models have a folder, and no commit is made up."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = run(
        """
        import os, sys
        from pathlib import Path
        for name in ("GPT2FAST_COMMIT", "GPT2FAST_BENCH_MODELS"):
            os.environ.pop(name, None)
        from gpt2fast.benchmark import command, environment, models
        from gpt2fast.benchmark.processes import Process
        assert "torch" not in sys.modules
        assert models.ROOT == Path("~/.cache/gpt2fast/bench").expanduser(), models.ROOT
        assert environment.commit() == {"commit": "unknown", "dirty": None}
        process = Process("torch alone", "tiny", 1)
        process.ask("prepare")
        process.close()
        """,
        cwd=tmp_path,
        path=[tmp_path / "site"],
    )
    assert done.returncode == 0, done.stderr


def test_altered_merges_are_not_built(checkout: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(checkout, altered)
    merges = altered / "tokenizer" / "data" / "vocab.bpe"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    done = run("from setuptools import build_meta; build_meta.build_wheel('.')", cwd=altered)
    assert done.returncode != 0
    assert f"expected {MERGES_SHA256}" in done.stderr
    assert not list(altered.glob("*.whl"))


def test_transformers_works_from_the_repository_root(checkout: Path) -> None:
    """There, ``kernels`` is ours to whoever looks: transformers does, and must not take it."""
    done = run(
        """
        import sys
        sys.path.insert(0, "")
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import is_kernels_available
        import kernels
        assert kernels.__file__.endswith("gpt2fast-main/kernels/__init__.py"), kernels.__file__
        assert not is_kernels_available()
        import gpt2fast.kernels
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50257))
        """,
        cwd=checkout,
    )
    assert done.returncode == 0, done.stderr
