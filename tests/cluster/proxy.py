"""A proxy before the API server that misbehaves on a test's command.

    with FaultProxy(kubeconfig) as proxy:           # forwards with the rights in that kubeconfig
        run_operator(proxy.kubeconfig)              # plain HTTP on loopback, without credentials
        rule = proxy.answer(429, method="POST", path="/pytorchjobs", times=2, retry_after=1)
        proxy.lose_answer(method="PATCH", path="/status")        # carried out, then the connection breaks
        proxy.freeze_watches()                      # open, but silent; other requests pass
        ...
        assert rule.hits == 2

A rule holds for requests whose method is ``method`` and whose path with query matches the regular expression ``path``, but
not for the first ``skip`` of them; the newest that matches counts. Watches and followed logs are streamed; upgrades (exec,
port-forward) are not served.
"""

import asyncio
import base64
import json
import re
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
from aiohttp import web

T = TypeVar("T")
_REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
_OWN_HEADERS = {"host", "authorization", "connection", "transfer-encoding", "content-length", "keep-alive"}
_EXPIRED = b'{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}\n'
_STREAMS = re.compile(r"[?&](watch|follow)=(true|1)\b")

Forward = Callable[[], Awaitable[web.StreamResponse]]


@dataclass
class Rule:
    """``hits`` counts the requests it met; it holds for the first ``times`` of them after ``skip``."""

    act: Callable[[web.Request, Forward], Awaitable[web.StreamResponse]]
    method: str
    path: re.Pattern[str]
    times: int
    skip: int = 0
    hits: int = 0

    def meets(self, method: str, path: str) -> bool:
        if self.hits >= self.times or self.method not in ("", method) or not self.path.search(path):
            return False
        self.skip -= 1
        return self.skip < 0


@dataclass(frozen=True)
class Seen:
    """One request as the client saw it; ``status`` is 0 where the connection broke."""

    method: str
    path: str
    status: int
    at: float = field(default_factory=time.monotonic)


