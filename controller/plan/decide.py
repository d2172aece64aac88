"""One reconcile step: from the run and what is seen to a status and actions.

Pure and total: the same arguments give the same answer, and every combination has one. Nothing is concluded from an
action having been asked for, only from what is observed; so an action that got lost is asked for again.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, RunStatus
from controller.plan import again, clocks, leftovers
from controller.plan import attempts as history
from controller.plan.at_once import NODES, devices_of, taken_by, too_much
from controller.plan.bounded import Bounded, bounded
from controller.plan.check import check_run
from controller.plan.conditions import update
from controller.plan.job import PhaseJob, build_job
from controller.plan.moments import later
from controller.plan.observed import JobState, Observed
from controller.plan.phase import Situation, Step, artifact_digests, step_phase
from controller.plan.refusal import Refusal, is_refused, refuse
from controller.plan.removed import removed_steps
from controller.plan.resolve import ResolvedPhase, resolve
from controller.plan.sizes import is_unknown, run_sizes, sentence
from controller.plan.verdict import MOVING, run_claims, summary
from trainers.contract import FailureClass

ENDED = (PhaseState.SUCCEEDED, PhaseState.FAILED, PhaseState.BLOCKED, PhaseState.NOT_SELECTED)

HELD_AGAIN = timedelta(seconds=15)
"""Between two looks at what is waited for: it is not this run's, so nobody need tell of its end."""


@dataclass(frozen=True)
class Apply:
    """See that this job exists. Applying the same job twice is one job."""

    job: PhaseJob


@dataclass(frozen=True)
class Delete:
    """See that this attempt ends and its job is gone. An absent one is a success."""

    phase: str
    attempt: int


@dataclass(frozen=True)
class Reclaim:
    """See that the job of this attempt says whose it is, as it did when it was made: so it goes when the run goes."""

    phase: str
    attempt: int


Action = Apply | Delete | Reclaim


@dataclass(frozen=True)
class Decision:
    status: Bounded
    actions: tuple[Action, ...] = ()
    delete_run: bool = False
    """The run has had its time: it goes, if it is still as it was when it was read."""
    requeue_after: timedelta | None = None
    """When time alone changes the answer; None if only an observation can."""


def decide(run: AlignmentRun, observed: Observed, now: datetime, only: Collection[str] | None = None) -> Decision:
    """What to do next. ``only`` restricts the run to some phases; others count if they have finished."""
    before = clocks.written(run.status or RunStatus(), run.metadata.creation_timestamp, now)
    observed = clocks.seen(observed, now)
    generation = run.metadata.generation
    if is_final(before, generation) and not _asks(run, before):
        return _at_rest(run, before, observed, now)
    if problems := [*map(str, check_run(run)), *observed.problems]:
        return refused(run, before, "; ".join(problems), observed, now)
    obeyed = again.obey(run, before)
    if is_final(before, generation) and obeyed.phases == before.phases:
        return _at_rest(run, obeyed, observed, now)
    phases = resolve(run)
    started = _run_started(run, before, now)
    before = _time_anew(obeyed) if is_terminal(before) else obeyed
    halted = _run_is_late(run, started, now)
    steps = _steps(run, phases, before, observed, now, only, halted)
    steps = _with_needs(run, phases, steps, before, observed) | removed_steps(run, before, observed, now)
    steps, jobs = _start(run, phases, steps, observed)
    stops: list[Action] = [Delete(name, number) for name, step in steps.items() for number in step.stop]
    status = _status(run, before, steps, started, halted, now)
    stops += [Delete(job.phase, job.attempt) for job in leftovers.outlived(run, before, observed, now)]
    actions = (*dict.fromkeys(stops), *map(Apply, jobs), *_reclaims(observed, stops))
    return Decision(status, actions, requeue_after=_requeue(run, status, steps, observed, now))


def rests(run: AlignmentRun) -> bool:
    """Whether it has ended: nobody has to look at the cluster until :func:`controller.plan.leftovers.next_chore`."""
    status = run.status or RunStatus()
    return is_final(status, run.metadata.generation) and not _asks(run, status) and not going(status)


