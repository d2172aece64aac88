"""Counting what the operator does, for /metrics."""

import time
from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, RunStatus
from controller.backends.cluster.scrape import OUTCOMES
from controller.clock import seconds_now
from controller.kube.calls import Call
from controller.memory import Key
from controller.operator.metrics import METRICS, PREFIX, RUN_METRICS, RUN_STATES
from controller.operator.run_series import RunSeries, gpus_of
from trainers import __version__
from trainers.contract import FailureClass
from trainers.phases import REGISTRY


class OperatorMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = [metric for metric in METRICS if metric not in RUN_METRICS]
        self._collectors: dict[str, Any] = {m.name: m.collector(self.registry) for m in own}
        self._states: dict[Key, str] = {}
        self._namespaces: set[str] = set()
        self._leads = False
        self._series = RunSeries()
        self._asked: dict[Key, dict[tuple[str, int], float]] = {}
        """Of runs, the attempts that wait for their queue, with the time at which they were asked for."""
        self._of("info", version=__version__).set(1)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first failure has not increased in Prometheus' eyes."""
        for name, failure in product((entry.name for entry in REGISTRY), FailureClass):
            for counter in ("attempt_failures_total", "retries_total"):
                self._of(counter, **{"type": name, "class": failure})
        for outcome in OUTCOMES:
            self._of("scrapes_total", outcome=outcome)
        for entry in REGISTRY:
            self._of("attempt_wait_seconds", type=entry.name)
            for state in PhaseState:
                self._of("phase_transitions_total", type=entry.name, state=state)
            for outcome in (PhaseState.SUCCEEDED, PhaseState.FAILED):
                self._of("phase_duration_seconds", type=entry.name, outcome=outcome)

    def page(self) -> bytes:
        return generate_latest(self.registry) + self._series.page().encode()

    # -- runs

    def run_seen(self, key: Key, run: AlignmentRun | None, status: RunStatus) -> None:
        """``run`` is None for one that could not be read."""
        before, after = self._states.get(key), state_of(status)
        self._series.seen(key, after, run, status)
        self._gpu_seconds_begin_at_zero(key, status)
        if before != after:
            self._states[key] = after
            self._count(key.namespace, before, after)

    def run_gone(self, key: Key) -> None:
        self._series.gone(key)
        self._asked.pop(key, None)
        if (before := self._states.pop(key, None)) is not None:
            self._count(key.namespace, before, None)

    def _gpu_seconds_begin_at_zero(self, key: Key, status: RunStatus) -> None:
        """As with failures; which namespaces there are is only known now."""
        for kind, outcome in product({phase.type for phase in status.phases}, (s for s in AttemptState if s.ended)):
            self._of("gpu_seconds_total", namespace=key.namespace, type=kind, outcome=outcome)

    def _count(self, namespace: str, before: str | None, after: str | None) -> None:
        """Not anew: of ten thousand runs that would take as many steps for each of them."""
        if namespace not in self._namespaces:
            self._namespaces.add(namespace)
            for state in RUN_STATES:
                self._of("runs", namespace=namespace, state=state).set(0)
        if before is not None:
            self._of("runs", namespace=namespace, state=before).dec()
        if after is not None:
            self._of("runs", namespace=namespace, state=after).inc()

    def transition(self, key: Key, run: AlignmentRun, before: RunStatus, after: RunStatus) -> None:
        """Count what has changed between two statuses of one run."""
        for phase in after.phases:
            was = before.phase_status(phase.name)
            self._phase(was, phase)
            known = {a.number: a for a in was.attempts} if was else {}
            for attempt in phase.attempts:
                self._waited(key, phase, attempt)
                old = known.get(attempt.number)
                if attempt.state.ended and not (old and old.state.ended):
                    takes = old.takes if old else {}
                    self._used(key, run, phase, attempt.model_copy(update={"takes": takes}))
        for phase in before.phases:
            if after.phase_status(phase.name) is None:
                self._removed(key, run, phase)

    def _removed(self, key: Key, run: AlignmentRun, phase: PhaseStatus) -> None:
        """One that an edit took out is forgotten when its attempt has ended, so nothing else tells of that end."""
        end = {"state": AttemptState.STOPPED, "finished_at": seconds_now()}
        for attempt in phase.attempts:
            self._asked_at(key, phase, attempt)
            if not attempt.state.ended:
                self._used(key, run, phase, attempt.model_copy(update=end))

    def _phase(self, before: PhaseStatus | None, after: PhaseStatus) -> None:
        old = before.state if before else PhaseState.WAITING
        if old != after.state:
            self._of("phase_transitions_total", type=after.type, state=after.state).inc()
            if after.state in (PhaseState.SUCCEEDED, PhaseState.FAILED) and after.started_at and after.finished_at:
                seconds = (after.finished_at - after.started_at).total_seconds()
                self._of("phase_duration_seconds", type=after.type, outcome=after.state).observe(seconds)
        self._attempts(before.attempts if before else (), after)

    def _attempts(self, before: Sequence[Attempt], after: PhaseStatus) -> None:
        known = {a.number for a in before}
        failed = {a.number for a in before if a.state == AttemptState.FAILED}
        last: Attempt | None = None
        for attempt in after.attempts:
            # One that follows a stop, or has other settings, is no retry.
            again = last is not None and last.state == AttemptState.FAILED and last.digest == attempt.digest
            if attempt.number not in known and last is not None and again:
                self._of("retries_total", **{"type": after.type, "class": last.failure}).inc()
            if attempt.state == AttemptState.FAILED and attempt.number not in failed:
                self._of("attempt_failures_total", **{"type": after.type, "class": attempt.failure}).inc()
            last = attempt

    def _waited(self, key: Key, phase: PhaseStatus, attempt: Attempt) -> None:
        if attempt.started_at is None and not attempt.state.ended:
            self._asked.setdefault(key, {}).setdefault((phase.name, attempt.number), time.time())
        elif (asked := self._asked_at(key, phase, attempt)) is not None and attempt.started_at is not None:
            # The server's times have whole seconds.
            self._of("attempt_wait_seconds", type=phase.type).observe(max(attempt.started_at.timestamp() - asked, 0.0))

    def _asked_at(self, key: Key, phase: PhaseStatus, attempt: Attempt) -> float | None:
        """And forgotten."""
        mine = self._asked.get(key, {})
        asked = mine.pop((phase.name, attempt.number), None)
        if not mine:
            self._asked.pop(key, None)
        return asked

    def _used(self, key: Key, run: AlignmentRun, phase: PhaseStatus, attempt: Attempt) -> None:
        if attempt.started_at is not None and attempt.finished_at is not None:
            seconds = gpus_of(run, phase.name, attempt) * (attempt.finished_at - attempt.started_at).total_seconds()
            labels = {"namespace": key.namespace, "type": phase.type, "outcome": attempt.state}
            self._of("gpu_seconds_total", **labels).inc(max(seconds, 0.0))

    # -- the operator itself

    def reconciled(self, outcome: str, seconds: float) -> None:
        self._of("reconcile_seconds", outcome=outcome).observe(seconds)

    def waited(self, seconds: float) -> None:
        self._of("workqueue_wait_seconds").observe(seconds)

    def queue(self, queue: Sized) -> None:
        """Measured when it is asked for: when all workers hang nothing else would tell. A standby has no workers."""
        self._of("workqueue_depth").set_function(lambda: len(queue) if self._leads else 0)

    def clock(self, ahead: Callable[[], float]) -> None:
        self._of("clock_ahead_seconds").set_function(ahead)

    def called(self, call: Call, code: str, seconds: float) -> None:
        resource = call.resource.plural + (f"/{call.resource.subresource}" if call.resource.subresource else "")
        self._of("api_requests_total", verb=call.verb, resource=resource, code=code).inc()
        self._of("api_request_seconds", verb=call.verb, resource=resource).observe(seconds)

    def scraped(self, outcome: str) -> None:
        self._of("scrapes_total", outcome=outcome).inc()

    def leads(self, leads: bool) -> None:
        self._leads = leads
        self._of("leader").set(leads)

    def watched(self, resource: str) -> None:
        self._of("watch_events_total", resource=resource).inc()

    def watches(self, resources: Iterable[str], dead: Iterable[str]) -> None:
        for resource in resources:
            self._of("watch_dead", resource=resource).set(resource in dead)

    def _of(self, name: str, **labels: object) -> Any:
        collector = self._collectors[PREFIX + name]
        return collector.labels(**{key: str(value) for key, value in labels.items()}) if labels else collector


def state_of(status: RunStatus) -> str:
    """One of :data:`RUN_STATES`."""
    for kind in (meta.SUCCEEDED, meta.FAILED, meta.SUSPENDED, meta.STALLED):
        if status.is_true(kind):
            return kind
    if status.phase in ("Queued", "Waiting", ""):
        return status.phase or "Waiting"
    return "Running"
