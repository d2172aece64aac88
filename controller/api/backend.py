"""What carries out a run's phases on a cluster."""

import enum


class BackendName(enum.StrEnum):
    """A kind of job, of which there is one for each attempt at a phase."""

    PYTORCHJOB = "PyTorchJob"
    """Of the Kubeflow Training Operator v1."""
    TRAINJOB = "TrainJob"
    """Of the Kubeflow Trainer v2."""


CONTAINERS = {BackendName.PYTORCHJOB: "pytorch", BackendName.TRAINJOB: "node"}
"""What each demands that the container of the trainers is called."""
