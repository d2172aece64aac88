"""Lists of objects that whoever made them has filled: what is read of them at once, and what is kept."""

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from test_catch_up import Loopback

from controller.kube import transport
from controller.kube.api import Api
from controller.kube.transport import Transport

COUNT = 100
KB = 2**10
HEAVY = "x" * (64 * KB)
LARGEST = 1024 * KB
"""An eighth of what a page may have; Kubernetes takes 256 KiB of annotations."""


class Pods:
    """Serves pods page by page, as an API server does."""

    def __init__(self, count: int, text: str) -> None:
        self.count, self.text = count, text
        self.asked: list[tuple[int, int]] = []
        """From where, and how many."""

    def _pod(self, number: int) -> dict[str, Any]:
        metadata = {"name": f"pod-{number}", "namespace": "ns", "uid": str(number), "resourceVersion": str(number)}
        return {"metadata": {**metadata, "annotations": {"a": self.text}}, "spec": {"containers": []}, "status": {}}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        first, limit = int(request.query.get("continue", 0)), int(request.query["limit"])
        self.asked.append((first, limit))
        end = min(first + limit, self.count)
        metadata = {"resourceVersion": "1", **({"continue": str(end)} if end < self.count else {})}
        page = {"kind": "PodList", "metadata": metadata, "items": []}
        head, tail = json.dumps(page).split("[]")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(f"{head}[".encode())
        for number in range(first, end):
            await response.write(f"{',' if number > first else ''}{json.dumps(self._pod(number))}".encode())
        await response.write(f"]{tail}".encode())
        return response


def asked_of(pods: Pods, question: Callable[[Api], Awaitable[Any]]) -> Any:
    async def ask() -> Any:
        app = web.Application()
        app.router.add_get("/{path:.*}", pods.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        asked = Transport(lambda: Loopback(f"http://127.0.0.1:{port}"))
        try:
            return await question(Api(asked))
        finally:
            await asked.close()
            await runner.cleanup()

    return asyncio.run(ask())


def test_heavy_pods_are_read_a_few_at_a_time_and_kept_without_what_makes_them_heavy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "LARGEST_PAGE", LARGEST)
    pods = Pods(COUNT, HEAVY)
    tracemalloc.start()
    try:
        found = asked_of(pods, lambda api: api.list_pods("ns", {"a": "b"}))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [pod["metadata"]["name"] for pod in found] == [f"pod-{i}" for i in range(COUNT)]
    assert found[7]["metadata"] == {"name": "pod-7", "namespace": "ns", "uid": "7", "resourceVersion": "7"}
    assert pods.asked == [(0, 500), (0, 125), (0, 31), *((first, 7) for first in range(0, COUNT, 7))]
    # A page as it came, as text, and as what that says; the server's own pieces beside it.
    assert most < 5 * LARGEST < COUNT * len(HEAVY)


def test_ordinary_pods_are_read_five_hundred_at_a_time() -> None:
    pods = Pods(1100, "x")
    assert len(asked_of(pods, lambda api: api.list_pods("ns", {}))) == 1100
    assert pods.asked == [(0, 500), (500, 500), (1000, 500)]


def test_one_that_is_larger_than_a_page_may_be_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LARGEST_PAGE", len(HEAVY) // 2)
    pods = Pods(3, HEAVY)
    assert len(asked_of(pods, lambda api: api.list_pods("ns", {}))) == 3
    assert pods.asked == [(0, 500), (0, 125), (0, 31), (0, 7), (0, 1), (1, 1), (2, 1)]
