"""A run as the API server has it, and which one is meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from controller.api import meta
from controller.api.problems import InvalidRun, Problem
from controller.api.status import PhaseState, RunStatus
from controller.commands.find import named
from controller.plan import again
from controller.plan.decide import is_terminal
from controller.plan.refusal import is_refused


@dataclass(frozen=True)
class ClusterRun:
    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    @property
    def created(self) -> datetime:
        return datetime.fromisoformat(self.document["metadata"]["creationTimestamp"])

    @property
    def leaving(self) -> bool:
        """Somebody has deleted it, and something of it is still there."""
        return self.document["metadata"].get("deletionTimestamp") is not None

    @property
    def asked_to_stop(self) -> bool:
        return bool(self.document["spec"].get("suspend"))

    @property
    def phases(self) -> list[str]:
        return [str(phase["name"]) for phase in self.document["spec"]["phases"]]

    @property
    def suspended_phases(self) -> list[str]:
        """Phases with a `suspend` of their own."""
        return [str(phase["name"]) for phase in self.document["spec"]["phases"] if phase.get("suspend")]

    @cached_property
    def status(self) -> RunStatus:
        return RunStatus.model_validate(self.document.get("status") or {})

    @property
    def settled(self) -> bool:
        """The operator has seen the run as it is now."""
        seen = self.status.observed_generation == self.document["metadata"]["generation"]
        # A refused run takes note of nothing but its edits.
        asked = not is_refused(self.status) and again.is_news(self.asked_again, self.status)
        return bool(self.status.conditions) and seen and not asked

    @property
    def asked_again(self) -> str | None:
        """What somebody has asked to try again, whether or not the operator has seen it."""
        found: Mapping[str, str] = self.document["metadata"].get("annotations") or {}
        return found.get(meta.ANNOTATION_RETRY)

    @property
    def ended(self) -> bool:
        return self.settled and is_terminal(self.status)

    @property
    def active_phases(self) -> list[str]:
        """Phases of which something runs, or is still saving its work."""
        return [
            phase.name
            for phase in self.status.phases
            if phase.state == PhaseState.RUNNING or any(not attempt.state.ended for attempt in phase.attempts)
        ]

    @property
    def stopped(self) -> bool:
        return self.settled and self.status.is_true(meta.SUSPENDED) and not self.active_phases

    @property
    def state(self) -> str:
        """In a word."""
        if self.leaving:
            return "being deleted"
        if not self.status.conditions:
            return "not seen by the operator yet"
        if is_terminal(self.status) and not self.settled:
            return "changed, not seen by the operator yet"
        if not is_terminal(self.status) and self.asked_to_stop and not self.stopped:
            return "stopping"
        # Words are capitalised in status.phase, names of running phases are not.
        word = self.status.phase
        return word.lower() if word[:1].isupper() else "running"


def newest(runs: Sequence[ClusterRun], wanted: str | None, namespace: str) -> ClusterRun:
    """The named run, else the one created last."""
    ordered = sorted(runs, key=lambda run: (run.created, run.name), reverse=True)
    place = f"namespace {namespace}"
    if not ordered:
        raise InvalidRun(
            [Problem(place, f"no {f'run {wanted}' if wanted else 'runs'} here (another one: -n NAMESPACE)")]
        )
    name = named(wanted, [run.name for run in ordered], place) if wanted else ordered[0].name
    return next(run for run in ordered if run.name == name)


def the_one(
    runs: Sequence[ClusterRun], wanted: str | None, candidates: Sequence[ClusterRun], namespace: str
) -> ClusterRun:
    """The named run, else the only candidate, else the newest of all: nobody stops another one's run by accident."""
    if wanted is None and len(candidates) > 1:
        names = ", ".join(sorted(run.name for run in candidates))
        raise InvalidRun([Problem(f"namespace {namespace}", f"say which run you mean with --run: {names}")])
    return newest(candidates or runs, wanted, namespace) if wanted is None else newest(runs, wanted, namespace)
