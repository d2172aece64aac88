"""The contract between a phase program and whatever started it. Imports no torch.

A phase reads one file (:class:`PhaseFile`), works in one directory (:class:`PhaseDir`) and ends in one of the ways
listed in :data:`FAILURES`, or with ``result.json``, which is written last and is the only sign of success.
"""

import enum
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from trainers.spec import ArtifactKind, PhaseSpec, SpecModel

CONTRACT_VERSION = 1
"""Part of every digest: raise it when the same spec starts to mean something else."""

TERMINATION_LIMIT = 4096
"""Bytes of a termination message that Kubernetes keeps."""

TERMINATION_VARIABLE = "ALIGNMENT_TERMINATION_LOG"
METRICS_PORT_VARIABLE = "ALIGNMENT_METRICS_PORT"
DEFAULT_METRICS_PORT = 9400


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


class Termination(SpecModel):
    """What a phase says when it ends: at most 4 KiB of JSON, read by the controller."""

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


def termination_json(termination: Termination) -> str:
    """Encode within :data:`TERMINATION_LIMIT` bytes, dropping metrics from the end and then shortening the message."""
    doc = termination.document()
    metrics = dict(termination.metrics)
    while len(text := json.dumps(doc | {"metrics": metrics})) > TERMINATION_LIMIT and metrics:
        metrics.popitem()
    if len(text) > TERMINATION_LIMIT:
        doc["message"] = termination.message.encode("ascii", "replace").decode()[: TERMINATION_LIMIT // 2]
        text = json.dumps(doc | {"metrics": metrics})
    return text


# ---------------------------------------------------------------- what a phase reads


class Input(SpecModel):
    """A finished phase that this one builds on."""

    path: str
    """Its directory."""
    digest: str
    """Its artifact digest."""


class PhaseFile(SpecModel):
    """The file given as `--spec`: one phase, its references resolved to directories."""

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
    """The phase's own settings, as in the run."""


def canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def phase_digest(type_name: str, spec: PhaseSpec, image: str, inputs: Mapping[str, str]) -> str:
    """A phase's identity: type, settings that differ from their defaults, image, and its inputs' artifact digests.

    Leaving defaults out keeps old digests valid when a release adds an option.
    """
    settings = spec.document(exclude_defaults=True, exclude=set(spec.NOT_IDENTITY))
    identity = {
        "version": CONTRACT_VERSION,
        "type": type_name,
        "spec": settings,
        "image": image,
        "inputs": dict(inputs),
    }
    return sha256_text(canonical_json(identity))


# ---------------------------------------------------------------- what a phase leaves


class DataRecord(SpecModel):
    source: str
    """Path of the field in the spec."""
    fingerprint: str
    """Identity of the content that was read."""
    rows: int = 0
    """Rows used."""
    skipped: int = 0
    """Malformed rows skipped."""
    dropped: int = 0
    """Rows too long to use."""


class Artifact(SpecModel):
    kind: ArtifactKind
    path: str
    """Relative to the phase's directory."""
    digest: str
    """Of its files' names and contents."""
    size: int = 0
    """Bytes in all its files."""

    def intact(self, phase_root: Path) -> bool:
        """Whether its files are still there, by their size: hashing a large model at every start would take minutes."""
        path = phase_root / self.path
        return path.exists() and self.size in (0, tree_size(path))


class Result(SpecModel):
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
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seed: int = 0
    steps: int = 0
    started_at: str = ""
    finished_at: str = ""
    seconds: float = 0.0
    """Wall-clock seconds of work, over all attempts."""


class Progress(SpecModel):
    """`progress.json`: how far a running phase is. Rewritten at most twice a second."""

    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    stage: str = ""
    """What is going on outside the steps: loading, evaluating, saving."""
    metrics_port: int | None = None
    updated_at: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True)
class PhaseDir:
    """Names of the files in a phase's directory."""

    root: Path

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def phase_file(self) -> Path:
        return self.root / "phase.json"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def identity(self) -> Path:
        """Digest that unfinished work in this directory belongs to."""
        return self.root / "digest"

    def read_result(self) -> Result | None:
        """The result, or None if the phase has not finished here. A damaged file counts as not finished."""
        try:
            return Result.model_validate_json(self.result.read_text())
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ):  # ValidationError and UnicodeDecodeError are ValueErrors
            return None

    def read_progress(self) -> Progress | None:
        try:
            return Progress.model_validate_json(self.progress.read_text())
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ):  # ValidationError and UnicodeDecodeError are ValueErrors
            return None


# ---------------------------------------------------------------- atomic writing


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def commit_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its name. Files are flushed first, so the name never points at torn content.

    An older directory of that name is kept until the new one is in place.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    displaced = None
    if final.exists():
        displaced = final.with_name(f".{final.name}.{os.getpid()}.old")
        os.replace(final, displaced)
    os.replace(temporary, final)
    fsync_directory(final.parent)
    if displaced is not None:
        shutil.rmtree(displaced)


def tree_digest(root: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``root`` (or of one file)."""
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for path in files:
        name = path.name if path == root else path.relative_to(root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def tree_size(root: Path) -> int:
    """Bytes in all files below ``root`` (or in one file)."""
    files = [root] if root.is_file() else root.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


# ---------------------------------------------------------------- one workspace, many results

HISTORY = ".history"
"""Folder beside the phases where results and unfinished work go when an edit displaces them."""


def history_dir(phase_root: Path, digest: str) -> Path:
    return phase_root.parent / HISTORY / f"{phase_root.name}-{digest[:16]}"


def set_aside(phase_root: Path) -> Path | None:
    """Move what another digest left in a phase's directory to the history. Nothing computed is ever deleted."""
    directory = PhaseDir(phase_root)
    if not directory.identity.exists() and not directory.result.exists():
        return None
    result = directory.read_result()
    unfinished = directory.identity.read_text().strip() if directory.identity.exists() else "damaged"
    digest = result.digest if result else unfinished
    target = history_dir(phase_root, digest)
    if target.exists():
        target = target.with_name(f"{target.name}.{int(time.time())}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(phase_root, target)
    return target


def open_directory(directory: PhaseDir, digest: str) -> None:
    """Make the directory this digest's: unfinished work of the same digest stays, anything else goes to the history."""
    unfinished = directory.identity.exists() and directory.identity.read_text().strip() != digest
    if unfinished or directory.result.exists():
        set_aside(directory.root)
    directory.root.mkdir(parents=True, exist_ok=True)
    write_atomic(directory.identity, digest)


def find_finished(workspace: Path, digest: str) -> Iterator[Path]:
    """Directories anywhere in the workspace (any run, or a run's history) whose result has this digest.

    Several may have it: the digest covers what was asked for, and data may have changed between two of them.
    """
    for pattern in ("*/*/result.json", f"*/{HISTORY}/*/result.json"):
        for path in sorted(workspace.glob(pattern)):
            result = PhaseDir(path.parent).read_result()
            if result is not None and result.digest == digest:
                yield path.parent


def adopt(finished: Path, phase_root: Path) -> None:
    """Give a phase the result of an equal one, by hard links where the file system allows, else by copying.

    Artifacts never change once ``result.json`` stands, so sharing their files is safe.
    """
    temporary = phase_root.with_name(f".{phase_root.name}.{os.getpid()}.adopt")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        finished, temporary, copy_function=link_or_copy, ignore=shutil.ignore_patterns("checkpoints", "attempts")
    )
    set_aside(phase_root)
    shutil.rmtree(phase_root, ignore_errors=True)
    os.replace(temporary, phase_root)
    fsync_directory(phase_root.parent)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
