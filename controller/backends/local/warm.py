"""Phases started from a process that has imported torch already (:mod:`trainers.warm`), for runs of several phases on a CPU."""

import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from controller.backends.local import process
from trainers.warm import room

PHASE = [sys.executable, "-m", "trainers"]
"""How a command begins that the warm process can take the place of."""
PATIENCE = 30.0
"""Seconds for a fork. One that takes longer is of a process that hangs."""


class Warm:
    """The warm process, and what it has said. Whatever happens to it, phases can be started without."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready, self._ended = False, False
        self._statuses: dict[int, int] = {}
        arguments, mark = room()
        with theirs:
            self._process = subprocess.Popen(
                [*process.leash(), sys.executable, "-m", "trainers.warm", str(theirs.fileno()), *arguments],
                env={**environ, **mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )

    def start(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> "Forked | None":
        """The phase of a command; None if it has to be started without: while imports last, or when there is no process."""
        self._read()
        if self._ended or not self._ready:
            return None
        log.parent.mkdir(parents=True, exist_ok=True)
        order = {"arguments": command[len(PHASE) :], "environment": dict(environ), "log": str(log)}
        try:
            self._ours.send(json.dumps(order).encode())
        except OSError:  # it is gone, or the environment is larger than a datagram
            return None
        while (answer := self._next(PATIENCE)) is not None:
            if "status" not in answer:
                return Forked(self, answer["pid"])
            self._hear(answer)
        self.close()
        process.kill(process.processes_under(log.parent.parent))  # it may have been forked all the same
        return None

    def status(self, pid: int) -> int | None:
        """How a phase has ended; None while it has not."""
        self._read()
        if pid in self._statuses:
            return self._statuses[pid]
        # Its last words were lost with it, which is when its phases are asked to stop.
        return -signal.SIGTERM if self._ended and not psutil.pid_exists(pid) else None

    def close(self) -> None:
        """Its phases are asked to stop by its end."""
        self._ended = True
        self._ours.close()
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        """Hear what it has said by now."""
        while not self._ended and (answer := self._next(0)) is not None:
            self._hear(answer)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """Its next answer; None if there is none in time, or it is gone."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return None
        try:
            answer = self._ours.recv(4096)
        except OSError:
            answer = b""
        if answer:
            return dict(json.loads(answer))
        self._ended = True
        self._process.wait()
        return None

    def _hear(self, answer: dict[str, Any]) -> None:
        self._ready = True
        if "status" in answer:
            self._statuses[answer["pid"]] = answer["status"]


class Forked:
    """A phase's process, with what subprocess's have (:class:`controller.backends.local.process.Handle`)."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self.warm, self.pid = warm, pid

    def poll(self) -> int | None:
        return self.warm.status(self.pid)

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.05)
        return status


class Starter:
    """Starts phases, from the second one on by a warm process where one can take a phase's place."""

    def __init__(self, cores: int, gpus: Sequence[str]) -> None:
        self._cores = cores
        # CUDA does not survive a fork, and who has a GPU does not wait for imports.
        self._usable = sys.platform == "linux" and not gpus
        self._warm: Warm | None = None
        self._started = 0

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], log: Path, own: Mapping[str, str]
    ) -> process.Handle:
        """``own``: what the phase's environment has of its own, which libraries may read when they are imported."""
        if self._usable and not own and list(command[: len(PHASE)]) == PHASE and self._can_count(environ):
            if self._warm is not None and (forked := self._warm.start(command, environ, log)):
                return forked
            self._started += 1
            if self._started == 2:
                self._warm = Warm({**environ, "OMP_NUM_THREADS": str(self._cores), "OPENBLAS_NUM_THREADS": "1"})
        return process.start(command, environ, log)

    def close(self) -> None:
        """End the warm process. Phases that are started later are started without."""
        self._usable = False
        if self._warm is not None:
            self._warm.close()

    def _can_count(self, environ: Mapping[str, str]) -> bool:
        """MKL takes another number than all cores, set after its start, more strictly: sums may differ in their last digits."""
        return environ["OMP_NUM_THREADS"] in ("1", str(self._cores))
