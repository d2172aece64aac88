"""What the controller says about a run."""

import copy
import enum
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import reduce
from operator import getitem
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from controller.api.backend import BackendName
from controller.api.text import LONG_LIMIT, plain
from controller.api.workspace import Workspace
from trainers.contract import FailureClass
from trainers.spec import SpecModel


class StatusModel(SpecModel):
    """Base of what the controller writes. Fields of a newer version are dropped, so an older one can read them.

    What a phase reports may be no number; the planner leaves it out.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Whoever wrote it: an earlier operator, or somebody by hand."""
        return plain(value, LONG_LIMIT) if type(value) is str else value

    def document(self, **kwargs: Any) -> dict[str, Any]:
        """Without what is empty: people read this in `kubectl describe`."""
        found: dict[str, Any] = _without_empty(super().document(**kwargs))
        return found


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item not in ("", {}, [])}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


class PhaseState(enum.StrEnum):
    WAITING = "Waiting"
    """An input has not finished."""
    READY = "Ready"
    """Could start, but as many phases as allowed are running, or an earlier run still writes to its folder."""
    RUNNING = "Running"
    BACKING_OFF = "BackingOff"
    """Waits before its next attempt."""
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    BLOCKED = "Blocked"
    """An input failed, or is not part of what was asked for."""
    NOT_SELECTED = "NotSelected"
    """Not part of what was asked for."""


class AttemptState(enum.StrEnum):
    ASKED = "Asked"
    """Asked for, not seen yet."""
    RUNNING = "Running"
    STOPPING = "Stopping"
    """We asked it to end."""
    STOPPED = "Stopped"
    """Ended because we asked; does not count as a failure."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def ended(self) -> bool:
        return self in (AttemptState.STOPPED, AttemptState.SUCCEEDED, AttemptState.FAILED)


class QueueState(enum.StrEnum):
    """Where a queued job stands."""

    PENDING = "Pending"
    """Waits for quota."""
    QUOTA_RESERVED = "QuotaReserved"
    """Has quota, waits for the checks of its queue."""
    ADMITTED = "Admitted"
    """May run."""
    EVICTED = "Evicted"
    """Was stopped by the queue and waits again."""
    PREEMPTED = "Preempted"
    """Was stopped in favour of another job and waits again."""
    MISSING = "Missing"
    """The queue or Kueue's integration does not exist."""


class QueueStatus(StatusModel):
    """What the queue says about a phase's job."""

    state: QueueState
    """Where it stands."""
    message: str = ""
    """In the queue's words."""
    workload: str = ""
    """Name of Kueue's Workload."""


class Attempt(StatusModel):
    """One start of a phase."""

    number: int
    """Counts from 1; part of the job's name."""
    digest: str
    """Identity of what it was started for."""
    settings: str = ""
    """Mark of all its settings, those that cannot change a result included: failures of other ones do not count."""
    halvings: int = 0
    """How often `microBatchTokens` and the responses side by side were halved for it, because attempts before ran out of memory."""
    nodes: int = 0
    """Pods it was started with; 0 is not known."""
    takes: dict[str, int] = {}
    """What all its pods take beside their number, by the name of the resource, until it has ended: whatever the spec says by then."""
    times: int = 1
    """How many attempts this one stands for: itself, and older ones that ended alike."""
    checkpoint_step: int = 0
    """Step of the newest checkpoint that it was seen to have; 0 is none."""
    made_good: bool = False
    """Failed, and work that was saved since has given its retry back (`failurePolicy.refillOnProgress`)."""
    forgiven: bool = False
    """Failed, and somebody has asked for another try since, or for other settings: it uses up no budget."""
    placed: int = 0
    """Of one that did not begin to run in time: how many of them found a place, if the next one is to have as many."""
    state: AttemptState
    """How far it is."""
    failure: FailureClass | None = None
    """Class of its failure; of a live attempt, why it is about to end."""
    message: str = Field(default="", max_length=1024)
    """What it said at its end, or why it was stopped; of a live attempt, what keeps it from running."""
    job: str = ""
    """Name of its job."""
    job_uid: str = ""
    """UID of its job, by which that stays the run's although somebody takes its owner reference away."""
    barred: str = ""
    """Why its job may not be made now, in the API server's words. It is asked for until it may."""
    taken_by: str = ""
    """Whose the object is that has the name its job would have had. Another attempt with another name follows."""
    node: str = ""
    """Node on which it failed."""
    started_at: AwareDatetime | None = None
    """First seen running."""
    finished_at: AwareDatetime | None = None
    """Seen ended; of a live attempt, seen to be about to."""


