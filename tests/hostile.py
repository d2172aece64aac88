"""Pods that mean harm: servers of metrics that answer as no server should, on real sockets, in a process of their own.

The answers come as fast as the reader takes them, unless slowness is the point.
"""

import gzip
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
END = b"\r\n"
STEP = b'alignment_trainer_step{rank="0"} 7\nalignment_trainer_total_steps{rank="0"} 10\n'
MIB = 1 << 20

Answer = Callable[[], Iterator[bytes]]


def _length(size: int) -> bytes:
    return b"Content-Length: %d\r\n" % size


def _whole(body: bytes, more: bytes = b"") -> Iterator[bytes]:
    yield OK + more + _length(len(body)) + END + body


def _series(count: int) -> bytes:
    return b"".join(b'alignment_trainer_step{i="%d"} 1\n' % i for i in range(count))


def honest() -> Iterator[bytes]:
    return _whole(STEP)


def gzip_bomb() -> Iterator[bytes]:
    """About 150 KB that become some 60 MB of series."""
    return _whole(gzip.compress(STEP + b'a{i="1"} 1\n' * 5_000_000), b"Content-Encoding: gzip\r\n")


def gigabyte() -> Iterator[bytes]:
    yield OK + _length(1 << 30) + END
    yield from itertools.repeat(b"# " + b"x" * 125 + b"\n", 1 << 23)


def endless() -> Iterator[bytes]:
    """Without a length: until the reader goes away."""
    yield OK + END
    yield from itertools.repeat(STEP * 1000)


def one_line() -> Iterator[bytes]:
    yield OK + END
    yield from itertools.repeat(b"x" * MIB)


def million_series() -> Iterator[bytes]:
    return _whole(_series(1_000_000))


def byte_a_second() -> Iterator[bytes]:
    yield OK + _length(len(STEP)) + END
    yield from _slowly(STEP)


def header_byte_a_second() -> Iterator[bytes]:
    return _slowly(OK + _length(len(STEP)) + END + STEP)


def _slowly(text: bytes) -> Iterator[bytes]:
    for i in range(len(text)):
        time.sleep(1.0)
        yield text[i : i + 1]


def endless_headers() -> Iterator[bytes]:
    yield OK
    for i in itertools.count():
        yield b"".join(b"X-%d-%d: y\r\n" % (i, j) for j in range(1000))


def endless_header() -> Iterator[bytes]:
    yield OK + b"X: "
    yield from itertools.repeat(b"y" * 65536)


def endless_interim() -> Iterator[bytes]:
    return itertools.repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)


def endless_chunks() -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n" + END
    yield from itertools.repeat(b"%x\r\n%s\r\n" % (len(STEP), STEP) * 1000)


def endless_chunk_size() -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n" + END + b"1;"
    yield from itertools.repeat(b"y" * 65536)


def binary() -> Iterator[bytes]:
    return _whole(os.urandom(200_000))


def lying_length() -> Iterator[bytes]:
    yield OK + _length(10**30) + END + STEP


def almost() -> Iterator[bytes]:
    """As much as is taken, and then no end."""
    yield OK + END + (STEP * 10_000)[: 255 * 1024]
    yield from silent()


def redirect() -> Iterator[bytes]:
    yield b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/metrics\r\n" + _length(len(STEP)) + END + STEP


def silent() -> Iterator[bytes]:
    time.sleep(3600)
    yield b""


def nothing() -> Iterator[bytes]:
    return iter(())


ANSWERS: dict[str, Answer] = {
    f.__name__: f
    for f in (
        honest, gzip_bomb, gigabyte, endless, one_line, million_series, byte_a_second, header_byte_a_second, endless_headers,
        endless_header, endless_interim, endless_chunks, endless_chunk_size, binary, lying_length, almost, redirect,
        silent, nothing,
    )
}  # fmt: skip


def _answer(connection: socket.socket, answer: Answer) -> None:
    with connection:
        try:
            connection.recv(65536)
            for part in answer():
                connection.sendall(part)
        except OSError:  # the reader has had enough
            return


def _serve(listener: socket.socket, answer: Answer) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()


def main(port: int) -> None:
    """Serve until nobody listens to us any more."""
    addresses = [(f"127.0.1.{i}", port) for i in range(1, len(ANSWERS) + 1)]
    listeners = {name: socket.create_server(at, backlog=512) for name, at in zip(ANSWERS, addresses, strict=True)}
    for name, listener in listeners.items():
        threading.Thread(target=_serve, args=(listener, ANSWERS[name]), daemon=True).start()
    print(json.dumps({name: listener.getsockname() for name, listener in listeners.items()}), flush=True)
    sys.stdin.read()


@contextmanager
def hostile_pods(port: int = 0) -> Iterator[dict[str, tuple[str, int]]]:
    """Their addresses and ports, by the name of the answer. In a process of their own: their memory is not the reader's."""
    command = [sys.executable, __file__, str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield {name: (address, port) for name, (address, port) in json.loads(process.stdout.readline()).items()}
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main(int(sys.argv[1]))
