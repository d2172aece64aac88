"""What a job's pods see of disks. Pure."""

from typing import Any

from controller.api import meta
from controller.api.volumes import EphemeralClaim, PodVolume
from controller.api.workspace import Workspace
from controller.plan.job import PhaseJob

Object = dict[str, Any]

WORKSPACE = "/workspace"
PHASE_FOLDER = "/etc/alignment"
TMP = "/tmp"  # noqa: S108 -- an emptyDir of the pod's own
SHARED_MEMORY = "/dev/shm"  # noqa: S108


def volumes(job: PhaseJob) -> list[Object]:
    given = {_path(volume.mount_path) for volume in job.template.volumes or ()}
    return [
        *({"name": name, **source} for name, path, source in _usual(job.workspace) if path not in given),
        *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": c.claim_name, "readOnly": c.read_only}}
          for i, c in enumerate(job.template.claims)),
        *({"name": f"volume-{i}", **_source(v)} for i, v in enumerate(job.template.volumes or ())),
    ]  # fmt: skip


def mounts(job: PhaseJob) -> list[Object]:
    given = {_path(volume.mount_path) for volume in job.template.volumes or ()}
    return [
        *({"name": name, "mountPath": path, **({"readOnly": True} if name == "phase" else {})}
          for name, path, _ in _usual(job.workspace) if path not in given),
        *({"name": f"claim-{i}", "mountPath": c.mount_path, "readOnly": c.read_only,
           **({"subPath": c.sub_path} if c.sub_path else {})}
          for i, c in enumerate(job.template.claims)),
        *({"name": f"volume-{i}", "mountPath": v.mount_path} for i, v in enumerate(job.template.volumes or ())),
    ]  # fmt: skip


def _usual(workspace: Workspace | None) -> list[tuple[str, str, Object]]:
    """Name, place and source of what every pod has, unless the user has put another volume there."""
    claim = workspace.claim_name if workspace else None
    annotation = f"metadata.annotations['{meta.ANNOTATION_PHASE_FILE}']"
    phase = {"downwardAPI": {"items": [{"path": "phase.json", "fieldRef": {"fieldPath": annotation}}]}}
    return [
        ("workspace", WORKSPACE, {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}),
        ("phase", PHASE_FOLDER, phase),
        ("tmp", TMP, {"emptyDir": {}}),
        # Processes of a pod exchange tensors through shared memory; the runtime's own default is 64 MB.
        ("shm", SHARED_MEMORY, {"emptyDir": {"medium": "Memory"}}),
    ]


def _source(volume: PodVolume) -> Object:
    if volume.ephemeral is not None:
        return {"ephemeral": {"volumeClaimTemplate": {"spec": _claim(volume.ephemeral)}}}
    given = volume.document(exclude={"mount_path"})
    return {kind: source for kind, source in given.items() if kind in ("emptyDir", "csi", "image")}


def _claim(wanted: EphemeralClaim) -> Object:
    named = {"storageClassName": wanted.storage_class_name} if wanted.storage_class_name else {}
    return {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": wanted.size}}, **named}


def _path(mount_path: str) -> str:
    return mount_path.rstrip("/")
