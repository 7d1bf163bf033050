"""from_pretrained from the Hub: a real HTTP server on loopback that speaks its protocol."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save

from gpt2fast import GPT2Config, GPT2LMHeadModel
from tests.checkpoint.loopback_hub import COMMIT, OLD_COMMIT, WEIGHTS, Client, Hub, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    yield from serving(Hub())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(server: Hub, home: Path) -> Iterator[Client]:
    client = Client(server, home)
    yield client
    client.close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.repositories, server.redirects, server.gated = {}, {}, set()
    server.breaks, server.announced, server.seen = [], None, []
    return server


@pytest.fixture
def files(lm: GPT2LMHeadModel) -> dict[str, bytes]:
    return {
        "config.json": lm.config.to_json_string().encode(),
        WEIGHTS: save({name: p.detach() for name, p in lm.named_parameters()}, {"format": "pt"}),
    }


@pytest.fixture
def total(lm: GPT2LMHeadModel) -> dict[str, Any]:
    return {"sum": pytest.approx(sum(p.double().sum().item() for p in lm.parameters()))}


def _cached(cache: Path) -> list[str]:
    """What the cache holds of contents, complete or not."""
    return sorted(path.name for path in cache.glob("models--*/blobs/*"))


def test_downloads_once_with_progress(client, hub, files, total, home):
    hub.repositories["some/model"] = {COMMIT: files}
    assert client.load("some/model") == total
    assert hub.downloads() == 1
    agent = hub.seen[0][2]["user-agent"]
    assert agent.startswith("gpt2fast/")
    assert f"{WEIGHTS}: 100%" in (home / "stderr").read_text()
    hub.seen.clear()
    assert client.load("some/model") == total
    # The weights' commit is known from the configuration: nothing is asked about them again.
    assert [(method, path.rpartition("/")[2]) for method, path, _ in hub.seen] == [
        ("HEAD", "config.json")
    ]
    assert client.load("some/model", force_download=True) == total
    assert hub.downloads() == 1


def test_revision_and_token_reach_the_server(client, hub, files, lm, total, tmp_path):
    hub.repositories["some/tagged"] = {OLD_COMMIT: files}
    options = {"cache_dir": str(tmp_path), "token": "hf_secret"}
    assert client.load("some/tagged", revision="v1", **options) == total
    assert "/some/tagged/resolve/v1/config.json" in {path for _, path, _ in hub.seen}
    assert {headers["authorization"] for _, _, headers in hub.seen} == {"Bearer hf_secret"}
    assert client.load("some/tagged", revision=OLD_COMMIT, **options) == total
    answer = client.load("some/tagged", revision="v9", **options)
    assert "FileNotFoundError" in answer["error"]
    assert answer["message"] == f"some/tagged on {hub.url} has no revision 'v9'"


def test_cache_dir(client, hub, files, total, tmp_path):
    hub.repositories["some/elsewhere"] = {COMMIT: files}
    assert client.load("some/elsewhere", cache_dir=str(tmp_path / "cache")) == total
    assert len(_cached(tmp_path / "cache")) == 2


def test_subfolder(client, hub, files, total, tmp_path):
    hub.repositories["some/nested"] = {COMMIT: {f"a/b/{k}": v for k, v in files.items()}}
    for _ in range(2):
        answer = client.load("some/nested", subfolder="a/b", cache_dir=str(tmp_path))
        assert answer == total
    assert hub.downloads() == 1


def test_all_files_come_from_one_commit(client, hub, files, total, tmp_path):
    """Should the branch move between two downloads, they would still fit together."""
    hub.repositories["some/moving"] = {COMMIT: files}
    assert client.load("some/moving", cache_dir=str(tmp_path)) == total
    weights = {path for _, path, _ in hub.seen if path.endswith(WEIGHTS)}
    assert weights == {f"/some/moving/resolve/{COMMIT}/{WEIGHTS}"}


def test_sharded_and_pickled(client, hub, files, lm, total, tmp_path):
    lm.save_pretrained(tmp_path / "shards", max_shard_size=10_000)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    hub.repositories["some/shards"] = {COMMIT: shards}
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    pickled = {
        "config.json": files["config.json"],
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    hub.repositories["some/pickle"] = {COMMIT: pickled}
    for name in ("some/shards", "some/pickle"):
        assert client.load(name, cache_dir=str(tmp_path / "cache")) == total


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "openai-community/gpt2"])
def test_presets(client, hub, files, total, tmp_path, name):
    full = {"gpt2": "openai-community/gpt2", "distilgpt2": "distilbert/distilgpt2"}.get(name, name)
    hub.repositories[full] = {COMMIT: files}
    assert client.load(name, cache_dir=str(tmp_path)) == total
    assert [path.name for path in tmp_path.glob("models--*")] == [
        "models--" + full.replace("/", "--")
    ]


def test_a_preset_cached_under_its_other_name_is_not_downloaded_again(
    client, hub, files, total, tmp_path
):
    hub.repositories["openai-community/gpt2"] = {COMMIT: files}
    hub.redirects["gpt2"] = "openai-community/gpt2"
    script = """if True:
        import sys
        from huggingface_hub import hf_hub_download
        for name in ("config.json", "model.safetensors"):
            hf_hub_download("gpt2", name, cache_dir=sys.argv[1])
    """
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert hub.downloads() == 1
    for name in ("gpt2", "openai-community/gpt2"):
        assert client.load(name, cache_dir=str(tmp_path)) == total
        assert client.load(name, cache_dir=str(tmp_path), local_files_only=True) == total
    assert hub.downloads() == 1


def test_what_is_not_there(client, hub, files, tmp_path):
    cache = {"cache_dir": str(tmp_path)}
    answer = client.load("some/absent", **cache)
    assert "FileNotFoundError" in answer["error"]
    assert "neither a folder or file here nor a model on " + hub.url in answer["message"]

    hub.repositories["some/empty"] = {COMMIT: {"readme.md": b""}}
    answer = client.load("some/empty", **cache)
    assert "FileNotFoundError" in answer["error"]
    expected = f"found no config.json in some/empty at revision 'main' on {hub.url}"
    assert answer["message"] == expected

    hub.repositories["some/weightless"] = {COMMIT: {"config.json": files["config.json"]}}
    answer = client.load("some/weightless", **cache)
    assert "FileNotFoundError" in answer["error"]
    assert "found no model.safetensors or model.safetensors.index.json or" in answer["message"]

    hub.repositories["some/gated"] = {COMMIT: files}
    hub.gated.add("some/gated")
    answer = client.load("some/gated", **cache)
    assert "PermissionError" in answer["error"]
    assert "gated" in answer["message"]
    assert "sum" in client.load("some/gated", token="hf_allowed", **cache)


def test_a_broken_download_resumes(client, hub, tmp_path):
    # The Hub client keeps what it received in steps of 10 MiB.
    large = GPT2LMHeadModel(GPT2Config(110_000, n_positions=8, n_embd=32, n_layer=1, n_head=1))
    large.save_pretrained(tmp_path / "large")
    files = {path.name: path.read_bytes() for path in (tmp_path / "large").iterdir()}
    hub.repositories["some/large"] = {COMMIT: files}
    hub.breaks = [12 << 20]
    total = {"sum": pytest.approx(sum(p.double().sum().item() for p in large.parameters()))}
    answer = client.load("some/large", cache_dir=str(tmp_path))
    if "error" in answer:  # Hub clients before 1.0 resume when called again
        assert "ConnectionError" in answer["error"]
        answer = client.load("some/large", cache_dir=str(tmp_path))
    assert answer == total
    first, second = (h.get("range") for m, p, h in hub.seen if m == "GET" and p.endswith(WEIGHTS))
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 10 << 20


def test_a_download_broken_for_good_leaves_nothing_half_written(
    client, hub, files, total, tmp_path
):
    hub.repositories["some/broken"] = {COMMIT: files}
    hub.breaks = [5000] + [0] * 20
    answer = client.load("some/broken", cache_dir=str(tmp_path))
    assert "ConnectionError" in answer["error"]
    assert f"the download of {WEIGHTS} of some/broken from {hub.url} broke off" in answer["message"]
    assert len([name for name in _cached(tmp_path) if "incomplete" not in name]) == 1
    assert not list(tmp_path.glob(f"models--*/snapshots/*/{WEIGHTS}"))
    hub.breaks = []
    assert client.load("some/broken", cache_dir=str(tmp_path)) == total


@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_a_wrong_hash(client, hub, files, lm, total, tmp_path, file):
    if file != WEIGHTS:
        torch.save(lm.state_dict(), tmp_path / file)
        files = {"config.json": files["config.json"], file: (tmp_path / file).read_bytes()}
    hub.repositories["some/altered"] = {COMMIT: files}
    # One bit of one weight: nothing else could notice.
    altered = bytearray(files[file])
    altered[len(altered) // 2] ^= 1
    hub.announced = bytes(altered)
    cache = tmp_path / "cache"
    for _ in range(2):
        answer = client.load("some/altered", cache_dir=str(cache))
        assert "CheckpointError" in answer["error"]
        received, announced = (hashlib.sha256(x).hexdigest() for x in (files[file], altered))
        assert f"sha256 {received}, but the Hub announced {announced}" in answer["message"]
        assert not list(cache.glob(f"models--*/snapshots/*/{file}"))
        assert announced not in _cached(cache)
    hub.announced = None
    assert client.load("some/altered", cache_dir=str(cache)) == total
    # What is downloaded anew is compared anew.
    hub.announced = files[file]
    hub.repositories["some/altered"] = {COMMIT: {**files, file: bytes(altered)}}
    answer = client.load("some/altered", cache_dir=str(cache), force_download=True)
    assert f"sha256 {announced}, but the Hub announced {received}" in answer["message"]


def test_offline(client, hub, files, total, home):
    hub.repositories["some/cached"] = {COMMIT: files}
    hub.repositories["openai-community/gpt2"] = {COMMIT: {"config.json": files["config.json"]}}
    assert client.load("some/cached") == total
    assert "FileNotFoundError" in client.load("gpt2")["error"]
    answer = client.load("some/other", local_files_only=True)
    assert "FileNotFoundError" in answer["error"]
    assert "local_files_only=True forbids the download" in answer["message"]

    hub.seen.clear()
    (home / "offline").mkdir()
    offline = Client(hub, home / "offline", HF_HUB_OFFLINE="1", HF_HUB_CACHE=f"{home}/hub")
    assert offline.load("some/cached") == total
    answer = offline.load("some/other")
    assert "FileNotFoundError" in answer["error"]
    assert answer["message"] == (
        f"found no config.json of some/other (revision 'main') in the cache {home}/hub, and "
        "HF_HUB_OFFLINE forbids the download; the model 'bundled' comes with this package and "
        "needs no network"
    )
    answer = offline.load("gpt2")
    assert "found no model.safetensors or" in answer["message"]
    assert "of openai-community/gpt2" in answer["message"]
    assert "'bundled'" in answer["message"]
    offline.close()
    assert hub.seen == []


def test_the_server_gone(files, total, tmp_path):
    hub = Hub()
    running = serving(hub)
    next(running)
    hub.repositories["some/cached"] = {COMMIT: files}
    client = Client(hub, tmp_path)
    assert client.load("some/cached") == total
    assert next(running, None) is None
    assert client.load("some/cached") == total
    client.close()


def test_no_server_and_nothing_cached(monkeypatch, tmp_path):
    # In earnest this takes the Hub client half a minute of retries.
    calls = []

    def unreachable(repo, name, **options):
        calls.append((name, options["local_files_only"]))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("gpt2fast.checkpoint.hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached; the model 'bundled' comes"):
        GPT2LMHeadModel.from_pretrained("some/other", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found no model\.safetensors or .* of some/other"):
        GPT2LMHeadModel.from_pretrained("some/other", cache_dir=tmp_path, config=GPT2Config())
    # One wait for the network is enough.
    assert [local for _, local in calls] == [False, False, True, True, True]
