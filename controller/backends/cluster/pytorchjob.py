"""A phase as a PyTorchJob of the Kubeflow Training Operator v1.

Workers only, no Master: then the Training Operator adds no init container (which would break restricted namespaces and
air-gapped sites), and the job succeeds only when every pod has. Retries, deadlines and clean-up are the planner's, because
the Training Operator's do not hold (backoffLimit is never enforced when pods are recreated, activeDeadlineSeconds is
checked only when something else happens).
"""

import re
from collections.abc import Mapping
from typing import Any

from controller.api.backend import CONTAINERS, BackendName
from controller.backends.cluster import pod
from controller.backends.cluster.conditions import condition
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.settings import Settings
from controller.kube.resources import PYTORCHJOBS
from controller.plan.job import PhaseJob

Object = dict[str, Any]

KIND = "PyTorchJob"
RESOURCE = PYTORCHJOBS
INSTALL = "the Kubeflow Training Operator v1"
INTEGRATION = "kubeflow.org/pytorchjob"
MAKERS = {(PYTORCHJOBS.group, KIND): PYTORCHJOBS}
PROPAGATION = "Foreground"
CONTAINER = CONTAINERS[BackendName.PYTORCHJOB]
"""The Training Operator demands this name."""
PODS = "training.kubeflow.org/job-name"
REFERS = False
SUSPEND = "spec.runPolicy.suspend"
PLACE = re.compile("-worker-([0-9]+)$")
RANK = "metadata.labels['training.kubeflow.org/replica-index']"


def render(job: PhaseJob, owner: Owner, settings: Settings) -> Object:
    """The PyTorchJob for one attempt. The Training Operator adds PET_NNODES and PET_NPROC_PER_NODE."""
    address = f"{job.name}-worker-0"
    template = pod.template(job, owner, settings, CONTAINER, pod.rendezvous(job, address, RANK))
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": KIND,
        "metadata": pod.job_metadata(job, owner),
        "spec": {
            "nprocPerNode": str(job.procs_per_node),
            # Running: pods that have ended stay, to be read; others do not keep their GPUs.
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {"Worker": {"replicas": job.nodes, "restartPolicy": "Never", "template": template}},
        },
    }


def runtime(job: PhaseJob, owner: Owner, settings: Settings) -> None:
    """All is in the job."""


def name_of(maker: str) -> str:
    return maker


def nodes(job: Mapping[str, Any]) -> int:
    return int(job["spec"]["pytorchReplicaSpecs"]["Worker"].get("replicas", 1))


def is_suspended(job: Mapping[str, Any]) -> bool:
    return bool(job["spec"].get("runPolicy", {}).get("suspend"))


def managed_by(job: Mapping[str, Any]) -> str | None:
    found: str | None = job["spec"].get("runPolicy", {}).get("managedBy")
    return found


def ended(job: Mapping[str, Any]) -> str | None:
    return next((kind for kind in ("Succeeded", "Failed") if condition(job, kind).get("status") == "True"), None)


def started_at(job: Mapping[str, Any]) -> str | None:
    found: str | None = job.get("status", {}).get("startTime")
    return found


def finished_at(job: Mapping[str, Any]) -> str | None:
    found: str | None = job.get("status", {}).get("completionTime") or condition(job, ended(job) or "").get(
        "lastTransitionTime"
    )
    return found
