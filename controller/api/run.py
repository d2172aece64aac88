"""What a user writes: the AlignmentRun's metadata and spec."""

from datetime import datetime
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import (
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from controller.api.backend import BackendName
from controller.api.meta import API_VERSION, DNS_LABEL, KIND, MAX_PHASES, PHASE_NAME_LENGTH, RUN_NAME_LENGTH
from controller.api.status import RunStatus
from controller.api.template import Template
from controller.api.workspace import Workspace
from trainers.contract import PhaseType
from trainers.phases import REGISTRY, phase_type
from trainers.spec import ModelRef, PhaseSpec, SpecModel, members_set

JOB_SECONDS = 7 * 24 * 3600

MEMBERS: tuple[str, ...] = tuple(entry.name for entry in REGISTRY)
"""The members a phase entry can have: one for each phase type."""


class ObjectMeta(SpecModel):
    """The part of Kubernetes' metadata that is used here; fields set by the server pass through."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=DNS_LABEL, max_length=RUN_NAME_LENGTH)
    """Name of the run: lower-case letters, digits and `-`."""
    namespace: str | None = None
    """Namespace; ignored in local runs."""
    labels: dict[str, str] = {}
    """Labels, handed on to every object made for the run but for those of Kueue and of controllers of jobs."""
    annotations: dict[str, str] = {}
    """Annotations."""
    generation: int | None = None
    """Set by the server: counts changes of the spec."""
    uid: str | None = None
    """Set by the server: who this is, even if another one gets its name later."""
    resource_version: str | None = None
    """Set by the server: changes with every write."""
    creation_timestamp: datetime | None = None
    """Set by the server."""


class RetryBudget(SpecModel):
    """Further attempts after a failure, by its class. Bad input, missed gates and divergence are never retried.

    Raising a budget of a failed run lets it go on, and so does editing any setting of the phase or its template.
    """

    out_of_memory: int = Field(default=3, ge=0, le=10)
    """The device or the machine ran out of memory; see `halveOnOutOfMemory`."""
    infrastructure: int = Field(default=5, ge=0, le=10)
    """Network, storage, a lost node or another process failed."""
    interrupted: int = Field(default=10, ge=0, le=10)
    """Something outside asked the phase to stop (preemption, eviction)."""
    startup_timeout: int = Field(default=1, ge=0, le=10)
    """The pods did not all run within `startupTimeoutSeconds`."""
    stalled: int = Field(default=1, ge=0, le=10)
    """No progress for `stallTimeoutSeconds`."""
    internal: int = Field(default=0, ge=0, le=10)
    """A bug, or an error that nobody could classify."""


class Backoff(SpecModel):
    """Wait before a further attempt; doubles with each failure, with up to a quarter of jitter."""

    initial_seconds: float = Field(default=10.0, ge=0)
    """Before the second attempt."""
    max_seconds: float = Field(default=600.0, ge=0)
    """Longest wait."""


class FailurePolicy(SpecModel):
    """What happens when a phase fails. Phases that do not need its artifact go on."""

    retries: RetryBudget = RetryBudget()
    """Further attempts per phase."""
    refill_on_progress: bool = True
    """An attempt that saves a later checkpoint than all before it gives back the retries that the platform has cost so far (`infrastructure`, `interrupted`, `startupTimeout`, `stalled`): what is lost again and again and still gets on may take weeks. A budget of 0 stays 0."""
    halve_on_out_of_memory: bool = True
    """An attempt after one that ran out of memory has half of its `parallel.microBatchTokens` and half as many responses side by side as it had, on which the result does not depend."""
    backoff: Backoff = Backoff()
    """Wait between attempts."""
    phase_deadline_seconds: float | None = Field(default=None, gt=0)
    """A phase that takes longer, all attempts together, is stopped and has failed."""
    run_deadline_seconds: float | None = Field(default=None, gt=0)
    """A run that takes longer is stopped and has failed."""
    stalled_after_seconds: float = Field(default=900.0, gt=0)
    """A running phase that reports no progress for so long makes the run Stalled; nothing is stopped for it."""
    stall_timeout_seconds: float | None = Field(default=None, gt=0)
    """A running phase that reports no progress for so long is stopped and started again (`retries.stalled`); never unless set."""
    startup_timeout_seconds: float | None = Field(default=1800.0, gt=0)
    """Pods that do not all run within this time after they may start (waiting in a queue does not count) are given up."""
    node_lost_seconds: int = Field(default=120, ge=0, le=86400)
    """Pods on a node that has stopped answering are given up after this time."""
    avoid_failed_nodes: bool = False
    """Start further attempts on other nodes than those on which the infrastructure failed, where others have room."""


class PhaseEntry(SpecModel):
    """One phase of a run: a name, and exactly one member that says the type."""

    NOT_MEMBERS: ClassVar[tuple[str, ...]] = ("name", "suspend", "template")

    name: str = Field(pattern=DNS_LABEL, max_length=PHASE_NAME_LENGTH)
    """Name that other phases refer to: lower-case letters, digits and `-`."""
    suspend: bool = False
    """Do not start this phase; stop it if it runs. Unfinished work is kept."""
    template: Template | None = None
    """Where this phase departs from the run's template."""

    @model_validator(mode="after")
    def _one_member(self) -> Self:
        found = members_set(self, MEMBERS)
        if len(found) != 1:
            got = " and ".join(found) or "none of them"
            raise ValueError(f"a phase has exactly one of {', '.join(MEMBERS)}; got {got}")
        return self

    @property
    def type(self) -> PhaseType:
        return phase_type(members_set(self, MEMBERS)[0])

    @property
    def spec(self) -> PhaseSpec:
        return cast(PhaseSpec, getattr(self, self.type.name))


def _summary(entry: PhaseType) -> str:
    return (entry.spec.__doc__ or entry.name).strip().splitlines()[0]


_members: dict[str, Any] = {
    entry.name: (entry.spec | None, Field(default=None, description=_summary(entry))) for entry in REGISTRY
}
Phase = create_model("Phase", __base__=PhaseEntry, __module__=__name__, **_members)
Phase.__doc__ = PhaseEntry.__doc__


class RunSpec(SpecModel):
    """What is wanted: phases, and what they have in common."""

    model: ModelRef | None = None
    """Model for the phases that name none of their own."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed for the phases that name none of their own."""
    workspace: Workspace | None = None
    """Where artifacts are kept on a cluster."""
    template: Template = Template()
    """How processes run, for all phases."""
    backend: BackendName | None = None
    """Kind of job that phases run as on a cluster, PyTorchJob or TrainJob (Kubeflow Trainer v2); the operator's default unless set. A run keeps the one that it has begun with."""
    queue_name: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63)
    """Kueue queue (LocalQueue) that the run's jobs wait in; on a cluster the operator's default unless set, if it has one."""
    queue_priority: str | None = Field(default=None, max_length=63)
    """Kueue priority (WorkloadPriorityClass) of the run's jobs."""
    failure_policy: FailurePolicy = FailurePolicy()
    """Retries and deadlines."""
    suspend: bool = False
    """Stop everything that runs and start nothing. Finished phases stay finished, unfinished work is kept."""
    ttl_seconds_after_finished: int | None = Field(default=JOB_SECONDS, ge=0)
    """Delete jobs, with their pods and logs, this long after their end (7 days unless set; never if null); the run itself and its artifacts stay."""
    run_ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    """Delete the run itself this long after its end, well or not; never unless set. Its artifacts stay."""
    phases: tuple[Phase, ...] = Field(min_length=1, max_length=MAX_PHASES)
    """The phases; references between them say what waits for what, independent ones run side by side."""


class AlignmentRun(SpecModel):
    """A whole alignment pipeline: applied to a cluster or run on one machine."""

    api_version: Literal[API_VERSION]  # type: ignore[valid-type]
    """Version of this format."""
    kind: Literal[KIND]  # type: ignore[valid-type]
    """Always AlignmentRun."""
    metadata: ObjectMeta
    """Name and labels."""
    spec: RunSpec
    """What is wanted."""
    status: RunStatus | None = None
    """What is; written by the controller."""

    @property
    def phases(self) -> tuple[PhaseEntry, ...]:
        return cast(tuple[PhaseEntry, ...], self.spec.phases)

    @property
    def name(self) -> str:
        return self.metadata.name
