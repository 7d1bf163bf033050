"""A Hub on loopback that speaks its HTTP protocol, and a process that loads models from it.

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


def serving(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()
