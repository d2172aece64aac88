"""What is worth an Event: the transitions between two statuses, and nothing that only repeats. Pure."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, PhaseState, PhaseStatus, RetryStatus, RunStatus
from controller.api.text import plain
from controller.plan.said import LABELS_LOST, OWNER_LOST

NOTE_LIMIT = 1024
"""Bytes of a note that Kubernetes takes."""
SHOWN_METRICS = 4
MEDDLING = {LABELS_LOST: "LabelsLost", OWNER_LOST: "OwnerLost"}
"""What a phase says of it, and the event's reason."""


TYPES: Mapping[str, Literal["Normal", "Warning"]] = {
    "RetryAsked": "Normal",
    "RetryRefused": "Warning",
    "PhaseChanged": "Normal",
    "PhaseSucceeded": "Normal",
    "PhaseFailed": "Warning",
    "PhaseSuspended": "Normal",
    "PhaseBlocked": "Warning",
    "AttemptStarted": "Normal",
    "AttemptFailed": "Warning",
    "JobNameTaken": "Warning",
    "JobForbidden": "Warning",
    "LabelsLost": "Warning",
    "OwnerLost": "Warning",
    "WillNotFit": "Warning",
    meta.WAITING_FOR_EARLIER_RUN: "Warning",
    "RunRejected": "Warning",
    "RunAccepted": "Normal",
    "RunSuspended": "Normal",
    "RunResumed": "Normal",
    "RunStalled": "Warning",
    "RunSucceeded": "Normal",
    "RunFailed": "Warning",
    "QueuePending": "Normal",
    "QueueQuotaReserved": "Normal",
    "QueueAdmitted": "Normal",
    "QueuePreempted": "Normal",
    "QueueEvicted": "Normal",
    "QueueMissing": "Warning",
}
"""By reason. A warning is what somebody may have to do something about; that a queue takes its quota back is its work, as Kueue's
own events of it say."""


@dataclass(frozen=True)
class Event:
    reason: str
    note: str

    @property
    def type(self) -> Literal["Normal", "Warning"]:
        return TYPES[self.reason]


def transitions(before: RunStatus, after: RunStatus) -> Iterator[Event]:
    """What was asked for first, then phases, then what it means for the run."""
    yield from _retry(before.retry or RetryStatus(), after.retry or RetryStatus())
    for phase in after.phases:
        yield from _phase(before.phase_status(phase.name), phase)
    for kind in (meta.ACCEPTED, meta.ADMITTED, meta.SUSPENDED, meta.STALLED, meta.SUCCEEDED, meta.FAILED):
        yield from _condition(kind, before, after)


def _retry(before: RetryStatus, after: RetryStatus) -> Iterator[Event]:
    if after.refused and after.refused != before.refused:
        yield Event("RetryRefused", after.refused)
    elif after.number > before.number and not after.refused:
        yield Event("RetryAsked", f"somebody has asked to try again (request {after.number})")


def _phase(before: PhaseStatus | None, after: PhaseStatus) -> Iterator[Event]:
    name = f"phase {after.name}"
    before = before or PhaseStatus(name=after.name, type=after.type)
    if before.digest and after.digest != before.digest and before.state in (PhaseState.SUCCEEDED, PhaseState.RUNNING):
        why = "it was asked to" if after.again != before.again else "its settings or inputs have changed"
        yield Event("PhaseChanged", f"{name}: {why}, so it runs again")
    yield from _attempts(before, after)
    if after.fits is False and before.needs != after.needs:
        yield Event("WillNotFit", f"{name} {after.needs}")
    if after.held_by and not before.held_by:
        yield Event(meta.WAITING_FOR_EARLIER_RUN, f"{name} {after.message}")
    yield from _meddling(before, after)
    if after.state == before.state:
        return
    if after.state == PhaseState.SUCCEEDED:
        yield Event("PhaseSucceeded", f"{name} succeeded{_metrics(after)}")
    elif after.state == PhaseState.FAILED:
        yield Event("PhaseFailed", f"{name} failed: {_reason(after)}")
    elif after.state == PhaseState.SUSPENDED:
        yield Event("PhaseSuspended", f"{name} is suspended")
    elif after.state == PhaseState.BLOCKED:
        yield Event("PhaseBlocked", f"{name} cannot run: it {after.message}")


