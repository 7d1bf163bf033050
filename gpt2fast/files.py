"""Files that are whole or absent, whatever moment the process dies at, and locks on files."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` once complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the rename itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(name: str) -> Path:
    """Where files are kept that can be made again: may begin with ``~``, and not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gpt2fast", name)


def try_lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed, or its process ends; False where another has the lock.

    True as well where the system, or the file system, has no locks.
    """
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
