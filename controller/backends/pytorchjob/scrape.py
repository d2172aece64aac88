"""How far a running phase is: read from the metrics that its rank 0 serves."""

import asyncio
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from controller.api.status import PhaseProgress
from trainers.contract import DEFAULT_METRICS_PORT
from trainers.metrics import PREFIX

TIMEOUT = aiohttp.ClientTimeout(total=3)
PATIENCE_SECONDS = 0.5
"""How long a look at a run waits for a pod. A slower one's report is there at the next look: pods that cannot be reached,
behind a network policy say, must not keep the operator from its other runs."""
EVERY_SECONDS = 15.0
"""Between two looks at the same pod. A run's status is written no more often for progress alone."""
FORGET_AFTER = 10
"""Reports that nobody has asked for during so many intervals are dropped."""


@dataclass
class Report:
    progress: PhaseProgress | None
    read_at: float
    """On the monotonic clock."""
    reading: asyncio.Task[None] | None = None


class Scraper:
    """Remembers the last report of each pod, so that a pod that is busy for a moment keeps its figures."""

    def __init__(self, port: int = DEFAULT_METRICS_PORT, every: float = EVERY_SECONDS) -> None:
        self.port = port
        self.every = every
        self._reports: dict[str, Report] = {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def progress(self, uid: str, address: str, since: datetime | None) -> PhaseProgress | None:
        """The pod's last report. ``since`` is when it began to run: before its first step it has been at work since then."""
        report = self._reports.get(uid)
        if report is None:
            self._forget()
            report = self._reports[uid] = Report(None, float("-inf"))
        if report.reading is None and time.monotonic() - report.read_at >= self.every:
            report.reading = asyncio.create_task(self._refresh(report, address, since))
        if report.reading is not None:
            await asyncio.wait({report.reading}, timeout=PATIENCE_SECONDS)
        return report.progress

    async def _refresh(self, report: Report, address: str, since: datetime | None) -> None:
        try:
            report.progress = await self._read(address, since) or report.progress
        finally:
            report.read_at, report.reading = time.monotonic(), None

    def _forget(self) -> None:
        """Drop the reports of pods that are gone."""
        old = time.monotonic() - FORGET_AFTER * self.every
        self._reports = {uid: r for uid, r in self._reports.items() if r.reading is not None or r.read_at > old}

    async def _read(self, address: str, since: datetime | None) -> PhaseProgress | None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        host = f"[{address}]" if ":" in address else address
        try:
            # What answers may be anyone's program, and must not send the operator elsewhere.
            address = f"http://{host}:{self.port}/metrics"
            async with self._session.get(address, allow_redirects=False) as response:
                return parse(await response.text(), since)
        except (aiohttp.ClientError, TimeoutError, ValueError, OverflowError):
            return None


def parse(text: str, since: datetime | None) -> PhaseProgress | None:
    """Progress in a page of metrics; None if it is not a trainer's, or one's that has not finished a step.

    How many steps there will be is known earlier, but it is no sign of life: a long loading before it would be a stall.
    """
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    values = {s.name: s.value for s in samples if math.isfinite(s.value)}
    if f"{PREFIX}step" not in values:
        return None
    # Processes share the work evenly; this one knows its own part.
    processes = next((int(s.labels["processes"]) for s in samples if s.name == f"{PREFIX}info"), 1)
    return PhaseProgress(
        step=int(values[f"{PREFIX}step"]),
        total_steps=int(values.get(f"{PREFIX}total_steps", 0)),
        loss=values.get(f"{PREFIX}loss"),
        tokens_per_second=values.get(f"{PREFIX}tokens_per_second", 0.0) * processes or None,
        eta_seconds=values.get(f"{PREFIX}eta_seconds") or None,
        updated_at=_updated(values.get(f"{PREFIX}last_step_timestamp_seconds", 0.0), since),
    )


def _updated(seconds: float, since: datetime | None) -> datetime | None:
    return datetime.fromtimestamp(int(seconds), UTC) if seconds else since