def _asks(run: AlignmentRun, status: RunStatus) -> bool:
    return again.is_news(run.metadata.annotations.get(meta.ANNOTATION_RETRY), status)


def refused(run: AlignmentRun, before: RunStatus, message: str, observed: Observed, now: datetime) -> Decision:
    """For a run that makes no sense, which may be one that cannot even be read. ``message``: every problem."""
    refusal = Refusal(message, run.spec.suspend, run.metadata.generation)
    status, stop = refuse(before, refusal, observed, now)
    stops = [Delete(phase, number) for phase, number in stop]
    return Decision(bounded(status, run), (*stops, *_reclaims(observed, stops)))


def going(status: RunStatus) -> bool:
    """Whether an attempt has not been seen to end."""
    return any(not attempt.state.ended for phase in status.phases for attempt in phase.attempts)


def _at_rest(run: AlignmentRun, before: RunStatus, observed: Observed, now: datetime) -> Decision:
    """An end stays. Jobs of a finished run go when their time has come; a live one has outlived a lost deletion."""
    before = bounded(before, run)
    end = leftovers.end_of_run(run, before)
    if end is not None and end <= now:
        return Decision(before, _end_live(observed), delete_run=True)
    due = leftovers.next_chore(run, before)
    if due is None or now < due:
        return Decision(before, _end_live(observed), requeue_after=due - now if due else None)
    jobs = [job for job in observed.jobs if not job.past]
    status = before if jobs else bounded(before.model_copy(update={"jobs_deleted": True}), run)
    actions = tuple(Delete(job.phase, job.attempt) for job in jobs)
    return Decision(status, actions, requeue_after=end - now if end else None)


def _run_started(run: AlignmentRun, before: RunStatus, now: datetime) -> datetime:
    """A run that goes on after its end, because it was edited, or after a suspension, has its time anew."""
    suspension = before.condition(meta.SUSPENDED)
    slept = suspension is not None and suspension.status == "True" and suspension.reason == meta.RUN_SUSPENDED
    resumed = slept and not run.spec.suspend
    return now if before.started_at is None or is_terminal(before) or resumed else before.started_at


def _time_anew(before: RunStatus) -> RunStatus:
    """So have its phases, but for those that failed because they had taken too long."""
    kept = [
        p.state == PhaseState.SUCCEEDED or (p.state == PhaseState.FAILED and p.failure is None) for p in before.phases
    ]
    phases = [
        p if keep else p.model_copy(update={"started_at": None}) for p, keep in zip(before.phases, kept, strict=True)
    ]
    return before.model_copy(update={"phases": tuple(phases)})


def is_terminal(status: RunStatus) -> bool:
    return status.is_true(meta.SUCCEEDED) or status.is_true(meta.FAILED)


def is_final(status: RunStatus, generation: int | None) -> bool:
    """An end that only an edit can change. That a run makes no sense is none: the cause may be the operator's."""
    return is_terminal(status) and not is_refused(status) and status.observed_generation == generation


def _end_live(observed: Observed) -> tuple[Action, ...]:
    return tuple(Delete(job.phase, job.attempt) for job in observed.jobs if job.state == JobState.LIVE)


def _reclaims(observed: Observed, stops: Collection[Action]) -> list[Action]:
    """Last of what is done: work does not wait for it."""
    disowned = [job for job in observed.jobs if job.disowned and Delete(job.phase, job.attempt) not in stops]
    return [Reclaim(job.phase, job.attempt) for job in disowned]


def _run_is_late(run: AlignmentRun, started: datetime, now: datetime) -> bool:
    limit = None if run.spec.suspend else run.spec.failure_policy.run_deadline_seconds
    return limit is not None and now >= later(started, limit)


def _steps(
    run: AlignmentRun, phases: tuple[ResolvedPhase, ...], before: RunStatus, observed: Observed, now: datetime,
    only: Collection[str] | None, halted: bool,
) -> dict[str, Step]:  # fmt: skip
    steps: dict[str, Step] = {}
    for phase in phases:
        at = Situation(
            run=run.name,
            observed=observed,
            policy=run.spec.failure_policy,
            now=now,
            inputs={name: steps[name].status for name in phase.inputs},
            selected=only is None or phase.name in only,
            halted=halted,
            queue=run.spec.queue_name,
        )
        steps[phase.name] = step_phase(phase, before.phase_status(phase.name), at)
    return steps


