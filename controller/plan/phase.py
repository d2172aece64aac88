"""One phase's share of a decision."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from controller.api.run import FailurePolicy
from controller.api.status import Attempt, AttemptState, PhaseProgress, PhaseState, PhaseStatus
from controller.plan import attempts as history
from controller.plan import strangers
from controller.plan.moments import later
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.resolve import ResolvedPhase
from controller.plan.said import SUSPENDED, said_of, with_meddling, with_rest
from controller.plan.timeouts import ending_due, overdue, stall_due, startup_due
from trainers import gates
from trainers.contract import FailureClass

HOPELESS = (PhaseState.FAILED, PhaseState.BLOCKED, PhaseState.NOT_SELECTED)


@dataclass(frozen=True)
class Situation:
    """What a phase's step depends on beside the phase itself."""

    run: str
    observed: Observed
    policy: FailurePolicy
    now: datetime
    inputs: Mapping[str, PhaseStatus]
    """Of this step, for the phases it builds on."""
    selected: bool
    halted: bool
    """The run's deadline has passed: nothing starts, what runs is stopped."""
    queue: str | None = None
    """In which jobs are to wait; None leaves it to the cluster."""


@dataclass(frozen=True)
class Step:
    status: PhaseStatus
    next_attempt: int
    """Number of the attempt that a start would have."""
    missing: int | None = None
    """An attempt that was asked for and is not there: to be asked for again."""
    stop: tuple[int, ...] = ()
    """Attempts to end."""
    live: bool = False
    due: datetime | None = None
    """When a live attempt has had its chance, if nothing changes."""


def step_phase(phase: ResolvedPhase, before: PhaseStatus | None, at: Situation) -> Step:
    """Where the phase stands. READY in the answer means that it could start now."""
    before = before or PhaseStatus(name=phase.name, type=phase.type.name)
    jobs = [job for job in at.observed.jobs if job.phase == phase.name]
    asked, digest = wanted(phase, at.inputs, before)
    taken = {number: owner for (name, number), owner in at.observed.taken.items() if name == phase.name}
    records = strangers.pass_by(history.join(before.attempts, jobs, at.now, taken), taken, at.now)
    records = history.with_work(records, jobs, at.observed.progress.get(phase.name), digest)
    records = _end_overdue(history.barred(records, phase.name, at.observed.barred), jobs, phase, at)
    result = _known_result(phase, digest, before, at.observed.results.get(phase.name))
    if result is not None:
        return _of(asked, before, _finished(phase, before, records, jobs, digest, result, at.now))
    records = history.without_result(records, before.attempts, digest, phase.settings)
    records = history.on_all_nodes(records) if _resumes(phase, before) else records
    return _of(asked, before, _unfinished(phase, before, records, jobs, digest, at))


def _of(asked: str, before: PhaseStatus, step: Step) -> Step:
    """With what stays the same for as long as the identity does."""
    image = before.image if before.digest == step.status.digest else ""
    return replace(step, status=step.status.model_copy(update={"asked": asked, "image": image, "again": before.again}))


def wanted(phase: ResolvedPhase, inputs: Mapping[str, PhaseStatus], before: PhaseStatus) -> tuple[str, str | None]:
    """What is asked for, and the phase's identity; known once all its inputs have finished.

    For the same words the identity stays what it was: another version of the operator may have other defaults, and what has
    finished, or runs, is none the worse for it.
    """
    artifacts = artifact_digests(phase, inputs)
    if artifacts is None:
        return "", None
    asked = phase.asked(artifacts, before.again or 0)
    if before.digest and before.asked == asked:
        return asked, before.digest
    return asked, phase.digest(artifacts, before.again or 0)


def artifact_digests(phase: ResolvedPhase, inputs: Mapping[str, PhaseStatus]) -> dict[str, str] | None:
    found = {name: inputs[name].artifact_digest for name in phase.inputs if inputs[name].state == PhaseState.SUCCEEDED}
    digests = {name: digest for name, digest in found.items() if digest is not None}
    return digests if len(digests) == len(phase.inputs) else None


