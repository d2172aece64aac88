"""Starting and ending a cluster's keeper, and what is asked of it in between."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import keeper
from cluster.build import Say, announce
from cluster.locks import try_lock

NODE_STATE = Path("/var/tmp/alignment-cluster")
_PREFIX = "alignment-cluster-"
_START_TIMEOUT = 300


class StartFailed(Exception):
    """The message has the error and where the logs are kept."""


@dataclass
class Running:
    """A cluster that is up; ``info`` is what its tier says of itself."""

    state: Path
    process: subprocess.Popen[bytes]
    info: dict[str, Any]

    def detach(self) -> None:
        """From now on it outlives this process."""
        (self.state / keeper.DETACHED).touch()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def start(tier: str, nodes: int, say: Say = announce) -> Running:
    """Blocks until everything is ready. Raises StartFailed."""
    remove_stale()
    state, lock = _claim(tier, say)
    spec = {"tier": tier, "state": str(state), "nodes": nodes}
    log = (state / "logs" / "keeper.log").open("wb")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.keeper", json.dumps(spec)],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True, pass_fds=[lock],
    )  # fmt: skip
    os.close(lock)
    log.close()
    (state / "keeper.pid").write_text(str(process.pid))
    running = Running(state, process, {})
    try:
        running.info = _await(running)
    except BaseException:
        running.stop()
        raise
    return running


def ask(state: Path, action: str, argument: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(state / keeper.CONTROL))
        with connection.makefile("rw") as stream:
            stream.write(json.dumps({"action": action, "argument": argument}) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
    if "error" in answer:
        raise RuntimeError(f"{action} {argument}: {answer['error']}")


def stop_node_cluster() -> bool:
    """Ends the cluster of nodes on this machine, whoever started it, and removes what a killed one left."""
    found = NODE_STATE.exists()
    lock = os.open(_node_lock(), os.O_RDWR | os.O_CREAT, 0o600)
    if not try_lock(lock):
        with suppress(OSError, ValueError):
            os.kill(int((NODE_STATE / "keeper.pid").read_text()), signal.SIGTERM)
        fcntl.flock(lock, fcntl.LOCK_EX)
    keeper.clean_up({"tier": "node", "state": str(NODE_STATE)})
    os.close(lock)
    return found


def remove_stale() -> None:
    """State of clusters whose keeper was killed: their lock is free."""
    for state in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(state / keeper.LOCK, os.O_RDWR)
            if try_lock(lock):
                shutil.rmtree(state, ignore_errors=True)
            os.close(lock)


def keep_logs(state: Path) -> Path:
    """A copy that outlives the cluster."""
    kept = Path(tempfile.mkdtemp(prefix="alignment-logs-"))
    shutil.copytree(state / "logs", kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    return kept


def _await(running: Running) -> dict[str, Any]:
    deadline = time.monotonic() + _START_TIMEOUT
    while not (running.state / keeper.READY).exists():
        failed = running.state / keeper.FAILED
        if failed.exists() or running.process.poll() is not None or time.monotonic() > deadline:
            reason = failed.read_text() if failed.exists() else "its keeper ended, or it took too long"
            raise StartFailed(f"the cluster did not start: {reason}\nlogs are kept in {keep_logs(running.state)}")
        time.sleep(0.1)
    return json.loads((running.state / keeper.READY).read_text())


def _claim(tier: str, say: Say) -> tuple[Path, int]:
    """A state folder and a lock on it that the keeper inherits."""
    if tier != "node":
        state = Path(tempfile.mkdtemp(prefix=_PREFIX))
        (state / "logs").mkdir()
        return state, _locked(state / keeper.LOCK)
    lock = os.open(_node_lock(), os.O_RDWR | os.O_CREAT, 0o600)
    if not try_lock(lock):
        if (NODE_STATE / keeper.DETACHED).exists():
            raise StartFailed("the cluster of `make cluster-up` is running; end it with `make cluster-down`")
        say("another test run has this machine's cluster of nodes; waiting for its end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    keeper.clean_up({"tier": "node", "state": str(NODE_STATE)})
    (NODE_STATE / "logs").mkdir(parents=True, mode=0o700)
    return NODE_STATE, lock


def _locked(path: Path) -> int:
    """The file appears under its name only when it is locked, so `remove_stale` never takes it for a free one."""
    new = path.with_suffix(".new")
    lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(path)
    return lock


def _node_lock() -> Path:
    return NODE_STATE.with_name(f"{NODE_STATE.name}.lock")
