"""A phase as a TrainJob of the Kubeflow Trainer v2, which makes a JobSet of it, that a Job, and that the pods.

What the pods are is in a TrainingRuntime of the attempt's own beside it, so nobody has to install one. The Trainer has nothing to
add: its plugin for torch would choose the number of processes by itself, and the rendezvous is that of every kind of job.
Nothing is tried again below a TrainJob: one pod that fails is the end of the Job, of the JobSet and of the TrainJob.
"""

import re
from collections.abc import Mapping
from typing import Any

from controller.api.backend import CONTAINERS, BackendName
from controller.backends.cluster import pod
from controller.backends.cluster.conditions import condition
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.settings import Settings
from controller.kube.resources import BATCH_JOBS, JOBSETS, TRAINING_RUNTIMES, TRAINJOBS
from controller.plan.job import PhaseJob

Object = dict[str, Any]

KIND = "TrainJob"
RESOURCE = TRAINJOBS
INSTALL = "Kubeflow Trainer v2.3 with JobSet"
INTEGRATION = "trainer.kubeflow.org/trainjob"
MAKERS = {(TRAINJOBS.group, KIND): TRAINJOBS, (JOBSETS.group, "JobSet"): JOBSETS, (BATCH_JOBS.group, "Job"): BATCH_JOBS}
PROPAGATION = "Background"
"""While a TrainJob is there the Trainer makes a JobSet that is gone anew, also of one that is being deleted."""
CONTAINER = CONTAINERS[BackendName.TRAINJOB]
"""The Trainer demands this name."""
PODS = "jobset.sigs.k8s.io/jobset-name"
REFERS = True
SUSPEND = "spec.suspend"
SET = "node"
"""What the JobSet calls the one Job in it."""
PLACE = re.compile("-([0-9]+)-[a-z0-9]{5}$")
RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
API_VERSION = f"{TRAINJOBS.group}/{TRAINJOBS.version}"
ENDS = {"Complete": "Succeeded", "Failed": "Failed"}


def render(job: PhaseJob, owner: Owner, settings: Settings) -> Object:
    """Without `managedBy`, which Kueue sets where another cluster is to run it."""
    runtime = {"apiGroup": TRAINING_RUNTIMES.group, "kind": "TrainingRuntime", "name": job.name}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": pod.job_metadata(job, owner),
        "spec": {"runtimeRef": runtime, "trainer": {"numNodes": job.nodes}},
    }


def runtime(job: PhaseJob, owner: Owner, settings: Settings) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainingRuntime",
        "metadata": pod.job_metadata(job, owner),
        "spec": {
            "mlPolicy": {"numNodes": job.nodes},
            "template": {
                "metadata": {"labels": dict(job.labels)},
                "spec": {"replicatedJobs": [{"name": SET, "template": _job(job, owner, settings)}]},
            },
        },
    }


def _job(job: PhaseJob, owner: Owner, settings: Settings) -> Object:
    template = pod.template(job, owner, settings, CONTAINER, _rendezvous(job))
    return {
        # By this label the Trainer knows which pods it is about.
        "metadata": {"labels": {**job.labels, "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {
            "backoffLimit": 0,
            "template": {**template, "spec": {**template["spec"], "restartPolicy": "Never"}},
        },
    }


def _rendezvous(job: PhaseJob) -> list[Object]:
    size = {"PET_NNODES": job.nodes, "PET_NPROC_PER_NODE": job.procs_per_node}
    # The first pod's name in the JobSet's own headless Service.
    met = pod.rendezvous(job, f"{job.name}-{SET}-0-0.{job.name}", RANK)
    return [*({"name": name, "value": str(value)} for name, value in size.items()), *met]


def name_of(maker: str) -> str:
    return maker.removesuffix(f"-{SET}-0")


def nodes(job: Mapping[str, Any]) -> int:
    return int(job["spec"].get("trainer", {}).get("numNodes", 1))


def is_suspended(job: Mapping[str, Any]) -> bool:
    return bool(job["spec"].get("suspend"))


def managed_by(job: Mapping[str, Any]) -> str | None:
    found: str | None = job["spec"].get("managedBy")
    return found


def ended(job: Mapping[str, Any]) -> str | None:
    return next((end for kind, end in ENDS.items() if condition(job, kind).get("status") == "True"), None)


def started_at(job: Mapping[str, Any]) -> str | None:
    let_go = condition(job, "Suspended")
    return let_go.get("lastTransitionTime") if let_go.get("status") == "False" else None


def finished_at(job: Mapping[str, Any]) -> str | None:
    found = (condition(job, kind) for kind in ENDS)
    return next((c.get("lastTransitionTime") for c in found if c.get("status") == "True"), None)
