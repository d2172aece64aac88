"""What is particular to a kind of job. A module for each kind has it; whatever else is done with jobs is the same for all."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from controller.backends.cluster.settings import Settings
from controller.kube.resources import Resource
from controller.plan.job import PhaseJob

Object = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """The run that a job belongs to."""

    namespace: str
    name: str
    uid: str
    folder: str
    """In its workspace."""


class JobKind(Protocol):
    KIND: str
    RESOURCE: Resource
    INSTALL: str
    """What brings it into a cluster."""
    INTEGRATION: str
    """What Kueue calls it."""
    MAKERS: Mapping[tuple[str, str], Resource]
    """By group and kind: the job itself, what it makes, and so on. The last one makes the pods."""
    PROPAGATION: str
    """How it is deleted: Foreground, so that it stays visible until its pods have ended, or Background, where that cannot be."""
    REFERS: bool
    """To a TrainingRuntime, in which its pods are."""
    PODS: str
    """Their label that has the job's name, by its controller."""
    CONTAINER: str
    """The one that trains."""
    SUSPEND: str
    """Its field that does it."""
    PLACE: re.Pattern[str]
    """In a pod's name its place in the job: node rank."""

    def render(self, job: PhaseJob, owner: Owner, settings: Settings) -> Object:
        """Pure: the same job gives the same object."""

    def runtime(self, job: PhaseJob, owner: Owner, settings: Settings) -> Object | None:
        """The TrainingRuntime that the job refers to, if it is of a kind that does. Pure, too."""

    def name_of(self, maker: str) -> str:
        """What the job is called whose pods this one makes."""

    def nodes(self, job: Mapping[str, Any]) -> int:
        """How many pods it has."""

    def is_suspended(self, job: Mapping[str, Any]) -> bool:
        """By its queue, or by somebody: we never suspend a job."""

    def managed_by(self, job: Mapping[str, Any]) -> str | None:
        """Who carries it out, if that is said."""

    def ended(self, job: Mapping[str, Any]) -> str | None:
        """`Succeeded`, `Failed`, or None."""

    def started_at(self, job: Mapping[str, Any]) -> str | None:
        """When its queue let it go, if it says so."""

    def finished_at(self, job: Mapping[str, Any]) -> str | None:
        """When it ended, if it says so."""
