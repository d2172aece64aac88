"""A page of metrics from a pod that may be anyone's program.

No client for HTTP: one connection, one request, so many bytes and so many seconds. Nothing is unpacked, joined, followed, kept
or asked of the environment, so what an answer costs is known before it comes.
"""

import asyncio
import re
import socket
from ipaddress import ip_address

SECONDS = 3.0
"""For all of it."""
LIMIT = 256 * 1024
"""Bytes of a page; a trainer's has ten thousand."""
HEAD = 16 * 1024
"""Bytes before it."""
CHUNK = 16 * 1024
PAUSE = 0.01
"""Seconds between two reads: a page that comes byte by byte wakes nobody for each of them."""

# A server may not answer 1.0 in chunks.
REQUEST = (
    "GET /metrics HTTP/1.0\r\nHost: {}\r\nAccept: text/plain\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
)
STATUS = re.compile(rb"HTTP/1\.[01] 200[ \r]")
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r")
PACKED = re.compile(rb"\r\n(?:content|transfer)-encoding:(?![ \t]*identity[ \t]*\r)")
END = b"\r\n\r\n"


async def fetch(address: str, port: int) -> bytes | None:
    """The page; None if there is none that is plain, whole and within the limits."""
    try:
        async with asyncio.timeout(SECONDS):
            return await _ask(address, port)
    except (OSError, TimeoutError, ValueError):
        return None


async def _ask(address: str, port: int) -> bytes | None:
    ip = ip_address(address)  # no name, that somebody's DNS would have to be asked for
    host = f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, (str(ip), port))
        await loop.sock_sendall(connection, REQUEST.format(host).encode())
        answer = bytearray()
        while not _is_enough(answer) and (part := await loop.sock_recv(connection, CHUNK)):
            answer += part
            await asyncio.sleep(PAUSE)
    return _page(answer)


def _is_enough(answer: bytearray) -> bool:
    """Whole, or more than will be looked at."""
    start = answer.find(END, 0, HEAD)
    if start < 0:
        return len(answer) >= HEAD
    found = LENGTH.search(_head(answer, start))
    size = int(found[1]) if found else LIMIT + 1
    return len(answer) - start - len(END) >= min(size, LIMIT + 1)


def _page(answer: bytearray) -> bytes | None:
    start = answer.find(END, 0, HEAD)
    head = _head(answer, start)
    if start < 0 or not STATUS.match(answer) or PACKED.search(head):
        return None
    page = bytes(answer[start + len(END) :])
    found = LENGTH.search(head)
    is_whole = len(page) >= int(found[1]) if found else True
    return page if is_whole and len(page) <= LIMIT else None


def _head(answer: bytearray, start: int) -> bytes:
    return bytes(answer[: start + 2]).lower()
