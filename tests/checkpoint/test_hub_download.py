"""from_pretrained from the Hub: a real HTTP server on loopback that speaks its protocol.

The Hub client reads HF_ENDPOINT when it is imported, so the loading runs in another process, which
takes one call a line from its input.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save

from gpt2fast import GPT2Config, GPT2LMHeadModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "76543210fedcba9876543210fedcba9876543210"
WEIGHTS = "model.safetensors"

CLIENT = """
import json, os, sys
from gpt2fast import GPT2LMHeadModel

for line in sys.stdin:
    name, options, environment = json.loads(line)
    os.environ.update(environment)
    try:
        model = GPT2LMHeadModel.from_pretrained(name, **options)
        answer = {"sum": sum(p.double().sum().item() for p in model.parameters())}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": kinds, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Hub(ThreadingHTTPServer):
    """Repositories (commit -> file -> content), and what goes wrong with them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.redirects: dict[str, str] = {}
        self.gated: set[str] = set()
        # How many bytes of the weights each download sends before the connection breaks.
        self.breaks: list[int] = []
        # Announce the sha256 and the size of this content instead of what is sent.
        self.announced: bytes | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        # Else the connections that clients keep alive would be served on.
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, file: str = WEIGHTS) -> int:
        return sum(method == "GET" and path.endswith(f"/{file}") for method, path, _ in self.seen)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.server
        if "/resolve/" not in self.path:
            return self._send(404, {"Content-Length": "0"})  # what else the client asks a Hub
        hub.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if repo in hub.redirects:
            location = f"/{hub.redirects[repo]}/resolve/{rest}"
            return self._send(307, {"Location": location, "Content-Length": "0"})
        if repo in hub.gated and self.headers["Authorization"] != "Bearer hf_allowed":
            return self._send(403, {"X-Error-Code": "GatedRepo", "Content-Length": "0"})
        if repo not in hub.repositories:
            return self._send(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        commit = {"main": COMMIT, "v1": OLD_COMMIT}.get(revision, revision)
        files = hub.repositories[repo].get(commit)
        if files is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"})
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "Content-Length": "0"}
            return self._send(404, headers)
        content = files[file]
        large = not file.endswith(".json")
        announced = content if hub.announced is None or not large else hub.announced
        sha1 = hashlib.sha1(announced).hexdigest()
        headers |= {"ETag": f'"{sha1}"', "Accept-Ranges": "bytes"}
        if large:
            sha256 = hashlib.sha256(announced).hexdigest()
            headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(announced))}
        status, start = 200, 0
        if (wanted := self.headers.get("Range")) and body:
            status, start = 206, int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        self._send(status, headers)
        if body:
            content = content[start:]
            if large and hub.breaks:
                content = content[: hub.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(content)

    def _send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


class Client:
    """The process that loads."""

    def __init__(self, hub: Hub, home: Path, **environment: str) -> None:
        self._log = (home / "stderr").open("w")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={
                **inherited,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(home),
                "NO_PROXY": "127.0.0.1",
                "TQDM_POSITION": "-1",  # a progress bar though stderr is no terminal
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def load(self, name: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, options, environment or {}]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)
        self._log.close()


def _serving(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    yield from _serving(Hub())


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
    serving = _serving(hub)
    next(serving)
    hub.repositories["some/cached"] = {COMMIT: files}
    client = Client(hub, tmp_path)
    assert client.load("some/cached") == total
    assert next(serving, None) is None
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
