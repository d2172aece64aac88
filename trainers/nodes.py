"""Whether a run's other nodes are still there.

A machine that loses power says nothing, and collectives wait for it until they time out, for half an hour by default. So
every launcher but the first has a connection to the first one, over which nothing is sent: the kernel asks its other end
whether it is there (TCP keepalive, RFC 1122). One that is closed tells nothing: an end closes it, good or bad, and processes see
that for themselves.
"""

import errno
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread

IDLE, EVERY, TIMES = 5, 2, 5
"""Seconds until the kernel asks, and between questions; how many may stay without an answer."""
SECONDS = IDLE + EVERY * TIMES
SILENCE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)

Lost = Callable[[int], None]
"""Called with the place of a node that does not answer."""


def watch(node: int, address: str, port: int, lost: Lost) -> None:
    """Look after the first node from ``node``, or after the others from the first one, in a thread of its own."""
    look = partial(_first, port, lost) if node == 0 else partial(_other, node, address, port, lost)
    Thread(target=look, name="nodes", daemon=True).start()


def _first(port: int, lost: Lost) -> None:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    nodes: dict[socket.socket, int] = {}
    with server, selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ, server)
        while True:
            for connection in [key.data for key, _ in ready.select()]:
                if connection is server:
                    new = _asked(server.accept()[0])
                    ready.register(new, selectors.EVENT_READ, new)
                elif said := _said(connection, nodes, lost):
                    nodes[connection] = int(said)
                else:
                    ready.unregister(connection)


def _said(connection: socket.socket, nodes: dict[socket.socket, int], lost: Lost) -> bytes:
    """What a node says: once, at the beginning, which one it is. Nothing if its connection is over."""
    try:
        return connection.recv(8)
    except OSError as error:
        if error.errno in SILENCE and connection in nodes:
            lost(nodes[connection])
        return b""


def _other(node: int, address: str, port: int, lost: Lost) -> None:
    connection = _asked(_connected(address, port))
    with connection:
        connection.sendall(str(node).encode())
        _said(connection, {connection: 0}, lost)


def _connected(address: str, port: int) -> socket.socket:
    """The first node's pod may start later, and its name be known later still."""
    while True:
        with suppress(OSError):
            return socket.create_connection((address, port), timeout=5)
        time.sleep(1)


def _asked(connection: socket.socket) -> socket.socket:
    """Let the kernel ask the other end, and this end wait without a limit of its own."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, IDLE), (socket.TCP_KEEPINTVL, EVERY), (socket.TCP_KEEPCNT, TIMES)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
