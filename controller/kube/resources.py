"""The kinds of objects that the controller reads or writes, and where the API server has them."""

from dataclasses import dataclass
from typing import Any

from controller.api import meta

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    group: str
    version: str
    plural: str
    subresource: str = ""

    def path(self, namespace: str | None, name: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural]
        return "/".join([*parts, *filter(None, (name, self.subresource))])


RUNS = Resource(meta.GROUP, meta.VERSION, meta.PLURAL)
RUN_STATUS = Resource(meta.GROUP, meta.VERSION, meta.PLURAL, "status")
PYTORCHJOBS = Resource("kubeflow.org", "v1", "pytorchjobs")
TRAINJOBS = Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs")
TRAINING_RUNTIMES = Resource("trainer.kubeflow.org", "v1alpha1", "trainingruntimes")
JOBSETS = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets")
BATCH_JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
WORKLOADS = tuple(Resource("kueue.x-k8s.io", version, "workloads") for version in ("v1beta2", "v1beta1"))
"""As newer and as older clusters serve them. What is read of them is alike in both: owners, labels and conditions."""
EVENTS = Resource("events.k8s.io", "v1", "events")
CORE_EVENTS = Resource("", "v1", "events")
"""The same events by their older name, under which they can be selected by the object that they are about."""
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")
LEASES = Resource("coordination.k8s.io", "v1", "leases")

JOBS = (PYTORCHJOBS, TRAINJOBS)
"""What a phase can run as."""
BETWEEN = (JOBSETS, BATCH_JOBS)
"""What is made of such a job before pods are."""
WATCHED = (RUNS, *JOBS, *BETWEEN, PODS)
"""What kopf lists and watches for us, where it is installed."""
