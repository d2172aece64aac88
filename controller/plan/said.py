"""What a running phase says: of the attempt that counts, what keeps it, and how many nodes it has."""

from collections.abc import Iterable, Sequence

from controller.api.run import FailurePolicy
from controller.api.status import Attempt, AttemptState
from controller.plan.observed import JobState, ObservedJob
from controller.plan.resolve import ResolvedPhase

OTHER = "stopping an attempt for other settings"
STOPPED = "waits for the end of an attempt that was stopped"
SUSPENDED = "suspended"
MOST_NAMES = 3
LABELS_LOST = "somebody took labels away from"
OWNER_LOST = "somebody took the owner reference away from"
PUT_BACK = "it stays the run's, which puts it back where it may"
SEEN_LATE = "it goes on, and what becomes of it is noticed later"
"""No watch tells of what does not have them."""


def with_meddling(said: str, jobs: Iterable[ObservedJob]) -> str:
    """With what somebody has done to jobs that have not ended, since nobody else will ever say it."""
    live = [job for job in jobs if job.state == JobState.LIVE]
    kept = [
        f"job {job.name} was deleted and stays until somebody removes its finalizer {', '.join(job.kept_by[:MOST_NAMES])}"
        for job in live
        if job.kept_by
    ]
    lost = [f"{LABELS_LOST} {', '.join(job.unlabelled[:MOST_NAMES])}: {SEEN_LATE}" for job in live if job.unlabelled]
    disowned = [f"{OWNER_LOST} job {job.name}: {PUT_BACK}" for job in live if job.disowned]
    return "; ".join(filter(None, (said, *kept, *lost, *disowned)))


def with_rest(said: str, going: Iterable[Attempt], jobs: Iterable[ObservedJob]) -> str:
    """With what goes on of attempts that are to end: before it has ended nothing follows."""
    at_work = {a.number for a in going if a.state != AttemptState.STOPPING and not a.failure}
    left = [job.left for job in jobs if job.state == JobState.LIVE and job.attempt not in at_work]
    return "; ".join(filter(None, (said, *left)))


def said_of(
    going: Sequence[Attempt], job: ObservedJob | None, phase: ResolvedPhase, digest: str | None, policy: FailurePolicy
) -> str:
    """``going``: attempts that have not ended; ``job``: the live one of the last of them."""
    last = going[-1] if going else None
    if last is None:
        return ""
    if last.state == AttemptState.STOPPING:
        return last.message if last.failure else OTHER if last.digest != digest else STOPPED
    if last.failure:
        return f"{last.failure}: {last.message}"
    fewer = f"on {last.nodes} of {phase.nodes} nodes" if 0 < last.nodes < phase.nodes else ""
    return "; ".join(filter(None, (fewer, _found(last, job, phase, policy), last.message)))


def _found(last: Attempt, job: ObservedJob | None, phase: ResolvedPhase, policy: FailurePolicy) -> str:
    """Of an attempt on several nodes that something keeps from running: how many have a place, and what follows from it."""
    if job is None or not last.message or job.placed >= last.nodes or last.nodes < 2:
        return ""
    limit = policy.startup_timeout_seconds
    enough = limit is not None and phase.min_nodes <= job.placed
    more = f", which are enough after startupTimeoutSeconds {limit:g}" if enough else ""
    return f"{job.placed} of {last.nodes} nodes found{more}"
