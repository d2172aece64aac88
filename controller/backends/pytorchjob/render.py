"""From a job of the planner to a PyTorchJob. Pure: the same job gives the same object.

Workers only, no Master: then the Training Operator adds no init container (which would break restricted namespaces and
air-gapped sites), and the job succeeds only when every pod has. Retries, deadlines and clean-up are the planner's, because
the Training Operator's do not hold (backoffLimit is never enforced when pods are recreated, activeDeadlineSeconds is
checked only when something else happens).
"""

import math
from dataclasses import dataclass
from typing import Any

from controller.api import meta
from controller.api.run import Template
from controller.api.workspace import Workspace
from controller.plan.job import PhaseJob
from trainers.contract import DEFAULT_METRICS_PORT, METRICS_PORT_VARIABLE, TERMINATION_VARIABLE, PhaseFile

Object = dict[str, Any]

CONTAINER = "pytorch"
"""The Training Operator demands this name."""
WORKSPACE = "/workspace"
PHASE_FOLDER = "/etc/alignment"
PHASE_FILE = f"{PHASE_FOLDER}/phase.json"
TERMINATION_LOG = "/dev/termination-log"
MASTER_PORT = 23456
RENDEZVOUS_SECONDS = 7 * 86400
"""For pods to wait for each other: how long that may take is up to the run's startup timeout."""
GRACE_MARGIN = 5
"""Seconds of the pod's grace that torchrun keeps for itself."""
TMP = "/tmp"  # noqa: S108 -- an emptyDir of the pod's own
SHARED_MEMORY = "/dev/shm"  # noqa: S108
USER = 1000
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


@dataclass(frozen=True)
class Owner:
    """The run that a job belongs to."""

    namespace: str
    name: str
    uid: str


def render(job: PhaseJob, owner: Owner, image: str | None) -> Object:
    """The PyTorchJob for one attempt; ``image`` if the run names none."""
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {
            "name": job.name,
            "namespace": owner.namespace,
            "labels": {**job.labels, **_queue_labels(job)},
            "annotations": {meta.ANNOTATION_DIGEST: job.digest},
            "ownerReferences": [_owner_reference(owner)],
        },
        "spec": {
            "nprocPerNode": str(job.procs_per_node),
            # Running: pods that have ended stay, to be read; others do not keep their GPUs.
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": job.nodes, "restartPolicy": "Never", "template": _pod(job, image)}
            },
        },
    }


def _owner_reference(owner: Owner) -> Object:
    return {
        "apiVersion": meta.API_VERSION,
        "kind": meta.KIND,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
    }


def _queue_labels(job: PhaseJob) -> dict[str, str]:
    if job.queue_name is None:
        return {}
    priority = {QUEUE_PRIORITY_LABEL: job.queue_priority} if job.queue_priority else {}
    return {QUEUE_LABEL: job.queue_name, **priority}


def _pod(job: PhaseJob, image: str | None) -> Object:
    return {
        "metadata": {
            "labels": dict(job.labels),
            "annotations": {
                meta.ANNOTATION_PHASE_FILE: phase_file(job),
                # A sidecar never ends, so the job would not either.
                "sidecar.istio.io/inject": "false",
            },
        },
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": job.template.grace_seconds,
            # The pause container is process 1, so a SIGTERM also ends a phase that is still importing torch.
            "shareProcessNamespace": True,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(job, image)],
            "volumes": _volumes(job, _workspace(job)),
            **_placement(job),
        },
    }


def _workspace(job: PhaseJob) -> Workspace:
    assert job.workspace is not None, "a run without a workspace is rejected before this"
    return job.workspace


def phase_file(job: PhaseJob) -> str:
    """What the phase program reads, as JSON."""
    file: PhaseFile = job.phase_file(WORKSPACE, WORKSPACE)
    uri = _workspace(job).uri
    if uri is not None:
        file = file.model_copy(update={"remote": uri.rstrip("/")})
    return file.model_dump_json(by_alias=True)


def _container(job: PhaseJob, image: str | None) -> Object:
    resources = job.template.resources
    return {
        "name": CONTAINER,
        "image": job.image or image,
        "command": _command(job),
        "env": _environment(job),
        "envFrom": [{"secretRef": {"name": name}} for name in job.template.secret_refs],
        "ports": _ports(job.procs_per_node),
        "resources": resources.document() if resources else {},
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(job),
    }


def _ports(processes: int) -> list[Object]:
    """Every process of a pod serves its own metrics, on the ports from the first one on."""
    return [
        {"name": f"metrics-{i}" if i else "metrics", "containerPort": DEFAULT_METRICS_PORT + i}
        for i in range(processes)
    ]


