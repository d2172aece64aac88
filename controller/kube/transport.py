"""How calls reach the API server: one session, credentials that are read anew, lists page by page.

A thin client on aiohttp, which kopf brings: importing the official one costs about 40 MB in a process that makes a dozen
different calls. Nothing is retried here; the work queue does that.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import aiohttp

from controller.kube.answers import ApiError, error_of, items, object_of
from controller.kube.calls import Call
from controller.kube.resources import Object

TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
PAGE = 500
"""Objects in one answer to a list call."""
LARGEST_PAGE = 8 << 20
"""Bytes of one. Who may make pods may give each a megabyte of annotations: then fewer are asked for at once."""
FEWER = 4
"""Times."""
CREDENTIALS_SECONDS = 60.0
"""A pod's token is renewed in its file about every hour."""
METHODS = {"get": "GET", "list": "GET", "watch": "GET", "create": "POST", "update": "PUT", "delete": "DELETE"}


class Connection(Protocol):
    """What is needed of kopf's ConnectionInfo."""

    @property
    def server(self) -> str: ...

    def as_http_headers(self) -> dict[str, str]: ...

    def as_ssl_context(self) -> Any: ...


Login = Callable[[], Connection]
Observer = Callable[[Call, str, float], None]
"""Told of every call, its outcome (status code, or `error`) and its seconds."""
Dated = Callable[[str, float], None]
"""Told of the date of every answer, and how many seconds it took."""


class TooLarge(Exception):
    """An answer has more bytes than are wanted."""


class Transport:
    def __init__(
        self, login: Login, observe: Observer = lambda call, code, seconds: None,
        dated: Dated = lambda date, seconds: None,
    ) -> None:  # fmt: skip
        self._login = login
        self._observe = observe
        self._dated = dated
        self._session: aiohttp.ClientSession | None = None
        self._connection: Connection | None = None
        self._read_at = 0.0
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def listed(
        self, call: Call, namespace: str | None, labels: Mapping[str, str], more: Mapping[str, str] | None = None
    ) -> list[Object]:
        pages = self.pages(call, namespace, labels, more=more)
        return [item async for page in pages for item in items(page)]

    async def pages(
        self, call: Call, namespace: str | None, labels: Mapping[str, str], accept: str = "application/json",
        more: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Object]:  # fmt: skip
        """One by one: ten thousand objects at once are a hundred megabytes."""
        query, limit = {"labelSelector": selector(labels), **(more or {})}, PAGE
        while True:
            asked, most = {"limit": str(limit), **query}, LARGEST_PAGE if limit > 1 else None
            try:
                answer = await self.call(call, namespace, None, query=asked, accept=accept, most=most)
            except TooLarge:
                limit = max(limit // FEWER, 1)
                continue
            if "items" not in answer:
                raise ApiError(call, "", 200, "the answer is no list")
            yield answer
            token = answer.get("metadata", {}).get("continue")
            if not token:
                return
            query["continue"] = token

    async def call(
        self, call: Call, namespace: str | None, name: str | None, body: Object | None = None,
        query: Mapping[str, str] | None = None, accept: str = "application/json", most: int | None = None,
    ) -> Object:  # fmt: skip
        """``most``: bytes of the answer. Raises TooLarge."""
        async with self.request(call, namespace, name, body, query, accept) as response:
            text = (await _body(response, most)).decode(errors="replace")
        if response.status >= 400:
            raise error_of(call, name or "", response, text)
        return object_of(call, name or "", response.status, text)

    @contextlib.asynccontextmanager
    async def request(
        self, call: Call, namespace: str | None, name: str | None, body: Object | None = None,
        query: Mapping[str, str] | None = None, accept: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        path = call.resource.path(namespace, name if call.verb in ("get", "update", "delete") else None)
        started, code = time.monotonic(), "error"
        try:
            session, connection = await self._connected()
            async with session.request(
                METHODS[call.verb], connection.server.rstrip("/") + path, params=query, json=body,
                headers={**connection.as_http_headers(), "Accept": accept},
            ) as response:  # fmt: skip
                code = str(response.status)
                self._dated(response.headers.get("Date", ""), time.monotonic() - started)
                yield response
        finally:
            self._observe(call, code, time.monotonic() - started)

    async def _connected(self) -> tuple[aiohttp.ClientSession, Connection]:
        async with self._connecting:  # many may ask at once, and one session is enough
            if self._connection is None or time.monotonic() - self._read_at > CREDENTIALS_SECONDS:
                # Reads small files: the token of a service account, or a kubeconfig.
                connection = self._login()
                if connection != self._connection or self._session is None:
                    await self.close()
                    self._session = await _session(connection)
                self._connection, self._read_at = connection, time.monotonic()
            assert self._session is not None
            return self._session, self._connection


async def _body(response: aiohttp.ClientResponse, most: int | None) -> bytes:
    """Of one that is too large the rest is not read, and its connection is used no more."""
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if most is not None and size > most:
            response.close()
            raise TooLarge
        pieces.append(piece)
    return b"".join(pieces)


async def _session(connection: Connection) -> aiohttp.ClientSession:
    secure = connection.server.startswith("https")
    context = await asyncio.to_thread(connection.as_ssl_context) if secure else False
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), timeout=TIMEOUT)


def selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
