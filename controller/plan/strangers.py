"""What is not this run's and stands in its way.

An object that has the name of an attempt's job is passed by: the next attempt has another number, so another name. Waiting
for it would let anybody who can make a job stop a run for as long as he likes, and nothing is lost by another number. An
earlier run's job is waited for, since it writes to the same folder; it ends, and its owner is told meanwhile.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from controller.api.status import Attempt, AttemptState
from controller.plan.observed import JobState, ObservedJob


def pass_by(records: tuple[Attempt, ...], taken: Mapping[int, str], now: datetime) -> tuple[Attempt, ...]:
    """Attempts whose name another's object has are over, and count as nothing."""
    return tuple(_passed(a, taken[a.number], now) if not a.state.ended and a.number in taken else a for a in records)


def _passed(record: Attempt, owner: str, now: datetime) -> Attempt:
    changes: dict[str, Any] = {
        "state": AttemptState.STOPPED,
        "taken_by": owner,
        "message": f"its job's name is taken by {owner}, which is left alone; the next attempt has another name",
        "finished_at": now,
    }
    return record.model_copy(update=changes)


def in_the_way(phase: str, jobs: list[ObservedJob], held: Mapping[str, str]) -> str:
    """Who keeps the phase from starting; empty if nobody does, or if it has started."""
    return "" if any(job.state == JobState.LIVE for job in jobs) else held.get(phase, "")


def waits_for(owner: str) -> str:
    return f"waits for {owner} to end: it may still write to this phase's folder"
