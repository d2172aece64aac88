"""A run that makes no sense, now or to this operator: nothing starts, and what runs goes on.

The cause is often not the run's: an operator without its default image for one restart, a rule of a newer version, an edit
with a slip in it. None of them is worth the work of a night. So attempts are watched and remembered as ever, and when the
cause is gone the run goes on as if nothing had been. Who wants them stopped says so: ``spec.suspend`` holds here too.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from controller.api import meta
from controller.api.status import Attempt, AttemptState, PhaseProgress, PhaseState, PhaseStatus, RunStatus
from controller.api.text import plain
from controller.plan import attempts as history
from controller.plan.conditions import Claim, update
from controller.plan.observed import JobState, Observed, ObservedJob
from controller.plan.phase import finite, finite_metrics, stopping
from controller.plan.said import SUSPENDED
from controller.plan.verdict import MOVING, summary


@dataclass(frozen=True)
class Refusal:
    message: str
    """Every problem."""
    suspend: bool
    generation: int | None


def is_refused(status: RunStatus) -> bool:
    accepted = status.condition(meta.ACCEPTED)
    return accepted is not None and accepted.status == "False"


def refuse(
    before: RunStatus, refusal: Refusal, observed: Observed, now: datetime
) -> tuple[RunStatus, list[tuple[str, int]]]:
    """The status, and (phase, number) of the attempts that are to end: those that were asked to before."""
    phases, stop = [], []
    for phase in before.phases:
        watched, numbers = _watched(phase, refusal.suspend, observed, now)
        phases.append(watched)
        stop += [(phase.name, number) for number in numbers]
    known = {phase.name for phase in before.phases}
    stop += [(job.phase, job.attempt) for job in observed.jobs if job.state == JobState.LIVE and job.phase not in known]
    running = [phase.name for phase in phases if phase.state == PhaseState.RUNNING]
    figures = dict.fromkeys(("step", "loss", "tokens_per_second", "eta"), "")
    status = before.model_copy(update={"phases": tuple(phases), "observed_generation": refusal.generation, **figures})
    conditions = update(before.conditions, _claims(refusal, running), refusal.generation, now)
    said = {**(summary(status) if phases else {}), "phase": "Invalid", "conditions": conditions}
    return status.model_copy(update=said), stop


def _claims(refusal: Refusal, running: list[str]) -> dict[str, Claim]:
    at_work = Claim(True, meta.PHASES_RUNNING, f"running: {', '.join(running)}; nothing else starts")
    suspended = Claim(True, meta.RUN_SUSPENDED, "spec.suspend is true")
    return {
        meta.ACCEPTED: Claim(False, meta.INVALID_SPEC, refusal.message),
        meta.PROGRESSING: at_work if running else Claim(False, meta.INVALID_SPEC),
        meta.SUSPENDED: suspended if refusal.suspend else Claim(False, meta.NOT_SUSPENDED),
        meta.STALLED: Claim(False, meta.INVALID_SPEC),
        meta.SUCCEEDED: Claim(False, meta.INVALID_SPEC),
        meta.FAILED: Claim(not running, meta.INVALID_SPEC, refusal.message),
    }


def _watched(
    phase: PhaseStatus, suspend: bool, observed: Observed, now: datetime
) -> tuple[PhaseStatus, tuple[int, ...]]:
    jobs = [job for job in observed.jobs if job.phase == phase.name]
    progress = observed.progress.get(phase.name)
    records = history.with_work(history.join(phase.attempts, jobs, now), jobs, progress, phase.digest)
    records, stop = stopping(records, jobs, None if suspend else phase.digest, SUSPENDED)
    changes: dict[str, Any] = {"attempts": history.prune(records, phase.digest), **_result(phase, observed)}
    if _is_seen(records, jobs):
        return phase.model_copy(update=changes | _running(records, progress)), stop
    if phase.state in MOVING:
        changes |= {"state": PhaseState.WAITING, "message": "the run is invalid"}
        changes |= {"progress": None, "queue": None, "retry_at": None, "held_by": ""}
    return phase.model_copy(update=changes), stop


def _is_seen(records: tuple[Attempt, ...], jobs: list[ObservedJob]) -> bool:
    """Whether anything is there that has not ended; what was only asked for is not."""
    going = any(not a.state.ended and a.state != AttemptState.ASKED for a in records)
    return going or any(job.state == JobState.LIVE for job in jobs)


def _running(records: tuple[Attempt, ...], progress: PhaseProgress | None) -> dict[str, Any]:
    said = next((a.message for a in reversed(records) if not a.state.ended), "")
    return {"state": PhaseState.RUNNING, "message": said, "progress": finite(progress)}


def _result(phase: PhaseStatus, observed: Observed) -> dict[str, Any]:
    """What was left meanwhile is kept, since its pods may be gone when the run makes sense again. Gates are judged then."""
    seen = observed.results.get(phase.name)
    if (
        seen is None
        or seen.digest != phase.digest
        or seen.stale is not None
        or not (artifact := plain(seen.artifact_digest))
    ):
        return {}
    return {"artifact_digest": artifact, "metrics": finite_metrics(seen.metrics)}
