"""`/healthz`, `/readyz` and `/metrics`."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

Check = Callable[[], str | None]
"""What is wrong, or None."""


async def serve(port: int, healthy: Check, ready: Check, metrics: Callable[[], bytes]) -> tuple[web.AppRunner, int]:
    """Serve until the runner is cleaned up. Returns the port, which port 0 leaves to the system."""
    app = web.Application()
    app.router.add_get("/healthz", _probe(healthy))
    app.router.add_get("/readyz", _probe(ready))

    async def page(_: web.Request) -> web.Response:
        # With a thousand runs a page takes a moment to write, and probes and looks must not wait for it.
        return web.Response(body=await asyncio.to_thread(metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "0.0.0.0", port)  # noqa: S104 -- the kubelet and Prometheus come from outside
    await site.start()
    return runner, runner.addresses[0][1]


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        wrong = check()
        return web.Response(text=f"{wrong or 'ok'}\n", status=503 if wrong else 200)

    return answer
