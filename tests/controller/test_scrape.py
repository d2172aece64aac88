"""Asking pods how far they are: reachable ones, silent ones, those that mean harm. On real sockets."""

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web
from hostile import STEP, hostile_pods
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from controller.api.status import PhaseProgress
from controller.backends.cluster.fetch import LIMIT, SECONDS, fetch
from controller.backends.cluster.scrape import (
    AT_ONCE,
    FORGET_AFTER,
    OF_A_NAMESPACE,
    OF_A_RUN,
    Scraper,
    Target,
)

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
HERE = "127.0.0.1"
MIB = 1 << 20


def target(number: int = 0, run: str = "run", namespace: str = "ns", address: str = HERE) -> Target:
    return Target(namespace, run, f"{namespace}/{run}/{number}", address, SINCE)


def said(scraper: Scraper, pod: Target) -> PhaseProgress | None:
    """Of a run with one pod."""
    return scraper.progress(pod.namespace, pod.run, {"phase": pod}).get("phase")


def page(step: int) -> str:
    return f'alignment_trainer_step{{rank="0"}} {step}\nalignment_trainer_total_steps{{rank="0"}} 10\n'


async def serve(answer) -> tuple[web.AppRunner, int]:
    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HERE, 0)
    await site.start()
    return runner, runner.addresses[0][1]


