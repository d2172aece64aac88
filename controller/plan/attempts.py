"""The attempts at a phase: what is remembered joined with what is seen, and whether one more may follow."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from controller.api.run import Backoff, FailurePolicy, RetryBudget
from controller.api.status import Attempt, AttemptState, PhaseProgress
from controller.api.text import plain
from controller.plan.moments import later
from controller.plan.observed import JobState, ObservedJob
from trainers.contract import FAILURES, FailureClass

KEPT = 3
"""Attempts that are kept as they were: failures that count, and others that have ended."""

KINDS = 12
"""Records of older ones: settings × ends."""

STOPPED = "stopped: {}"
OTHER_SETTINGS = "its settings or inputs have changed"

OLD_MESSAGE_LIMIT = 120

OF_THE_PLATFORM = (
    FailureClass.INFRASTRUCTURE, FailureClass.INTERRUPTED, FailureClass.STARTUP_TIMEOUT, FailureClass.STALLED,
)  # fmt: skip
"""Failures that say nothing of the run, so that progress gives their retries back. One that ran out of memory does so again."""

BARRED = "waits, because its job may not be made now"

DELETED = "its job was deleted, and not by the operator"

GIVEN_AWAY = "its job is not the run's any more: {} has its name, and is left alone"

NOBODY: Mapping[int, str] = MappingProxyType({})

WAS_OVER = "was over before attempt {}, of which this status did not know"


def join(
    before: Sequence[Attempt], jobs: Iterable[ObservedJob], now: datetime, taken: Mapping[int, str] = NOBODY
) -> tuple[Attempt, ...]:
    """Attempts by number. An end once seen stands, so stale and repeated observations do no harm.

    ``taken``: whose the objects are that have the names of the jobs of some.
    """
    records = {attempt.number: attempt for attempt in before}
    seen = {job.attempt: job for job in jobs if not job.past}
    newest = max(records, default=0)
    for number, job in seen.items():
        # The job of an attempt that has been pruned: whatever it was, it has been dealt with.
        if number in records or number > newest or job.state == JobState.LIVE:
            records[number] = _advance(records.get(number), job, now)
    following = max(seen, default=0)
    for number, record in records.items():
        known = record.state != AttemptState.ASKED or following > number
        if number not in seen and not record.state.ended and known:
            records[number] = _gone(record, following, taken.get(number, ""), now)
    return tuple(records[number] for number in sorted(records))


def _gone(record: Attempt, following: int, owner: str, now: datetime) -> Attempt:
    """The end of one that was seen, and is not there any more.

    We ended it, or it was about to fail and took its end with it. Else somebody else has deleted its job: that counts and
    backs off as any failure, or whoever deletes our jobs and we who make them would keep each other busy for ever. One
    that has a follower was over before it, as its status would say if it were not older than the cluster: we never
    start two.
    """
    change: dict[str, object] = {"state": _after_stopping(record), "finished_at": now}
    if record.state != AttemptState.STOPPING and record.failure is None:
        if following > record.number:
            change |= {"message": WAS_OVER.format(following)}
        else:
            why = GIVEN_AWAY.format(owner) if owner else DELETED
            change |= {"state": AttemptState.FAILED, "failure": FailureClass.INTERRUPTED, "message": short(why)}
    return record.model_copy(update=change)


def barred(records: Sequence[Attempt], phase: str, why: Mapping[tuple[str, int], str]) -> tuple[Attempt, ...]:
    """An attempt whose job may not be made now says so. It has not failed: it is asked for until there is room."""
    return tuple(
        a.model_copy(update={"barred": (told := short(why[phase, a.number])), "message": short(f"{BARRED}: {told}")})
        if a.state == AttemptState.ASKED and (phase, a.number) in why
        else a
        for a in records
    )


def with_work(
    records: Sequence[Attempt], jobs: Iterable[ObservedJob], report: PhaseProgress | None, digest: str | None
) -> tuple[Attempt, ...]:
    """What the live attempt has saved is remembered of it, and makes good what has failed before."""
    live = max((job.attempt for job in jobs if job.state == JobState.LIVE), default=None)
    step = report.checkpoint_step if report else 0
    told = [
        a.model_copy(update={"checkpoint_step": step}) if a.number == live and a.checkpoint_step < step else a
        for a in records
    ]
    turn = _last_to_get_on([a for a in told if a.digest == digest])
    return tuple(
        a.model_copy(update={"made_good": True})
        if a.digest == digest and a.number < turn and a.state == AttemptState.FAILED and a.failure in OF_THE_PLATFORM
        else a
        for a in told
    )


def _last_to_get_on(records: Sequence[Attempt]) -> int:
    """Number of the last attempt that had saved more than every one before it; 0 if none has saved anything."""
    furthest = turn = 0
    for record in records:
        if record.checkpoint_step > furthest:
            furthest, turn = record.checkpoint_step, record.number
    return turn


def _advance(record: Attempt | None, job: ObservedJob, now: datetime) -> Attempt:
    if record is not None and record.state.ended:
        return record
    before = record or Attempt(number=job.attempt, digest=job.digest, state=AttemptState.ASKED)
    base = before.model_copy(
        update={
            "digest": job.digest,
            "job": short(job.name) or before.job,
            "job_uid": short(job.uid) or before.job_uid,
            "node": short(job.node) or before.node,
            "barred": "",
            # Waiting in a queue is not yet a start.
            "started_at": before.started_at or job.started_at or job.may_start_since,
        }
    )
    if job.state == JobState.LIVE:
        return _live(base, job, now)
    ended = base.model_copy(update={"finished_at": job.finished_at or now})
    if job.state == JobState.SUCCEEDED:
        return ended.model_copy(
            update={"state": AttemptState.SUCCEEDED, "failure": None, "message": short(job.message)}
        )
    if before.state == AttemptState.STOPPING:
        return ended.model_copy(update={"state": _after_stopping(before)})
    return ended.model_copy(update={"state": AttemptState.FAILED, **_reason(before, job)})


def _live(before: Attempt, job: ObservedJob, now: datetime) -> Attempt:
    """What is said about a job that is about to end stays: its pods may be gone when it has ended."""
    if before.state == AttemptState.STOPPING:
        return before
    said: dict[str, object] = {"state": AttemptState.RUNNING}
    if job.failure is not None and not _is_known_better(before, job):
        said |= {"failure": job.failure, "message": short(job.message), "finished_at": before.finished_at or now}
    elif job.failure is None and (before.failure is None or _goes_on(job)):
        said |= {"failure": None, "message": short(job.message), "finished_at": None}
    return before.model_copy(update=said)


def _goes_on(job: ObservedJob) -> bool:
    """All of it runs, or its queue has taken it back and will start it again: it was not the end."""
    held = job.queue is not None and job.may_start_since is None
    return job.running_since is not None or held


def stopping(record: Attempt, why: str) -> Attempt:
    """It is to end. Why that was asked first stays, as does a failure."""
    if record.failure is not None or record.state == AttemptState.STOPPING:
        return record.model_copy(update={"state": AttemptState.STOPPING})
    return record.model_copy(update={"state": AttemptState.STOPPING, "message": short(STOPPED.format(why))})


def _after_stopping(record: Attempt) -> AttemptState:
    """We ended it: because it was not wanted any more, or because it had failed to start or to go on."""
    return AttemptState.STOPPED if record.failure is None else AttemptState.FAILED


def _reason(before: Attempt, job: ObservedJob) -> dict[str, object]:
    """The best that was ever known of why it failed: at its end, or while it was going down."""
    if _is_known_better(before, job):
        return {}
    if job.failure is not None:
        return {"failure": job.failure, "message": short(job.message)}
    return {"failure": FailureClass.INTERNAL, "message": short(job.message)}


def _is_known_better(before: Attempt, job: ObservedJob) -> bool:
    return before.failure is not None and (job.failure is None or job.guessed)


def short(message: str) -> str:
    """What is seen may be anything; copies of records are not checked again until they are read."""
    return plain(message)


def of_settings(attempts: Sequence[Attempt], digest: str | None, settings: str) -> list[Attempt]:
    """Attempts at what is asked for now, with the settings of now. Of one that was only seen, the settings are not known."""
    return [a for a in attempts if a.digest == digest and a.settings in ("", settings)]


def nodes(failures: Sequence[Attempt], wanted: int) -> int:
    """How many a further attempt has: as many as found a place when not all did."""
    return min([wanted, *(a.placed for a in failures if a.placed > 0)])


def on_all_nodes(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Forget which nodes were missing: those attempts had been ended by us, and that is all that is left of them."""
    return tuple(_as_stopped(a) if a.placed else a for a in attempts)


