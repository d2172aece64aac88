"""A status that can always be written: etcd takes 1.5 MB, and every list of runs carries all of it.

Sixty-four phases that fail again and again have more to say than that. So the longest things go first, and only as far as
is needed; what the planner itself relies on (gated figures, the last attempt's number) stays to the end.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NewType

from controller.api.run import AlignmentRun
from controller.api.status import Attempt, PhaseStatus, QueueStatus, RunStatus
from controller.api.text import within

LIMIT = 100_000
"""Bytes of a status as etcd keeps it, whatever characters are in it."""
CONDITION_LIMIT = 1024
"""Bytes of a condition's message, where phases alone cannot make room."""

Bounded = NewType("Bounded", RunStatus)
"""One that :func:`bounded` has seen. No decision has another."""
Squeeze = Callable[[PhaseStatus, Collection[str]], PhaseStatus]


def bounded(status: RunStatus, run: AlignmentRun) -> Bounded:
    gated = {entry.name: {gate.metric for gate in entry.spec.gates} for entry in run.phases}
    for squeeze in SQUEEZES:
        if size(status) <= LIMIT:
            return Bounded(status)
        phases = tuple(squeeze(phase, gated.get(phase.name, ())) for phase in status.phases)
        status = status.model_copy(update={"phases": phases})
    return Bounded(status if size(status) <= LIMIT else _few_words(status))


def size(status: RunStatus) -> int:
    written = status.model_dump_json(by_alias=True, exclude_none=True)
    # The API server writes these as six bytes each.
    return len(written.encode()) + 5 * sum(map(written.count, "<>&"))


def _few_words(status: RunStatus) -> RunStatus:
    """What is said of the run as a whole."""
    cut = partial(within, limit=CONDITION_LIMIT)
    conditions = tuple(c.model_copy(update={"message": cut(c.message)}) for c in status.conditions)
    changes: dict[str, Any] = {"conditions": conditions, "phase": cut(status.phase)}
    if status.retry is not None:
        changes["retry"] = status.retry.model_copy(update={"refused": cut(status.retry.refused)})
    return status.model_copy(update=changes)


def _messages(longest: int) -> Squeeze:
    def squeeze(phase: PhaseStatus, _: Collection[str]) -> PhaseStatus:
        changes: dict[str, Any] = {n: within(getattr(phase, n), longest) for n in ("message", "needs", "held_by")}
        changes["attempts"] = tuple(_shortened(a, longest) for a in phase.attempts)
        if phase.queue is not None:
            changes["queue"] = QueueStatus(state=phase.queue.state, message=within(phase.queue.message, longest))
        return phase.model_copy(update=changes)

    return squeeze


def _shortened(attempt: Attempt, longest: int) -> Attempt:
    return attempt.model_copy(
        update={n: within(getattr(attempt, n), longest) for n in ("message", "node", "taken_by", "barred")}
    )


def _figures(most: int) -> Squeeze:
    """A gate without its figure would have the phase run again."""

    def squeeze(phase: PhaseStatus, gated: Collection[str]) -> PhaseStatus:
        names = [name for name in phase.metrics if name in gated]
        names += [name for name in phase.metrics if name not in gated][:most]
        return phase.model_copy(update={"metrics": {name: phase.metrics[name] for name in names}})

    return squeeze


def _old_failures(phase: PhaseStatus, _: Collection[str]) -> PhaseStatus:
    """What is left uses up its budget anew, which is better than a run that nobody can act on."""
    going = [a for a in phase.attempts if not a.state.ended]
    return phase.model_copy(update={"attempts": tuple(going or phase.attempts[-1:])})


SQUEEZES: tuple[Squeeze, ...] = (
    _messages(200), _figures(16), _messages(60), _figures(2), _old_failures, _messages(20), _figures(0),
)  # fmt: skip
