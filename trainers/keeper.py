"""Keeps a server for as long as somebody holds the line to it. A program of its own that needs Python and nothing else,
so that it runs in a server's image too.

    keeper.py          one server, for whoever has the other end of standard input, which is a socket
    keeper.py PATH     one for each that connects to this socket, one after the other

Who holds the line says first what to start, as a line of JSON: `command`, `environment` (beside this process's own), `log`
(a file), `scratch` (folders that go with the server). A server that ends by itself is told of: `{"status": 1}`, or
`{"error": "..."}` if it could not be started. Once the line is let go of, by whatever ends its holder, the server is ended with
all that it has started, and only then does this end of it close.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

GRACE_SECONDS = 10.0
"""For a server to give back what it holds of devices and shared memory."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a container's first process would not hear of it else
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a server leaves behind is found
    if len(sys.argv) == 1:
        with socket.socket(fileno=0) as line:
            keep(line)
        return
    with socket.socket(socket.AF_UNIX) as door:
        with suppress(FileNotFoundError):
            os.unlink(sys.argv[1])  # of this container before it was started again
        door.bind(sys.argv[1])
        door.listen()
        while True:
            line, _ = door.accept()
            with line:
                keep(line)


def keep(line: socket.socket) -> None:
    order = _order(line)
    if order is None:
        return
    try:
        server = _started(order)
    except OSError as error:
        _say(line, {"error": f"{order['command'][0]}: {error.strerror}"})
        return
    try:
        while not select.select([line], [], [], 0.2)[0]:  # nothing more is ever said, so what can be read is the end
            if server.poll() is not None:
                _say(line, {"status": server.returncode})
                select.select([line], [], [])
    finally:
        _end(server)
        for folder in order["scratch"]:
            shutil.rmtree(folder, ignore_errors=True)


def _order(line: socket.socket) -> Any:
    """What the first line says; None if its holder is gone before."""
    text = b""
    while not text.endswith(b"\n"):
        some = line.recv(1 << 16)
        if not some:
            return None
        text += some
    return json.loads(text)


def _started(order: Any) -> "subprocess.Popen[bytes]":
    with open(order["log"], "wb") as log:
        return subprocess.Popen(
            order["command"],
            env={**os.environ, **order["environment"]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - no threads here
        )


def _say(line: socket.socket, words: dict[str, Any]) -> None:
    with suppress(OSError):
        line.sendall(json.dumps(words).encode() + b"\n")


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ask its group to end, then insist; what has left the group is a child of this process by then."""
    until = time.monotonic() + GRACE_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    while _reaped() and time.monotonic() < until:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    while children := _reaped():
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _reaped() -> list[int]:
    """Children that live, after those that do not are waited for."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()]


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])  # a name may hold brackets
    except OSError:
        return 0


if __name__ == "__main__":
    main()
