"""Phases that the spec does not have, because an edit took them out or gave them another name, and of which something goes on.

Nobody wants what they would leave, and it keeps devices and writes. So it is asked to end, as by any edit, and the status has the
phase until it is gone. That the status does not know of a job is no excuse: whatever is the run's and lives is told.
"""

from datetime import datetime
from typing import Any

from controller.api.run import AlignmentRun
from controller.api.status import PhaseState, PhaseStatus, RunStatus
from controller.plan import attempts as history
from controller.plan.observed import JobState, Observed
from controller.plan.phase import Step, finite, stopping
from controller.plan.said import with_meddling, with_rest

SAID = "is not in the spec any more: its attempt is being stopped"
GONE = "its phase is not in the spec any more"
NOT_KNOWN = "unknown"
"""Type of a phase of which there is a job alone."""
AT_REST: dict[str, Any] = {
    "failure": None, "finished_at": None, "retry_at": None, "queue": None, "held_by": "", "needs": "", "fits": None,
}  # fmt: skip


def removed_steps(run: AlignmentRun, before: RunStatus, observed: Observed, now: datetime) -> dict[str, Step]:
    """By name. Of a phase of which nothing goes on there is none: it is forgotten."""
    wanted = {entry.name for entry in run.phases}
    live = (job.phase for job in observed.jobs if job.state == JobState.LIVE)
    names = dict.fromkeys((*(phase.name for phase in before.phases), *live))
    steps = ((name, _step(name, before.phase_status(name), observed, now)) for name in names if name not in wanted)
    return {name: step for name, step in steps if step.live}


def _step(name: str, before: PhaseStatus | None, observed: Observed, now: datetime) -> Step:
    before = before or PhaseStatus(name=name, type=NOT_KNOWN)
    jobs = [job for job in observed.jobs if job.phase == name]
    records, stop = stopping(history.join(before.attempts, jobs, now), jobs, None, GONE)
    live = any(not a.state.ended for a in records) or any(job.state == JobState.LIVE for job in jobs)
    changes = {
        "state": PhaseState.RUNNING,
        "message": with_meddling(with_rest(SAID, (), jobs), jobs),
        "attempts": history.prune(records, before.digest),
        "progress": finite(observed.progress.get(name)),
    }
    status = before.model_copy(update=AT_REST | changes)
    return Step(status, max((a.number for a in records), default=0) + 1, stop=stop, live=live)
