"""Checkpoint files to tensors and back. A checkpoint is data: nothing in it is ever executed.

safetensors are mapped into memory (private, copy on write): no byte is read before it is needed,
and training a mapped tensor never reaches the file. PyTorch files are read at once, because
programs overwrite them in place with ``torch.save``, which would pull the mapped pages from under
the model. Formats are told apart by their first bytes:

* safetensors;
* what ``torch.save`` writes, as a zip or as the older plain pickle, by
  ``torch.load(weights_only=True)``;
* ``*.index.json``, which says which of several such files (shards) holds which tensor;
* the ``.tar.gz`` archives of pytorch-pretrained-BERT (``config.json`` and ``pytorch_model.bin``).
"""

import gzip
import json
import mmap
import pickle
import re
import reprlib
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2fast.files import replacing

SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# In the order in which a folder is searched.
WEIGHT_FILES = (
    SAFETENSORS_FILE,
    SAFETENSORS_FILE + INDEX_SUFFIX,
    PICKLE_FILE,
    PICKLE_FILE + INDEX_SUFFIX,
)
CONFIG_FILE = "config.json"

_MAX_JSON_BYTES = 64 << 20
# Weights hardly compress; an archive that unpacks to much more than its size is a bomb.
_MAX_ARCHIVE_RATIO = 20
_OUR_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_LOW_BIT = (torch.float16, torch.int8, torch.uint8)
_PARTS = 24  # about so many mappings of low-bit tensors: each holds a file descriptor
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CheckpointError(ValueError):
    """A checkpoint's contents are damaged, hostile, or not those of the model asked for."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is too large, not JSON, or holds something else than an object.
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds {_kind(content)}")
    return content


def read_tensors(path: Path, neighbour: Callable[[str], Path | None]) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint onto the CPU; those of safetensors are mapped.

    Args:
        path: a file of weights, or the index of a sharded checkpoint.
        neighbour: finds a file beside ``path`` by its plain name, for shards.

    Raises:
        CheckpointError: the contents are damaged, hostile or of an unknown format.
        OSError: a file is missing or cannot be read.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path, neighbour)
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(9)
    # Ask the name first, so that a file called safetensors is never unpickled.
    if path.suffix == ".safetensors" or (head[8:] == b"{" and head[:2] != b"PK"):
        return _read_safetensors(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_pickle(path, zipped=head[:2] == b"PK")
    raise CheckpointError(
        f"{path} is neither safetensors nor a PyTorch file; it starts with {head!r}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _as_checkpoint_error(path), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        low_bit = {name: t for name, t in tensors.items() if t.dtype in _LOW_BIT and t.numel()}
        return {**tensors, **_mapped_in_parts(path, low_bit)}


def _mapped_in_parts(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Low-bit tensors of a safetensors file once more, in mappings of a few each.

    What was read of a mapping stays in memory until all of it is freed. safetensors makes one for
    the file, but on a CPU a low-bit matrix is freed once it is laid out for its op.
    """
    found = {}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        waiting = sorted((*header[name]["data_offsets"], name) for name in tensors)
        room = path.stat().st_size // _PARTS
        while waiting:
            begin, end, _ = waiting[0]
            end = max(end, begin + room)
            part = [place for place in waiting if place[1] <= end]
            waiting = waiting[len(part) :]
            skipped = (start + begin) % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(
                file.fileno(),
                part[-1][1] - begin + skipped,
                access=mmap.ACCESS_COPY,
                offset=start + begin - skipped,
            )
            for offset, _, name in part:
                like = tensors[name]
                flat = torch.frombuffer(
                    mapped, dtype=like.dtype, count=like.numel(), offset=offset - begin + skipped
                )
                found[name] = flat.view(like.shape)
    return found


def _read_pickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    with _as_checkpoint_error(path):
        if zipped:
            _check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a dict of tensors; it holds {_kind(content)}")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} must hold tensors by name; it holds {_kind(tensor)} by {name!r}"
            )
        if not _is_dense(tensor):
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense one")
        tensors[name] = tensor.detach()
    return tensors


