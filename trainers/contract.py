"""The contract between a phase program and whatever started it. Imports no torch.

A phase reads one file (:class:`PhaseFile`), works in one directory (:class:`trainers.phase_dir.PhaseDir`) and ends in
one of the ways listed in :data:`FAILURES`, or with ``result.json``, which is written last and is the only sign of
success.
"""

import enum
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field

from trainers.spec import ArtifactKind, PhaseSpec, SpecModel, identifying

CONTRACT_VERSION = 2
"""Part of every digest: raise it when the same spec starts to mean something else."""

TERMINATION_LIMIT = 4096
"""Bytes of a termination message that Kubernetes keeps."""

TERMINATION_VARIABLE = "ALIGNMENT_TERMINATION_LOG"
JOB_VARIABLE = "ALIGNMENT_JOB"
"""By which every process of a local phase, however deep, is known: its phase's directory."""
METRICS_PORT_VARIABLE = "ALIGNMENT_METRICS_PORT"
DEFAULT_METRICS_PORT = 9400
KEEPER_VARIABLE = "ALIGNMENT_SERVER_KEEPER"
"""Socket of the container that starts servers for the phase (:mod:`trainers.keeper`); without one it starts them itself."""
RUN_UID_VARIABLE = "ALIGNMENT_RUN_UID"
ATTEMPT_VARIABLE = "ALIGNMENT_ATTEMPT"
"""Of two attempts of one run, the one with the higher number may write (:mod:`trainers.lease`). Older images know neither."""
HALVINGS_VARIABLE = "ALIGNMENT_HALVINGS"
"""How often what memory goes into is halved in the phase file, since attempts before ran out of it (:mod:`trainers.memory_room`).
Older images know it not and go by the file alone."""


@dataclass(frozen=True)
class PhaseType:
    name: str
    """The member's name in a run."""
    spec: type[PhaseSpec]
    module: str
    """Where ``main(spec, context)`` is; a string, so that reading a run stays cheap."""
    produces: ArtifactKind
    reads_all: bool = False
    """Builds on every phase of the run that does not build on it."""
    reads_beside: tuple[str, ...] = ()
    """Files that it reads beside its inputs' results and artifacts, as patterns."""


# ---------------------------------------------------------------- how a phase ends


class FailureClass(enum.StrEnum):
    BAD_INPUT = "BadInput"
    GATE_FAILED = "GateFailed"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    INFRASTRUCTURE = "Infrastructure"
    INTERRUPTED = "Interrupted"
    INTERNAL = "Internal"
    STARTUP_TIMEOUT = "StartupTimeout"
    STALLED = "Stalled"


@dataclass(frozen=True)
class Failure:
    code: int | None
    """Exit status of the process; None for what only an onlooker can tell."""
    retryable: bool
    meaning: str


FAILURES: Mapping[FailureClass, Failure] = {
    FailureClass.INTERNAL: Failure(1, True, "a bug in the phase program, or an error nobody could classify"),
    FailureClass.BAD_INPUT: Failure(2, False, "the spec, the data or a model cannot be used as asked"),
    FailureClass.GATE_FAILED: Failure(3, False, "a final metric missed its threshold"),
    FailureClass.DIVERGED: Failure(4, False, "the loss or the gradient is not finite"),
    FailureClass.OUT_OF_MEMORY: Failure(5, True, "the device or the machine ran out of memory"),
    FailureClass.INFRASTRUCTURE: Failure(75, True, "network, storage or another process failed"),
    FailureClass.INTERRUPTED: Failure(143, True, "asked to stop; unfinished work is saved"),
    FailureClass.STARTUP_TIMEOUT: Failure(None, True, "did not begin to run in time"),
    FailureClass.STALLED: Failure(None, True, "no progress for too long"),
}


ROOT_CAUSES = (
    FailureClass.BAD_INPUT, FailureClass.GATE_FAILED, FailureClass.DIVERGED, FailureClass.OUT_OF_MEMORY,
    FailureClass.INTERNAL, FailureClass.INFRASTRUCTURE, FailureClass.INTERRUPTED,
)  # fmt: skip
"""When a process fails, its peers fail after it with errors of the network, or are asked to stop: the cause is the class that
comes first here."""


