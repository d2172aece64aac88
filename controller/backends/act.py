"""Carrying out what was decided, whatever the backend."""

from collections.abc import Iterable

from controller.api.run import AlignmentRun
from controller.backends.base import Backend
from controller.plan.decide import Action, Apply
from controller.plan.observed import Observed


async def act(backend: Backend, run: AlignmentRun, actions: Iterable[Action], observed: Observed) -> None:
    """``observed``: what was decided upon. Nothing else is deleted."""
    seen = {(job.phase, job.attempt): job for job in observed.jobs}
    for action in actions:
        if isinstance(action, Apply):
            await backend.apply(run, action.job)
        else:
            await backend.delete(run, action.phase, action.attempt, seen.get((action.phase, action.attempt)))