def _known_result(
    phase: ResolvedPhase, digest: str | None, before: PhaseStatus, seen: ObservedResult | None
) -> ObservedResult | None:
    """A result for exactly this digest, seen now or remembered, that the gates of now can be judged by.

    Not every metric fits into what a pod says at its end. Where a gated one is missing, another attempt finds the result
    and judges it.
    """
    remembered = ObservedResult(before.digest or "", before.artifact_digest or "", before.metrics)
    for result in filter(None, (seen, remembered)):
        holds = result.digest == digest and result.artifact_digest and result.stale is None
        if holds and gates.has_figures(phase.spec.gates, result.metrics):
            return result
    return None


def _finished(
    phase: ResolvedPhase, before: PhaseStatus, records: tuple[Attempt, ...], jobs: list[ObservedJob],
    digest: str | None, result: ObservedResult, now: datetime,
) -> Step:  # fmt: skip
    missed = gates.missed(phase.spec.gates, result.metrics)
    state = PhaseState.FAILED if missed else PhaseState.SUCCEEDED
    again = before.state == state and before.digest == digest
    records, stop = stopping(records, jobs, keep=None, why="the phase has finished")
    last = records[-1] if records else None
    # One that ended between two looks was never seen at work.
    started = (before.started_at if before.digest == digest else None) or (last.started_at if last else None)
    status = PhaseStatus(
        name=phase.name,
        type=phase.type.name,
        state=state,
        message=history.short(missed),
        digest=digest,
        failure=FailureClass.GATE_FAILED if missed else None,
        artifact_digest=result.artifact_digest,
        metrics=finite_metrics(result.metrics),
        attempts=history.prune(records, digest),
        started_at=started,
        finished_at=before.finished_at if again else (last.finished_at if last else None) or now,
    )
    live = any(job.state == JobState.LIVE for job in jobs)
    return Step(status, _next_number(records, jobs), stop=stop, live=live)


def _unfinished(
    phase: ResolvedPhase, before: PhaseStatus, records: tuple[Attempt, ...], jobs: list[ObservedJob],
    digest: str | None, at: Situation,
) -> Step:  # fmt: skip
    mine = [a for a in records if a.digest == digest]
    started = _phase_started(phase, before, mine, digest)
    failures = history.failed(records, digest, phase.settings)
    verdict = history.judge(failures, at.policy, f"{at.run}/{phase.name}")
    late = _late(started, at) and not _rests(phase, before)
    state, said = _state(phase, digest, failures, verdict, late, at)
    records = _end_outgrown(records, jobs, history.nodes(failures, phase.nodes), at.queue)
    records, stop = stopping(records, jobs, digest if state == PhaseState.READY else None, said)
    going = [a for a in records if not a.state.ended]
    live = bool(going) or any(job.state == JobState.LIVE for job in jobs)
    if live and state in (PhaseState.READY, PhaseState.BACKING_OFF):
        state, said = PhaseState.RUNNING, said_of(going, _current(going, jobs), phase, digest, at.policy)
    current = _current(going, jobs) if state == PhaseState.RUNNING else None
    held_by = ""
    if state in (PhaseState.READY, PhaseState.RUNNING):
        held_by = strangers.in_the_way(phase.name, jobs, at.observed.held)
    status = PhaseStatus(
        name=phase.name,
        type=phase.type.name,
        state=state,
        message=strangers.waits_for(held_by) if held_by else with_meddling(with_rest(said, going, jobs), jobs),
        held_by=held_by,
        digest=digest,
        failure=failures[-1].failure if failures and state == PhaseState.FAILED and not late else None,
        attempts=history.prune(records, digest),
        started_at=started,
        finished_at=_end_of(before, failures, at.now) if state == PhaseState.FAILED else None,
        retry_at=verdict.retry_at if state == PhaseState.BACKING_OFF else None,
        progress=_progress(
            before, digest, at.observed.progress.get(phase.name) if state == PhaseState.RUNNING else None
        ),
        queue=current.queue if current else None,
    )
    due = _due(going[-1], current, status.progress, phase, at) if current else None
    missing = None if held_by else _missing(going, jobs, digest)
    return Step(status, _next_number(records, jobs), missing, stop, live, due)


