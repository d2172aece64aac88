"""A hub on this machine: repositories of files with commits, over the real hub's HTTP interface."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class FakeHub:
    """``commits[repo]`` lists a repository's states, oldest first; `main` is the last."""

    commits: dict[str, list[Files]] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    """Statuses that the next requests get instead of an answer; 0 breaks the connection off."""
    refusal: tuple[int, str] | None = None
    """Status and error code of every answer."""
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def push(self, repo: str, folder: Path) -> str:
        """Add a folder's content as the newest commit of `org/name` or `datasets/org/name`. Returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.commits.setdefault(repo, []).append(files)
        return self.sha(repo, len(self.commits[repo]) - 1)

    def sha(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """(commit, files) of a revision, which is `main` or a commit."""
        states = {self.sha(repo, i): files for i, files in enumerate(self.commits.get(repo, []))}
        commit = list(states)[-1] if revision == "main" and states else revision
        return (commit, states[commit]) if commit in states else None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(self.path)
            if hub.failures:
                status = hub.failures.pop(0)
                if not status:
                    self.close_connection = True
                    return
                self._send(status, b"{}", {})
                return
            if hub.refusal is not None:
                self._send(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
                return
            self._send(*_part(self.headers.get("range"), *_answer(hub, unquote(urlsplit(self.path).path))))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.requests.append(self.path)
            asked = self.rfile.read(int(self.headers.get("content-length", 0)))
            self._send(*_infos(hub, unquote(urlsplit(self.path).path), asked))

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _answer(hub: FakeHub, path: str) -> tuple[int, bytes, dict[str, str]]:
    if re.fullmatch(r"/api/(models|datasets)/.+/tree/[^/]+/.+", path):
        return _missing(None, "EntryNotFound")  # folders of their own are not listed
    if match := re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+))?", path):
        kind, name, what, revision = match.groups()
        found = hub.find(name if kind == "models" else f"datasets/{name}", revision or "main")
        return _missing(revision) if found is None else _listed(name, what, *found)
    if match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
        repo, revision, file = match.groups()
        found = hub.find(repo, revision)
        if found is None or file not in found[1]:
            return _missing(revision if found is None else None, "EntryNotFound")
        etag = hashlib.sha1(found[1][file]).hexdigest()
        return 200, found[1][file], {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]}
    return 404, b"{}", {}


def _part(wanted: str | None, status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
    """The bytes of a file that a reader of streams asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None or status != 200:
        return status, body, headers
    first, last = int(match[1]), int(match[2] or len(body) - 1)
    found = body[first : last + 1]
    return 206, found, {**headers, "Content-Range": f"bytes {first}-{first + len(found) - 1}/{len(body)}"}


def _infos(hub: FakeHub, path: str, asked: bytes) -> tuple[int, bytes, dict[str, str]]:
    """What a client asks about single files, as a form or as JSON."""
    match = re.fullmatch(r"/api/datasets/(.+?)/paths-info/([^/]+)", path)
    found = hub.find(f"datasets/{match[1]}", match[2]) if match else None
    if found is None:
        return 404, b"{}", {}
    wanted = json.loads(asked)["paths"] if asked[:1] == b"{" else parse_qs(asked.decode()).get("paths", [])
    return 200, json.dumps(_entries({k: v for k, v in found[1].items() if k in wanted})).encode(), {}


def _entries(files: Files) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]


def _listed(name: str, what: str, commit: str, files: Files) -> tuple[int, bytes, dict[str, str]]:
    if what == "tree":
        return 200, json.dumps(_entries(files)).encode(), {"Content-Type": "application/json"}
    body = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "tags": []}
    return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}


def _missing(revision: str | None, code: str = "") -> tuple[int, bytes, dict[str, str]]:
    error = code or ("RevisionNotFound" if revision else "RepoNotFound")
    return 404, b"{}", {"X-Error-Code": error, "X-Error-Message": error}
