"""A checkpoint is data: damaged and hostile ones are refused, and nothing in them is executed."""

import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2LMHeadModel
from gpt2fast.checkpoint import CheckpointError

EMBEDDING = "transformer.wte.weight"


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match
    return int(match[1]) * 1024


@pytest.fixture(autouse=True)
def _no_absurd_allocation() -> Iterator[None]:
    """Every checkpoint here is a few kilobytes."""
    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before < 100 << 20


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that the hostile pickles here would make."""
    return tmp_path / "executed"


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        GPT2LMHeadModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x}, lambda x: [x]])
def test_a_pickle_is_not_executed(lm, save_pickle, marker, zipped, wrap):
    content = wrap({**lm.state_dict(), "transformer.extra": Hostile(marker)})
    folder = save_pickle(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"not a plain pickle.*refers to posix\.mkdir"
    ) as info:
        GPT2LMHeadModel.from_pretrained(folder)
    assert "weights_only" not in str(info.value)
    assert info.value.__cause__ is None
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_bare_pickle_is_not_executed(config, tmp_path, marker, protocol, name):
    config.to_json_file(tmp_path / "config.json")
    (tmp_path / name).write_bytes(pickle.dumps(Hostile(marker), protocol))
    refused(tmp_path, name)
    assert not marker.exists()


def test_the_environment_cannot_unlock_pickles(lm, save_pickle, marker, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(save_pickle({"x": Hostile(marker)}), "not a plain pickle")
    assert not marker.exists()


HUGE = 10**12
TENSORS = {
    "expanded": lambda: torch.zeros(1).expand(61, 16),
    "expanded to terabytes": lambda: torch.zeros(1).expand(HUGE, 16),
    "without storage": lambda: torch.empty(61, 16, device="meta"),
    "sparse": lambda: torch.zeros(61, 16).to_sparse(),
    "sparse, huge": lambda: torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9)
    ),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(61, 16), 1.0, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # quantised tensors are announced for removal
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", TENSORS)
def test_pickled_tensors_that_are_not_all_there(lm, save_pickle, kind, zipped):
    state = {**lm.state_dict(), EMBEDDING: TENSORS[kind]()}
    del state["lm_head.weight"]
    folder = save_pickle(state, _use_new_zipfile_serialization=zipped)
    refused(folder, f"tensor '{EMBEDDING}' is not a plain dense one")
    refused(folder, f"tensor '{EMBEDDING}' is not a plain dense one", vocab_size=HUGE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_tensors_of_another_kind_of_number(lm, save_pickle, dtype):
    state = {**lm.state_dict(), "transformer.h.0.ln_1.bias": torch.zeros(16, dtype=dtype)}
    refused(
        save_pickle(state), rf"transformer\.h\.0\.ln_1\.bias is {dtype}, expected one of float32"
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(2)], r"must hold a dict of tensors; it holds list \[tensor"),
        (torch.zeros(2), "must hold a dict of tensors; it holds Tensor"),
        ({"n": 5}, "must hold tensors by name; it holds int 5 by 'n'"),
        ({5: torch.zeros(1)}, r"must hold tensors by name; it holds Tensor .* by 5"),
        ({}, "holds 0 layers of GPT-2; it holds nothing"),
        ({"bert.weight": torch.zeros(2)}, r"holds 0 layers of GPT-2; it holds bert\.weight"),
    ],
)
def test_pickles_of_something_else(save_pickle, content, match):
    refused(save_pickle(content), match)


def test_sizes_in_a_pickle_beyond_the_file(lm, save_pickle):
    """The number of elements of a storage, and the shape of a tensor, edited in the pickle."""
    elements, shape = b"M" + struct.pack("<H", 61 * 16), b"K=K\x10"
    absurd = b"\x8a\x06" + HUGE.to_bytes(6, "little")
    folder = save_pickle(lm.state_dict(), _use_new_zipfile_serialization=False)
    path = folder / "pytorch_model.bin"
    assert elements in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(elements, absurd))
    refused(folder, "cannot be read")

    path = save_pickle(lm.state_dict()) / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (program,) = [name for name in entries if name.endswith("data.pkl")]
    assert shape in entries[program]
    entries[program] = entries[program].replace(shape, absurd + shape[2:])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused(folder, "cannot be read")


def test_a_zip_bomb(config, tmp_path):
    config.to_json_file(tmp_path / "config.json")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 1 << 20
    refused(tmp_path, "'archive/data.pkl' is compressed")


def _write_safetensors(folder: Path, header: Any, data: bytes = b"", length: int = -1) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(encoded) if length < 0 else length)
    (folder / "model.safetensors").write_bytes(prefix + encoded + data)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 99_999_999, 3])
def test_safetensors_header_of_another_length(config, tmp_path, length):
    config.to_json_file(tmp_path / "config.json")
    _write_safetensors(tmp_path, {}, length=length)
    refused(tmp_path, r"model\.safetensors cannot be read: .*header")


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**62, 2**62]},
        {"shape": [HUGE, 16]},
        {"shape": [-1, 16]},
        {"shape": "61"},
        {"data_offsets": [10**9, 10**9 + 61 * 64]},
        {"data_offsets": [61 * 64, 0]},
        {"data_offsets": [-64, 61 * 64]},
        {"data_offsets": [0, 2**70]},
        {"dtype": "F31"},
        {"dtype": "F64"},
    ],
)
def test_safetensors_with_absurd_entries(config, tmp_path, entry):
    config.to_json_file(tmp_path / "config.json")
    good = {"dtype": "F32", "shape": [61, 16], "data_offsets": [0, 61 * 64]}
    _write_safetensors(tmp_path, {EMBEDDING: {**good, **entry}}, bytes(61 * 64))
    refused(tmp_path, r"model\.safetensors cannot be read")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "", ".", "..", "x\0", 5, None],
)
def test_shards_outside_the_folder(config, lm, tmp_path, shard):
    folder = tmp_path / "inside"
    lm.save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {EMBEDDING: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, re.escape(f"shard {shard!r} is not the plain name of a file"))


def test_indexes_that_are_none(config, lm, tmp_path):
    lm.save_pretrained(tmp_path, max_shard_size=20_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for weight_map in ([], {}, None, "x"):
        path.write_text(json.dumps({"weight_map": weight_map}))
        refused(tmp_path, "'weight_map' must be an object; it is")
    index["weight_map"]["absent"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(tmp_path, r"model-00001-of-00002\.safetensors lacks tensor 'absent'")
    path.write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    refused(tmp_path, r"config\.json is neither safetensors nor a PyTorch file")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\udc80", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", r"must hold a JSON object; it holds list \[\]"),
        ("null", "must hold a JSON object; it holds NoneType None"),
    ],
)
def test_configurations_that_are_none(saved, text, match):
    (saved / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(saved, rf"config\.json {match}")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("model_type", "bert", r"config\.json: expected .* model_type 'gpt2'; got 'bert'"),
        ("n_layer", 10**9, "n_layer=1000000000, but the checkpoint holds 2 layers"),
        ("n_layer", 10**30, "but the checkpoint holds 2 layers"),
        ("n_layer", -1, r"config\.json: n_layer must be a positive integer; got -1"),
        ("n_layer", "2", r"config\.json: n_layer must be a positive integer; got '2'"),
        ("n_head", 0, r"config\.json: n_head must be a positive integer; got 0"),
        ("n_head", 3, r"config\.json: n_embd must be a multiple of n_head"),
        ("n_positions", HUGE, rf"wpe\.weight is \[16, 16\], expected \[{HUGE}, 16\]"),
        ("n_inner", 10**15, rf"c_fc\.weight is \[16, 64\], expected \[16, {10**15}\]"),
        ("n_inner", 10**30, "sizes are impossible"),
        ("n_embd", 10**9, "sizes are impossible"),
        ("vocab_size", 10**30, "sizes are impossible"),
        ("layer_norm_epsilon", float("nan"), r"config\.json: layer_norm_epsilon .*; got nan"),
        ("attn_pdrop", float("inf"), r"config\.json: attn_pdrop must be a probability .*; got inf"),
        ("attn_pdrop", [0.1], r"config\.json: attn_pdrop must be a probability .*; got \[0.1\]"),
        ("dtype", "int8", "the configuration's dtype must be one of .*; got 'int8'"),
        ("dtype", {}, None),
        ("to_dict", 5, r"config\.json: 'to_dict' is not a field"),
        ("__class__", 5, r"config\.json: '__class__' is not a field"),
        ("self", 5, r"config\.json: "),
    ],
)
def test_hostile_fields_of_a_configuration(saved, field, value, match):
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**fields, field: value}))
    if match is None:
        assert GPT2LMHeadModel.from_pretrained(saved).dtype == torch.float32
    else:
        refused(saved, match)


def test_a_configuration_of_a_hundred_megabytes(saved):
    with (saved / "config.json").open("wb") as file:
        file.truncate(100 << 20)
    refused(saved, r"config\.json has 104857600 bytes; at most")


def test_parameters_that_are_mostly_absent(config, lm, save_pickle):
    """A fresh model is no answer to a checkpoint that lacks most of one."""
    state = {n: t for n, t in lm.state_dict().items() if "ln_" in n}
    refused(save_pickle(state), r"lacks \d+, among them .*: it is not one of this model")
    state = lm.state_dict()
    del state["transformer.wpe.weight"]
    refused(
        save_pickle(state), rf"lacks {16 * HUGE}, among them transformer\.wpe", n_positions=HUGE
    )


def _archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_archives_write_nowhere_else(lm, save_pickle, tmp_path, monkeypatch):
    folder = save_pickle(lm.state_dict())
    scratch = tmp_path / "a" / "b" / "scratch"
    scratch.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    config, weights = ((folder / n).read_bytes() for n in ("config.json", "pytorch_model.bin"))
    link = tarfile.TarInfo("pytorch_model.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(folder / "pytorch_model.bin")
    hard = tarfile.TarInfo("config.json")
    hard.type, hard.linkname = tarfile.LNKTYPE, str(folder / "config.json")
    path = _archive(
        tmp_path / "a.tar.gz",
        [
            (tarfile.TarInfo("../../evil"), b"x"),
            (tarfile.TarInfo(str(tmp_path / "absolute")), b"x"),
            (link, b""),
            (hard, b""),
            (tarfile.TarInfo("../../config.json"), config),
            (tarfile.TarInfo(str(tmp_path / "pytorch_model.bin")), weights),
        ],
    )
    before = sorted(p for p in tmp_path.rglob("*") if p != path)
    model = GPT2LMHeadModel.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, lm.lm_head.weight)
    assert sorted(p for p in tmp_path.rglob("*") if p != path) == before

    twice = [(tarfile.TarInfo("config.json"), config), (tarfile.TarInfo("x/config.json"), config)]
    refused(_archive(path, twice), r"holds several files called 'config\.json'")


@pytest.mark.parametrize("where", ["a member", "the end"])
def test_an_archive_bomb(config, tmp_path, where):
    member = tarfile.TarInfo("pytorch_model.bin")
    member.size = 1 << 24
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        if where == "a member":
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    tail = bytes(member.size) if where == "the end" else b""
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(data.getvalue() + tail, 1))
    assert path.stat().st_size < 1 << 18
    refused(path, "unpacks to 16777216 bytes" if where == "a member" else "unpacks to more than")


def _formats(lm: GPT2LMHeadModel, folder: Path) -> dict[str, Path]:
    """One folder a format; its files are the ones to damage."""
    lm.save_pretrained(folder / "safetensors")
    lm.save_pretrained(folder / "shards", max_shard_size=20_000)
    for name, zipped in (("zip", True), ("legacy", False)):
        (folder / name).mkdir()
        lm.config.to_json_file(folder / name / "config.json")
        path = folder / name / "pytorch_model.bin"
        torch.save(lm.state_dict(), path, _use_new_zipfile_serialization=zipped)
    (folder / "archive").mkdir()
    with tarfile.open(folder / "archive" / "gpt2.tar.gz", "w:gz") as archive:
        for name in ("pytorch_model.bin", "config.json"):
            archive.add(folder / "zip" / name, arcname=name)
    return {path.name: path for path in folder.iterdir()}


def _damage(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind == 1:
        start = rng.randrange(len(damaged))
        length = min(rng.randrange(1, 64), len(damaged) - start)
        damaged[start : start + length] = rng.randbytes(length)
        return bytes(damaged)
    # Formats keep what matters at their ends.
    places = {2: range(len(damaged)), 3: range(min(3000, len(damaged)))}
    place = places.get(kind, range(max(0, len(damaged) - 3000), len(damaged)))
    for _ in range(rng.choice([1, 1, 8])):
        damaged[rng.choice(place)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.filterwarnings("ignore:.*(newly initialised|not used)")
@pytest.mark.parametrize("name", ["safetensors", "shards", "zip", "legacy", "archive"])
def test_damaged_files_are_refused_or_harmless(lm, tmp_path, name):
    """Truncated and bit-flipped: a clear error, or a model whose every weight can be read."""
    folder = _formats(lm, tmp_path / "formats")[name]
    before = sorted(tmp_path.rglob("*"))
    rng = random.Random(name)
    outcomes = {"loaded": 0, "refused": 0}
    expected = [parameter.sum() for parameter in lm.parameters()]
    for _ in range(150):
        path = rng.choice(sorted(folder.iterdir()))
        original = path.read_bytes()
        path.write_bytes(_damage(original, rng))
        try:
            model = GPT2LMHeadModel.from_pretrained(path if name == "archive" else folder)
            weights = [parameter.sum() for parameter in model.parameters()]
            # A flipped bit among the weights is another weight, but gzip has a checksum: what is
            # left is its header, where nobody reads the time or the name.
            assert name != "archive" or weights == expected
            outcomes["loaded"] += 1
        except (CheckpointError, FileNotFoundError):
            outcomes["refused"] += 1
        path.write_bytes(original)
    assert outcomes["refused"] > 30
    assert outcomes["loaded"] or name == "archive"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["safetensors", "zip", "legacy"])
def test_every_truncation_is_refused(lm, tmp_path, name):
    folder = _formats(lm, tmp_path / "formats")[name]
    (path,) = [p for p in folder.iterdir() if p.name != "config.json"]
    data = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(data), len(data) // 60), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(folder, re.escape(str(path)))
