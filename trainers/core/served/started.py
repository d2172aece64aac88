"""A vLLM server that the phase starts from a model's own folder: it answers to the phase's processes and nobody else."""

import http.client
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trainers.contract import BadInput, Infrastructure, Interrupted
from trainers.core.context import PhaseContext
from trainers.core.served.connections import Connections
from trainers.core.served.line import Ended, Line
from trainers.core.served.log import is_of_command, is_of_memory, last_words
from trainers.core.served.server import Server, Unanswered, side_by_side
from trainers.spec import OwnServer, Served

MEMORY_HINT = (
    "set --gpu-memory-utilization in server.args (of all memory there, a processor's too), "
    "or VLLM_CPU_KVCACHE_SPACE (GiB) in the environment of one on a processor"
)

COMMAND_HINT = (
    "set server.command to what starts a vLLM with all that it imports, for example [/opt/vllm/bin/vllm, serve]"
)

MOST_OF_AN_ADDRESS = 107
"""Bytes that Linux has for the path of a Unix socket, beside its end."""

SOCKET_OF_ITS_OWN = len("/vllm-12345678/00000000-0000-0000-0000-000000000000")
"""What the paths of its processes' sockets have behind the folder for temporary files (`vllm/utils/network_utils.py`)."""


class StartedServer(Server):
    """Over a socket in a folder that only this user can open: no port, no key."""

    def __init__(self, ctx: PhaseContext, field: str, place: Path, line: Line | None) -> None:
        """``line``: of the process that has started it."""
        super().__init__(field, Served(url="http://localhost"), lambda: ctx.stop_signal is not None)
        self.url, self._line, self.answered = "the phase's own vLLM", line, False
        self._base, self._headers = "", {}
        self._connections = Connections(partial(_SocketConnection, place, "localhost", timeout=self.timeout))

    def answers(self, look: Callable[[], None]) -> bool:
        """Whether it has come to answer; ``look`` is called while it is waited for. Raises if it has ended instead."""
        try:
            side_by_side(lambda _: self._once("/v1/models", None), [None], 1, look)
        except Unanswered:
            return False
        self.answered = True
        return True

    def started_with(self, flag: str) -> str:
        return f"set {flag} in server.args"

    def _once(self, path: str, body: bytes | None) -> Any:
        try:
            return super()._once(path, body)
        except Unanswered:
            if self._line is not None and (heard := self._line.heard()) is not None:
                raise self._end(self._line, heard) from None
            raise

    def _end(self, line: Line, ended: Ended) -> Exception:
        if self._stopping():  # what stops all processes of a machine stops this one too
            return self._interrupted()
        said = last_words(line.log)
        when = "" if self.answered else " before it answered"
        text = f"{self.field}: {self.url} is gone{when}, {ended.how}: {said}"
        if ended.of_order:
            return BadInput(f"{text}; server says how it is started")
        if not self.answered and is_of_memory(said):  # what it may take is a setting, which the next attempt has too
            return BadInput(f"{text}; {MEMORY_HINT}")
        if not self.answered and ended.status is not None and is_of_command(said, ended.status):
            return BadInput(f"{text}; {COMMAND_HINT}")
        return Infrastructure(text)


@contextmanager
def started(
    ctx: PhaseContext,
    field: str,
    settings: OwnServer,
    folder: str,
    flags: List[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    scratch: List[Path] = (),
) -> Iterator[StartedServer]:
    """A server of the folder's model on each machine, started by its first process, once it answers; it ends with the block.

    ``scratch``: folders that go with it, also where this process is killed.
    """
    with ExitStack() as until:
        line, place = None, None
        if ctx.workers.local_rank == 0:
            _check_temporary(field)
            own = Path(until.enter_context(tempfile.TemporaryDirectory(prefix="vllm-")))
            place = own / "s"
            words = [*settings.command, folder, "--uds", str(place), *flags, *settings.args]
            around = {**environment, "TMPDIR": str(own)}  # what it leaves behind goes with the folder
            line = Line(words, around, _log(ctx), settings.start_timeout_seconds, [own, *scratch])
            until.callback(line.close)
            _wait(ctx, StartedServer(ctx, field, place, line), line, settings)
        places = ctx.workers.gather_objects([place])
        found = next(p for p in reversed(places[: ctx.workers.rank + 1]) if isinstance(p, Path))
        server = StartedServer(ctx, field, found, line)
        server.answered = True
        yield server


def _check_temporary(field: str) -> None:
    """Raise BadInput if sockets in the folder for temporary files would have too long a name."""
    folder, most = tempfile.gettempdir(), MOST_OF_AN_ADDRESS - SOCKET_OF_ITS_OWN
    if (length := len(os.fsencode(folder))) > most:
        raise BadInput(
            f"{field}: a vLLM's sockets are in the folder for temporary files, {folder}, whose name has {length} bytes: "
            f"set TMPDIR to one of {most} at most"
        )


def _log(ctx: PhaseContext) -> Path:
    return ctx.dir.root / ("vllm.log" if ctx.workers.is_main else f"vllm-{ctx.workers.rank}.log")


def _wait(ctx: PhaseContext, server: StartedServer, line: Line, settings: OwnServer) -> None:
    until = time.monotonic() + settings.start_timeout_seconds

    def look() -> None:
        if ctx.stop_signal is not None:
            raise Interrupted("stopped while a server started; the phase can go on")
        if time.monotonic() > until:
            said = last_words(line.log)
            raise Infrastructure(
                f"{server.field}: {server.url} has not answered within {settings.start_timeout_seconds} s "
                f"(server.startTimeoutSeconds): {said}"
            )

    while not server.answers(look):
        look()
        time.sleep(0.2)


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, place: Path, host: str, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._place = place

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._place))