class PhaseProgress(StatusModel):
    """How far a phase is."""

    step: int = 0
    """Finished steps."""
    total_steps: int = 0
    """Steps in all."""
    loss: float | None = None
    """Loss of the last step."""
    tokens_per_second: float | None = None
    """Over the last steps."""
    eta_seconds: float | None = None
    """Estimated time to the phase's end."""
    checkpoint_step: int = 0
    """Step of the newest checkpoint: where another attempt would go on."""
    stage: str = ""
    """What goes on outside the steps: loading, evaluating, saving."""
    updated_at: AwareDatetime | None = None
    """When the phase last reported."""


class PhaseStatus(StatusModel):
    name: str
    """Name of the phase."""
    type: str
    """Its type."""
    state: PhaseState = PhaseState.WAITING
    """How far it is."""
    message: str = ""
    """Why it is in this state."""
    held_by: str = ""
    """What it waits for before it starts: something of an earlier run that may still write to its folder."""
    digest: str | None = None
    """Identity of what is asked for; known once the inputs have finished."""
    asked: str = ""
    """Mark of the settings that the digest is of, as they are written: for these it stays, whatever a later version would make of them."""
    image: str = ""
    """Where neither the run nor the phase names one: the operator's default when the phase began, which its further attempts have too."""
    again: int | None = None
    """Number of the last request to run it anew, if there was one, which is part of its identity: what had been computed before does not count."""
    artifact_digest: str | None = None
    """Identity of what it left."""
    failure: FailureClass | None = None
    """Class of the failure that ended it."""
    attempts: tuple[Attempt, ...] = ()
    """All that have begun: the last few as they were, older ones that ended alike as one, and one that is yet to begin."""
    started_at: AwareDatetime | None = None
    """First seen running with this digest."""
    finished_at: AwareDatetime | None = None
    """Ended."""
    retry_at: AwareDatetime | None = None
    """When the next attempt may start."""
    progress: PhaseProgress | None = None
    """Last report of the running attempt; before it has one, and between attempts, the step at which the last one was."""
    queue: QueueStatus | None = None
    """What the queue says about the live attempt's job."""
    needs: str = ""
    """Memory that it needs of a device, by arithmetic: `needs 38 GiB of 80 GiB on each of 8 devices`. Until it has finished."""
    fits: bool | None = None
    """Whether that is there. Not set where it cannot be told."""
    metrics: dict[str, float] = {}
    """Final metrics."""

    @property
    def tries(self) -> int:
        """Attempts so far, with those that others stand for."""
        return sum(attempt.times for attempt in self.attempts)

    @property
    def waits_in_queue(self) -> bool:
        """What nothing queues (:class:`QueueState`) may run, and has then been seen to."""
        if self.state != PhaseState.RUNNING or self.queue is None or self.queue.state == QueueState.ADMITTED:
            return False
        begun = bool(self.attempts) and self.attempts[-1].started_at is not None
        return not (begun and self.queue.state == QueueState.MISSING)


class RetryStatus(StatusModel):
    """The last request to try again (the annotation `alignment.dev/retry`)."""

    number: int = 0
    """Its number; only larger ones are obeyed from now on."""
    refused: str = ""
    """What is wrong with it, if so."""


