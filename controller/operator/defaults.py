"""What the operator sets for runs that do not say."""

from dataclasses import dataclass
from typing import Any

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.api.workspace import Workspace


@dataclass(frozen=True)
class Defaults:
    workspace: Workspace | None = None
    queue: str | None = None
    """A LocalQueue."""

    def applied(self, run: AlignmentRun) -> AlignmentRun:
        """Only for one look at it: what is written back is the run's status, never its spec."""
        missing: dict[str, Any] = {}
        if run.spec.queue_name is None:
            missing["queue_name"] = self.queue
        if run.spec.workspace is None:
            missing["workspace"] = (run.status.workspace if run.status else None) or self.workspace
        return run.model_copy(update={"spec": run.spec.model_copy(update=missing)})


def remembering(status: RunStatus, run: AlignmentRun) -> RunStatus:
    """The workspace in which work has begun: with another default later, what is finished would not be found."""
    begun = any(phase.attempts for phase in status.phases)
    return status.model_copy(update={"workspace": run.spec.workspace}) if begun else status
