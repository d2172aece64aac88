"""Child processes that die with their parent, and waiting for them with a deadline."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class NotReady(Exception):
    """The message names what was waited for, and the log that may say why."""


def die_with_parent() -> None:
    """For a new child: the kernel kills it when its parent ends, however that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Children:
    """Named children with one log each. A child that ends by itself makes every wait fail at once."""

    def __init__(self, logs: Path):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, tuple[Sequence[str | Path], Mapping[str, str] | None]] = {}

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> int:
        self._started[name] = (command, env)
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | (env or {}),
                start_new_session=True, preexec_fn=die_with_parent,  # noqa: PLW1509 (a keeper has one thread)
            )  # fmt: skip
        return self.running[name].pid

    def kill(self, name: str) -> None:
        child = self.running.pop(name)
        child.kill()
        child.wait()

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """In the middle of whatever it does (SIGSTOP); then it goes on."""
        self.running[name].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.running[name].send_signal(signal.SIGCONT)

    def again(self, name: str) -> None:
        """One that was killed or ended, with the command that it had."""
        self.start(name, *self._started[name])

    def ended(self) -> list[str]:
        return [name for name, child in self.running.items() if child.poll() is not None]

    def wait_for(self, predicate: Callable[[], object], timeout: float, what: str) -> None:
        def unless_ended() -> object:
            if ended := self.ended():
                raise NotReady(f"{what}: {', '.join(ended)} ended; last lines of its log:\n{self.tail(ended[0])}")
            return predicate()

        try:
            wait_for(unless_ended, timeout, what)
        except TimeoutError as error:
            raise NotReady(f"{error}; logs: {self.logs}") from None

    def tail(self, name: str, lines: int = 15) -> str:
        text = (self.logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def wait_for(predicate: Callable[[], T | None], timeout: float, what: str, every: float = 0.1) -> T:
    """The first true value of ``predicate``; TimeoutError names ``what`` and the last value."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {timeout:g} s: {what} (last: {value!r})")
        time.sleep(every)
    return value


def free_ports(count: int) -> list[int]:
    """Ports below the range that the kernel takes for outgoing connections, so nothing takes them by chance."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) and _can_bind(port):
                found.append(port)
    return found


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
