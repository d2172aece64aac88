"""What a backend sees: the planner's only knowledge of the world."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from controller.api.status import PhaseProgress
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
    message: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
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
    elsewhere: Mapping[str, ObservedResult] = field(default_factory=dict)
    """By digest: results of other runs and of earlier settings in the same workspace; only `plan` asks."""
