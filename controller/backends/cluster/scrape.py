"""How far running phases are: their pods are asked beside the looks at runs, which read what was said last and never wait."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from weakref import WeakValueDictionary

from controller.api.status import PhaseProgress
from controller.backends.cluster.fetch import fetch
from controller.backends.cluster.page import progress_of
from controller.clock import seconds_now
from trainers.contract import DEFAULT_METRICS_PORT

EVERY_SECONDS = 15.0
"""Between two questions to a pod, however often its run is looked at."""
FORGET_AFTER = 40
"""Pods of a run that nobody has looked at during so many intervals are asked no more."""

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
    asking: asyncio.Task[None]
    progress: PhaseProgress | None = None


@dataclass
class Pods:
    """Of one run, by UID."""

    wanted_at: float
    """On the monotonic clock."""
    reports: dict[str, Report] = field(default_factory=dict)

    def stop(self, uids: Iterable[str]) -> list[asyncio.Task[None]]:
        tasks = [self.reports.pop(uid).asking for uid in uids]
        for task in tasks:
            task.cancel()
        return tasks


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
        self._runs: dict[tuple[str, str], Pods] = {}
        self._turns = Turns()

    async def close(self) -> None:
        tasks = [task for pods in self._runs.values() for task in pods.stop(list(pods.reports))]
        await asyncio.gather(*tasks, return_exceptions=True)

    def progress(self, namespace: str, run: str, pods: Mapping[str, Target]) -> dict[str, PhaseProgress]:
        """What they said last, by their keys. From now on these are asked again and again, and no others of this run."""
        if not pods:
            self._stop((namespace, run))
            return {}
        asked = self._runs.setdefault((namespace, run), Pods(0.0))
        asked.wanted_at = time.monotonic()
        wanted = {pod.uid: pod for pod in pods.values()}
        asked.stop(asked.reports.keys() - wanted.keys())
        for uid in wanted.keys() - asked.reports.keys():
            asked.reports[uid] = self._begin(asked, wanted[uid])
        found = {key: asked.reports[pod.uid].progress for key, pod in pods.items()}
        return {key: progress for key, progress in found.items() if progress is not None}

    def _begin(self, asked: Pods, pod: Target) -> Report:
        return Report(asyncio.get_running_loop().create_task(self._ask_on(asked, pod)))

    async def _ask_on(self, asked: Pods, pod: Target) -> None:
        # After a start of the operator all pods are asked at once; the second time they are not.
        wait = self.every * (1 + hash(pod.uid) % 100 / 100) / 2
        while time.monotonic() - asked.wanted_at <= FORGET_AFTER * self.every:
            await self._ask(asked.reports[pod.uid], pod)
            await asyncio.sleep(wait)
            wait = self.every
        self._stop((pod.namespace, pod.run))

    async def _ask(self, report: Report, pod: Target) -> None:
        async with self._turns.of(pod):
            page = await fetch(pod.address, self.port)
        found = progress_of(page, pod.since, self.now()) if page is not None else None
        self.told(PROGRESS if found else FAILED if page is None else EMPTY)
        begins = found is not None and report.progress is None
        report.progress = found or report.progress
        if begins:
            self.begun(pod.namespace, pod.run)

    def _stop(self, run: tuple[str, str]) -> None:
        if (pods := self._runs.pop(run, None)) is not None:
            pods.stop(list(pods.reports))


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
