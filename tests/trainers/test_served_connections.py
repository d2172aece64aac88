"""Connections to a server that are kept: real sockets, and a server that breaks off wherever it is told to."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from cluster import pki

from trainers.contract import BadInput, Infrastructure, Interrupted
from trainers.core.served.server import Server, Watcher, side_by_side
from trainers.spec import Served


@dataclass
class Heard(Watcher):
    answers: int = 0
    again: int = 0

    def answered(self, seconds: float) -> None:
        self.answers += 1
        assert seconds >= 0

    def asked_again(self) -> None:
        self.again += 1


Turn = Callable[[socket.socket, bytes], bool]
"""Answers a question. Returns whether it goes on listening on the connection."""


def reply(connection: socket.socket, question: bytes) -> bool:
    """The question itself, so that an answer to another one shows."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(question), question))
    return True


def reply_and_go(connection: socket.socket, question: bytes) -> bool:
    """As a server that says nothing of how long it listens."""
    reply(connection, question)
    return False


def deeper_than_can_be_read(connection: socket.socket, question: bytes) -> bool:
    return reply(connection, b"[" * 100_000 + b"]" * 100_000)


def hang_up(connection: socket.socket, question: bytes) -> bool:
    return False


def half(connection: socket.socket, question: bytes) -> bool:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(question), question[:3]))
    return False


def half_a_head(connection: socket.socket, question: bytes) -> bool:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
    return False


def given_up(connection: socket.socket, question: bytes) -> bool:
    """As a vLLM that is told to end answers what it has begun."""
    return reply(connection, b'{"choices": [{"finish_reason": "abort", "token_ids": [5]}]}')


def failed_as_if_well(connection: socket.socket, question: bytes) -> bool:
    return reply(connection, b'{"error": {"message": "overloaded", "code": 503}}')


def a_byte_now_and_then(connection: socket.socket, question: bytes) -> bool:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    with suppress(OSError):
        for _ in range(1000):
            connection.sendall(b" ")
            time.sleep(0.1)
    return False


def late(connection: socket.socket, question: bytes) -> bool:
    time.sleep(1.5)
    with suppress(OSError):
        reply(connection, question)
    return True


def old(connection: socket.socket, question: bytes) -> bool:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(question), question))
    return False


@dataclass
class Listener:
    turns: list[Turn] = field(default_factory=list)
    """What it does with the next questions; answers when there are none left."""
    port: int = 0
    connections: list[socket.socket] = field(default_factory=list)
    questions: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):  # a handshake of TLS is no question
            lines = connection.makefile("rb")
            while head := lines.readline():
                headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(lines.readline, b"\r\n"))
                question = lines.read(int(headers.get("content-length", 0)))
                with self.lock:
                    self.questions.append(question)
                    self.paths.append(head.split()[1].decode())
                    turn = self.turns.pop(0) if self.turns else reply
                if not turn(connection, question):
                    connection.shutdown(socket.SHUT_RDWR)
                    return