def _is_dense(tensor: Tensor) -> bool:
    """Whether every element is there: pickles may also describe sparse, quantised, expanded or
    storage-less tensors, of any size."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _check_zip(path: Path) -> None:
    """Refuse a zip that is not laid out as ``torch.save`` does: stored, within the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise CheckpointError(f"{path}: entry {entry.filename!r} is compressed")


def _read_shards(path: Path, neighbour: Callable[[str], Path | None]) -> dict[str, Tensor]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' must be an object; it is {_kind(weight_map)}")
    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            raise CheckpointError(f"{path}: shard {shard!r} is not the plain name of a file")
        names_of.setdefault(shard, []).append(name)
    tensors = {}
    for shard, names in names_of.items():
        if (file := neighbour(shard)) is None:
            raise FileNotFoundError(f"{path} names the shard {shard}, which is not beside it")
        held = _read_file(file)
        for name in names:
            if name not in held:
                raise CheckpointError(f"{file} lacks tensor {name!r}, which {path.name} promises")
            tensors[name] = held[name]
    return tensors


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\:\0")
    )


def is_archive(path: Path) -> bool:
    """Whether a file is compressed by gzip, as pytorch-pretrained-BERT's archives are."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def unpack_archive(path: Path, folder: Path) -> None:
    """Unpack the configuration and the weights of an archive into a folder, and nothing else.

    Only regular members with these two names are taken, whatever folder they claim to be in, so
    nothing is written elsewhere.

    Raises:
        CheckpointError: the archive is damaged, or unpacks to absurdly more than its size.
    """
    limit = _MAX_ARCHIVE_RATIO * path.stat().st_size + (1 << 20)  # tar pads to blocks
    with (
        _as_checkpoint_error(path),
        gzip.open(path) as stream,
        tarfile.open(fileobj=stream, mode="r:") as archive,
    ):
        for member in archive:
            if member.offset_data + member.size > limit:
                raise CheckpointError(f"{path}: {member.name!r} unpacks to {member.size} bytes")
            name = member.name.rpartition("/")[2]
            if member.isreg() and name in (CONFIG_FILE, PICKLE_FILE):
                if (folder / name).exists():
                    raise CheckpointError(f"{path} holds several files called {name!r}")
                source = archive.extractfile(member)
                assert source is not None
                with (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        # gzip compares its checksum at the end of the stream.
        while stream.read(1 << 20):
            if stream.tell() > limit:
                raise CheckpointError(f"{path} unpacks to more than {limit} bytes")


def write_tensors(
    tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str | None = None
) -> None:
    """Write ``model.safetensors``, or shards and their index, each file replaced whole.

    A file is written under another name and then renamed: a kill leaves the old or the new one,
    and a model that still maps the old file keeps it. Files of an earlier, differently sharded
    checkpoint are removed.

    Args:
        tensors: dense tensors that share no memory.
        max_shard_size: bytes, or a text such as "200MB"; None for a single file.
    """
    shards = _split(tensors, max_shard_size)
    names = [SAFETENSORS_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        packed = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        with replacing(folder / name) as file:
            save_file(packed, file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        names.append(SAFETENSORS_FILE + INDEX_SUFFIX)
        with replacing(folder / names[-1]) as file:
            file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if _OUR_FILES.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _split(
    tensors: Mapping[str, Tensor], max_shard_size: int | str | None
) -> list[dict[str, Tensor]]:
    limit = float("inf") if max_shard_size is None else _parse_size(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    return shards


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", str(size).strip())
    if not match or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"max_shard_size must be bytes or a text like '200MB'; got {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """The libraries that parse a file raise many types for bad contents: give them one."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        # Of the OSErrors, gzip's and tarfile's are about the contents and carry no number.
        if isinstance(error, CheckpointError) or error.errno is not None:
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        # Without PyTorch's message, which goes on to say how to execute the file after all.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {named[1]}" if named else "it is damaged, or holds other objects"
        raise CheckpointError(f"{path} is not a plain pickle of tensors: {reason}") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {str(error).partition(chr(10))[0]}"
        ) from error


def _kind(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"
