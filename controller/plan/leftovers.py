"""What is left of work that has ended, and when it goes: jobs with their pods, later perhaps the run. Artifacts never do."""

from collections.abc import Iterator
from datetime import datetime

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.plan.moments import later
from controller.plan.observed import JobState, Observed, ObservedJob


def next_chore(run: AlignmentRun, status: RunStatus) -> datetime | None:
    """When a run that has ended wants something done. What needs nothing any more is not even looked at."""
    jobs = None if status.jobs_deleted else _after(status.finished_at, run.spec.ttl_seconds_after_finished)
    return min(filter(None, (jobs, end_of_run(run, status))), default=None)


def end_of_run(run: AlignmentRun, status: RunStatus) -> datetime | None:
    """When the run itself is deleted."""
    return _after(status.finished_at, run.spec.run_ttl_seconds_after_finished)


def outlived(run: AlignmentRun, status: RunStatus, observed: Observed, now: datetime) -> list[ObservedJob]:
    """Jobs whose time is over although their run goes on: attempts of weeks would fill every list."""
    return [job for job, due in _dues(run, status, observed) if due <= now]


def next_due(run: AlignmentRun, status: RunStatus, observed: Observed, now: datetime) -> datetime | None:
    return min((due for _, due in _dues(run, status, observed) if due > now), default=None)


def _dues(run: AlignmentRun, status: RunStatus, observed: Observed) -> Iterator[tuple[ObservedJob, datetime]]:
    """Of jobs whose end the status has, so that nothing is forgotten with them."""
    for job in observed.jobs:
        due = _after(_end_of(job, status), run.spec.ttl_seconds_after_finished)
        if job.state != JobState.LIVE and not job.past and due is not None:
            yield job, due


def _end_of(job: ObservedJob, status: RunStatus) -> datetime | None:
    phase = status.phase_status(job.phase)
    attempts = phase.attempts if phase else ()
    record = next((a for a in attempts if a.number == job.attempt), None)
    if record is not None:
        return record.finished_at if record.state.ended else None
    # Of one that the status has done with, or that is news.
    return job.finished_at if job.attempt < max((a.number for a in attempts), default=0) else None


def _after(start: datetime | None, seconds: float | None) -> datetime | None:
    return later(start, seconds) if start is not None and seconds is not None else None
