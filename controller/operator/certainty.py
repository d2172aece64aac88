"""Whether what is remembered is enough to act on, or has to be read anew.

Memory may lag behind. But a job that has succeeded stays so, and what its first pod has left stays what it was: who knows both
knows all that the next phase waits for. Everything else that starts, stops or ends something is read anew.
"""

from controller.api.status import AttemptState, RunStatus
from controller.plan.decide import ENDED, Action, Apply, Decision
from controller.plan.observed import JobState, Observed

End = tuple[str, int, str]
"""Of a phase, which has the number 0, or of an attempt: how it ended."""


def to_do(decision: Decision, observed: Observed) -> list[Action]:
    """Without the deletions of what is on its way out."""
    leaving = {(job.phase, job.attempt) for job in observed.jobs if job.leaving}
    return [a for a in decision.actions if isinstance(a, Apply) or (a.phase, a.attempt) not in leaving]


def has_to_be_read(before: RunStatus, decision: Decision, observed: Observed) -> bool:
    """``decision``: on what is remembered."""
    cleared = decision.status.jobs_deleted and not before.jobs_deleted
    old, new = _ends(before), _ends(decision.status)
    if not cleared and not to_do(decision, observed) and old == new:
        return False
    return cleared or not (
        old < new and _are_known_successes(new - old, observed) and _is_new(before, decision, observed)
    )


def _are_known_successes(ends: set[End], observed: Observed) -> bool:
    done = {job.phase for job in observed.jobs if job.state == JobState.SUCCEEDED}
    known = done & observed.results.keys()
    return all(state == AttemptState.SUCCEEDED and phase in known for phase, _, state in ends)


def _is_new(before: RunStatus, decision: Decision, observed: Observed) -> bool:
    """Whether all that is done is to begin phases that have never been begun, and nothing is in the way of any."""
    begun = {phase.name for phase in before.phases if phase.attempts} | {job.phase for job in observed.jobs}
    in_the_way = observed.taken or observed.held or observed.barred
    return not in_the_way and all(isinstance(a, Apply) and a.job.phase not in begun for a in to_do(decision, observed))


def _ends(status: RunStatus) -> set[End]:
    over = {(phase.name, 0, str(phase.state)) for phase in status.phases if phase.state in ENDED}
    attempts = [(phase.name, attempt) for phase in status.phases for attempt in phase.attempts]
    return over | {
        (name, a.number, str(a.state)) for name, a in attempts if a.state.ended or a.state == AttemptState.STOPPING
    }