def _as_stopped(record: Attempt) -> Attempt:
    state = AttemptState.STOPPED if record.state.ended else record.state
    return record.model_copy(update={"state": state, "failure": None, "placed": 0})


def failed(attempts: Sequence[Attempt], digest: str | None, settings: str) -> list[Attempt]:
    """Those that count."""
    return [a for a in of_settings(attempts, digest, settings) if a.state == AttemptState.FAILED]


@dataclass(frozen=True)
class Extent:
    """What an attempt has of what its phase asks for."""

    nodes: int
    halvings: int = 0


def following(
    attempts: Sequence[Attempt], digest: str | None, settings: str, wanted: int, policy: FailurePolicy
) -> Extent:
    """Of a further attempt."""
    failures = failed(attempts, digest, settings)
    return Extent(nodes(failures, wanted), max(0, halvings(failures)) if policy.halve_on_out_of_memory else 0)


def extent(
    attempts: Sequence[Attempt], digest: str | None, settings: str, wanted: int, policy: FailurePolicy
) -> Extent:
    """Of the attempt that is under way, or else of a further one."""
    going = [a for a in of_settings(attempts, digest, settings) if not a.state.ended and a.nodes > 0]
    return (
        Extent(going[-1].nodes, max(0, going[-1].halvings))
        if going
        else following(attempts, digest, settings, wanted, policy)
    )


