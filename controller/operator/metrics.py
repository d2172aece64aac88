"""What the operator measures of itself and of the runs it looks after."""

from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from controller.api import meta
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, RunStatus
from controller.kube import Call
from controller.operator.queue import Key

# Otherwise every counter has a series beside it that says when it began.
disable_created_metrics()

PREFIX = "alignment_operator_"
RUN_STATES = ("Waiting", "Queued", "Running", "Suspended", "Stalled", "Succeeded", "Failed")
LONG = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0, 259200.0)
"""Buckets for what takes minutes to days."""
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class MetricDef:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[MetricDef, ...] = (
    MetricDef(PREFIX + "runs", "gauge", "Runs by state.", ("namespace", "state")),
    MetricDef(PREFIX + "phase_duration_seconds", "histogram", "First start of a phase to its end.", ("type", "outcome"), LONG),
    MetricDef(PREFIX + "phase_transitions_total", "counter", "Changes of phases' states.", ("type", "from", "to")),
    MetricDef(PREFIX + "attempt_failures_total", "counter", "Attempts that failed, by class of failure.", ("type", "class")),
    MetricDef(PREFIX + "retries_total", "counter", "Further attempts, by the class of failure before.", ("type", "class")),
    MetricDef(PREFIX + "reconcile_seconds", "histogram", "Duration of one look at a run.", ("outcome",), SHORT),
    MetricDef(PREFIX + "queue_wait_seconds", "histogram", "From the wish for a look at a run to its begin.", (), SHORT),
    MetricDef(PREFIX + "queue_depth", "gauge", "Runs that wait for a look."),
    MetricDef(PREFIX + "api_requests_total", "counter", "Calls to the API server.", ("verb", "resource", "code")),
    MetricDef(PREFIX + "api_request_seconds", "histogram", "Duration of calls to the API server.", ("verb", "resource"), SHORT),
    MetricDef(PREFIX + "leader", "gauge", "1 in the replica that acts."),
    MetricDef(PREFIX + "watch_events_total", "counter", "Events seen by the watches.", ("resource",)),
)  # fmt: skip

KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class OperatorMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._collectors: dict[str, Any] = {m.name: _collector(m, self.registry) for m in METRICS}
        self._states: dict[Key, str] = {}

    def page(self) -> bytes:
        return generate_latest(self.registry)

    # -- runs

    def run_seen(self, key: Key, status: RunStatus) -> None:
        before, after = self._states.get(key), state_of(status)
        if before != after:
            self._states[key] = after
            self._count_runs({key.namespace})

    def run_gone(self, key: Key) -> None:
        if self._states.pop(key, None) is not None:
            self._count_runs({key.namespace})

    def _count_runs(self, namespaces: Iterable[str]) -> None:
        for namespace in namespaces:
            tally = Tally(state for key, state in self._states.items() if key.namespace == namespace)
            for state in RUN_STATES:
                self._of("runs", namespace=namespace, state=state).set(tally[state])

    def transition(self, before: RunStatus, after: RunStatus) -> None:
        """Count what has changed between two statuses of one run."""
        for phase in after.phases:
            self._phase(before.phase_status(phase.name), phase)

    def _phase(self, before: PhaseStatus | None, after: PhaseStatus) -> None:
        old = before.state if before else PhaseState.WAITING
        if old != after.state:
            self._of("phase_transitions_total", **{"type": after.type, "from": old, "to": after.state}).inc()
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

    # -- the operator itself

    def reconciled(self, outcome: str, seconds: float) -> None:
        self._of("reconcile_seconds", outcome=outcome).observe(seconds)

    def waited(self, seconds: float, depth: int) -> None:
        self._of("queue_wait_seconds").observe(seconds)
        self._of("queue_depth").set(depth)

    def called(self, call: Call, code: str, seconds: float) -> None:
        resource = call.resource.plural + (f"/{call.resource.subresource}" if call.resource.subresource else "")
        self._of("api_requests_total", verb=call.verb, resource=resource, code=code).inc()
        self._of("api_request_seconds", verb=call.verb, resource=resource).observe(seconds)

    def leads(self, leads: bool) -> None:
        self._of("leader").set(leads)

    def watched(self, resource: str) -> None:
        self._of("watch_events_total", resource=resource).inc()

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


def _collector(metric: MetricDef, registry: CollectorRegistry) -> Any:
    extra = {"buckets": metric.buckets} if metric.buckets else {}
    return KINDS[metric.kind](metric.name, metric.help, metric.labels, registry=registry, **extra)
