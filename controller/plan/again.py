"""Trying again without an edit: a number in an annotation, obeyed once.

`alignment.dev/retry: "7"` has failed phases try once more; `"7 dpo"` has the phase, and all that builds on it, run anew. Only a
number larger than the last one is obeyed, and the status keeps the last one: whatever is written twice, comes late, is put
back by a tool that keeps manifests, or is seen again after a restart, is obeyed at most once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from controller.api.meta import ANNOTATION_RETRY
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, RetryStatus, RunStatus
from controller.api.text import plain
from controller.plan import attempts as history
from controller.plan.graph import dependents, edges
from trainers.contract import FailureClass

ALL = "*"
"""In a phase's place: every phase."""
DIGITS = 15
"""Of a number that anybody may write. Beyond, only the next one is taken: nobody can leave none that is larger."""
LONGEST = 19
"""Digits that a status has room for."""
SHOWN = 60


class Malformed(Exception):
    """What the annotation says cannot be understood."""


@dataclass(frozen=True)
class Request:
    number: int
    phases: tuple[str, ...] = ()
    """To run anew, with what builds on them. None: what failed tries again."""


def largest(seen: int) -> int:
    """The largest number that is taken after this one."""
    return max(10**DIGITS - 1, seen + 1)


def parse(text: str, seen: int) -> Request:
    """``seen``: number of the last request, or 0."""
    number, *phases = text.split() or [""]
    is_number = number.isascii() and number.isdigit() and len(number) <= LONGEST
    if not (is_number and 0 < int(number) <= largest(seen)):
        limit = f"a number from 1 up to {DIGITS} digits, then names of phases"
        why = f'"{plain(text, SHOWN)}" is not {limit}, for example "1" or "2 dpo"'
        raise Malformed(plain(f"annotation {ANNOTATION_RETRY}: {why}"))
    return Request(int(number), tuple(phases))


def following(text: str | None, status: RunStatus, now: int) -> int:
    """A number that is taken, whatever the annotation says now: larger than what was seen and, if it can be, than what waits.

    What cannot be understood will never be obeyed, and is passed over.
    """
    seen = last(status)
    try:
        waits = parse(text, seen).number if text is not None else 0
    except Malformed:
        waits = 0
    wanted = max(now, seen + 1, waits + 1)
    return wanted if wanted <= largest(seen) else seen + 1


def last(status: RunStatus) -> int:
    """Number of the last request that was obeyed or refused; 0 if there was none."""
    return status.retry.number if status.retry else 0


def is_news(text: str | None, status: RunStatus) -> bool:
    """Whether the annotation says something that the status does not know yet."""
    if text is None:
        return False
    try:
        return parse(text, last(status)).number > last(status)
    except Malformed as error:
        return status.retry is None or status.retry.refused != str(error)


def obey(run: AlignmentRun, before: RunStatus) -> RunStatus:
    """The status from which the planner goes on. The run has been checked."""
    text = run.metadata.annotations.get(ANNOTATION_RETRY)
    if text is None or not is_news(text, before):
        return before
    try:
        request = parse(text, last(before))
    except Malformed as error:
        return _kept(before, RetryStatus(number=last(before), refused=str(error)))
    names = [entry.name for entry in run.phases]
    if unknown := [name for name in request.phases if name not in (*names, ALL)]:
        why = f'"{plain(unknown[0], SHOWN)}" is not a phase of this run; phases are: {", ".join(names)}'
        return _kept(before, RetryStatus(number=request.number, refused=plain(f"annotation {ANNOTATION_RETRY}: {why}")))
    return _kept(_changed(run, before, request), RetryStatus(number=request.number))


def _kept(before: RunStatus, told: RetryStatus) -> RunStatus:
    return before.model_copy(update={"retry": told})


def _changed(run: AlignmentRun, before: RunStatus, request: Request) -> RunStatus:
    if not request.phases:
        phases = tuple(_tried_again(phase) for phase in before.phases)
    else:
        anew = chosen(run, request.phases)
        known = {phase.name: phase for phase in before.phases}
        # A phase that nothing is known of yet may have been finished by an earlier run.
        unknown = (e for e in run.phases if e.name in anew and e.name not in known)
        made = (PhaseStatus(name=e.name, type=e.type.name) for e in unknown)
        phases = tuple(
            phase.model_copy(update={"again": request.number}) if phase.name in anew else phase
            for phase in (*before.phases, *made)
        )
    return before.model_copy(update={"phases": phases})


def chosen(run: AlignmentRun, phases: Sequence[str]) -> frozenset[str]:
    """These phases and all that builds on them."""
    start = [entry.name for entry in run.phases] if ALL in phases else phases
    return frozenset({*start, *dependents(edges(run.phases), start)})


def can_try_again(phase: PhaseStatus) -> bool:
    """What missed a gate has done its work: it is judged by other gates, or runs anew."""
    waits = phase.state == PhaseState.BACKING_OFF
    return waits or (phase.state == PhaseState.FAILED and phase.failure != FailureClass.GATE_FAILED)


def _tried_again(phase: PhaseStatus) -> PhaseStatus:
    """With its budgets, its time and its nodes as at first; its work stays, and what is known of the memory it needs."""
    if not can_try_again(phase):
        return phase
    changes: dict[str, object] = {"state": PhaseState.WAITING, "message": "", "failure": None, "retry_at": None}
    changes |= {"started_at": None, "finished_at": None}
    attempts = tuple(map(_forgiven, history.on_all_nodes(phase.attempts)))
    return phase.model_copy(update={**changes, "attempts": attempts})


def _forgiven(record: Attempt) -> Attempt:
    return record.model_copy(update={"forgiven": True}) if record.state == AttemptState.FAILED else record
