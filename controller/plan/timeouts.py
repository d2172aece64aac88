"""When a live attempt has had its chance: it did not begin to run in time, or it does not go on."""

from datetime import datetime

from controller.api.run import FailurePolicy
from controller.api.status import Attempt, AttemptState, PhaseProgress
from controller.plan.moments import later
from controller.plan.observed import JobState, ObservedJob
from trainers.contract import FailureClass

Overdue = tuple[FailureClass, str]

ENDING_SECONDS = 60.0
"""For a job that is about to end to do so, after the time that it has to save its work."""


def overdue(job: ObservedJob, progress: PhaseProgress | None, policy: FailurePolicy, now: datetime) -> Overdue | None:
    """Why this attempt is to be ended, or None."""
    if job.state != JobState.LIVE or job.failure is not None:
        return None
    due = startup_due(job, policy)
    if due is not None and now >= due:
        why = job.message or "not all of its pods run"
        return FailureClass.STARTUP_TIMEOUT, f"not running after {policy.startup_timeout_seconds:g} s: {why}"
    due = stall_due(job, progress, policy)
    if due is not None and now >= due:
        step = f" since step {progress.step}" if progress else ""
        return FailureClass.STALLED, f"no progress for {policy.stall_timeout_seconds:g} s{step}"
    return None


def ending_due(record: Attempt, grace_seconds: float) -> datetime | None:
    """The moment by which an attempt that is about to end has to be gone: some wait for what will never come."""
    if record.failure is None or record.finished_at is None or record.state != AttemptState.RUNNING:
        return None
    return later(record.finished_at, grace_seconds + ENDING_SECONDS)


def startup_due(job: ObservedJob, policy: FailurePolicy) -> datetime | None:
    """The moment by which all parts of the job have to run; None if they do, or if it waits in a queue."""
    if job.running_since is not None or job.may_start_since is None or policy.startup_timeout_seconds is None:
        return None
    return later(job.may_start_since, policy.startup_timeout_seconds)


def stall_due(job: ObservedJob, progress: PhaseProgress | None, policy: FailurePolicy) -> datetime | None:
    """The moment by which the phase has to report again. Nobody who has never reported can be told from one we cannot hear."""
    if policy.stall_timeout_seconds is None or progress is None or progress.updated_at is None:
        return None
    # A job that a queue has stopped and started again makes no progress meanwhile.
    since = max(filter(None, (progress.updated_at, job.running_since)))
    return later(since, policy.stall_timeout_seconds)
