"""The pods of a job of the planner, and its name and labels, the same whatever kind of job makes them. Pure."""

import math
from inspect import getsource
from typing import Any

from controller.api import meta
from controller.api.quantities import number
from controller.api.template import Template
from controller.api.workspace import Workspace
from controller.backends import start
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.placement import placement
from controller.backends.cluster.references import reference
from controller.backends.cluster.settings import Settings
from controller.backends.cluster.volumes import PHASE_FOLDER, TMP, WORKSPACE, mounts, volumes
from controller.plan.job import PhaseJob
from trainers import keeper
from trainers.contract import (
    ATTEMPT_VARIABLE,
    DEFAULT_METRICS_PORT,
    KEEPER_VARIABLE,
    METRICS_PORT_VARIABLE,
    RUN_UID_VARIABLE,
    TERMINATION_VARIABLE,
    PhaseFile,
)
from trainers.phases import phase_type

Object = dict[str, Any]

PHASE_FILE = f"{PHASE_FOLDER}/phase.json"
TERMINATION_LOG = "/dev/termination-log"
KEEPER = f"{TMP}/keeper"
"""Socket over which trainers have servers started in the other container (:mod:`trainers.keeper`)."""
RESTRICTED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
MASTER_PORT = 23456
RENDEZVOUS_SECONDS = 7 * 86400
"""For pods to wait for each other: how long that may take is up to the run's startup timeout."""
GRACE_MARGIN = 5
"""Seconds of the pod's grace that torchrun keeps for itself."""


def job_metadata(job: PhaseJob, owner: Owner) -> Object:
    queue = {meta.ANNOTATION_QUEUE: job.queue_name} if job.queue_name else {}
    return {
        "name": job.name,
        "namespace": owner.namespace,
        "labels": {**job.labels, **_queue_labels(job)},
        "annotations": {meta.ANNOTATION_DIGEST: job.digest, meta.ANNOTATION_RUN_UID: owner.uid, **queue},
        "ownerReferences": [reference(owner.name, owner.uid)],
    }


def _queue_labels(job: PhaseJob) -> dict[str, str]:
    if job.queue_name is None:
        return {}
    priority = {meta.LABEL_QUEUE_PRIORITY: job.queue_priority} if job.queue_priority else {}
    return {meta.LABEL_QUEUE: job.queue_name, **priority}


def template(job: PhaseJob, owner: Owner, settings: Settings, container: str, rendezvous: list[Object]) -> Object:
    """A PodTemplateSpec. ``container`` is what the one that trains is called, ``rendezvous`` the variables by which pods meet."""
    return {
        "metadata": {
            "labels": {**(job.template.labels or {}), **job.labels},
            "annotations": {
                # A sidecar has to be asked for: pods of several nodes would not meet through it.
                "sidecar.istio.io/inject": "false",
                **(job.template.annotations or {}),
                meta.ANNOTATION_PHASE_FILE: phase_file(job, owner),
            },
        },
        "spec": {
            "automountServiceAccountToken": False,
            # A Service called vllm would set VLLM_PORT, by which vLLM does not start.
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": job.template.grace_seconds,
            # The pause container is process 1, so a SIGTERM also ends a phase that is still importing torch.
            "shareProcessNamespace": True,
            "securityContext": _security_context(job.template, settings.user),
            **_servers(job),
            "containers": [_container(job, owner, settings.image, container, rendezvous)],
            "volumes": volumes(job),
            **_pulling(job.template),
            **_devices(job.template),
            **placement(job),
        },
    }


def _security_context(template: Template, user: int | None) -> Object:
    given = template.security_context
    return {
        "runAsNonRoot": True,
        **(dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user) if user else {}),
        **(given.document() if given else {}),
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _pulling(template: Template) -> Object:
    secrets = [{"name": name} for name in template.image_pull_secrets or ()]
    return {"imagePullSecrets": secrets} if secrets else {}


def _devices(template: Template) -> Object:
    claims = [claim.document(exclude={"request"}) for claim in template.resource_claims or ()]
    return {"resourceClaims": claims} if claims else {}


def _workspace(job: PhaseJob) -> Workspace:
    assert job.workspace is not None, "a run without a workspace is rejected before this"
    return job.workspace


