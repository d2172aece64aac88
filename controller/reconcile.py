"""One turn of the loop, the same for every backend: observe, decide, write the status once, act."""

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace
from datetime import datetime

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.backends.base import Backend
from controller.plan.decide import Action, Apply, Decision, decide
from controller.plan.observed import Observed
from controller.plan.shapes import Configs

Save = Callable[[RunStatus], Awaitable[None]]


async def reconcile(
    run: AlignmentRun, backend: Backend, now: datetime, save: Save, only: Collection[str] | None = None,
    configs: Configs | None = None,
) -> Decision:  # fmt: skip
    """The status is saved before anything is done: a crash in between asks again, and never forgets a failure."""
    observed = replace(await backend.observe(run), configs=configs or {})
    decision = decide(run, observed, now, only)
    if decision.status != run.status:
        await save(decision.status)
    await act(backend, run, decision.actions, observed)
    return decision


async def act(backend: Backend, run: AlignmentRun, actions: Iterable[Action], observed: Observed) -> None:
    """``observed``: what was decided upon. Nothing else is deleted."""
    seen = {(job.phase, job.attempt): job for job in observed.jobs}
    for action in actions:
        if isinstance(action, Apply):
            await backend.apply(run, action.job)
        else:
            await backend.delete(run, action.phase, action.attempt, seen.get((action.phase, action.attempt)))
