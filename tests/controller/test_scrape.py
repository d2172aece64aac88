"""Reading progress from pods: reachable ones, silent ones, none at all."""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import generate_latest

from controller.backends.pytorchjob import scrape
from controller.backends.pytorchjob.scrape import Scraper, parse
from trainers.meter import Meter
from trainers.metrics import PREFIX
from trainers.spec import Tracking
from trainers.workspace import PhaseDir

SINCE = datetime(2026, 1, 1, tzinfo=UTC)


def page(step: int) -> str:
    return f'alignment_trainer_step{{rank="0"}} {step}\nalignment_trainer_total_steps{{rank="0"}} 10\n'


async def serve(answer) -> tuple[web.AppRunner, int]:
    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, runner.addresses[0][1]


def test_the_rate_is_that_of_all_processes():
    """Each knows its own part; they share the work evenly."""
    rate = 'alignment_trainer_tokens_per_second{rank="0"} 100\n'
    info = 'alignment_trainer_info{device="cpu",processes="4",rank="0",version="1"} 1\n'
    assert parse(page(1) + rate, None).tokens_per_second == 100
    assert parse(page(1) + rate + info, None).tokens_per_second == 400
    assert parse(page(1) + info, None).tokens_per_second is None


def test_a_report_is_read_again_only_after_some_time():
    asked = []

    async def answer(_):
        asked.append(1)
        return web.Response(text=page(len(asked)))

    async def go():
        runner, port = await serve(answer)
        scraper = Scraper(port, every=0.2)
        steps = [(await scraper.progress("pod", "127.0.0.1", SINCE)).step for _ in range(3)]
        await asyncio.sleep(0.25)
        steps.append((await scraper.progress("pod", "127.0.0.1", SINCE)).step)
        await runner.cleanup()
        # The pod has gone quiet: what it said last stays.
        await asyncio.sleep(0.25)
        steps.append((await scraper.progress("pod", "127.0.0.1", SINCE)).step)
        await scraper.close()
        return steps

    assert asyncio.run(go()) == [1, 1, 1, 2, 2]


def test_a_pod_that_does_not_answer_holds_nobody_up():
    async def answer(_):
        await asyncio.sleep(1.0)
        return web.Response(text=page(7))

    async def go():
        runner, port = await serve(answer)
        scraper = Scraper(port, every=0.1)
        started = time.monotonic()
        first = await scraper.progress("pod", "127.0.0.1", SINCE)
        waited = time.monotonic() - started
        await asyncio.sleep(1.0)
        second = await scraper.progress("pod", "127.0.0.1", SINCE)
        await scraper.close()
        await runner.cleanup()
        return first, waited, second

    first, waited, second = asyncio.run(go())
    assert first is None
    assert waited < scrape.PATIENCE_SECONDS + 0.4
    assert second.step == 7


def test_pods_that_are_gone_are_forgotten():
    async def go():
        scraper = Scraper(1, every=0.01)  # nobody listens at port 1
        for i in range(50):
            await scraper.progress(f"pod-{i}", "127.0.0.1", SINCE)
            await asyncio.sleep(0.01)
        await scraper.close()
        return len(scraper._reports)

    assert asyncio.run(go()) < 30


def test_before_the_first_step_a_pod_has_been_at_work_since_it_runs():
    assert scrape.parse(page(0), SINCE).updated_at == SINCE
    assert scrape.parse("python_info 1\n", SINCE) is None


def test_a_pod_cannot_send_the_operator_elsewhere():
    """Its image is the user's, and the operator may reach what the user may not."""
    reached = []

    async def secret(_):
        reached.append(1)
        return web.Response(text=page(3))

    async def go():
        other, elsewhere = await serve(secret)

        async def sends_on(_):
            raise web.HTTPFound(f"http://127.0.0.1:{elsewhere}/metrics")

        runner, port = await serve(sends_on)
        scraper = Scraper(port)
        found = await scraper.progress("pod", "127.0.0.1", SINCE)
        await scraper.close()
        await asyncio.gather(runner.cleanup(), other.cleanup())
        return found

    assert asyncio.run(go()) is None
    assert not reached


@pytest.mark.parametrize(
    "text", ["", "no metrics at all\n", "x{ 1\n", page(1) + f"{PREFIX}last_step_timestamp_seconds 1e300\n"]
)
def test_a_page_that_is_no_trainers_is_no_error(text):
    async def answer(_):
        return web.Response(text=text)

    async def go():
        runner, port = await serve(answer)
        scraper = Scraper(port)
        found = await scraper.progress("pod", "127.0.0.1", SINCE)
        await scraper.close()
        await runner.cleanup()
        return found

    assert asyncio.run(go()) is None


# ---------------------------------------------------------------- what the trainers really serve


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    made = Meter(PhaseDir(tmp_path), {"run": "r", "phase": "p", "type": "sft", "rank": "0"}, 0, Tracking())
    yield made
    made.close()


def served(meter: Meter) -> str:
    return generate_latest(meter.registry).decode()


def test_a_trainers_own_page(meter: Meter):
    meter.begin(0, 40)
    for step in (1, 2):
        meter.count(tokens=1000, samples=4)
        time.sleep(0.01)
        meter.log(step, loss=2.5, learning_rate=1e-4)
    found = scrape.parse(served(meter), SINCE)
    assert found is not None
    assert (found.step, found.total_steps, found.loss) == (2, 40, 2.5)
    assert found.tokens_per_second == pytest.approx(meter._rate)
    assert found.eta_seconds is not None
    assert found.eta_seconds > 0
    assert found.updated_at is not None
    assert abs((datetime.now(UTC) - found.updated_at).total_seconds()) < 5


def test_a_trainer_that_has_not_finished_a_step_has_no_progress(meter: Meter):
    assert scrape.parse(served(meter), SINCE) is None


def test_a_loss_that_is_no_number_is_left_out(meter: Meter):
    meter.begin(0, 4)
    meter.log(1, loss=float("nan"), grad_norm=float("inf"))
    found = scrape.parse(served(meter), SINCE)
    assert found is not None
    assert (found.step, found.loss) == (1, None)


def test_the_last_step_leaves_no_time(meter: Meter):
    meter.begin(3, 4)
    meter.log(4, loss=1.0)
    found = scrape.parse(served(meter), SINCE)
    assert found is not None
    assert (found.step, found.eta_seconds) == (4, None)