def _meddling(before: PhaseStatus, after: PhaseStatus) -> Iterator[Event]:
    for said, reason in MEDDLING.items():
        if said in after.message and said not in before.message:
            yield Event(reason, f"phase {after.name}: {after.message}")


def _attempts(before: PhaseStatus, after: PhaseStatus) -> Iterator[Event]:
    known = {attempt.number: attempt for attempt in before.attempts}
    for attempt in after.attempts:
        old = known.get(attempt.number)
        label = f"phase {after.name}, attempt {attempt.number}"
        if old is None and not attempt.state.ended:
            yield Event("AttemptStarted", f"{label} {_started(after.message)}")
        if attempt.taken_by and (old is None or not old.taken_by):
            yield Event("JobNameTaken", f"{label}: {attempt.message}")
        if attempt.barred and (old is None or not old.barred):
            yield Event("JobForbidden", f"{label} {attempt.message}")
        failed_now = attempt.state == AttemptState.FAILED and (old is None or old.state != AttemptState.FAILED)
        told_by_phase = after.state == PhaseState.FAILED and before.state != PhaseState.FAILED
        if failed_now and not told_by_phase:
            on = f" on node {attempt.node}" if attempt.node else ""
            yield Event("AttemptFailed", f"{label} failed{on}: {attempt.failure}: {attempt.message}")


def _started(message: str) -> str:
    """With fewer nodes or less memory than was asked for, if so."""
    return f"started{message.removeprefix('starting')}" if message.startswith("starting") else "started"


def _metrics(phase: PhaseStatus) -> str:
    shown = [f"{name} {value:.6g}" for name, value in list(phase.metrics.items())[:SHOWN_METRICS]]
    return f": {', '.join(shown)}" if shown else ""


def _reason(phase: PhaseStatus) -> str:
    return f"{phase.failure}: {phase.message}" if phase.failure else phase.message


BAD_NEWS = {
    meta.ACCEPTED: ("False", "RunRejected"),
    meta.STALLED: ("True", "RunStalled"),
    meta.FAILED: ("True", "RunFailed"),
}
"""Conditions whose status is worth a warning, and the warning's reason."""


def _condition(kind: str, before: RunStatus, after: RunStatus) -> Iterator[Event]:
    old, new = before.condition(kind), after.condition(kind)
    if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
        return
    if kind in BAD_NEWS:
        status, reason = BAD_NEWS[kind]
        # A rejected run has failed too; that is one piece of news.
        if new.status == status and not (kind == meta.FAILED and new.reason == meta.INVALID_SPEC):
            yield Event(reason, new.message)
        elif kind == meta.ACCEPTED and old is not None and old.status == status:
            yield Event("RunAccepted", "the run makes sense again, and goes on")
    elif kind == meta.ADMITTED:
        yield Event(f"Queue{new.reason}", new.message)
    elif kind == meta.SUCCEEDED and new.status == "True":
        yield Event("RunSucceeded", "all phases succeeded")
    elif kind == meta.SUSPENDED and (new.status == "True" or (old is not None and old.status == "True")):
        reason = "RunSuspended" if new.status == "True" else "RunResumed"
        yield Event(reason, new.message or "nothing of the run is suspended any more")


def render(event: Event, run: AlignmentRun, instance: str, now: datetime) -> dict[str, Any]:
    """The Event object. Its name is a function of what happened, so one that is sent twice is one."""
    mark = hashlib.sha256(f"{run.metadata.uid}/{run.metadata.resource_version}/{event}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{run.name}.{mark}", "namespace": run.metadata.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": meta.PRODUCT,
        "reportingInstance": instance[:128],
        "action": "Reconcile",
        "type": event.type,
        "reason": event.reason,
        "note": plain(event.note, NOTE_LIMIT).encode()[:NOTE_LIMIT].decode(errors="ignore"),
        "regarding": {
            "apiVersion": meta.API_VERSION,
            "kind": meta.KIND,
            "name": run.name,
            "namespace": run.metadata.namespace,
            "uid": run.metadata.uid,
        },
    }
