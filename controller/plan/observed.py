"""What a backend sees: the planner's only knowledge of the world."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from controller.api.status import PhaseProgress, QueueStatus
from controller.plan.shapes import Configs
from trainers.contract import FailureClass


class JobState(enum.StrEnum):
    LIVE = "Live"
    """Accepted by the backend and not ended: queued, starting, running or on its way out."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class ObservedJob:
    """One attempt at a phase, as the backend sees it."""

    phase: str
    attempt: int
    digest: str
    """Identity that the attempt was started for."""
    state: JobState
    failure: FailureClass | None = None
    """Of a live job: it is about to end, for this reason."""
    message: str = ""
    """Of a live job without a failure: what keeps it from running."""
    guessed: bool = False
    """Nothing is left that says why it failed: a reason that was seen before is the better one."""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    name: str = ""
    """What the backend calls it."""
    uid: str = ""
    """Who it is, even if another one gets its name later; empty where names are enough."""
    node: str = ""
    """Where it failed, if that is known."""
    may_start_since: datetime | None = None
    """Since when nothing but the platform keeps it from running; None while it waits in a queue, or always runs at once."""
    running_since: datetime | None = None
    """Since when all its parts run."""
    placed: int = 0
    """How many of its parts have a machine."""
    queue_name: str | None = None
    """Of the queue that it is to wait in; empty if in none. None: there are no queues."""
    queue_asked: str = ""
    """Of the queue that its run had asked for: without, the platform may have put it into one."""
    queue: QueueStatus | None = None
    """What its queue says."""
    elsewhere: bool = False
    """Another backend carries it out for this one: of how it does nothing is seen but that it has begun and ended."""
    leaving: bool = False
    """It has been deleted, and is on its way out."""
    left: str = ""
    """What of a live one has not ended and how long that may go on, in words; empty where nobody can tell."""
    kept_by: tuple[str, ...] = ()
    """What keeps it although it has been deleted, and is not the backend's to take away."""
    unlabelled: tuple[str, ...] = ()
    """What of it has lost the labels by which the backend is told of it."""
    disowned: bool = False
    """It does not say any more whose it is: somebody has taken its owner reference away."""
    past: bool = False
    """Ended before the user asked again: its number is taken, its failure is forgiven."""


@dataclass(frozen=True)
class ObservedResult:
    """A finished phase."""

    digest: str
    artifact_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    stale: str | None = None
    """Why it does not count although its digest may fit, for example data that has changed since."""
    place: str = ""
    """Where it was found."""


@dataclass(frozen=True)
class Unfinished:
    """Work that a phase can go on from."""

    digest: str
    step: int
    """Of the newest checkpoint; 0 is none."""
    stale: str | None = None
    """Why it does not count although its digest may fit."""


@dataclass(frozen=True)
class Observed:
    jobs: tuple[ObservedJob, ...] = ()
    results: Mapping[str, ObservedResult] = field(default_factory=dict)
    """By phase."""
    progress: Mapping[str, PhaseProgress] = field(default_factory=dict)
    """By phase; of the live attempt."""
    capacity: int | None = None
    """Phases that may run at once; None leaves it to a scheduler."""
    unfinished: Mapping[str, Unfinished] = field(default_factory=dict)
    """By phase; only `plan` asks."""
    taken: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Whose the objects are that have the name of an attempt's job and are not this run's, by phase and attempt."""
    barred: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Why an attempt's job may not be made now, by phase and attempt: a quota is full, a right is missing."""
    held: Mapping[str, str] = field(default_factory=dict)
    """What may still write to a phase's folder and is not this run's, by phase."""
    most: Mapping[str, int] = field(default_factory=dict)
    """What a run may take at once here: of `nodes`, or of a device by the name of its resource."""
    problems: tuple[str, ...] = ()
    """What makes the run impossible on this backend, one line each."""
    configs: Configs = field(default_factory=dict)
    """Of the models that the run names, as far as they are known: what phases will need is worked out from them."""
    elsewhere: Mapping[str, ObservedResult] = field(default_factory=dict)
    """By digest: results of other runs and of earlier settings in the same workspace; only `plan` asks."""
