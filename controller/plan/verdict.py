"""What the phases' states mean for the run: its conditions and the words for the printer columns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, PhaseState, PhaseStatus, QueueState, RunStatus
from controller.plan.conditions import Claim
from controller.plan.moments import later
from controller.plan.said import SUSPENDED

LONGEST = 1e12
"""Seconds that are told; what says more is not a time."""

MOVING = (PhaseState.READY, PhaseState.RUNNING, PhaseState.BACKING_OFF)


def run_claims(
    run: AlignmentRun, phases: Sequence[PhaseStatus], live: bool, halted: bool, now: datetime
) -> dict[str, Claim]:
    failed = _failure(run, phases, live, halted)
    wanted = [p for p in phases if p.state != PhaseState.NOT_SELECTED]
    succeeded = not live and all(p.state == PhaseState.SUCCEEDED for p in wanted)
    suspended = None if failed or succeeded else _suspension(run, phases)
    return {
        meta.ACCEPTED: Claim(True, meta.VALID),
        meta.PROGRESSING: _progressing(phases, bool(failed or succeeded), suspended),
        meta.SUSPENDED: suspended or Claim(False, meta.NOT_SUSPENDED),
        meta.STALLED: _stalled(run, phases, now),
        meta.SUCCEEDED: Claim(succeeded, meta.ALL_PHASES_SUCCEEDED if succeeded else meta.NOT_FINISHED),
        meta.FAILED: failed or Claim(False, meta.NOT_FINISHED),
    } | _admission(phases)


def _failure(run: AlignmentRun, phases: Sequence[PhaseStatus], live: bool, halted: bool) -> Claim | None:
    """Failed once nothing runs and nothing can start; until then independent phases finish their work."""
    if live or all(p.state in (PhaseState.SUCCEEDED, PhaseState.NOT_SELECTED) for p in phases):
        return None
    if halted:
        limit = run.spec.failure_policy.run_deadline_seconds
        return Claim(True, meta.DEADLINE_EXCEEDED, f"the run took longer than runDeadlineSeconds {limit:g}")
    bad = [p for p in phases if p.state in (PhaseState.FAILED, PhaseState.BLOCKED)]
    if not bad or any(p.state in (*MOVING, PhaseState.SUSPENDED) for p in phases):
        return None
    told = [p for p in bad if p.state == PhaseState.FAILED] or bad
    late = all(p.state == PhaseState.FAILED and p.failure is None for p in told)
    return Claim(True, meta.DEADLINE_EXCEEDED if late else meta.PHASE_FAILED, "; ".join(map(_told, told)))


def _told(phase: PhaseStatus) -> str:
    return (
        f"phase {phase.name}: {phase.failure}: {phase.message}"
        if phase.failure
        else f"phase {phase.name}: {phase.message}"
    )


def _suspension(run: AlignmentRun, phases: Sequence[PhaseStatus]) -> Claim | None:
    names = [p.name for p in phases if p.state == PhaseState.SUSPENDED]
    ending = "; ".join(f"{p.name}: {p.message.removeprefix(f'{SUSPENDED}; ')}" for p in phases if _is_stopping(p))
    if run.spec.suspend:
        return Claim(True, meta.RUN_SUSPENDED, "; ".join(filter(None, ("spec.suspend is true", ending))))
    if names and not any(p.state in MOVING for p in phases):
        return Claim(True, meta.PHASES_SUSPENDED, "; ".join(filter(None, (f"suspended: {', '.join(names)}", ending))))
    return None


def _admission(phases: Sequence[PhaseStatus]) -> dict[str, Claim]:
    """What the queue says; only while something waits in it or has been let in. A run need not name one to be held by one."""
    queued = [p for p in phases if p.queue is not None]
    if not queued:
        return {}
    waiting = [p for p in queued if p.queue and p.queue.state != QueueState.ADMITTED]
    first = waiting[0].queue if waiting else None
    if first is None:
        return {meta.ADMITTED: Claim(True, QueueState.ADMITTED, _names("admitted", queued))}
    return {meta.ADMITTED: Claim(False, first.state, _queues_words(waiting))}


def _queues_words(phases: Iterable[PhaseStatus]) -> str:
    """What is said of several stands once."""
    names: dict[str, list[str]] = {}
    for phase in phases:
        names.setdefault(phase.queue.message if phase.queue else "", []).append(phase.name)
    return "; ".join(f"{', '.join(of_these)}: {words}" for words, of_these in names.items())


def _progressing(phases: Sequence[PhaseStatus], ended: bool, suspended: Claim | None) -> Claim:
    if ended:
        return Claim(False, meta.FINISHED)
    if suspended is not None:
        return Claim(False, suspended.reason, suspended.message)
    return _at_work(phases) or _waiting(phases)


def _at_work(phases: Sequence[PhaseStatus]) -> Claim | None:
    """All that is under way. What comes first gives the reason."""
    running = [p for p in phases if p.state == PhaseState.RUNNING]
    seen, asked = [p for p in running if _is_seen(p)], [p for p in running if not _is_seen(p) and not p.held_by]
    queued = [p for p in seen if p.waits_in_queue and not _is_stopping(p)]
    at_work = [p for p in seen if not p.waits_in_queue and not _is_stopping(p)]
    barred = [p for p in asked if _is_barred(p)]
    said = [
        Claim(True, meta.PHASES_RUNNING, _names("running", at_work)),
        Claim(True, meta.STOPPING, _messages(p for p in running if _is_stopping(p))),
        Claim(True, meta.WAITING_FOR_EARLIER_RUN, _messages(p for p in phases if p.held_by)),
        Claim(True, meta.JOB_FORBIDDEN, "; ".join(f"{p.name} {p.attempts[-1].message}" for p in barred)),
        Claim(True, meta.STARTING, _names("starting", [p for p in asked if p not in barred])),
        Claim(True, meta.QUEUED, f"waiting for a queue: {_queues_words(queued)}" if queued else ""),
    ]
    found = [claim for claim in said if claim.message]
    return replace(found[0], message="; ".join(claim.message for claim in found)) if found else None


def _names(what: str, phases: Sequence[PhaseStatus]) -> str:
    return f"{what}: {', '.join(p.name for p in phases)}" if phases else ""


def _messages(phases: Iterable[PhaseStatus]) -> str:
    return "; ".join(f"{p.name}: {p.message}" for p in phases)


def _is_seen(phase: PhaseStatus) -> bool:
    return any(a.state != AttemptState.ASKED and not a.state.ended for a in phase.attempts)


def _is_stopping(phase: PhaseStatus) -> bool:
    """Whether nothing of it goes on but what is to end."""
    going = [a.state for a in phase.attempts if not a.state.ended]
    return AttemptState.STOPPING in going and AttemptState.RUNNING not in going


def _is_barred(phase: PhaseStatus) -> bool:
    return any(a.barred for a in phase.attempts[-1:])


def _waiting(phases: Sequence[PhaseStatus]) -> Claim:
    waiting = [p.name for p in phases if p.state == PhaseState.BACKING_OFF]
    if waiting:
        return Claim(True, meta.BACKING_OFF, f"will try again: {', '.join(waiting)}")
    held = _messages(p for p in phases if p.state == PhaseState.READY and p.message)
    return Claim(True, meta.WAITING_FOR_CAPACITY, held)


def _stalled(run: AlignmentRun, phases: Sequence[PhaseStatus], now: datetime) -> Claim:
    limit = run.spec.failure_policy.stalled_after_seconds
    running = [p for p in phases if p.state == PhaseState.RUNNING and p.progress and p.progress.updated_at]
    stuck = [
        p.name for p in running if p.progress and p.progress.updated_at and now >= later(p.progress.updated_at, limit)
    ]
    if stuck:
        return Claim(True, meta.NO_PROGRESS, f"no progress for {limit:g} s: {', '.join(stuck)}")
    return Claim(False, meta.MAKING_PROGRESS)


# ---------------------------------------------------------------- printer columns


def summary(status: RunStatus) -> dict[str, str | int]:
    """The columns of `kubectl get arun`. The figures are those of the first running phase that reports any."""
    done = sum(p.state == PhaseState.SUCCEEDED for p in status.phases)
    running = [p for p in status.phases if p.state == PhaseState.RUNNING]
    reports = [p.progress for p in running if p.progress]
    report = next((found for found in reports if found.updated_at), reports[0] if reports else None)
    percent = _percent(status.phases)
    columns: dict[str, str | int] = {
        "phase": _phase_column(status, running),
        "progress": f"{done}/{len(status.phases)} ({percent}%)",
        "percent": percent,
    }
    if report is not None:
        columns |= {
            "step": f"{report.step}/{report.total_steps}" if report.total_steps else "",
            "loss": f"{report.loss:.4g}" if report.loss is not None else "",
            "tokens_per_second": f"{report.tokens_per_second:.0f}" if report.tokens_per_second is not None else "",
            "eta": duration(report.eta_seconds) if report.eta_seconds is not None else "",
        }
    return columns


def in_line(status: RunStatus) -> bool:
    """Whether all that has begun waits for its queue."""
    running = [phase for phase in status.phases if phase.state == PhaseState.RUNNING]
    return bool(running) and all(phase.waits_in_queue for phase in running)


def _percent(phases: Sequence[PhaseStatus]) -> int:
    """Phases count alike: how long the next one takes is not known before it runs."""
    return int(100 * sum(map(_done, phases)) / len(phases)) if phases else 0


def _done(phase: PhaseStatus) -> float:
    if phase.state == PhaseState.SUCCEEDED:
        return 1.0
    report = phase.progress
    return min(report.step / report.total_steps, 1.0) if report and report.total_steps else 0.0


def _phase_column(status: RunStatus, running: Sequence[PhaseStatus]) -> str:
    for kind in (meta.SUCCEEDED, meta.FAILED, meta.SUSPENDED):
        if status.is_true(kind):
            return kind
    if in_line(status):
        return "Queued"
    if running:
        return ",".join(p.name for p in running)
    return "BackingOff" if any(p.state == PhaseState.BACKING_OFF for p in status.phases) else "Waiting"


def duration(seconds: float) -> str:
    """`42s`, `3m20s`, `5h07m`, `2d03h`."""
    if math.isnan(seconds):
        return "-"
    total = int(min(max(seconds, 0), LONGEST) + 0.5)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