def _with_needs(
    run: AlignmentRun, phases: tuple[ResolvedPhase, ...], steps: Mapping[str, Step], before: RunStatus, observed: Observed
) -> dict[str, Step]:  # fmt: skip
    """What unfinished phases need of a device. It is worked out once for a generation, and anew with what has become known
    or when an attempt has fewer nodes or smaller passes than were asked for.
    """
    said = {phase.name: phase for phase in before.phases if phase.needs}
    same = before.observed_generation == run.metadata.generation and before.started_at is not None
    left = [name for name, step in steps.items() if step.status.state not in ENDED]
    unknown = any(is_unknown(phase.needs) for phase in said.values())
    extents = _extents(run, phases, [step.status for step in steps.values()])
    kept = same and not (unknown and observed.configs) and extents == _extents(run, phases, before.phases)
    sizes = {} if kept else run_sizes(run, observed.configs, extents=extents)
    updated = dict(steps)
    for name in left:
        size, old = sizes.get(name), said.get(name)
        needs, fits = (sentence(size), size.fits) if size else (old.needs, old.fits) if old and kept else ("", None)
        status = steps[name].status.model_copy(update={"needs": needs, "fits": fits})
        updated[name] = replace(steps[name], status=status)
    return updated


def _extents(
    run: AlignmentRun, phases: tuple[ResolvedPhase, ...], statuses: Iterable[PhaseStatus]
) -> dict[str, history.Extent]:
    """Of phases whose attempt has less than was asked for."""
    known = {status.name: status for status in statuses if status.state not in ENDED}
    found = {phase.name: _extent(run, phase, known[phase.name]) for phase in phases if phase.name in known}
    asked = {phase.name: history.Extent(phase.nodes) for phase in phases}
    return {name: extent for name, extent in found.items() if extent != asked[name]}


def _extent(run: AlignmentRun, phase: ResolvedPhase, status: PhaseStatus) -> history.Extent:
    return history.extent(status.attempts, status.digest, phase.settings, phase.nodes, run.spec.failure_policy)


def _start(
    run: AlignmentRun, phases: tuple[ResolvedPhase, ...], steps: Mapping[str, Step], observed: Observed
) -> tuple[dict[str, Step], list[PhaseJob]]:
    """Start what is ready while there is room, and ask again for what was asked for and is not there."""
    live, capacity = sum(step.live for step in steps.values()), observed.capacity
    ready = [n for n, step in steps.items() if step.status.state == PhaseState.READY and not step.status.held_by]
    room = len(ready) if capacity is None else max(capacity - live, 0)
    alone = live + len(ready) == 1
    taken = taken_by((step.status for step in steps.values()), phases) if observed.most else Counter[str]()
    updated, jobs = dict(steps), []
    for phase in phases:
        step = steps[phase.name]
        attempt = step.missing
        if phase.name in ready[:room]:
            updated[phase.name], attempt = _begun(run, phase, step, taken, observed.most)
        if attempt is not None:
            jobs.append(_job(run, phase, updated, attempt, alone))
    return updated, jobs


def _begun(
    run: AlignmentRun, phase: ResolvedPhase, step: Step, taken: Counter[str], most: Mapping[str, int]
) -> tuple[Step, int | None]:
    """With the number of its attempt, which counts in ``taken`` from now on; without, where that would be too much at once."""
    asked = _asked(run, phase, step, step.next_attempt)
    record = asked.status.attempts[-1]
    if said := too_much(record, taken, most):
        return replace(step, status=step.status.model_copy(update={"message": said})), None
    taken.update({NODES: record.nodes, **record.takes})
    return asked, step.next_attempt


