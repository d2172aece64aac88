"""Runs of one phase as the planner sees them, look after look."""

from typing import Any

from builders import after, job, make_run, sft, with_status

from controller.api.run import AlignmentRun
from controller.api.status import Attempt, PhaseProgress, PhaseStatus, QueueState, QueueStatus
from controller.plan.decide import Decision, decide
from controller.plan.observed import JobState, Observed, ObservedJob
from trainers.contract import FailureClass

FAILED, SUCCEEDED = JobState.FAILED, JobState.SUCCEEDED
INFRA, INTERRUPTED, BAD = FailureClass.INFRASTRUCTURE, FailureClass.INTERRUPTED, FailureClass.BAD_INPUT


def one(*, name: str = "base", suspend: bool = False, seed: int = 0, generation: int = 1, **spec: Any) -> AlignmentRun:
    """A run of one phase, as the API server numbers its edits."""
    run = make_run(sft(name), suspend=suspend, seed=seed, queueName="gpus", **spec)
    return run.model_copy(update={"metadata": run.metadata.model_copy(update={"generation": generation})})


RUN = one()


def waits(run: AlignmentRun = RUN, state: QueueState = QueueState.PENDING, **more: Any) -> ObservedJob:
    """In the queue: nothing of it runs, and nothing may."""
    return job(run, "base", queue=QueueStatus(state=state, message=f"{state.lower()}!"), **more)


def admitted(run: AlignmentRun = RUN, at: float = 0, **more: Any) -> ObservedJob:
    queue = QueueStatus(state=QueueState.ADMITTED, message="admitted!")
    return job(run, "base", queue=queue, **{"may_start_since": after(at), **more})


def runs(run: AlignmentRun = RUN, at: float = 0, **more: Any) -> ObservedJob:
    return admitted(run, at, running_since=after(at), started_at=after(at), **more)


def doomed(run: AlignmentRun = RUN, failure: FailureClass = INFRA, **more: Any) -> ObservedJob:
    """A pod has failed, the job has not."""
    return job(run, "base", failure=failure, **{"message": "a pod failed", **more})


def report(step: int, at: float, **more: Any) -> dict[str, PhaseProgress]:
    return {"base": PhaseProgress(step=step, total_steps=10, updated_at=after(at), **more)}


def story(*looks: tuple[AlignmentRun, Observed, float]) -> list[Decision]:
    """Looks one after the other, each with the status that the one before left."""
    decisions: list[Decision] = []
    for run, observed, at in looks:
        known = with_status(run, decisions[-1]) if decisions else run
        decisions.append(decide(known, observed, after(at)))
    return decisions


def phase(decision: Decision) -> PhaseStatus:
    return decision.status.phases[0]


def attempt(decision: Decision, number: int = 1) -> Attempt:
    return next(a for a in phase(decision).attempts if a.number == number)


def ends(decision: Decision, number: int = 1) -> str:
    """`Failed Stalled`"""
    found = attempt(decision, number)
    return f"{found.state} {found.failure}" if found.failure else str(found.state)


def condition(decision: Decision, kind: str) -> str:
    found = decision.status.condition(kind)
    return f"{found.status}/{found.reason}" if found else "absent"
