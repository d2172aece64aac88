"""How a phase's processes run: the part of a pod that users say. The rest is the operator's (docs/adr/0015)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, StringConstraints

from controller.api.labels import Annotations, Labels
from controller.api.meta import DNS_LABEL
from controller.api.placement import Affinity, Toleration, TopologySpread
from controller.api.quantities import Quantity
from controller.api.volumes import ClaimMount, PodVolume
from controller.api.workspace import OBJECT_NAME
from trainers.spec import SpecModel

BY_PATH: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["mountPath"]}
BY_NAME: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
"""The API server refuses two of one key."""
ONCE: dict[str, JsonValue] = {"x-kubernetes-list-type": "set"}
BY_PLACE: dict[str, JsonValue] = {
    "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["topologyKey", "whenUnsatisfiable"],
}  # fmt: skip
LARGEST_ID = 2**31 - 1


class EnvVar(SpecModel):
    name: str = Field(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", max_length=256)
    """Name of the variable."""
    value: str = ""
    """Its value."""


class Resources(SpecModel):
    requests: dict[str, Quantity] = {}
    """What the scheduler sets aside, for example `{cpu: 8, memory: 64Gi}`."""
    limits: dict[str, Quantity] = {}
    """What a pod may use at most, for example `{nvidia.com/gpu: 8}`."""


SecretName = Annotated[str, StringConstraints(pattern=OBJECT_NAME, max_length=253)]


class ResourceClaim(SpecModel):
    """A device that dynamic resource allocation gives: exactly one of `resourceClaimName`, `resourceClaimTemplateName`."""

    one_of: ClassVar[tuple[str, ...]] = ("resource_claim_name", "resource_claim_template_name")

    name: str = Field(pattern=DNS_LABEL, max_length=63)
    """What the pod calls it."""
    resource_claim_name: SecretName | None = None
    """A ResourceClaim, for all pods together."""
    resource_claim_template_name: SecretName | None = None
    """A ResourceClaimTemplate: every pod has a claim of its own."""
    request: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63)
    """One request of the claim; all of them unless set."""


class SecurityContext(SpecModel):
    """Whose the pod's processes and files are, within the restricted Pod Security level; the operator's setting unless set."""

    run_as_user: int | None = Field(default=None, ge=1, le=LARGEST_ID)
    """User id; never root's."""
    run_as_group: int | None = Field(default=None, ge=0, le=LARGEST_ID)
    """Group id."""
    fs_group: int | None = Field(default=None, ge=0, le=LARGEST_ID)
    """Group that volumes are made writable for."""
    supplemental_groups: tuple[Annotated[int, Field(ge=0, le=LARGEST_ID)], ...] | None = Field(
        default=None, max_length=16
    )
    """Further groups, for example that of a file server."""


class ServerContainer(SpecModel):
    """A container beside that of the trainers, in which vLLM runs for a phase that starts one (`sampling.engine: vllm` without `url`)."""

    image: str = Field(default="vllm/vllm-openai:v0.32.0", pattern=r"^[^\sA-Z][^\s]*$", max_length=1024)
    """Its image, which has vLLM and `python3`."""
    resources: Resources | None = None
    """Its requests and limits: the GPUs here are vLLM's, those of the template the trainers'."""


class Template(SpecModel):
    """How a phase's processes run. A field set in a phase's own template wins; `env` is merged by name."""

    image: str | None = Field(default=None, pattern=r"^[^\sA-Z][^\s]*$", max_length=1024)
    """Container image of the trainers; the operator's default unless set. Part of a phase's identity."""
    nodes: int | None = Field(default=None, ge=1, le=4096)
    """Pods (machines) per phase; 1 unless set. Local runs have one."""
    min_nodes: int | None = Field(default=None, ge=1, le=4096)
    """Where not all `nodes` find a place within `failurePolicy.startupTimeoutSeconds`, go on with those that do, if they are as many as this."""
    procs_per_node: int | None = Field(default=None, ge=1, le=64)
    """Processes per pod, one per GPU; 1 unless set."""
    resources: Resources | None = None
    """Requests and limits of each pod."""
    server: ServerContainer | None = None
    """Where vLLM runs for phases that start one; in the trainers' own container unless set."""
    env: tuple[EnvVar, ...] = Field(default=(), max_length=128, json_schema_extra=BY_NAME)
    """Environment variables, of the server's container too."""
    secret_refs: tuple[SecretName, ...] = Field(default=(), max_length=16, json_schema_extra=ONCE)
    """Secrets whose keys become environment variables (a hub token, object store credentials)."""
    claims: tuple[ClaimMount, ...] = Field(default=(), max_length=16, json_schema_extra=BY_PATH)
    """Claims to mount besides the workspace."""
    volumes: tuple[PodVolume, ...] | None = Field(default=None, max_length=16, json_schema_extra=BY_PATH)
    """Volumes that live as long as the pod: disk of the node, a cache on it, files of an image."""
    node_selector: dict[str, str] = {}
    """Labels a node must have. By `nvidia.com/gpu.product` it is said beforehand whether a phase fits that GPU."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU (`80Gi`), where its product does not tell it. Nothing is asked for by it: whether phases fit is said by `alignctl plan` and in the status."""
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=32)
    """Taints that are tolerated."""
    affinity: Affinity | None = None
    """Nodes and pods that the pods go to or keep away from."""
    topology_spread_constraints: tuple[TopologySpread, ...] | None = Field(
        default=None, max_length=8, json_schema_extra=BY_PLACE
    )
    """How evenly the pods of a job are spread."""
    labels: Labels | None = None
    """Labels of the pods, beside the run's own."""
    annotations: Annotations | None = None
    """Annotations of the pods: networks, topology-aware scheduling, injected sidecars."""
    resource_claims: tuple[ResourceClaim, ...] | None = Field(default=None, max_length=16, json_schema_extra=BY_NAME)
    """Devices by dynamic resource allocation."""
    service_account_name: str | None = None
    """Service account of the pods."""
    priority_class_name: str | None = None
    """Priority class of the pods."""
    runtime_class_name: SecretName | None = None
    """Runtime class of the pods."""
    scheduler_name: SecretName | None = None
    """Scheduler of the pods; the cluster's default unless set."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When nodes pull the image; IfNotPresent unless set, of a tag `latest` Always."""
    image_pull_secrets: tuple[SecretName, ...] | None = Field(default=None, max_length=8, json_schema_extra=ONCE)
    """Secrets to pull images with, beside those of the service account."""
    security_context: SecurityContext | None = None
    """User and groups of the pods."""
    grace_seconds: int = Field(default=120, ge=1, le=3600)
    """Time a pod has to save its work when it is asked to stop."""
