"""What the planner needs from whatever runs the jobs, and how a decision reaches it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from controller.api.run import AlignmentRun
from controller.plan.decide import Action, Apply, Delete
from controller.plan.job import PhaseJob
from controller.plan.observed import Observed, ObservedJob


class Backend(Protocol):
    """Four methods. None of them may trust that an earlier call of another has worked."""

    async def observe(self, run: AlignmentRun) -> Observed:
        """Everything there is of this run: jobs, results, progress."""

    async def apply(self, run: AlignmentRun, job: PhaseJob) -> None:
        """See that the job exists. The same job twice is one job."""

    async def delete(self, run: AlignmentRun, phase: str, attempt: int, seen: ObservedJob | None) -> None:
        """Have the attempt end, with time to save its work. An absent one is a success.

        ``seen``: what it is, as this look has observed it; None if nobody saw it. What was not seen is not touched.
        """

    async def reclaim(self, run: AlignmentRun, seen: ObservedJob) -> None:
        """See that a job that this look has observed to be disowned says again whose it is, if it still is that one."""


class HasLogs(Protocol):
    """A backend that can show what a phase has printed."""

    def log_file(self, run: str, phase: str, attempt: int | None = None) -> Path | None:
        """The log of an attempt, the newest unless told; None if there is none."""


async def act(backend: Backend, run: AlignmentRun, actions: Iterable[Action], observed: Observed) -> None:
    """``observed``: what was decided upon. Nothing else is deleted."""
    seen = {(job.phase, job.attempt): job for job in observed.jobs}
    for action in actions:
        if isinstance(action, Apply):
            await backend.apply(run, action.job)
            continue
        job = seen.get((action.phase, action.attempt))
        if isinstance(action, Delete):
            await backend.delete(run, action.phase, action.attempt, job)
        elif job is not None:
            await backend.reclaim(run, job)
