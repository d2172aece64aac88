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
from cluster.locks import try_lock
from cluster.network import SLOTS
from cluster.tiers import Spec

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

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def start(tier: str, nodes: int, kept: bool = False) -> Running:
    """Blocks until everything is ready. Raises StartFailed.

    ``kept``: the cluster of `make cluster-up`, which outlives this process; there is one on a machine.
    """
    remove_stale()
    spec, lock = _claim_slot(kept) if tier == "node" else _claim_folder()
    spec |= {"tier": tier, "nodes": nodes}
    state = Path(spec["state"])
    (state / "logs").mkdir()
    with (state / "logs" / "keeper.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.keeper", json.dumps(spec)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, start_new_session=True, pass_fds=[lock],
        )  # fmt: skip
    os.close(lock)
    (state / "keeper.pid").write_text(str(process.pid))
    running = Running(state, process, {})
    try:
        running.info = _await(running)
    except BaseException:
        running.stop()
        raise
    if kept:
        (state / keeper.DETACHED).touch()
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


def stop_kept() -> bool:
    """Ends the cluster of `make cluster-up`, and removes what a killed one left. False if there was none."""
    state, lock = _slot_state(0), _open(_slot_lock(0))
    found = state.exists()
    if not try_lock(lock):
        with suppress(OSError, ValueError):
            os.kill(int((state / "keeper.pid").read_text()), signal.SIGTERM)
        fcntl.flock(lock, fcntl.LOCK_EX)
    _clean_slot(0)
    os.close(lock)
    return found


def remove_stale() -> None:
    """What clusters left whose keeper was killed: their lock is free."""
    for state in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(state / keeper.LOCK, os.O_RDWR)
            if try_lock(lock):
                shutil.rmtree(state, ignore_errors=True)
            os.close(lock)
    for slot in range(SLOTS):
        if _slot_lock(slot).exists() and os.access(_slot_lock(slot), os.W_OK):
            lock = _open(_slot_lock(slot))
            if try_lock(lock):
                _clean_slot(slot)
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


def _claim_folder() -> tuple[Spec, int]:
    """A state folder, and a lock on it that the keeper inherits."""
    state = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # It appears under its name only when it is locked, so `remove_stale` never takes it for a free one.
    new = state / f"{keeper.LOCK}.new"
    lock = _open(new)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(state / keeper.LOCK)
    return {"state": str(state)}, lock


def _claim_slot(kept: bool) -> tuple[Spec, int]:
    for slot in [0] if kept else range(1, SLOTS):
        lock = _open(_slot_lock(slot))
        if try_lock(lock):
            _clean_slot(slot)
            _slot_state(slot).mkdir(mode=0o700)
            return {"state": str(_slot_state(slot)), "slot": slot}, lock
        os.close(lock)
    raise StartFailed("it runs already; end it with `make cluster-down`" if kept else f"{SLOTS} clusters run already")


def _clean_slot(slot: int) -> None:
    keeper.clean_up({"tier": "node", "state": str(_slot_state(slot)), "slot": slot})


def _slot_state(slot: int) -> Path:
    """Not under the temporary folder, which may be in memory or on an overlay that containerd cannot use."""
    return Path(f"/var/tmp/alignment-cluster{slot or ''}")


def _slot_lock(slot: int) -> Path:
    return Path(f"/run/lock/{_slot_state(slot).name}.lock")


def _open(lock: Path) -> int:
    lock.parent.mkdir(parents=True, exist_ok=True)
    return os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
