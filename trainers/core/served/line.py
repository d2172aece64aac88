"""The line to a server's keeper (:mod:`trainers.keeper`): the server lives as long as this process holds it. Imports no torch."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainers.keeper
from trainers.contract import KEEPER_VARIABLE, Infrastructure

LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_\w+|TORCHELASTIC_\w+|PET_\w+|PYTHON(PATH|HOME)|OMPI_\w+|ALIGNMENT_\w+"
)
"""Variables that say where this process stands among its peers and whose code it runs: a server is none of them."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""A server reads files that are there, and tells nobody of it."""

END_SECONDS = 60.0
"""How long a server's end is waited for, so that what comes after it finds its memory free."""

ORDER_STATUSES = (2, 126, 127)
"""Of a program that does not understand its arguments, and of a shell that cannot start one."""


@dataclass(frozen=True)
class Ended:
    """A server that has ended by itself."""

    how: str
    of_order: bool = False
    """Whether what it was told is at fault: it would end so again."""
    status: int | None = None
    """None unless it is known to have ended: below 0 by a signal."""


class Line:
    """Holds one server. It ends with :meth:`close`, and with this process however that ends."""

    def __init__(
        self, command: List[str], environment: Mapping[str, str], log: Path, patience: float, scratch: List[Path]
    ) -> None:
        """``scratch``: folders that nobody needs behind the server.

        Raises Infrastructure if nobody takes the order within so many seconds.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        place = os.environ.get(KEEPER_VARIABLE)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._end, its = (_connected(place, patience), None) if place else socket.socketpair()
        if its is not None:
            self._keeper = _own_keeper(its)
        order = {"command": list(command), "environment": {**ENVIRONMENT, **environment}, "log": str(log)}
        order["scratch"] = [str(folder) for folder in scratch]
        self._end.sendall(json.dumps(order).encode() + b"\n")
        self._heard, self._gone = b"", False

    def heard(self) -> Ended | None:
        """How the server has ended; None while it is there."""
        self._end.setblocking(False)
        try:
            some = self._end.recv(1 << 12)
        except BlockingIOError:
            some = b""
        except OSError:
            return Ended("its keeper is gone")
        else:
            self._gone = not some
        self._heard += some
        if self._heard.endswith(b"\n"):
            return _ended(json.loads(self._heard))
        return Ended("its keeper is gone") if self._gone else None

    def close(self) -> None:
        """End the server, and wait until it is gone."""
        self._end.settimeout(END_SECONDS)
        try:
            self._end.shutdown(socket.SHUT_WR)
            while self._end.recv(1 << 12):
                pass
        except OSError:
            pass  # it is gone already, or takes too long about it
        finally:
            self._end.close()
            if self._keeper is not None:
                self._keeper.wait()


def _ended(said: dict[str, Any]) -> Ended:
    if "error" in said:
        return Ended(f"it could not be started ({said['error']})", of_order=True)
    status = int(said["status"])
    if status < 0:
        return Ended(f"it was killed by signal {-status}", status=status)
    return Ended(f"it ended with status {status}", status in ORDER_STATUSES, status)


def _own_keeper(line: socket.socket) -> "subprocess.Popen[bytes]":
    """A process of its own, which no signal of a terminal reaches."""
    environment = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    command = [sys.executable, "-I", "-S", str(trainers.keeper.__file__)]
    with line:
        return subprocess.Popen(command, stdin=line.fileno(), env=environment, start_new_session=True)


def _connected(place: str, patience: float) -> socket.socket:
    """To the keeper in another container, which may start later than this one."""
    until = time.monotonic() + patience
    while True:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(place)
        except OSError as error:
            end.close()
            if time.monotonic() > until:
                raise Infrastructure(
                    f"the container of the server does not answer at {place}: {error.strerror}"
                ) from error
            time.sleep(0.2)
        else:
            return end
