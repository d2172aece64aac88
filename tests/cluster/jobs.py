"""The kinds of job that phases run as, and how their controllers label pods."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """How a kind of job is found, and its pods."""

    api: str
    plural: str
    container: str
    pods: str
    """Their label that has the job's name."""
    index: str
    """Their label that has their place."""

    def path(self, namespace: str = "") -> str:
        """Of all, or of those of a namespace."""
        scope = f"namespaces/{namespace}/" if namespace else ""
        return f"/apis/{self.api}/{scope}{self.plural.partition('.')[0]}"

    def pod(self, job: str, index: int) -> str:
        """Selects one."""
        return f"{self.pods}={job},{self.index}={index}"


_TO, _JOBSET, _BATCH = "training.kubeflow.org", "jobset.sigs.k8s.io", "batch.kubernetes.io"
KINDS = {
    "PyTorchJob": Kind(
        api="kubeflow.org/v1", plural="pytorchjobs.kubeflow.org", container="pytorch",
        pods=f"{_TO}/job-name", index=f"{_TO}/replica-index",
    ),
    "TrainJob": Kind(
        api="trainer.kubeflow.org/v1alpha1", plural="trainjobs.trainer.kubeflow.org", container="node",
        pods=f"{_JOBSET}/jobset-name", index=f"{_BATCH}/job-completion-index",
    ),
}  # fmt: skip
