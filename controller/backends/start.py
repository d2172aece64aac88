"""How a phase is started, alike in a pod and on one machine."""

from collections.abc import Mapping
from pathlib import PurePath

from controller.plan.job import PhaseJob
from trainers.contract import HALVINGS_VARIABLE

DEFAULTS = {
    # Folders named like packages in the working directory must not be imported.
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    # Threads that wait must not burn the cores that a neighbour computes on: two pods on two cores were 20 times slower.
    "OMP_WAIT_POLICY": "passive",
}


def program(job: PhaseJob, phase_file: PurePath | str, *torchrun: str) -> list[str]:
    """Python's arguments: torchrun only where there is more than one process (docs/adr/0001)."""
    many = job.nodes * job.procs_per_node > 1
    return [
        *(["-m", "trainers.agent", *torchrun] if many else []),
        "-m",
        "trainers",
        job.type,
        "--spec",
        str(phase_file),
    ]


def environment(job: PhaseJob, defaults: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """What a run's own `env` may change, that, and what it may not."""
    own = {item.name: item.value for item in job.template.env}
    return {**DEFAULTS, **defaults, **own, **ours, HALVINGS_VARIABLE: str(job.halvings)}
