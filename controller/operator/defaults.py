"""What the operator sets for runs that do not say."""

from dataclasses import dataclass
from typing import Any

from controller.api.backend import BackendName
from controller.api.run import AlignmentRun
from controller.api.status import PhaseStatus, RunStatus
from controller.api.workspace import Workspace
from controller.plan.place import folder_of, has_begun
from controller.plan.resolve import merge_templates


@dataclass(frozen=True)
class Defaults:
    workspace: Workspace | None = None
    queue: str | None = None
    """A LocalQueue."""
    image: str | None = None
    """The trainers'."""
    backend: BackendName = BackendName.PYTORCHJOB

    def applied(self, run: AlignmentRun) -> AlignmentRun:
        """Only for one look at it: what is written back is the run's status, never its spec."""
        missing: dict[str, Any] = {"backend": self._backend(run)}
        if run.spec.queue_name is None:
            missing["queue_name"] = self.queue
        if run.spec.workspace is None:
            missing["workspace"] = (run.status.workspace if run.status else None) or self.workspace
        return run.model_copy(update={"spec": run.spec.model_copy(update=missing)})

    def remembered(self, status: RunStatus, run: AlignmentRun) -> RunStatus:
        """With what work has begun with: with other defaults later, what is finished would not be found, and the rest begin anew.

        A phase's checkpoints are of the program that has written them, so of its image.
        """
        if not has_begun(status):
            return status
        open_ = {entry.name for entry in run.phases if not merge_templates(run.spec.template, entry.template).image}
        phases = tuple(self._begun(phase) if phase.name in open_ else phase for phase in status.phases)
        return status.model_copy(
            update={
                "backend": run.spec.backend, "workspace": run.spec.workspace, "folder": folder_of(run), "phases": phases,
            }
        )  # fmt: skip

    def _backend(self, run: AlignmentRun) -> BackendName:
        """What began before there was a choice has PyTorchJobs."""
        begun = run.status is not None and has_begun(run.status)
        known = run.status.backend if run.status is not None else None
        return known or (BackendName.PYTORCHJOB if begun else run.spec.backend or self.backend)

    def _begun(self, phase: PhaseStatus) -> PhaseStatus:
        return phase.model_copy(update={"image": phase.image or self.image or ""}) if phase.attempts else phase
