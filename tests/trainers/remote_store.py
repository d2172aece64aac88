"""A real S3 server (versitygw) whose objects are plain files, and phases in pods that have nothing but it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cluster import build, requirements
from cluster.processes import free_ports

KEY, SECRET = "test-key", "a-secret-nobody-should-see"
ROWS = '{"prompt": "copy box : A B", "response": "A B"}\n{"prompt": "copy box : B A", "response": "B A"}\n' * 8
EVERY_STEP = {"everySteps": 1, "keepLast": 3}


@dataclass
class Bucket:
    """An empty bucket; ``path`` is where the server keeps its objects."""

    uri: str
    path: Path

    def names(self, folder: str = "") -> set[str]:
        root = self.path / folder
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


@dataclass
class Server:
    port: int
    root: Path
    process: subprocess.Popen

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve(root: Path, port: int) -> Server:
    binary = build.ensure("s3").binary("versitygw")
    environment = {**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET}
    command = [str(binary), "--port", f"127.0.0.1:{port}", "posix", str(root)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(port, root, process)
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(server.endpoint, timeout=5)
        except urllib.error.HTTPError:
            return server
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if reason := requirements.missing("s3"):
        requirements.not_here(f"S3 server: {reason}")
    server = serve(tmp_path_factory.mktemp("s3"), free_ports(1)[0])
    yield server
    server.stop()


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    use(monkeypatch, server.endpoint)
    name = re.sub(r"[^a-z0-9]", "-", tmp_path.name.lower()).strip("-")
    (server.root / name).mkdir()
    yield Bucket(f"s3://{name}", server.root / name)
    forget_connections()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str = SECRET) -> None:
    """What a pod gets from its secret references."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    forget_connections()


def forget_connections() -> None:
    """fsspec keeps file systems, with the credentials they were made with, for the life of the process."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def in_pod(run_phase, tmp_path, bucket):
    """``in_pod(type, spec, phase=, run=, inputs=) -> (exit code, Result or None, its folder)``: in an empty folder each time."""
    count = iter(range(1000))

    def run(kind, spec, phase=None, run="run", inputs=(), remote=None, folder=None, **file):
        workspace = folder or tmp_path / f"pod-{next(count)}"
        found = {}
        for name in inputs:  # what the controller knows of them is in the phase file
            found[name] = workspace / run / name
            found[name].mkdir(parents=True, exist_ok=True)
            shutil.copy(bucket.path / "ws" / run / name / "result.json", found[name])
        output = workspace / run / (phase or kind)
        remote = remote or f"{bucket.uri}/ws"
        code, result = run_phase(kind, spec, found, output, remote=remote, baseDir=str(workspace), **file)
        return code, result, output

    return run


def sft(start: Path | str, **changes) -> dict:
    base = {
        "model": {"source": str(start)},
        "data": {
            "train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 48}}],
            "maxLength": 64,
        },
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-3},
        "checkpoint": EVERY_STEP,
    }
    return {**base, **changes}


def weights(phase: Path) -> bytes:
    return (phase / "model" / "model.safetensors").read_bytes()


def steps(phase: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (phase / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, spec: dict, remote: str | None, prelude: str = "", **file) -> subprocess.Popen:
    """``python -m trainers`` in a process of its own, with an empty workspace, after the Python code ``prelude``."""
    folder.mkdir()
    document = {"output": str(folder / "ws/run/sft"), "spec": spec, "baseDir": str(folder / "ws"), "remote": remote}
    (folder / "phase.yaml").write_text(yaml.safe_dump({**document, **file}))
    arguments = ["trainers", "sft", "--spec", str(folder / "phase.yaml")]
    code = f"{prelude}\nimport runpy, sys\nsys.argv = {arguments}\nrunpy.run_module('trainers', run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