class FaultProxy:
    """See the module's text. Methods may be called from any thread; each returns its rule."""

    def __init__(self, kubeconfig: Path):
        self.requests: list[Seen] = []
        self._server, self._ssl, self._token = _credentials(kubeconfig)
        self._rules: list[Rule] = []
        self._streams: dict[int, web.Request] = {}
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._late, self._repeats, self._expires = 0.0, False, False
        self._folder = tempfile.TemporaryDirectory(prefix="alignment-proxy-")

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = self._call(self._start())
        self.kubeconfig = Path(self._folder.name) / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(_plain_kubeconfig(self.url)))
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._folder.cleanup()

    # ---- what a test commands

    def answer(
        self, status: int, *, method: str = "", path: str = "", times: int = 1, skip: int = 0,
        retry_after: int | None = None,
    ) -> Rule:  # fmt: skip
        """An answer of the proxy's own; the API server never sees the request."""

        async def act(_: web.Request, __: Forward) -> web.StreamResponse:
            return _status(status, retry_after)

        return self._add(act, method, path, times, skip)

    def garble(self, *, method: str = "", path: str = "", times: int = 1, skip: int = 0) -> Rule:
        """An answer that is none of the API server's: a page of something between, with status 200."""

        async def act(_: web.Request, __: Forward) -> web.StreamResponse:
            return web.Response(text="<html>the portal's page</html>", content_type="text/html")

        return self._add(act, method, path, times, skip)

    def cut(self, *, method: str = "", path: str = "", times: int = 1, skip: int = 0) -> Rule:
        """The request is carried out, and half of its answer comes."""

        async def act(request: web.Request, forward: Forward) -> web.StreamResponse:
            whole = await forward()
            body = whole.body if isinstance(whole, web.Response) and isinstance(whole.body, bytes) else b""
            half = web.StreamResponse(status=whole.status, headers={"Content-Type": "application/json"})
            half.content_length = len(body)
            await half.prepare(request)
            await half.write(body[: len(body) // 2])
            _break(request)
            return half

        return self._add(act, method, path, times, skip)

    def interrupt(self, act_first: Callable[[], None], *, carried_out: bool, path: str = "", skip: int = 0) -> Rule:
        """Call something in the middle of a request, before or after it is carried out; no answer comes."""

        async def act(request: web.Request, forward: Forward) -> web.StreamResponse:
            if carried_out:
                await forward()
            act_first()
            return _break(request)

        return self._add(act, "", path, 1, skip)

    def refuse(self, *, method: str = "", path: str = "", times: int = 1, skip: int = 0) -> Rule:
        """The connection breaks before the request is forwarded."""

        async def act(request: web.Request, _: Forward) -> web.StreamResponse:
            return _break(request)

        return self._add(act, method, path, times, skip)

    def lose_answer(self, *, method: str = "", path: str = "", times: int = 1, skip: int = 0) -> Rule:
        """The API server carries the request out; the client never learns of it."""

        async def act(request: web.Request, forward: Forward) -> web.StreamResponse:
            await forward()
            return _break(request)

        return self._add(act, method, path, times, skip)

    def delay(self, seconds: float, *, method: str = "", path: str = "", times: int = 1, skip: int = 0) -> Rule:
        """The request is forwarded after some time."""

        async def act(_: web.Request, forward: Forward) -> web.StreamResponse:
            await asyncio.sleep(seconds)
            return await forward()

        return self._add(act, method, path, times, skip)

    def break_everything(self) -> Rule:
        """Like an API server that is gone: watches end, connections break, until the rule is removed."""
        rule = self.refuse(times=10**9)
        self.break_streams()
        return rule

    def break_streams(self) -> None:
        """Open watches end; clients open them anew."""
        self._loop.call_soon_threadsafe(lambda: [_break(request) for request in list(self._streams.values())])

    def freeze_watches(self) -> None:
        """Open watches stay open and say nothing; new ones too. What they would have said follows at the thaw."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def thaw_watches(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.set)

    def expire_watches(self) -> None:
        """Open watches are told that their place is too old to go on from (410), and end."""
        self._expires = True

    def repeat_events(self) -> None:
        """Watches are told each thing twice, the second time behind the next one."""
        self._repeats = True

    def delay_events(self, seconds: float) -> None:
        self._late = seconds

    def remove(self, rule: Rule) -> None:
        self._rules.remove(rule)

    def heal(self) -> None:
        """No rules, no frozen or lying watches."""
        self._rules.clear()
        self._late, self._repeats, self._expires = 0.0, False, False
        self.thaw_watches()

    def seen(self, method: str = "", path: str = "") -> list[Seen]:
        return [one for one in list(self.requests) if method in ("", one.method) and re.search(path, one.path)]

    # ---- the proxy itself

    def _add(self, act: Any, method: str, path: str, times: int, skip: int) -> Rule:
        rule = Rule(act, method, re.compile(path), times, skip)
        self._rules.insert(0, rule)
        return rule

    def _call(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    async def _start(self) -> str:
        self._flowing.set()
        connector = aiohttp.TCPConnector(ssl=self._ssl, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        self._client = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        app = web.Application(client_max_size=16 * 1024**2)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # Without cancellation a watch whose client has gone would stay open before the API server.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        self._flowing.set()
        for request in list(self._streams.values()):
            _break(request)
        await self._runner.cleanup()
        await self._client.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        rule = next((rule for rule in list(self._rules) if rule.meets(request.method, request.path_qs)), None)
        try:
            if rule:
                rule.hits += 1
                response = await rule.act(request, lambda: self._forward(request))
            else:
                response = await self._forward(request)
        except (aiohttp.ClientError, ConnectionError):
            response = _break(request)
        broken = request.transport is None or request.transport.is_closing()
        self.requests.append(Seen(request.method, request.path_qs, 0 if broken else response.status))
        return response

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _OWN_HEADERS}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        async with self._client.request(
            request.method, self._server + request.path_qs, data=await request.read(), headers=headers,
            allow_redirects=False, skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:  # fmt: skip
            kept = {key: value for key, value in answer.headers.items() if key.lower() not in _OWN_HEADERS}
            if _STREAMS.search(request.path_qs) and answer.status == 200:
                return await self._stream(request, answer, kept)
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, headers: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        self._streams[id(request)] = request
        try:
            before = b""
            async for line in _lines(answer.content):
                await self._flowing.wait()
                await asyncio.sleep(self._late)
                if self._expires:
                    await response.write(_EXPIRED)
                    break
                await response.write(line + before if self._repeats else line)
                before = line
        finally:
            del self._streams[id(request)]
        return response


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """However long they are."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _break(request: web.Request) -> web.Response:
    if request.transport:
        request.transport.abort()
    return web.Response(status=503)


def _status(code: int, retry_after: int | None) -> web.Response:
    body = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
        "reason": _REASONS.get(code, "Unknown"), "message": f"the test's proxy answers {code}",
    }  # fmt: skip
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return web.json_response(body, status=code, headers=headers)


def _credentials(kubeconfig: Path) -> tuple[str, ssl.SSLContext, str]:
    document = json.loads(kubeconfig.read_text())
    cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    if "client-certificate-data" in user:
        pem = base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"])
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(file.name)
    return cluster["server"], context, user.get("token", "")


def _plain_kubeconfig(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": url}}],
        "users": [{"name": "proxy", "user": {"token": "unused"}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
    }  # fmt: skip