def phase_file(job: PhaseJob, owner: Owner) -> str:
    """What the phase program reads, as JSON."""
    file: PhaseFile = job.phase_file(WORKSPACE, WORKSPACE, owner.folder)
    uri = _workspace(job).uri
    if uri is not None:
        file = file.model_copy(update={"remote": uri.rstrip("/")})
    return file.model_dump_json(by_alias=True, exclude_unset=True)


def _container(job: PhaseJob, owner: Owner, image: str | None, name: str, rendezvous: list[Object]) -> Object:
    policy, met = job.template.image_pull_policy, {item["name"] for item in rendezvous}
    return {
        "name": name,
        "image": job.image or image,
        **({"imagePullPolicy": policy} if policy else {}),
        "command": ["python", *start.program(job, PHASE_FILE)],
        "env": [item for item in _environment(job, owner) if item["name"] not in met] + rendezvous,
        "envFrom": [{"secretRef": {"name": name}} for name in job.template.secret_refs],
        "ports": _ports(job.procs_per_node),
        "resources": _resources(job.template),
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": RESTRICTED,
        "volumeMounts": mounts(job),
    }


def _starts_server(job: PhaseJob) -> bool:
    return job.template.server is not None and phase_type(job.type).spec.model_validate(job.spec).starts_server


def _servers(job: PhaseJob) -> Object:
    """The container that servers are started in, which sees what the trainers' sees. It is there before them, and the pod ends
    without asking it, as native sidecars are.
    """
    server = job.template.server
    if server is None or not _starts_server(job):
        return {}
    policy = job.template.image_pull_policy
    environment = {"HOME": TMP, "USER": "server", **{item.name: item.value for item in job.template.env}}
    return {
        "initContainers": [
            {
                "name": "server",
                "image": server.image,
                **({"imagePullPolicy": policy} if policy else {}),
                "restartPolicy": "Always",
                "command": ["python3", "-I", "-S", "-c", getsource(keeper), KEEPER],
                "env": [{"name": name, "value": value} for name, value in environment.items()],
                "resources": server.resources.document() if server.resources else {},
                "securityContext": RESTRICTED,
                "volumeMounts": mounts(job),
            }
        ]
    }


def _resources(template: Template) -> Object:
    found = template.resources.document() if template.resources else {}
    claims = [claim.document(include={"name", "request"}) for claim in template.resource_claims or ()]
    return {**found, **({"claims": claims} if claims else {})}


def _ports(processes: int) -> list[Object]:
    """Every process of a pod serves its own metrics, on the ports from the first one on."""
    return [
        {"name": f"metrics-{i}" if i else "metrics", "containerPort": DEFAULT_METRICS_PORT + i}
        for i in range(processes)
    ]


def _environment(job: PhaseJob, owner: Owner) -> list[Object]:
    defaults = {
        # The root file system is read-only, and the user may be unknown to the image.
        "HOME": TMP,
        "USER": "trainer",
        "HF_HOME": f"{WORKSPACE}/.cache/huggingface",
        **_threads(job),
        # torchrun would kill its workers 30 s after a SIGTERM, in the middle of saving a large model.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(job.template.grace_seconds - GRACE_MARGIN, 1)),
    }
    ours = {
        **({KEEPER_VARIABLE: KEEPER} if _starts_server(job) else {}),
        TERMINATION_VARIABLE: TERMINATION_LOG,
        METRICS_PORT_VARIABLE: str(DEFAULT_METRICS_PORT),
        RUN_UID_VARIABLE: owner.uid,
        ATTEMPT_VARIABLE: str(job.attempt),
    }
    return [{"name": name, "value": value} for name, value in start.environment(job, defaults, ours).items()]


def _threads(job: PhaseJob) -> dict[str, str]:
    """A pod's share of the cores: libraries would count the machine's."""
    resources = job.template.resources
    cpu = (resources.limits.get("cpu") or resources.requests.get("cpu")) if resources else None
    if cpu is None:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, math.floor(number(cpu) / job.procs_per_node)))}


def rendezvous(job: PhaseJob, address: str, rank: str) -> list[Object]:
    """torchrun reads PET_*. ``rank`` is the field of a pod that has its place in the job."""
    if job.nodes == 1:
        return []
    return [
        {"name": "PET_MASTER_ADDR", "value": address},
        {"name": "PET_MASTER_PORT", "value": str(MASTER_PORT)},
        {"name": "PET_RDZV_CONF", "value": f"timeout={RENDEZVOUS_SECONDS}"},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": rank}}},
    ]