def _end_overdue(
    records: tuple[Attempt, ...], jobs: list[ObservedJob], phase: ResolvedPhase, at: Situation
) -> tuple[Attempt, ...]:
    """Attempts that did not begin, go on or end in time are stopping from now on, and will have failed."""
    seen = {job.attempt: job for job in jobs if not job.past}
    progress = at.observed.progress.get(phase.name)
    result = []
    for record in records:
        job = seen.get(record.number)
        late = overdue(job, progress, at.policy, at.now) if job and record.state == AttemptState.RUNNING else None
        change: dict[str, Any] = {}
        if late is not None:
            change = {"state": AttemptState.STOPPING, "failure": late[0], "message": history.short(late[1])}
            change |= {"placed": _enough(record, job, phase) if late[0] == FailureClass.STARTUP_TIMEOUT else 0}
        elif (due := ending_due(record, phase.template.grace_seconds)) is not None and at.now >= due:
            change = {"state": AttemptState.STOPPING}
        result.append(record.model_copy(update=change))
    return tuple(result)


def _enough(record: Attempt, job: ObservedJob | None, phase: ResolvedPhase) -> int:
    """How many nodes a smaller attempt can have; 0 if it may not or would not be smaller."""
    placed = job.placed if job else 0
    return placed if phase.min_nodes <= placed < record.nodes else 0


def _end_outgrown(
    records: tuple[Attempt, ...], jobs: list[ObservedJob], nodes: int, queue: str | None
) -> tuple[Attempt, ...]:
    """Attempts that have not begun to run are stopping where another number of nodes, or another queue, is wanted now.

    Nothing is lost by it.
    """
    live = [job for job in jobs if job.state == JobState.LIVE and job.running_since is None and not job.failure]
    idle = {job.attempt for job in live}
    elsewhere = {job.attempt for job in live if _waits_elsewhere(job, queue)}
    why = dict.fromkeys(elsewhere, f"queue {queue} is asked for" if queue else "no queue is asked for any more")
    why |= {
        a.number: f"{nodes} nodes are wanted now" for a in records if a.number in idle and a.nodes not in (0, nodes)
    }
    return tuple(
        history.stopping(a, why[a.number]) if a.state == AttemptState.RUNNING and a.number in why else a
        for a in records
    )


def _waits_elsewhere(job: ObservedJob, queue: str | None) -> bool:
    if not queue:
        return bool(job.queue_asked) and job.queue_name == job.queue_asked
    return job.queue_name not in (None, queue)


def _current(going: list[Attempt], jobs: list[ObservedJob]) -> ObservedJob | None:
    """The live job of the attempt that counts."""
    wanted = going[-1].number if going else None
    return next((job for job in jobs if job.attempt == wanted and job.state == JobState.LIVE), None)


def _due(
    record: Attempt, job: ObservedJob, progress: PhaseProgress | None, phase: ResolvedPhase, at: Situation
) -> datetime | None:
    ending = ending_due(record, phase.template.grace_seconds)
    moments = (startup_due(job, at.policy), stall_due(job, progress, at.policy), ending)
    return min(filter(None, moments), default=None)


def _state(  # noqa: PLR0911 -- a ladder of reasons, the first that holds counts
    phase: ResolvedPhase,
    digest: str | None,
    failures: list[Attempt],
    verdict: history.Verdict,
    late: bool,
    at: Situation,
) -> tuple[PhaseState, str]:
    if not at.selected:
        return PhaseState.NOT_SELECTED, "not part of what was asked for"
    if digest is None:
        return _waiting(phase, at.inputs)
    if late:
        return PhaseState.FAILED, f"took longer than phaseDeadlineSeconds {at.policy.phase_deadline_seconds:g}"
    if verdict.final:
        return PhaseState.FAILED, failures[-1].message
    if phase.suspend:
        return PhaseState.SUSPENDED, SUSPENDED
    if at.halted:
        return PhaseState.WAITING, "the run's deadline has passed"
    if verdict.retry_at is not None and at.now < verdict.retry_at:
        return PhaseState.BACKING_OFF, f"{failures[-1].failure}: {failures[-1].message}"
    return PhaseState.READY, ""


