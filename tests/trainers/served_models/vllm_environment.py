"""A real vLLM on this machine's processor, in an environment of its own: built once, from a lock, outside of the tree."""

import fcntl
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.requirements import not_here

LOCK = Path(__file__).parents[3] / "requirements/vllm.lock"
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment-vllm"
WHOLE = "whole"
"""A file that is there once all packages are."""

START_SECONDS = 3600
"""It takes about 80 of a processor, which others may want too, and one that hangs is to end some day."""

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1",
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen[bytes]


def vllm_python() -> Path:
    """The interpreter of the environment, which is built if it is not there."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        not_here(f"vLLM for processors is locked for x86-64 Linux, this is {platform.machine()}")
    mark = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = HOME / mark
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f"{mark}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / WHOLE).exists():
            _build(folder)
    return folder / "bin/python"


def _build(folder: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        not_here("there is no uv to install vLLM with: make test-vllm has it")
    environment = {**os.environ, "VIRTUAL_ENV": str(folder), "UV_HTTP_TIMEOUT": "300"}
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(folder)],
        ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(LOCK)],
    ):
        done = subprocess.run([uv, *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            not_here(f"vLLM cannot be installed: {' '.join(done.stderr.split())[-500:]}")
    (folder / WHOLE).touch()


def vllm_command() -> list[str]:
    """What a phase starts it by: its build for processors lacks the program `vllm`."""
    return [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model"]


@contextmanager
def serving(folder: Path, log: Path, *flags: str) -> Iterator[Running]:
    """A server of a model's folder, once it answers. It ends with all that it has started."""
    port = _free_port()
    command = [*vllm_command(), str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", *flags]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield Running(url, process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """All of its group, which is the server's own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with opener.open(f"{url}/health", timeout=10):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not come to answer: {log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