def halvings(failures: Sequence[Attempt]) -> int:
    """How often a further attempt should halve what its memory goes into."""
    return count(failures, FailureClass.OUT_OF_MEMORY)


def spent(failures: Sequence[Attempt], policy: FailurePolicy) -> list[Attempt]:
    """Those that use up budgets. There are only so many that a smaller attempt follows, and only so much work to save."""
    return [a for a in failures if not (a.placed or a.forgiven) and not (a.made_good and policy.refill_on_progress)]


def count(failures: Sequence[Attempt], failure: FailureClass | None) -> int:
    return sum(a.times for a in failures if a.failure == failure)


def without_result(
    attempts: Sequence[Attempt], before: Sequence[Attempt], digest: str | None, settings: str
) -> tuple[Attempt, ...]:
    """A job that succeeded and left no result for what was asked has failed: its word was lost, or its work.

    One that was started for other settings has done what it was asked for, also when these are asked for once more, and one
    that we had asked to stop has stopped.
    """
    known = {a.number: a for a in before}
    done = {a.number for a in before if a.state == AttemptState.SUCCEEDED}
    wanted = {a.number for a in of_settings(attempts, digest, settings) if a.state == AttemptState.SUCCEEDED} - done
    return tuple(_lost(a, known.get(a.number)) if a.number in wanted else a for a in attempts)


def _lost(record: Attempt, before: Attempt | None) -> Attempt:
    if before is not None and before.state == AttemptState.STOPPING:
        return before.model_copy(update={"state": _after_stopping(before), "finished_at": record.finished_at})
    lost = {
        "state": AttemptState.FAILED,
        "failure": FailureClass.INFRASTRUCTURE,
        "message": "ended without leaving a result for these settings",
    }
    return record.model_copy(update=lost)