async def until(holds: Callable[[], object], seconds: float = 10.0) -> float:
    """Seconds until it does."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        await asyncio.sleep(0.005)
    return time.monotonic() - started


# ---------------------------------------------------------------- a page


Places = dict[str, tuple[str, int]]
"""Address and port of a pod, by the name of its answer."""


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    with hostile_pods() as found:
        yield found


def peak() -> int:
    """The most memory since :func:`forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def test_no_answer_costs_more_than_its_share(places: Places):
    """All of them at once: gigabytes, endless headers, a byte a second, bombs."""

    async def go() -> dict[str, bytes | None]:
        pages = await asyncio.gather(*(fetch(*place) for place in places.values()))
        return dict(zip(places, pages, strict=True))

    before, started, worked = forget_peak(), time.monotonic(), time.process_time()
    found = asyncio.run(go())
    assert time.process_time() - worked < 1.0
    assert time.monotonic() - started < SECONDS + 3.0
    assert peak() - before < len(places) * MIB
    assert found.pop("honest") == STEP
    assert len(found.pop("binary") or b"") == 200_000
    assert set(found.values()) == {None}, "cut off, packed or in pieces is no page"


def test_a_slow_answer_ends(places: Places):
    async def seconds(name: str) -> float:
        started = time.monotonic()
        assert await fetch(*places[name]) is None
        return time.monotonic() - started

    async def go() -> list[float]:
        return await asyncio.gather(*map(seconds, ("byte_a_second", "header_byte_a_second", "silent")))

    assert all(SECONDS - 0.1 < took < SECONDS + 2.0 for took in asyncio.run(go()))


def test_an_address_is_a_pods_own():
    """Names are not looked up, and what is unreachable is no error."""
    for address in ("localhost", "", "127.0.0.1/x", "::1", HERE):
        assert asyncio.run(fetch(address, 1)) is None


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch, places: Places):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert asyncio.run(fetch(*places["honest"])) == STEP


def test_a_pod_cannot_send_the_operator_elsewhere():
    """Its image is the user's, and the operator may reach what the user may not."""
    reached = []

    async def secret(_):
        reached.append(1)
        return web.Response(text=page(3))

    async def go() -> bytes | None:
        other, elsewhere = await serve(secret)

        async def sends_on(_):
            raise web.HTTPFound(f"http://127.0.0.1:{elsewhere}/metrics")

        runner, port = await serve(sends_on)
        found = await fetch(HERE, port)
        await asyncio.gather(runner.cleanup(), other.cleanup())
        return found

    assert asyncio.run(go()) is None
    assert not reached


@pytest.mark.parametrize(("size", "taken"), [(LIMIT, True), (LIMIT + 1, False)])
def test_a_page_of_just_the_limit(size: int, taken: bool):
    async def answer(_):
        return web.Response(body=b"x" * size)

    async def go() -> bytes | None:
        runner, port = await serve(answer)
        found = await fetch(HERE, port)
        await runner.cleanup()
        return found

    assert (asyncio.run(go()) is not None) is taken


def test_the_server_that_trainers_use():
    registry = CollectorRegistry()
    Gauge("alignment_trainer_step", "", registry=registry).set(5)
    server, thread = start_http_server(0, addr=HERE, registry=registry)
    found = asyncio.run(fetch(HERE, server.server_port))
    server.shutdown()
    server.server_close()
    thread.join()
    assert found is not None
    assert b"alignment_trainer_step 5.0\n" in found


# ---------------------------------------------------------------- many pods, again and again


def test_a_report_is_read_beside_the_looks_and_again_after_some_time():
    asked: list[float] = []
    begun: list[tuple[str, str]] = []

    async def answer(_):
        asked.append(time.monotonic())
        return web.Response(text=page(len(asked)))

    async def go() -> None:
        runner, port = await serve(answer)
        scraper = Scraper(port, every=0.5, begun=lambda *run: begun.append(run))
        assert said(scraper, target()) is None, "nobody waits"
        await until(lambda: begun)
        await until(lambda: len(asked) >= 3)
        await runner.cleanup()
        # The pod has gone quiet: what it said last stays.
        await asyncio.sleep(0.6)
        assert said(scraper, target()).step >= len(asked) - 1
        await scraper.close()

    asyncio.run(go())
    assert begun == [("ns", "run")], "said once"
    assert min(later - sooner for sooner, later in pairwise(asked)) >= 0.25, "no pod is asked at every look"


def test_outcomes_are_told(places: Places):
    async def go(name: str) -> str:
        told: list[str] = []
        address, port = places[name]
        scraper = Scraper(port, told=told.append)
        said(scraper, target(address=address))
        await until(lambda: told)
        await scraper.close()
        return told[0]

    assert [asyncio.run(go(name)) for name in ("honest", "binary", "gzip_bomb")] == ["progress", "empty", "failed"]


def test_runs_with_silent_pods_delay_nobody(places: Places):
    """Eight runs of 64 pods that never answer; beside them a neighbour in their namespace and one in another."""

    async def go() -> None:
        silent, honest = Scraper(places["silent"][1]), Scraper(places["honest"][1])
        honest._turns = silent._turns  # pods have one port; here they are told apart by it
        started = time.monotonic()
        for run in range(8):
            pods = {str(number): target(number, f"bad-{run}", address=places["silent"][0]) for number in range(64)}
            silent.progress("ns", f"bad-{run}", pods)
        assert time.monotonic() - started < 0.5, "looks do not wait"
        await asyncio.sleep(0.1)
        neighbours = [target(0, "good", namespace, places["honest"][0]) for namespace in ("ns", "other")]
        waited = await until(lambda: None not in [said(honest, pod) for pod in neighbours])
        assert waited < SECONDS - 1.0
        await asyncio.gather(silent.close(), honest.close())

    asyncio.run(go())


def test_so_many_at_once_and_no_more(places: Places):
    """Of a run, of a namespace, and in all: which bounds the memory as well, for pods that fill their page and stop."""
    open_now: dict[tuple[str, ...], int] = {}

    async def go() -> int:
        address, port = places["almost"]
        scraper = Scraper(port)
        turns = scraper._turns
        before = forget_peak()
        for namespace in range(6):
            for run in range(20):
                pods = {str(number): target(number, f"r{run}", f"n{namespace}", address) for number in range(4)}
                scraper.progress(f"n{namespace}", f"r{run}", pods)
        await until(turns._all.locked)
        await asyncio.sleep(1.0)
        for whose, share in turns._shares.items():
            open_now[whose] = (OF_A_RUN if len(whose) == 2 else OF_A_NAMESPACE) - share._value
        grown = peak() - before
        await scraper.close()
        return grown

    assert asyncio.run(go()) < AT_ONCE * MIB / 2
    assert max(count for whose, count in open_now.items() if len(whose) == 2) == OF_A_RUN
    assert max(count for whose, count in open_now.items() if len(whose) == 1) == OF_A_NAMESPACE


def test_pods_that_are_gone_are_asked_no_more():
    asked: list[str] = []

    async def answer(request):
        asked.append(request.remote)
        return web.Response(text=page(1))

    async def go() -> None:
        runner, port = await serve(answer)
        scraper = Scraper(port, every=0.05)
        first, second = target(1, address=HERE), target(2, address="127.0.0.2")
        assert scraper.progress("ns", "run", {"a": first}) == {}
        await until(lambda: len(asked) >= 2)
        scraper.progress("ns", "run", {"b": second})
        await asyncio.sleep(0.3)
        assert len(scraper._runs) == 1
        assert list(scraper._runs["ns", "run"].reports) == [second.uid]
        scraper.progress("ns", "run", {})
        await asyncio.sleep(0.1)
        there = len(asked)
        await asyncio.sleep(0.3)
        assert (len(asked), scraper._runs, len(scraper._turns._shares)) == (there, {}, 0)
        await asyncio.gather(scraper.close(), runner.cleanup())

    asyncio.run(go())


def test_runs_that_nobody_looks_at_are_forgotten():
    async def go() -> int:
        scraper = Scraper(1, every=0.01)  # nobody listens at port 1
        for number in range(20):
            said(scraper, target(0, f"run-{number}"))
        await asyncio.sleep(FORGET_AFTER * 0.01 + 1.0)
        left = len(scraper._runs)
        await scraper.close()
        return left

    assert asyncio.run(go()) == 0