@contextmanager
def listening(*turns: Turn, port: int = 0) -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", port)) as door:
        found = Listener([*turns], door.getsockname()[1])

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = door.accept()
                    found.connections.append(connection)
                    threading.Thread(target=found.serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield found
        finally:
            door.shutdown(socket.SHUT_RDWR)
            for connection in found.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def server_of(listener: Listener, heard: Heard | None = None, **settings) -> Server:
    return Server("policy", Served(url=listener.url), patience=20, watcher=heard, **settings)


def ask(server: Server, number: int) -> None:
    assert server.post("/v1/completions", {"n": number}) == {"n": number}


def test_one_connection_has_all_questions_of_a_thread():
    with listening() as listener:
        server = server_of(listener)
        for number in range(20):
            ask(server, number)
        assert (len(listener.connections), len(listener.questions)) == (1, 20)


def test_threads_have_one_each_and_later_ones_take_them_over():
    """Rollouts ask by new threads for every batch."""
    with listening() as listener:
        server = server_of(listener)
        for _ in range(3):
            side_by_side(lambda number: ask(server, number), list(range(40)), 4)
        assert len(listener.questions) == 120
        assert len(listener.connections) <= 4


def test_one_that_was_closed_while_idle_is_not_used():
    with listening(reply_and_go, reply_and_go) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        time.sleep(0.2)
        ask(server, 2)
        ask(server, 3)
        assert (len(listener.connections), heard.answers, heard.again) == (3, 3, 0)


def test_one_that_closes_upon_the_question_is_asked_once_more_at_once():
    with listening(reply, hang_up) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        ask(server, 2)
        assert [json.loads(text)["n"] for text in listener.questions] == [1, 2, 2]
        assert (len(listener.connections), heard.again) == (2, 0)


def test_no_more_than_once():
    """The new connection is closed too: that server is down, and is waited for."""
    with listening(reply, hang_up, hang_up) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        ask(server, 2)
        assert (len(listener.questions), heard.again) == (4, 1)


def test_a_new_connection_that_is_closed_is_not_asked_at_once():
    with listening(hang_up) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        assert (len(listener.questions), heard.again) == (2, 1)


@pytest.mark.parametrize("turn", [half, half_a_head])
def test_half_an_answer_is_none_and_is_asked_for_again_behind_a_wait(turn):
    with listening(reply, turn) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        ask(server, 2)
        assert (len(listener.questions), len(listener.connections), heard.again) == (3, 2, 1)


@pytest.mark.parametrize("turn", [given_up, failed_as_if_well])
def test_an_answer_that_says_it_is_none_is_asked_for_again(turn):
    """A server that was shut down politely ended the phase for good: BadInput, with advice about stop tokens."""
    with listening(reply, turn) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        ask(server, 2)
        assert (len(listener.questions), heard.again) == (3, 1)


def test_an_error_that_comes_as_an_answer_is_told_in_its_words():
    words = b'{"error": {"message": "no such adapter", "type": "NotFoundError", "code": 404}}'
    with (
        listening(lambda connection, _: reply(connection, words)) as listener,
        pytest.raises(BadInput, match=f"{listener.url}/v1/completions says 404: no such adapter$"),
    ):
        ask(server_of(listener), 1)


def test_an_answer_that_comes_byte_by_byte_is_given_up():
    """Each byte came in time, so a rollout hung on it for as long as it came."""
    with listening(a_byte_now_and_then) as listener:
        heard, began = Heard(), time.monotonic()
        ask(server_of(listener, heard, timeout=2), 1)
        assert heard.again == 1
        assert time.monotonic() - began < 60


def test_what_is_no_http_is_told_in_one_line():
    def greet(connection: socket.socket, question: bytes) -> bool:
        connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")
        return False

    with listening(*[greet] * 50) as listener, pytest.raises(Infrastructure) as caught:
        Server("policy", Served(url=listener.url), patience=0.5).get("/v1/models")
    assert str(caught.value) == f"policy: {listener.url} does not answer (SSH-2.0-OpenSSH_9)"


def test_half_an_answer_forever_is_infrastructure():
    with listening(*[half] * 50) as listener, pytest.raises(Infrastructure, match="does not answer"):
        Server("policy", Served(url=listener.url), patience=0.6).post("/v1/completions", {"n": 1})


def test_a_late_answer_is_not_the_next_questions():
    with listening(reply, late) as listener:
        heard = Heard()
        server = server_of(listener, heard, timeout=0.5)
        for number in range(4):
            ask(server, number)
        assert heard.again >= 1


def test_what_is_said_unasked_ends_a_connection():
    """As a proxy tells an idle connection of its end."""
    is_answered, is_said = threading.Event(), threading.Event()

    def chatter(connection: socket.socket, question: bytes) -> bool:
        reply(connection, question)
        assert is_answered.wait(60)
        connection.sendall(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        is_said.set()
        return True

    with listening(chatter) as listener:
        heard = Heard()
        server = server_of(listener, heard)
        ask(server, 1)
        is_answered.set()
        assert is_said.wait(60)
        ask(server, 2)
        assert (len(listener.connections), heard.again) == (2, 0)


def test_a_server_that_starts_anew_at_its_address():
    with listening() as first:
        heard = Heard()
        server = server_of(first, heard)
        side_by_side(lambda number: ask(server, number), list(range(8)), 4)
    back = threading.Event()

    def again() -> None:
        time.sleep(0.5)
        with listening(port=first.port) as second:
            assert back.wait(60)
            assert second.questions

    thread = threading.Thread(target=again)
    thread.start()
    side_by_side(lambda number: ask(server, number), list(range(8)), 4)
    back.set()
    thread.join()
    assert heard.again > 0


def test_a_server_that_keeps_none_open():
    with listening(old, old) as listener:
        server = server_of(listener)
        ask(server, 1)
        ask(server, 2)
        assert len(listener.connections) == 2


def test_by_a_proxy_and_past_it(monkeypatch):
    with listening() as proxy:
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://me:p%40ss@"))
        server = Server("policy", Served(url="http://vllm.team:8000/v1"), patience=5)
        ask(server, 1)
        ask(server, 2)
        assert proxy.paths == ["http://vllm.team:8000/v1/completions"] * 2
        assert len(proxy.connections) == 1
        with listening() as listener:
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            ask(server_of(listener), 3)
            assert listener.paths == ["/v1/completions"]


def test_a_redirect_is_refused():
    def elsewhere(connection: socket.socket, question: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://other/\r\nContent-Length: 0\r\n\r\n")
        return True

    with listening(elsewhere) as listener, pytest.raises(BadInput, match="sends to another place"):
        server_of(listener).post("/v1/completions", {"n": 1})


def test_a_host_that_is_none():
    with pytest.raises(BadInput, match="names no host"):
        Server("policy", Served(url="http://a..b:80"), patience=1).get("/v1/models")


def test_an_answer_of_too_many_brackets_is_none_of_json():
    with listening(deeper_than_can_be_read) as listener, pytest.raises(BadInput, match="answers with no JSON"):
        server_of(listener).get("/v1/models")


def test_https_to_a_port_of_http():
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            connection, _ = door.accept()
            with connection:
                connection.recv(1 << 12)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                with suppress(OSError):
                    connection.recv(1 << 12)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(BadInput, match=r"speaks no TLS .*: write http:// if it has none"):
            Server("policy", Served(url=f"https://127.0.0.1:{door.getsockname()[1]}"), patience=60).get("/v1/models")


def test_http_to_a_port_of_https(tmp_path):
    """As uvicorn has it, and so vLLM: it closes the connection without a word. Such a server may also be on its way down."""
    pki.Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "ca.key")
    loop = asyncio.new_event_loop()
    door = loop.run_until_complete(asyncio.start_server(lambda reader, writer: None, "127.0.0.1", ssl=context))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{door.sockets[0].getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(BadInput, match=f"policy: {url} speaks TLS and no plain HTTP: write https://"):
            Server("policy", Served(url=url), patience=600).get("/v1/models")
        assert time.monotonic() - began < 300, "it is not tried again"
    finally:
        loop.call_soon_threadsafe(loop.stop)


def test_an_alert_of_tls_from_who_then_answers_plainly_is_asked_again():
    def alert(connection: socket.socket, question: bytes) -> bool:
        connection.sendall(b"\x15\x03\x03\x00\x02\x02\x46")
        return False

    with listening(alert) as listener:
        ask(server_of(listener), 1)


@pytest.mark.parametrize("begun", [0, 3])
def test_a_stop_is_noticed_though_answers_hang(begun):
    """Some have come, and others do not: they are neither waited for nor asked for again."""
    asked, stop = threading.Event(), threading.Event()

    def hang(connection: socket.socket, question: bytes) -> bool:
        asked.set()
        return connection.recv(1) != b""  # until the other end lets go

    with listening(*[reply] * begun, *[hang] * 8) as listener:
        server = server_of(listener, stopping=stop.is_set, finishing=0.2)
        threading.Thread(target=lambda: asked.wait(60) and stop.set()).start()
        with pytest.raises(Interrupted, match="the phase can go on"):
            side_by_side(lambda number: ask(server, number), range(8), 2, server.look)
        assert len(listener.questions) <= begun + 2
        with pytest.raises(Interrupted):
            server.get("/v1/models")


def test_what_a_step_has_begun_is_finished_behind_a_stop():
    with listening(late) as listener:
        server = server_of(listener, stopping=lambda: True, finishing=60)
        assert len(side_by_side(lambda number: ask(server, number), range(4), 2, server.look)) == 4


def test_a_call_of_the_main_thread_hears_a_stop():
    """A check of a server's weights asks so: one question after the other."""
    with listening(lambda connection, question: connection.recv(1) != b"") as listener:
        begun = time.monotonic()
        server = server_of(listener, stopping=lambda: bool(listener.questions), finishing=0.2)
        with pytest.raises(Interrupted):
            server.get("/v1/models")
        assert time.monotonic() - begun < 60
