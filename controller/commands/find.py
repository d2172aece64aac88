"""Which run and which phase a command means when it is not told."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from controller import runs_folder
from controller.api.problems import InvalidRun, Problem, nearest
from controller.api.status import PhaseState, RunStatus


def find_run(root: Path, run: str | None) -> str:
    """The run that is meant: the named one, else the one touched last."""
    names = runs_folder.run_names(root)
    if not names:
        raise InvalidRun(
            [Problem(str(root), "no run has been started in this workspace (another one: --workspace DIR)")]
        )
    return named(run, names, str(root)) if run else names[0]


def named(run: str, names: Sequence[str], where: str) -> str:
    if run not in names:
        raise InvalidRun([Problem(where, f'no run "{run}" here; runs are: {", ".join(names)}{nearest(run, names)}')])
    return run


def interesting_phase(status: RunStatus) -> str | None:
    """What runs, else what failed, else what ran last; None if nothing has run."""
    for state in (PhaseState.RUNNING, PhaseState.FAILED, PhaseState.BACKING_OFF):
        for phase in status.phases:
            if phase.state == state:
                return phase.name
    ran = [p for p in status.phases if p.attempts and p.finished_at]
    last = max(ran, key=lambda p: p.finished_at or datetime.min.replace(tzinfo=UTC), default=None)
    return last.name if last else None
