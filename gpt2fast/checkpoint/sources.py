"""Where a checkpoint's files are: a local folder, a file, an archive, or a Hub repository."""

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

from gpt2fast.checkpoint.weights import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHT_FILES,
    is_archive,
    unpack_archive,
)

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / BUNDLED

_REPO_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Source(Protocol):
    """Somewhere a checkpoint's files are."""

    def get(self, name: str) -> Path | None:
        """The local path of a file, fetched if need be; None where there is no such file."""

    def missing(self, names: str) -> FileNotFoundError:
        """The error that says that the files called ``names`` are not here."""


class Folder:
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def missing(self, names: str) -> FileNotFoundError:
        return FileNotFoundError(f"found no {names} in the folder {self.path.absolute()}")


class SingleFile(Folder):
    """One file of weights, with its configuration and other shards beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.file = path

    def get(self, name: str) -> Path | None:
        if name in WEIGHT_FILES:
            return self.file
        if name == CONFIG_FILE and self.file.name.endswith(f"-{PICKLE_FILE}"):
            # The first published files: gpt2-pytorch_model.bin beside gpt2-config.json.
            prefixed = self.file.name.removesuffix(PICKLE_FILE) + CONFIG_FILE
            return super().get(prefixed) or super().get(name)
        return super().get(name)


class Archive(Folder):
    """A pytorch-pretrained-BERT archive, unpacked for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix=f"{path.name}-")))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.archive = path
        unpack_archive(path, self.path)

    def missing(self, names: str) -> FileNotFoundError:
        return FileNotFoundError(f"found no {names} in the archive {self.archive.absolute()}")


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Source:
    """Find out what a name means: "bundled", then a local folder or file, then the Hub.

    Raises:
        FileNotFoundError: it can be none of them.
    """
    name = os.fspath(name_or_path)
    if name == BUNDLED:
        return Folder(BUNDLED_FOLDER)
    path = Path(name).expanduser()
    if path.is_dir():
        return Folder(path / (subfolder or ""))
    if path.is_file():
        return Archive(path) if is_archive(path) else SingleFile(path)
    if isinstance(name_or_path, os.PathLike) or not _REPO_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no folder or file {path.absolute()}")
    # The Hub's client takes a while to import: only those who need it wait.
    from gpt2fast.checkpoint.hub import Repository

    return Repository(
        name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
