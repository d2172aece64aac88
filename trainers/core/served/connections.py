"""Connections to a server that stay open between calls: no more than calls are made side by side. Imports no torch."""

import base64
import http.client
import math
import select
import socket
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import SplitResult, unquote, urlsplit

Make = Callable[[], http.client.HTTPConnection]

HANDSHAKE_SECONDS = 5.0


@dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    body: bytes
    measured: bool = True
    """Whether the server has said how long it is: else nothing shows that it was broken off."""


class Unheard(ConnectionError):
    """The other end closed the connection before a word of an answer."""


class Connections:
    """Safe to be used by several threads, each of which has one to itself while it waits for an answer."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._busy: set[http.client.HTTPConnection] = set()
        self._abandoned = False

    def abandon(self) -> None:
        """Break off what is being asked, for good: those who wait for an answer are told that there is none."""
        self._abandoned = True
        for connection in list(self._busy):
            if (end := connection.sock) is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        """Raises OSError or http.client.HTTPException if there is no whole answer.

        A server may close a connection that nothing was said on for a while, just when the next question comes. It is asked
        once more then, on a new one; a question that it may have begun to answer is not.
        """
        kept = self._kept()
        if kept is not None:
            try:
                return self._asked(kept, method, path, body, headers)
            except Unheard:
                pass
        return self._asked(self._make(), method, path, body, headers)

    def _kept(self) -> http.client.HTTPConnection | None:
        """The one that was used last, unless its other end is closed by now."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                return None
            if not _has_ended(connection):
                return connection
            connection.close()
        return None

    def _asked(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Reply:  # fmt: skip
        self._busy.add(connection)
        try:
            if self._abandoned:
                raise ConnectionAbortedError("nothing more is asked")
            answer = _begun(connection, method, path, body, headers)
            measured = answer.length is not None or bool(answer.chunked)
            found = Reply(answer.status, answer.reason, _whole(answer, connection.timeout), measured)
        except BaseException:
            connection.close()  # whatever else comes on it would be of this question
            raise
        finally:
            self._busy.discard(connection)
        if answer.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return found


def _begun(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    try:
        connection.request(method, path, body, dict(headers))
        return connection.getresponse()
    except (BrokenPipeError, ConnectionResetError) as error:  # http.client.RemoteDisconnected is one
        raise Unheard(str(error) or type(error).__name__) from error


def _whole(answer: http.client.HTTPResponse, seconds: float | None) -> bytes:
    """What is left of an answer. A timeout is of each read: who sends a byte now and then would never come to it."""
    until = time.monotonic() + seconds if seconds is not None else math.inf
    parts = []
    while part := answer.read1(1 << 20):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError(f"its answer has not come to an end in {seconds:g} s")
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    answer.read()  # nothing; but only then may the connection be asked again
    return b"".join(parts)


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Something to read where nothing was asked is the end."""
    if connection.sock is None:
        return True
    look = select.poll()
    look.register(connection.sock, select.POLLIN)
    return bool(look.poll(0))


# ---------------------------------------------------------------- the way to a server


def route(url: str, timeout: float) -> tuple[Make, str, dict[str, str]]:
    """What makes a connection, what stands in front of a path, and headers; by the proxy that the environment names, if any."""
    at = urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(at.netloc) else urllib.request.getproxies().get(at.scheme)
    if proxy is None:
        return partial(_connection, at, timeout), at.path, {}
    by = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if at.scheme == "http":
        return partial(_connection, by, timeout), f"http://{at.netloc}{at.path}", _permit(by)
    return partial(_tunnel, by, at, timeout), at.path, {}


def _connection(at: SplitResult, timeout: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    return kind(at.hostname or "", at.port, timeout=timeout)


def _tunnel(by: SplitResult, at: SplitResult, timeout: float) -> http.client.HTTPConnection:
    found = http.client.HTTPSConnection(by.hostname or "", by.port or http.client.HTTP_PORT, timeout=timeout)
    found.set_tunnel(at.hostname or "", at.port, _permit(by))
    return found


def speaks_tls(url: str) -> bool:
    """Whether a server that has no word for a question in plain HTTP has one for TLS. Who it is does not matter."""
    at, context = urlsplit(url), ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    where = (at.hostname or "", at.port or http.client.HTTP_PORT)
    try:
        with socket.create_connection(where, HANDSHAKE_SECONDS) as door:
            context.wrap_socket(door, server_hostname=at.hostname).close()
    except OSError:
        return False
    return True


def _permit(by: SplitResult) -> dict[str, str]:
    """Of a proxy that wants a name."""
    if by.username is None:
        return {}
    words = f"{unquote(by.username)}:{unquote(by.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
