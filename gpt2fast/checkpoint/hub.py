"""A checkpoint's files from the Hugging Face Hub, through its client's cache."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import cast

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gpt2fast.checkpoint.weights import CONFIG_FILE, CheckpointError
from gpt2fast.version import __version__

# The published models moved into organisations; the Hub still redirects the short names, and
# caches filled under either name are in use.
_SHORT_NAMES = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
    "distilbert/distilgpt2": "distilgpt2",
}
_FULL_NAMES = {short: full for full, short in _SHORT_NAMES.items()}
_SHA256 = re.compile(r"[0-9a-f]{64}")

# The Hub client's transport errors are those of its HTTP library, which changed between its
# releases: requests' are OSErrors, those of httpx are not. Its own error derives from either.
_TRANSPORT_ERRORS = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError))


class Repository:
    """A model repository of the Hub, read through the Hub client's cache.

    The first file found fixes the commit, so that all files come from the same one.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
    ) -> None:
        self.revision = revision or constants.DEFAULT_REVISION
        self.token = token
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.local_files_only = local_files_only
        self.force_download = force_download
        self.subfolder = subfolder or ""
        self.name = self._cached_name(name)
        self.commit: str | None = None
        self.unreachable: Exception | None = None

    def get(self, name: str) -> Path | None:
        known = self.commit is not None and self._is_cached(self.name, name, self.commit)
        try:
            path = Path(
                hf_hub_download(
                    self.name,
                    name,
                    subfolder=self.subfolder or None,
                    revision=self.commit or self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    # One wait for a Hub that does not answer is enough.
                    local_files_only=self.local_files_only or self.unreachable is not None,
                    force_download=self.force_download,
                    library_name="gpt2fast",
                    library_version=__version__,
                )
            )
        except LocalEntryNotFoundError as error:
            self.unreachable = error
            return None
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise PermissionError(
                f"{self.name} on {constants.ENDPOINT} is gated: ask for access on its page, then "
                "pass token="
            ) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name!r} is neither a folder or file here nor a model on "
                f"{constants.ENDPOINT} (for a private one, pass token=)"
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name} on {constants.ENDPOINT} has no revision {self.revision!r}"
            ) from error
        except _TRANSPORT_ERRORS as error:
            what = f"{name} of {self.name} from {constants.ENDPOINT}"
            raise ConnectionError(f"the download of {what} broke off: {error}") from error
        if self.force_download or not known:
            _verify(path)
        # .../snapshots/<commit>/<subfolder>/<name>
        self.commit = path.parents[len(PurePosixPath(self.subfolder, name).parts) - 1].name
        return path

    def missing(self, names: str) -> FileNotFoundError:
        if self.unreachable is None:
            where = f"{self.name} at revision {self.revision!r} on {constants.ENDPOINT}"
            return FileNotFoundError(f"found no {names} in {where}")
        cache = self.cache_dir or constants.HF_HUB_CACHE
        reason = f"{constants.ENDPOINT} cannot be reached"
        if self.local_files_only:
            reason = "local_files_only=True forbids the download"
        elif constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE forbids the download"
        error = FileNotFoundError(
            f"found no {names} of {self.name} (revision {self.revision!r}) in the cache {cache}, "
            f"and {reason}; the model 'bundled' comes with this package and needs no network"
        )
        error.__cause__ = self.unreachable
        return error

    def _cached_name(self, name: str) -> str:
        """Of the two names of a published model, the one whose files are here already."""
        full = _FULL_NAMES.get(name, name)
        for candidate in (name, full, _SHORT_NAMES.get(full)):
            if candidate and self._is_cached(candidate, CONFIG_FILE, self.revision):
                return candidate
        return full

    def _is_cached(self, repo: str, name: str, revision: str) -> bool:
        file = str(PurePosixPath(self.subfolder, name))
        found = try_to_load_from_cache(repo, file, cache_dir=self.cache_dir, revision=revision)
        return isinstance(found, str)


def _verify(path: Path) -> None:
    """Compare a downloaded file with the sha256 that the Hub announced for it.

    The Hub client checks the size alone. Its cache names a blob by its ETag, which for large
    files is their sha256; where it keeps no links (Windows) nothing is known to compare with.
    """
    if not path.is_symlink():
        return
    blob = path.parent / path.readlink()
    if not _SHA256.fullmatch(blob.name):
        return
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink()
        raise CheckpointError(
            f"{path.name} was downloaded with sha256 {digest.hexdigest()}, but the Hub announced "
            f"{blob.name}; it was removed from the cache"
        )