class Condition(StatusModel):
    """As metav1.Condition."""

    type: str
    """Accepted, Progressing, Suspended, Stalled, Succeeded or Failed."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """A word that programs can rely on."""
    message: str = ""
    """A sentence for people."""
    observed_generation: int | None = None
    """Generation of the run that this was said about."""
    last_transition_time: AwareDatetime
    """When the status last changed."""


class RunStatus(StatusModel):
    observed_generation: int | None = None
    """Generation of the run that this was said about."""
    phase: str = ""
    """Running phases by name, or how the run ended."""
    progress: str = ""
    """Finished phases of all, and the share of the work that is done: `3/8 (41%)`."""
    percent: int = 0
    """Share of the work that is done; phases count alike."""
    step: str = ""
    """Of the running phase: `120/400`."""
    loss: str = ""
    """Of the running phase."""
    tokens_per_second: str = ""
    """Of the running phase."""
    eta: str = ""
    """Of the running phase."""
    started_at: AwareDatetime | None = None
    """When work began."""
    finished_at: AwareDatetime | None = None
    """When the run ended."""
    jobs_deleted: bool | None = None
    """The run has ended, and nothing is left of its jobs (`ttlSecondsAfterFinished`)."""
    backend: BackendName | None = None
    """Kind of its jobs on a cluster, once work has begun: as the run says, or the operator's default at that time."""
    workspace: Workspace | None = None
    """Where its artifacts are, once work has begun: as the run says, or the operator's default at that time."""
    retry: RetryStatus | None = None
    """The last request to try again."""
    folder: str = ""
    """The run's folder in its workspace, once work has begun: `NAMESPACE.RUN`, or `RUN` of a run that began before folders were called so."""
    phases: tuple[PhaseStatus, ...] = ()
    """One for each phase, in the run's order."""
    conditions: tuple[Condition, ...] = ()
    """Accepted, Progressing, Suspended, Stalled, Succeeded, Failed."""

    @model_validator(mode="wrap")
    @classmethod
    def _as_far_as_known(cls, found: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What a newer version wrote and this one cannot read is left out, piece by piece; its history is not."""
        try:
            return handler(found)
        except ValidationError as error:
            known = _without(found, [_unreadable(problem) for problem in error.errors()])
            if known == found:
                raise
            return cls.model_validate(known)

    def beside(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """This status, with what ``found``, its state before, has in fields that only a newer version knows."""
        return _beside(found, self.document(), type(self))

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"

    def phase_status(self, name: str) -> PhaseStatus | None:
        return next((p for p in self.phases if p.name == name), None)


# ---------------------------------------------------------------- of another version

ITEMS: dict[str, tuple[type[StatusModel], str]] = {
    "phases": (PhaseStatus, "name"),
    "attempts": (Attempt, "number"),
    "conditions": (Condition, "type"),
}
"""Lists, the model of their items, and the field that says which is which."""


def _unreadable(problem: ErrorDetails) -> tuple[int | str, ...]:
    """Where the smallest thing is without which the rest could be read."""
    return problem["loc"][:-1] if problem["type"] == "missing" else problem["loc"]


def _without(found: Any, paths: Iterable[tuple[int | str, ...]]) -> Any:
    kept = copy.deepcopy(found)
    for *way, last in sorted({path for path in paths if path}, key=_last_first):
        with suppress(LookupError, TypeError):
            del reduce(getitem, way, kept)[last]
    return kept


def _last_first(path: tuple[int | str, ...]) -> tuple[int, list[int]]:
    """Inner things before outer ones, and of a list the last first: places stay what they were."""
    return -len(path), [-step for step in path if isinstance(step, int)]


def _beside(old: Mapping[str, Any], new: dict[str, Any], model: type[StatusModel]) -> dict[str, Any]:
    known = {field.alias for field in model.model_fields.values()}
    merged = {**{name: value for name, value in old.items() if name not in known}, **new}
    for name, (kind, key) in ITEMS.items():
        if name in known and name in new:
            before = {item.get(key): item for item in old.get(name, ())}
            merged[name] = [_beside(before.get(item[key], {}), item, kind) for item in new[name]]
    return merged
