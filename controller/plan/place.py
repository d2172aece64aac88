"""Where a run's work is in its workspace."""

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus


def folder_of(run: AlignmentRun) -> str:
    """Two namespaces may have runs of one name in one workspace. A namespace has no dot, nor has a run.

    A run that began before folders were called so stays where its work is.
    """
    if run.status is not None and run.status.folder:
        return run.status.folder
    if run.status is not None and has_begun(run.status):
        return run.name
    return f"{run.metadata.namespace or 'default'}.{run.name}"


def has_begun(status: RunStatus) -> bool:
    return any(phase.attempts for phase in status.phases)
