"""Calls of a server over HTTP: tried again while it does not answer, and told apart by whose fault a failure is.

What a server that is down, busy or on its way back says is Infrastructure, which is retried; what it refuses is
BadInput, in its own words. Imports no torch.
"""

import http.client
import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from trainers.contract import BadInput, Infrastructure, Interrupted
from trainers.core.served.answers import plain
from trainers.core.served.connections import Connections, Reply, Unheard, route, speaks_tls
from trainers.spec import Served

A = TypeVar("A")
B = TypeVar("B")

ANSWER_SECONDS = 600.0
"""How long one answer may take."""

PATIENCE_SECONDS = 120.0
"""How long a call is tried again; after that the attempt ends, and the next one has waits of its own."""

FINISHING_SECONDS = 10.0
"""How long calls go on once the process was asked to stop, where only what a batch has begun is lost."""

TRAINING_SECONDS = 60.0
"""The same where a whole step would be lost, and those before it since the last checkpoint: half of a pod's grace."""

LOOK_SECONDS = 0.5
"""How often those who wait for answers look whether to stop."""

LONGEST_WAIT = 15.0

BUSY = (408, 425, 429)
"""Statuses below 500 that say: ask again later."""

REFUSED = (401, 403)

NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
"""What OpenSSL calls an answer in plain HTTP, over its versions."""

WORDLESS = (Unheard, http.client.BadStatusLine)
"""How a port of TLS answers a question in plain HTTP: it closes the connection, or sends an alert."""


class Unanswered(Exception):
    """No answer, or one that says to ask again."""


class Watcher(Protocol):
    """Is told how a server answers, by several threads."""

    def answered(self, seconds: float) -> None:
        """It took so long, once it was asked the last time."""

    def asked_again(self) -> None:
        """It has not answered, or has said to ask again."""


