"""Others' source distributions: fetched by pip, checked against hashes, kept under ``build/``."""

import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Source:
    """One source distribution; ``sha256`` is that of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where it is unpacked; the folder exists whole or not at all."""
        return CACHE / f"{self.name}-{self.version}"


TRANSFORMERS = Source(
    "transformers", "5.23.0", "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
)
TIKTOKEN = Source(
    "tiktoken", "0.14.0", "231dec90efcdccf1b565a1416107736f1e09b1a08fe736ef9d6363e626d03874"
)


def fetch(source: Source) -> Path:
    """The folder of ``source``; downloaded unless an earlier run has left it.

    Raises:
        ConnectionError: pip could not fetch it, or its hash is another; the text has pip's reason.
    """
    if source.folder.is_dir():
        return source.folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        scratch = Path(name)
        # With a hash pip checks the archive before it runs anything of it to read its metadata.
        (scratch / "requirements.txt").write_text(
            f"{source.name}=={source.version} --hash=sha256:{source.sha256}\n"
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-binary", source.name]
        command += ["--dest", str(scratch), "--requirement", str(scratch / "requirements.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConnectionError(
                f"pip could not fetch the source distribution of {source.name} {source.version}:\n"
                f"{done.stderr.strip()}"
            )
        (archive,) = scratch.glob("*.tar.gz")
        unpack(archive, scratch / "unpacked")
        (top,) = (scratch / "unpacked").iterdir()
        top.rename(source.folder)
    return source.folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the tests that ``archive`` carries, ``<top>/tests``, below ``folder``.

    Raises:
        ValueError: a member that is neither, or that would lie outside ``folder``.
    """
    base = folder.resolve()
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        for member in members:
            target = (base / member.name).resolve()
            if not (member.isfile() or member.isdir()) or not target.is_relative_to(base):
                raise ValueError(f"{archive.name} holds {member.name!r}, which is not unpacked")
        # It drops owners and dangerous rights as well.
        tar.extractall(base, members, filter="data")