def _waiting(phase: ResolvedPhase, inputs: Mapping[str, PhaseStatus]) -> tuple[PhaseState, str]:
    bad = [name for name in phase.inputs if inputs[name].state in HOPELESS]
    if bad:
        return PhaseState.BLOCKED, f"needs {', '.join(bad)}"
    missing = [name for name in phase.inputs if inputs[name].state != PhaseState.SUCCEEDED]
    return PhaseState.WAITING, f"waits for {', '.join(missing)}"


def stopping(
    records: tuple[Attempt, ...], jobs: list[ObservedJob], keep: str | None, why: str
) -> tuple[tuple[Attempt, ...], tuple[int, ...]]:
    """Attempts for anything but ``keep`` are to end. One that is over and shows up again was started late: end it again.

    ``why``: nothing is kept.
    """
    unwanted = {
        a.number for a in records if not a.state.ended and (a.digest != keep or a.state == AttemptState.STOPPING)
    }
    over = {a.number for a in records if a.state in (AttemptState.STOPPED, AttemptState.FAILED)}
    unwanted |= {job.attempt for job in jobs if job.state == JobState.LIVE and job.attempt in over}
    said = why if keep is None else history.OTHER_SETTINGS
    marked = tuple(history.stopping(a, said) if a.number in unwanted and not a.state.ended else a for a in records)
    return marked, tuple(sorted(unwanted))


def _missing(going: list[Attempt], jobs: list[ObservedJob], digest: str | None) -> int | None:
    """An attempt we count on that nobody sees. Never while another one is live: two would write to one directory."""
    if any(job.state == JobState.LIVE for job in jobs):
        return None
    seen = {job.attempt for job in jobs}
    wanted = [
        a.number for a in going if a.state != AttemptState.STOPPING and a.digest == digest and a.number not in seen
    ]
    return wanted[-1] if wanted else None


def _next_number(records: tuple[Attempt, ...], jobs: list[ObservedJob]) -> int:
    return max([0, *(a.number for a in records), *(job.attempt for job in jobs)]) + 1


def _phase_started(
    phase: ResolvedPhase, before: PhaseStatus, mine: list[Attempt], digest: str | None
) -> datetime | None:
    """Since when the phase is at work. Its time begins anew when it goes on after a suspension, as that of a Job does."""
    if before.digest == digest and before.started_at is not None and not _resumes(phase, before):
        return before.started_at
    over = {a.number for a in before.attempts if a.state.ended or a.state == AttemptState.STOPPING}
    return min((a.started_at for a in mine if a.started_at and a.number not in over), default=None)


def _resumes(phase: ResolvedPhase, before: PhaseStatus) -> bool:
    return before.state == PhaseState.SUSPENDED and not phase.suspend


def _rests(phase: ResolvedPhase, before: PhaseStatus) -> bool:
    """No time runs while a phase is suspended; but what has failed is not revived by suspending it."""
    return phase.suspend and before.state != PhaseState.FAILED


def _progress(before: PhaseStatus, digest: str | None, report: PhaseProgress | None) -> PhaseProgress | None:
    """The last report. One that tells no step yet is of an attempt that will go on about where the one before it was."""
    told = finite(report)
    old = before.progress if before.digest == digest else None
    if old is None or not old.total_steps or (told is not None and (told.step or told.total_steps)):
        return told
    return (told or PhaseProgress()).model_copy(
        update={n: getattr(old, n) for n in ("step", "total_steps", "checkpoint_step")}
    )


def finite(report: PhaseProgress | None) -> PhaseProgress | None:
    """JSON has no infinities, and a status with NaN in it is never equal to itself."""
    if report is None:
        return None
    figures = {name: getattr(report, name) for name in ("loss", "tokens_per_second", "eta_seconds")}
    lost = {name: None for name, value in figures.items() if value is not None and not math.isfinite(value)}
    return report.model_copy(update=lost)


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _late(started: datetime | None, at: Situation) -> bool:
    limit = at.policy.phase_deadline_seconds
    return limit is not None and started is not None and at.now >= later(started, limit)


def _end_of(before: PhaseStatus, failures: list[Attempt], now: datetime) -> datetime:
    return before.finished_at or (failures[-1].finished_at if failures else None) or now