class Server:
    """A server that a field of the spec names. Safe to be called by several threads."""

    def __init__(
        self,
        field: str,
        at: Served,
        stopping: Callable[[], bool] = lambda: False,
        patience: float | None = None,
        timeout: float = ANSWER_SECONDS,
        watcher: Watcher | None = None,
        finishing: float | None = None,
    ) -> None:
        """``stopping``: whether this process was asked to stop, so that no call is tried again.

        ``finishing``: seconds from then on in which calls are made and waited for nevertheless.
        """
        assert at.url is not None
        self.field, self.timeout, self._stopping = field, timeout, stopping
        self.patience = PATIENCE_SECONDS if patience is None else patience
        self.finishing = FINISHING_SECONDS if finishing is None else finishing
        self._finished_at: float | None = None
        self.url = address(at.url)
        """What it is called where something is said of it."""
        self._key_variable, self._key = at.key_variable, _key(field, at.key_variable)
        self._watcher = watcher
        make, self._base, self._headers = route(self.url, timeout)
        self._connections = Connections(make)
        self._gone = threading.Event()
        """Set once a call has been given up: the others need not find out for themselves."""

    def get(self, path: str) -> Any:
        return self._call(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call(path, json.dumps(body, separators=(",", ":")).encode())

    def look(self) -> None:
        """Raises Interrupted once this process was asked to stop and has had its time; nothing is waited for from then on."""
        if not self._stopping():
            return
        if self._finished_at is None:
            self._finished_at = time.monotonic() + self.finishing
        if time.monotonic() >= self._finished_at:
            self.let_go()
            raise self._interrupted()

    def let_go(self) -> None:
        """Nothing is asked or waited for from then on, in whatever thread."""
        self._gone.set()
        self._connections.abandon()

    def started_with(self, flag: str) -> str:
        """How a user has it started so."""
        return f"start it with {flag}"

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped while {self.url} did not answer; the phase can go on")

    def _call(self, path: str, body: bytes | None) -> Any:
        if threading.current_thread() is threading.main_thread():  # which hears of signals, and only between two steps
            return side_by_side(lambda _: self._answered(path, body), [None], 1, self.look)[0]
        return self._answered(path, body)

    def _answered(self, path: str, body: bytes | None) -> Any:
        pause, until = 0.25, None
        while True:
            self.look()
            try:
                began = time.monotonic()
                found = self._once(path, body)
                if self._watcher is not None:
                    self._watcher.answered(time.monotonic() - began)
                return found
            except Unanswered as problem:
                if self._stopping():
                    raise self._interrupted() from problem
                now = time.monotonic()
                until = until or now + self.patience
                if now + pause > until or self._gone.is_set():
                    self._gone.set()
                    raise Infrastructure(f"{self.field}: {self.url} does not answer ({problem})") from problem
            if self._watcher is not None:
                self._watcher.asked_again()
            self._gone.wait(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_WAIT)

    def _once(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", **self._headers}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            reply = self._connections.ask("GET" if body is None else "POST", self._base + path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error) from error
        except UnicodeError as error:
            raise BadInput(f"{self.field}: {self.url} names no host that could be asked ({error})") from error
        if not 200 <= reply.status < 300:
            raise self._refusal(path, reply)
        try:
            found = json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            if not reply.measured:
                raise Unanswered("its answer breaks off") from error
            raise BadInput(f"{self.field}: {self.url}{path} answers with no JSON: is it a vLLM server?") from error
        if isinstance(found, dict) and isinstance(failed := found.get("error"), dict):
            raise self._refusal(path, replace(reply, status=_code(failed)))
        if _is_given_up(found):
            raise Unanswered("it has given the request up, as one that is shut down does")
        return found

    def _refusal(self, path: str, reply: Reply) -> Exception:
        said = _said(reply)
        if reply.status >= 500 or reply.status in BUSY:
            return Unanswered(f"{reply.status} {said}")
        if reply.status in REFUSED:
            return BadInput(f"{self.field}: {self.url} refuses the key ({reply.status}): {self._key_hint()}")
        if reply.status < 400:  # a key must not go to another host, nor a question become one without its tokens
            return BadInput(f"{self.field}: {self.url} sends to another place ({reply.status}): set url to that")
        return BadInput(f"{self.field}: {self.url}{path} says {reply.status}: {said}")

    def _silence(self, error: Exception) -> Exception:
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted ({error.verify_message}): set SSL_CERT_FILE to its authority's"
            return BadInput(f"{self.field}: {self.url}: {why}")
        if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
            return BadInput(f"{self.field}: {self.url} speaks no TLS ({error.reason}): write http:// if it has none")
        if isinstance(error, WORDLESS) and self._is_asked_plainly and speaks_tls(self.url):
            return BadInput(f"{self.field}: {self.url} speaks TLS and no plain HTTP: write https://")
        return Unanswered(plain(" ".join(str(error).split())) or type(error).__name__)

    @property
    def _is_asked_plainly(self) -> bool:
        """Without TLS, and not by a proxy, which is named in front of each path."""
        return self.url.startswith("http://") and not self._base.startswith("http://")

    def _key_hint(self) -> str:
        if self._key_variable is None:
            return "set keyVariable to the environment variable that holds it"
        return f"it is not the one in {self._key_variable}"


def address(url: str) -> str:
    """Of a server, with or without what all paths begin with."""
    return url.rstrip("/").removesuffix("/v1")


def side_by_side(
    work: Callable[[A], B], items: List[A], width: int, look: Callable[[], None] = lambda: None
) -> list[B]:
    """``work`` of every item, in order, at most ``width`` at a time; the first failure ends it, as does what ``look`` raises."""
    if not items:
        return []
    pool = ThreadPoolExecutor(min(width, len(items)), thread_name_prefix="served")
    try:
        return awaited([pool.submit(work, item) for item in items], look)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a failure nobody waits for what hangs


def awaited(futures: List[Future[B]], look: Callable[[], None]) -> list[B]:
    """Their results, or the first failure; ``look`` is called while they are waited for."""
    left: set[Future[B]] = set(futures)
    while left:
        done, left = wait(left, LOOK_SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if left:
            look()
    return [future.result() for future in futures]


def _key(field: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BadInput(f"{field}.keyVariable: the environment has no {variable}: bring it in by template.secretRefs")
    if not key.isascii() or not key.isprintable():
        raise BadInput(f"{field}.keyVariable: what {variable} holds cannot be sent as a key")
    return key


def _code(failed: dict[str, Any]) -> int:
    """Of an error that comes as if all were well, as some proxies pass it on."""
    code = failed.get("code")
    return code if type(code) is int and 400 <= code < 600 else 400


def _is_given_up(found: Any) -> bool:
    """vLLM that is told to end answers what it has begun so, with the tokens that there are, or with none."""
    choices = found.get("choices") if isinstance(found, dict) else None
    return isinstance(choices, list) and any(isinstance(c, dict) and c.get("finish_reason") == "abort" for c in choices)


def _said(reply: Reply) -> str:
    """The server's own reason, one line of it."""
    text = reply.body[: 1 << 16].decode(errors="replace")
    with suppress(ValueError, RecursionError):
        document = json.loads(text)
        found = document.get("error", document) if isinstance(document, dict) else document
        text = found.get("message") or found.get("detail") or text if isinstance(found, dict) else found
    lines = str(text).strip().splitlines() or [reply.reason]
    return plain(lines[0])