def prune(attempts: Sequence[Attempt], digest: str | None) -> tuple[Attempt, ...]:
    """What has not ended, failures that count, all else that has begun, the last one for its number, and who took a name.

    Of those that have ended the last few are kept. Older ones are counted: a run that fails for weeks, on a page of etcd's,
    would otherwise be one that nobody can write any more.
    """
    last = attempts[-1:]
    over = [a for a in attempts[:-1] if a.state.ended]
    failures = [a for a in over if a.state == AttemptState.FAILED and digest in (a.digest, None)]
    past = [_past(a) for a in over if a.started_at is not None and a not in failures]
    going = [a for a in attempts[:-1] if not a.state.ended]
    taken = [a for a in attempts if a.taken_by and digest in (a.digest, None)][-1:]
    kept = {a.number: a for a in (*_counted(failures), *_counted(past), *going, *taken, *last)}
    return tuple(_without_takes(kept[number]) for number in sorted(kept))


def _past(record: Attempt) -> Attempt:
    """Of one that was stopped, or had other settings. Who comes back to these asks for another try, on all nodes."""
    failed = record.state == AttemptState.FAILED
    return record.model_copy(update={"forgiven": True, "placed": 0}) if failed else record


def _without_takes(record: Attempt) -> Attempt:
    return record.model_copy(update={"takes": {}}) if record.takes and record.state.ended else record


def _counted(ended: Sequence[Attempt]) -> list[Attempt]:
    old, kept = ended[:-KEPT], ended[-KEPT:]
    alike: dict[tuple[object, ...], Attempt] = {}
    for record in old:
        key = _kind(record)
        alike[key] = _both(alike.pop(key, None), record)
    return [*list(alike.values())[-KINDS:], *kept]


def _kind(record: Attempt) -> tuple[object, ...]:
    """Of others nothing counts but that they were. Not all failures use up a budget."""
    if record.state != AttemptState.FAILED:
        return (record.state,)
    return record.digest, record.settings, record.failure, bool(record.placed), record.made_good, record.forgiven


def _both(older: Attempt | None, newer: Attempt) -> Attempt:
    """One record for two that ended alike. The fewest nodes that had a place are what a further attempt has."""
    changes: dict[str, object] = {"message": newer.message[:OLD_MESSAGE_LIMIT]}
    if older is not None:
        changes |= {
            "times": older.times + newer.times,
            "checkpoint_step": max(older.checkpoint_step if older.digest == newer.digest else 0, newer.checkpoint_step),
            "placed": min(filter(None, (older.placed, newer.placed)), default=0),
        }
    return newer.model_copy(update=changes)


@dataclass(frozen=True)
class Verdict:
    """What follows from the failures so far."""

    final: bool = False
    retry_at: datetime | None = None


def judge(failures: Sequence[Attempt], policy: FailurePolicy, key: str) -> Verdict:
    """Whether the last failure was one too many, and otherwise when to try again."""
    failures = spent(failures, policy)
    if not failures:
        return Verdict()
    last = failures[-1]
    if count(failures, last.failure) > budget(policy.retries, last.failure or FailureClass.INTERNAL):
        return Verdict(final=True)
    ended = last.finished_at or last.started_at
    wait = backoff_seconds(policy.backoff, sum(a.times for a in failures), key)
    return Verdict(retry_at=later(ended, wait) if ended else None)


def budget(retries: RetryBudget, failure: FailureClass) -> int:
    if not FAILURES[failure].retryable:
        return 0
    budgets = {
        FailureClass.OUT_OF_MEMORY: retries.out_of_memory,
        FailureClass.INFRASTRUCTURE: retries.infrastructure,
        FailureClass.INTERRUPTED: retries.interrupted,
        FailureClass.STARTUP_TIMEOUT: retries.startup_timeout,
        FailureClass.STALLED: retries.stalled,
        FailureClass.INTERNAL: retries.internal,
    }
    return budgets[failure]


def backoff_seconds(backoff: Backoff, failures: int, key: str) -> float:
    """Doubling, with up to a quarter more taken from a hash: many runs do not retry at once, and one decides alike each time."""
    wait = min(backoff.initial_seconds * 2.0 ** min(failures - 1, 32), backoff.max_seconds)
    draw = int.from_bytes(hashlib.sha256(f"{key}/{failures}".encode()).digest()[:4]) / 2**32
    return wait * (1 + draw / 4)