def _command(job: PhaseJob) -> list[str]:
    """As on one machine (docs/adr/0001): torchrun only where there is more than one process."""
    program = ["-m", "trainers", job.type, "--spec", PHASE_FILE]
    many = job.nodes * job.procs_per_node > 1
    return ["python", *(["-m", "trainers.agent"] if many else []), *program]


def _environment(job: PhaseJob) -> list[Object]:
    defaults = {
        # The root file system is read-only, and the user may be unknown to the image.
        "HOME": TMP,
        "USER": "trainer",
        "HF_HOME": f"{WORKSPACE}/.cache/huggingface",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        **_threads(job),
        # Threads that wait must not burn the cores that a neighbour computes on: two pods on two cores were 20 times slower.
        "OMP_WAIT_POLICY": "passive",
        # torchrun would kill its workers 30 s after a SIGTERM, in the middle of saving a large model.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(job.template.grace_seconds - GRACE_MARGIN, 1)),
        **{item.name: item.value for item in job.template.env},
        TERMINATION_VARIABLE: TERMINATION_LOG,
        METRICS_PORT_VARIABLE: str(DEFAULT_METRICS_PORT),
    }
    return [{"name": name, "value": value} for name, value in defaults.items()] + _rendezvous(job)


def _threads(job: PhaseJob) -> dict[str, str]:
    """A pod's share of the cores: libraries would count the machine's."""
    resources = job.template.resources
    cpu = (resources.limits.get("cpu") or resources.requests.get("cpu")) if resources else None
    if cpu is None:
        return {}
    cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return {"OMP_NUM_THREADS": str(max(1, math.floor(cores / job.procs_per_node)))}


def _rendezvous(job: PhaseJob) -> list[Object]:
    """torchrun reads PET_*; the Training Operator adds PET_NNODES and PET_NPROC_PER_NODE, for jobs without a Master no more."""
    if job.nodes == 1:
        return []
    index = "metadata.labels['training.kubeflow.org/replica-index']"
    return [
        {"name": "PET_MASTER_ADDR", "value": f"{job.name}-worker-0"},
        {"name": "PET_MASTER_PORT", "value": str(MASTER_PORT)},
        {"name": "PET_RDZV_CONF", "value": f"timeout={RENDEZVOUS_SECONDS}"},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _volumes(job: PhaseJob, workspace: Workspace) -> list[Object]:
    annotation = f"metadata.annotations['{meta.ANNOTATION_PHASE_FILE}']"
    claim = workspace.claim_name
    return [
        {"name": "workspace", **({"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}})},
        {
            "name": "phase",
            "downwardAPI": {"items": [{"path": "phase.json", "fieldRef": {"fieldPath": annotation}}]},
        },
        {"name": "tmp", "emptyDir": {}},
        # Processes of a pod exchange tensors through shared memory; the runtime's own default is 64 MB.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": c.claim_name, "readOnly": c.read_only}}
          for i, c in enumerate(job.template.claims)),
    ]  # fmt: skip


def _mounts(job: PhaseJob) -> list[Object]:
    return [
        {"name": "workspace", "mountPath": WORKSPACE},
        {"name": "phase", "mountPath": PHASE_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": TMP},
        {"name": "shm", "mountPath": SHARED_MEMORY},
        *({"name": f"claim-{i}", "mountPath": c.mount_path, "readOnly": c.read_only,
           **({"subPath": c.sub_path} if c.sub_path else {})}
          for i, c in enumerate(job.template.claims)),
    ]  # fmt: skip


def _placement(job: PhaseJob) -> Object:
    template = job.template
    return {
        "tolerations": [*(t.document() for t in template.tolerations), *_lost_node_tolerations(template, job)],
        **({"nodeSelector": template.node_selector} if template.node_selector else {}),
        **({"serviceAccountName": template.service_account_name} if template.service_account_name else {}),
        **({"priorityClassName": template.priority_class_name} if template.priority_class_name else {}),
        **({"affinity": _away_from(job.avoid_nodes)} if job.avoid_nodes else {}),
    }


def _lost_node_tolerations(template: Template, job: PhaseJob) -> list[Object]:
    """Kubernetes would wait five minutes before it gives up pods on a silent node."""
    given = {t.key for t in template.tolerations}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": job.node_lost_seconds}
        for key in UNREACHABLE
        if key not in given
    ]


def _away_from(nodes: tuple[str, ...]) -> Object:
    """Wished for, not demanded: where all nodes have failed once, or no other has room, one of them is better than none.

    By their names: a label says what a cloud or an administrator has written.
    """
    others = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    wish = {"weight": 100, "preference": {"matchFields": others}}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}