def cause_rank(failure: FailureClass, seen: bool = False) -> float:
    """Where a class comes in :data:`ROOT_CAUSES`; those that only an onlooker can tell come last.

    ``seen``: by an onlooker, as a kill or a node's loss is. It follows from nothing that another process met, and may make
    peers fail in words that nobody knows, which are Internal.
    """
    if seen and failure in (FailureClass.INFRASTRUCTURE, FailureClass.INTERRUPTED):
        return ROOT_CAUSES.index(FailureClass.INTERNAL) - 0.5
    return ROOT_CAUSES.index(failure) if failure in ROOT_CAUSES else len(ROOT_CAUSES)


def exit_status(failure: FailureClass) -> int:
    """The status that a process ends with."""
    code = FAILURES[failure].code
    assert code is not None, "only an onlooker can tell this failure"
    return code


class PhaseError(Exception):
    """Ends a phase with a failure class; the message is one line for the user."""

    failure = FailureClass.INTERNAL


class BadInput(PhaseError):
    failure = FailureClass.BAD_INPUT


class GateFailed(PhaseError):
    failure = FailureClass.GATE_FAILED


class Diverged(PhaseError):
    failure = FailureClass.DIVERGED


class OutOfMemory(PhaseError):
    failure = FailureClass.OUT_OF_MEMORY


class Infrastructure(PhaseError):
    failure = FailureClass.INFRASTRUCTURE


class Interrupted(PhaseError):
    failure = FailureClass.INTERRUPTED


class Record(SpecModel):
    """What one version writes and another may read: fields that only a newer one knows are passed over."""

    model_config = ConfigDict(extra="ignore")


class Termination(Record):
    """What a phase says when it ends: at most 4 KiB of JSON, read by the controller."""

    model_config = ConfigDict(allow_inf_nan=True)  # a failure can always be told; JSON leaves them out

    failure: FailureClass | None = None
    """None is success."""
    message: str = ""
    """One line."""
    digest: str = ""
    """The phase's identity."""
    artifact_digest: str = ""
    """The artifact's identity, the input digest of dependents."""
    metrics: dict[str, float] = {}
    """Final metrics; those that do not fit are left out."""
    seen: bool = False
    """The launcher says it of a process that was ended and could not say it itself."""
    lost_node: int | None = None
    """Node (by its place in the job) that the launcher of another one has lost."""


