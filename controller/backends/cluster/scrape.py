"""How far running phases are: their pods are asked beside the looks at runs, which read what was said last and never wait."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from weakref import WeakValueDictionary

from controller.api.status import PhaseProgress
from controller.backends.cluster.fetch import fetch
from controller.backends.cluster.page import progress_of
from controller.clock import seconds_now
from trainers.contract import DEFAULT_METRICS_PORT

EVERY_SECONDS = 15.0
"""Between two looks at the same run, for its progress."""
AHEAD = 0.8
"""A pod is asked when this share of the time to the next look has passed, so that the look finds news."""
FORGET_AFTER = 10
"""Reports that nobody has asked for during so many intervals are dropped."""

AT_ONCE = 128
OF_A_NAMESPACE = 32
OF_A_RUN = 2
"""Pods that are asked at once. One that does not answer takes its place for seconds: it is one of its own run's places."""


@dataclass(frozen=True)
class Target:
    """A pod that runs."""

    namespace: str
    run: str
    uid: str
    address: str
    since: datetime
    """It began to run."""


@dataclass
class Report:
    progress: PhaseProgress | None = None
    wanted_at: float = 0.0
    """On the monotonic clock."""
    asked: bool = False
    asking: asyncio.Task[None] | None = None


Outcome = str
PROGRESS, EMPTY, FAILED = OUTCOMES = ("progress", "empty", "failed")
"""Of asking a pod: it said how far it is; it said something else, as before its first step; it said nothing that is read."""


class Scraper:
    """Remembers the last report of each pod, so that a pod that is busy for a moment keeps its figures."""

    def __init__(
        self, port: int = DEFAULT_METRICS_PORT, every: float = EVERY_SECONDS,
        begun: Callable[[str, str], object] = lambda namespace, run: None,
        told: Callable[[Outcome], object] = lambda outcome: None, now: Callable[[], datetime] = seconds_now,
    ) -> None:  # fmt: skip
        """``begun`` is called when a pod of a run reports for the first time, ``told`` after each pod that was asked."""
        self.port = port
        self.every = every
        self.begun = begun
        self.told = told
        self.now = now
        self._reports: dict[str, Report] = {}
        self._turns = Turns()

    async def close(self) -> None:
        tasks = [report.asking for report in self._reports.values() if report.asking is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def progress(self, pod: Target) -> PhaseProgress | None:
        """What the pod said last, and see that it is asked again before the next look."""
        report = self._reports.get(pod.uid)
        if report is None:
            self._forget()
            report = self._reports[pod.uid] = Report()
        report.wanted_at = time.monotonic()
        if report.asking is None:
            wait = AHEAD * self.every if report.asked else 0.0
            report.asking = asyncio.get_running_loop().create_task(self._ask(report, pod, wait))
        return report.progress

    async def _ask(self, report: Report, pod: Target, wait: float) -> None:
        try:
            await asyncio.sleep(wait)
            async with self._turns.of(pod):
                page = await fetch(pod.address, self.port)
            found = progress_of(page, pod.since, self.now()) if page is not None else None
            self.told(PROGRESS if found else FAILED if page is None else EMPTY)
            begins = found is not None and report.progress is None
            report.progress = found or report.progress
            if begins:
                self.begun(pod.namespace, pod.run)
        finally:
            report.asked, report.asking = True, None

    def _forget(self) -> None:
        """Drop the reports of pods that are gone."""
        old = time.monotonic() - FORGET_AFTER * self.every
        self._reports = {uid: r for uid, r in self._reports.items() if r.asking is not None or r.wanted_at > old}


class Turns:
    """Who is asked now. Pods wait for a place of their run's, runs for one of their namespace's, each in the order of coming."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(AT_ONCE)
        self._shares: WeakValueDictionary[tuple[str, ...], asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, pod: Target) -> AsyncIterator[None]:
        run, namespace = self._share(OF_A_RUN, pod.namespace, pod.run), self._share(OF_A_NAMESPACE, pod.namespace)
        async with run, namespace, self._all:
            yield

    def _share(self, places: int, *whose: str) -> asyncio.Semaphore:
        """Kept for as long as somebody has or wants a place."""
        return self._shares.setdefault(whose, asyncio.Semaphore(places))
