"""Reading progress from pods: reachable ones, silent ones, none at all."""

import asyncio
import time
from datetime import UTC, datetime

from aiohttp import web

from controller.backends.pytorchjob import scrape
from controller.backends.pytorchjob.scrape import Scraper

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