def _asked(run: AlignmentRun, phase: ResolvedPhase, step: Step, attempt: int) -> Step:
    before, digest = step.status.attempts, step.status.digest or ""
    next_one = history.following(before, digest, phase.settings, phase.nodes, run.spec.failure_policy)
    nodes, times = next_one.nodes, next_one.halvings
    record = Attempt(
        number=attempt, digest=digest, settings=phase.settings, halvings=times, nodes=nodes, takes=devices_of(phase, nodes),
        state=AttemptState.ASKED,
    )  # fmt: skip
    said = "starting"
    said += f", on {nodes} of {phase.nodes} nodes" if nodes < phase.nodes else ""
    said += f", with what its memory goes into halved {times}x" if times else ""
    changes = {"state": PhaseState.RUNNING, "message": said, "attempts": (*before, record)}
    return replace(step, status=step.status.model_copy(update=changes), live=True)


def _job(run: AlignmentRun, phase: ResolvedPhase, steps: Mapping[str, Step], attempt: int, alone: bool) -> PhaseJob:
    inputs = artifact_digests(phase, {name: steps[name].status for name in phase.inputs})
    digest = steps[phase.name].status.digest
    assert inputs is not None, "only a phase whose inputs have finished is started"
    assert digest is not None
    status = steps[phase.name].status
    halved, nodes = next(((a.halvings, a.nodes) for a in status.attempts if a.number == attempt), (0, 0))
    return build_job(run, phase, attempt, digest, inputs, _avoided(run, status), alone, halved, nodes)


def _avoided(run: AlignmentRun, status: PhaseStatus) -> tuple[str, ...]:
    """Nodes on which the infrastructure failed this phase."""
    if not run.spec.failure_policy.avoid_failed_nodes:
        return ()
    bad = [a.node for a in status.attempts if a.failure == FailureClass.INFRASTRUCTURE and a.node]
    return tuple(sorted(set(bad)))


def _status(
    run: AlignmentRun, before: RunStatus, steps: Mapping[str, Step], started: datetime, halted: bool, now: datetime
) -> Bounded:
    wanted = [entry.name for entry in run.phases]
    phases = tuple(steps[name].status for name in (*wanted, *(name for name in steps if name not in wanted)))
    live = any(step.live for step in steps.values())
    generation = run.metadata.generation
    claims = run_claims(run, phases, live, halted, now)
    status = RunStatus(
        observed_generation=generation,
        started_at=started,
        workspace=before.workspace,
        retry=before.retry,
        folder=before.folder,
        backend=before.backend,
        phases=phases,
        conditions=update(before.conditions, claims, generation, now),
    )
    times: dict[str, datetime | None] = {}
    if is_terminal(status) and is_terminal(before):
        # An edit that changed nothing of what is finished.
        times = {"started_at": before.started_at or started, "finished_at": before.finished_at or now}
    elif is_terminal(status):
        times = {"finished_at": now}
    return bounded(status.model_copy(update={**summary(status), **times}), run)


def _requeue(
    run: AlignmentRun, status: RunStatus, steps: Mapping[str, Step], observed: Observed, now: datetime
) -> timedelta | None:
    """Until the next moment at which a wait, a deadline or a stall comes due."""
    policy = run.spec.failure_policy
    if is_terminal(status):
        due = leftovers.next_chore(run, status)
        return max(due - now, timedelta()) if due else None
    moments = [phase.retry_at for phase in status.phases]
    moments += [step.due for step in steps.values()]
    moments += [_after(p.started_at, policy.phase_deadline_seconds) for p in status.phases if p.state in MOVING]
    moments += [_after(p.progress.updated_at, policy.stalled_after_seconds) for p in status.phases if p.progress]
    moments.append(_after(status.started_at, None if run.spec.suspend else policy.run_deadline_seconds))
    moments.append(leftovers.next_due(run, status, observed, now))
    moments += [now + HELD_AGAIN for phase in status.phases if phase.held_by]
    ahead = [moment - now for moment in moments if moment is not None and moment > now]
    return min(ahead, default=None)


def _after(start: datetime | None, seconds: float | None) -> datetime | None:
    return later(start, seconds) if start is not None and seconds is not None else None
