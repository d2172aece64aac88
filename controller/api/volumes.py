"""What pods see besides the workspace: claims, and volumes that live as long as the pod.

None that the restricted Pod Security level refuses: no folder of the node's own.
"""

from collections import Counter
from collections.abc import Sequence
from posixpath import normpath
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from controller.api.problems import shown
from controller.api.quantities import Quantity
from controller.api.workspace import OBJECT_NAME
from trainers.spec import SpecModel

OWN_FOLDERS = ("/", "/dev", "/etc", "/etc/alignment", "/proc", "/sys", "/dev/termination-log")
"""Of the pod, where a volume would hide what a phase needs."""

MountPath = Annotated[
    str,
    Field(
        pattern=r"^/[^:]+$",
        max_length=512,
        json_schema_extra={
            "x-kubernetes-validations": [{"rule": f"!(self in {list(OWN_FOLDERS)})", "message": "the pod's own"}]
        },
    ),
]


class ClaimMount(SpecModel):
    """A PersistentVolumeClaim that pods see besides the workspace, for example data or a cache of models."""

    claim_name: str = Field(pattern=OBJECT_NAME, max_length=253)
    """Name of the claim."""
    mount_path: MountPath
    """Where pods see it."""
    sub_path: str | None = None
    """Folder in the claim; all of it unless set."""
    read_only: bool = True
    """Pods cannot write to it."""


class EmptyDir(SpecModel):
    """Disk of the node, or its memory."""

    medium: Literal["Memory"] | None = None
    """The node's memory in place of its disk; it counts as the pod's."""
    size_limit: Quantity | None = None
    """A pod that takes more is evicted."""


class EphemeralClaim(SpecModel):
    """A claim that is made for the pod and deleted with it."""

    size: Quantity
    """How much."""
    storage_class_name: str | None = Field(default=None, pattern=OBJECT_NAME, max_length=253)
    """StorageClass, for example one of the nodes' own NVMe; the cluster's default unless set."""


class CsiVolume(SpecModel):
    """What a CSI driver makes for the pod, for example a cache on the node that pods after it find."""

    driver: str = Field(pattern=OBJECT_NAME, max_length=63)
    """Name of the driver."""
    volume_attributes: dict[str, str] = {}
    """What it is told."""
    read_only: bool = False
    """Pods cannot write to it."""


class ImageVolume(SpecModel):
    """Files of an OCI image or artifact, which nodes keep as they keep images: a model that is pulled once a node."""

    reference: str = Field(pattern=r"^[^\sA-Z][^\s]*$", max_length=1024)
    """The image."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the node pulls it."""


class PodVolume(SpecModel):
    """Exactly one of `emptyDir`, `ephemeral`, `csi`, `image`. At `/tmp`, `/dev/shm`, or at `/workspace` with a workspace by `uri`, it stands in for the pod's own."""

    one_of: ClassVar[tuple[str, ...]] = ("empty_dir", "ephemeral", "csi", "image")

    mount_path: MountPath
    """Where pods see it."""
    empty_dir: EmptyDir | None = None
    """Disk of the node, or its memory."""
    ephemeral: EphemeralClaim | None = None
    """A claim that is made for the pod and deleted with it."""
    csi: CsiVolume | None = None
    """What a CSI driver makes for the pod."""
    image: ImageVolume | None = None
    """Files of an OCI image."""


def mount_problems(claims: Sequence[ClaimMount], volumes: Sequence[PodVolume], claimed: bool) -> list[str]:
    """What Kubernetes would refuse of all mounts of a pod. ``claimed``: its workspace is a claim."""
    given = [*(c.mount_path for c in claims), *(v.mount_path for v in volumes)]
    unsound = [path for path in given if ".." in path.split("/") or not path.isprintable()]
    paths = Counter("/" + normpath(path).lstrip("/") for path in given if path not in unsound)
    problems = [f'{shown(path)} is no mountPath: it has "..", or characters that cannot be shown' for path in unsound]
    problems += [
        f'"{path}" is the mountPath of {count} claims and volumes; one at each'
        for path, count in paths.items()
        if count > 1
    ]
    if claimed and "/workspace" in paths:
        problems.append('"/workspace" is where the claim of spec.workspace is; choose another mountPath')
    return [
        *problems,
        *(f'"{path}" is the pod\'s own; choose another mountPath' for path in OWN_FOLDERS if path in paths),
    ]