def termination_json(termination: Termination) -> str:
    """Encode within :data:`TERMINATION_LIMIT` bytes: shortening a long message first, then dropping metrics from the end."""
    doc = termination.document()
    metrics = {name: value for name, value in termination.metrics.items() if math.isfinite(value)}
    if len(json.dumps(doc["message"])) > TERMINATION_LIMIT // 2:
        ascii_only = termination.message.encode("ascii", "replace").decode()[: TERMINATION_LIMIT // 4]
        # A control character would be six bytes; none of the others is more than two.
        doc["message"] = "".join(char if char.isprintable() else " " for char in ascii_only)
    while len(text := json.dumps(doc | {"metrics": metrics}, allow_nan=False)) > TERMINATION_LIMIT and metrics:
        metrics.popitem()
    return text


# ---------------------------------------------------------------- what a phase reads


class Input(SpecModel):
    """A finished phase that this one builds on."""

    path: str
    """Its directory."""
    digest: str
    """Its artifact digest."""


class PhaseFile(SpecModel):
    """The file given as `--spec`: one phase, its references resolved to directories.

    Its writer may be another version. A field that this one does not know is refused, since it may say where to write; so a
    writer leaves out what need not be said.
    """

    version: str = ""
    """Of whatever wrote it."""
    digest: str = ""
    """The phase's identity, as its writer knows it and waits for; reckoned here unless set."""
    digest_of: str = ""
    """Mark of what the digest is of (:attr:`mark`): of a file that somebody has edited it is no more."""
    run: str = "local"
    """Name of the run."""
    phase: str = ""
    """Name of the phase; its type unless set."""
    output: str
    """The phase's directory."""
    base_dir: str = "."
    """Where relative paths of data and models start."""
    remote: str | None = None
    """Object store prefix that the workspace folder mirrors; None: the workspace is a shared folder."""
    image: str = ""
    """Image or code version the phase runs with; part of its digest."""
    inputs: dict[str, Input] = {}
    """Finished phases by name, one for each `{phase: NAME}` in the spec."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """The phase's own settings, as in the run: those that are set. Others are at the defaults of whoever reads it."""

    @property
    def mark(self) -> str:
        """Of all that a digest covers, as it is written here."""
        inputs = {name: entry.digest for name, entry in self.inputs.items()}
        return sha256_text(canonical_json([self.spec, self.image, inputs]))[:16]


def canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(kind: PhaseType, file: PhaseFile, spec: PhaseSpec) -> str:
    """The identity that a phase file's writer waits for. With a version's defaults it may be another than with ours."""
    if file.digest and file.digest_of == file.mark:
        return file.digest
    return phase_digest(kind.name, spec, file.image, {name: entry.digest for name, entry in file.inputs.items()})


def phase_digest(type_name: str, spec: PhaseSpec, image: str, inputs: Mapping[str, str]) -> str:
    """A phase's identity: type, settings that differ from their defaults, image, and its inputs' artifact digests.

    Leaving defaults out keeps old digests valid when a release adds an option. What cannot change a result
    (:attr:`trainers.spec.SpecModel.NOT_IDENTITY`) is left out at any depth.
    """
    settings = identifying(spec).document(exclude_defaults=True)
    identity = {
        "version": CONTRACT_VERSION,
        "type": type_name,
        "spec": settings,
        "image": image,
        "inputs": dict(inputs),
    }
    return sha256_text(canonical_json(identity))


class Origins(Record):
    """What a result is made of beside what was asked for (:mod:`trainers.origins`)."""

    program: str = ""
    """Version of the package, and a digest of the sources that the phase type uses."""
    content: dict[str, str] = {}
    """Fingerprints of data and models that no phase made, by the dotted path in the spec."""


class Identity(Record):
    """Two results of one identity are the same result; unfinished work of it is work on that result."""

    digest: str
    """Of what was asked for (:func:`phase_digest`)."""
    origins: Origins = Origins()

    @property
    def mark(self) -> str:
        """All of it in one word."""
        return sha256_text(canonical_json(self.document()))


# ---------------------------------------------------------------- what a phase leaves


class DataRecord(Record):
    source: str
    """Path of the field in the spec."""
    fingerprint: str
    """Identity of the content that was read."""
    rows: int = 0
    """Rows used."""
    skipped: int = 0
    """Malformed rows."""
    dropped: int = 0
    """Rows of which nothing could be used, because they are too long."""
    shortened: int = 0
    """Rows used in part: without the left end of a prompt, or without turns, that were too long."""
    unreached: int = 0
    """Rows that no step came to, of which nothing is known."""
    first_skipped: str = ""
    """Place of the first malformed row, and what is wrong with it."""

    @property
    def read(self) -> int:
        """Rows looked at."""
        return self.rows + self.skipped + self.dropped

    @property
    def whole(self) -> bool:
        """Whether all rows were used as they are."""
        return not (self.skipped or self.dropped or self.shortened)

    def __str__(self) -> str:
        counts = {
            "dropped (too long)": self.dropped,
            "used in part": self.shortened,
            "skipped (malformed)": self.skipped,
        }
        losses = "".join(f", {count} {name}" for name, count in counts.items() if count)
        first = f"; the first: {self.first_skipped}" if self.first_skipped else ""
        more = f"; {self.unreached} more were not reached" if self.unreached else ""
        return f"{self.source}: {self.rows} of {self.read} rows used{losses}{first}{more}"


class Artifact(Record):
    kind: ArtifactKind
    path: str
    """Relative to the phase's directory."""
    digest: str
    """Of its files' names and contents."""
    size: int = 0
    """Bytes in all its files."""


class Result(Record):
    """`result.json`."""

    run: str
    phase: str
    type: str
    digest: str
    """Identity of what was asked for (:func:`phase_digest`)."""
    artifact_digest: str
    """Identity of what came out; dependents' digests build on it."""
    artifacts: dict[str, Artifact] = {}
    metrics: dict[str, float] = {}
    inputs: dict[str, str] = {}
    data: tuple[DataRecord, ...] = ()
    commits: dict[str, str] = {}
    """What was read from the hub, as `name@commit`, by the path of the field in the spec."""
    origins: Origins = Origins()
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seed: int = 0
    steps: int = 0
    started_at: str = ""
    finished_at: str = ""
    seconds: float = 0.0
    """Wall-clock seconds of work, over all attempts."""

    @property
    def identity(self) -> Identity:
        return Identity(digest=self.digest, origins=self.origins)


class Progress(Record):
    """`progress.json`: how far a running phase is. Rewritten at most twice a second."""

    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint_step: int = 0
    """Of the newest whole checkpoint; 0 is none."""
    stage: str = ""
    """What is going on outside the steps: loading, evaluating, saving."""
    metrics_port: int | None = None
    updated_at: float = 0.0
    """Seconds since the epoch."""
