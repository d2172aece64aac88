"""Times that another clock has written, an earlier operator's or a node's. What cannot be is taken as the nearest that can.

Nothing of a run was before it was made, and nothing that has happened is still to come. A clock that was wrong by hours would
otherwise end a phase at its first look, hold a retry for as long, or delete jobs that have just ended.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from controller.api.status import Attempt, PhaseStatus, RunStatus
from controller.plan.observed import Observed, ObservedJob

Put = Callable[[datetime | None], datetime | None]
T = TypeVar("T", RunStatus, PhaseStatus, Attempt)


def written(status: RunStatus, made: datetime | None, now: datetime) -> RunStatus:
    """The status with times that can be. ``made``: when its run was, by the API server; None if nobody knows."""
    earliest = made if made is not None and made.tzinfo is not None else None

    def put(moment: datetime | None) -> datetime | None:
        if moment is None:
            return None
        return min(max(moment, earliest) if earliest else moment, now)

    phases = tuple(_phase(phase, put) for phase in status.phases)
    return _over(_put(status, put, phases=phases))


def seen(observed: Observed, now: datetime) -> Observed:
    return replace(observed, jobs=tuple(_job(job, now) for job in observed.jobs))


def _phase(phase: PhaseStatus, put: Put) -> PhaseStatus:
    return _put(phase, put, attempts=tuple(_put(attempt, put) for attempt in phase.attempts))


def _put(thing: T, put: Put, **more: Any) -> T:
    return thing.model_copy(update={"started_at": put(thing.started_at), "finished_at": put(thing.finished_at), **more})


def _over(status: RunStatus) -> RunStatus:
    """A run did not end before its attempts did, whose ends another clock has told."""
    if status.finished_at is None:
        return status
    ends = [a.finished_at for phase in status.phases for a in phase.attempts if a.finished_at is not None]
    return status.model_copy(update={"finished_at": max([status.finished_at, *ends])})


def _job(job: ObservedJob, now: datetime) -> ObservedJob:
    names = ("started_at", "finished_at", "may_start_since", "running_since")
    ahead = [name for name in names if (moment := getattr(job, name)) is not None and moment > now]
    changes: dict[str, Any] = dict.fromkeys(ahead, now)
    return replace(job, **changes)
