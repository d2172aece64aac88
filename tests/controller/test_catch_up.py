"""Answers of an API server that do not say what has changed since some moment."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from controller.kube import changes
from controller.kube.answers import ApiError
from controller.kube.changes import Changes, Versions
from controller.kube.resources import PODS
from controller.kube.transport import Transport

EXPIRED = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}}


@dataclass
class Loopback:
    """A connection."""

    server: str

    def as_http_headers(self) -> dict[str, str]:
        return {}

    def as_ssl_context(self) -> None:
        return None


def event(kind: str, uid: str, version: str) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"uid": uid, "resourceVersion": version}}}


def caught_up(*events: dict[str, Any], status: int = 200, hangs: bool = False) -> tuple[bool, Versions]:
    """From a, b and c at version 1; with an API server that tells these events."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.json_response({"items": None, "metadata": {}})
        assert request.query["resourceVersion"] == "1"
        stream = web.StreamResponse(status=status)
        await stream.prepare(request)
        await stream.write("".join(json.dumps(one) + "\n" for one in events).encode())
        if hangs:
            await asyncio.sleep(60)
        return stream

    async def go() -> tuple[bool, Versions]:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        transport = Transport(lambda: Loopback(f"http://127.0.0.1:{runner.addresses[0][1]}"))
        versions = Versions(dict.fromkeys("abc", "1"), "1")
        try:
            return await Changes(transport).catch_up(PODS, None, {}, versions), versions
        finally:
            await transport.close()
            await runner.cleanup()

    return asyncio.run(go())


def test_changes_until_it_says_that_this_is_all():
    done, versions = caught_up(
        event("MODIFIED", "a", "5"), event("DELETED", "b", "6"), event("ADDED", "d", "7"), event("BOOKMARK", "", "9"),
        event("MODIFIED", "c", "10"),
    )  # fmt: skip
    assert done
    assert versions == Versions({"a": "5", "c": "1", "d": "7"}, "9")


NOT_ALL: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "it ends without a word": ([event("MODIFIED", "a", "5")], {}),
    "it says nothing, and stays": ([], {"hangs": True}),
    "the moment is too long ago": ([EXPIRED], {}),
    "and it says so at once": ([], {"status": 410}),
}


@pytest.mark.parametrize("sentence", NOT_ALL)
def test_it_is_not_known_whether_that_is_all(sentence: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "CATCH_UP_PATIENCE_SECONDS", 0.5 - changes.CATCH_UP_SECONDS)
    events, how = NOT_ALL[sentence]
    assert not caught_up(*events, **how)[0]


@pytest.mark.parametrize("answer", [{"type": "MODIFIED"}, {"kind": "Status", "message": "who are you?"}])
def test_what_is_no_watch(answer: dict[str, Any]):
    with pytest.raises(ApiError, match="no watch"):
        caught_up(answer)
