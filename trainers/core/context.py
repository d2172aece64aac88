"""What a phase's ``main(spec, context)`` is given, and what it gives back."""

import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from trainers.contract import Artifact, BadInput, DataRecord, Interrupted, Origins, PhaseFile, PhaseType
from trainers.core.hub import hub_name, model_files
from trainers.core.parallel import Workers
from trainers.lease import Lease
from trainers.meter import Meter
from trainers.phase_dir import PhaseDir
from trainers.spec import ArtifactRef, ModelRef, RewardModelRef

if TYPE_CHECKING:
    from trainers.remote.checkpoints import StoredCheckpoints
    from trainers.remote.uploads import Uploads

ARTIFACT_NAMES = {
    "model": "model",
    "reward-model": "model",
    "traces": "traces.jsonl",
    "evaluation": "results.json",
    "package": "report.html",
}
"""Where each kind of artifact lies in its phase's directory."""


@dataclass
class Outcome:
    """A finished phase: its final metrics and what it used. Artifacts already lie in the phase's directory."""

    metrics: dict[str, float] = field(default_factory=dict)
    data: list[DataRecord] = field(default_factory=list)
    steps: int = 0


@dataclass
class PhaseContext:
    file: PhaseFile
    type: PhaseType
    spec: Any
    dir: PhaseDir
    workers: Workers
    meter: Meter
    origins: Origins
    """What the phase is made of beside its settings and inputs."""
    uploads: "Uploads | None" = None
    """On rank 0, if the workspace is a mirror of an object store."""
    stored: "StoredCheckpoints | None" = None
    """In each node's first process, if it is."""
    lease: Lease | None = None
    """What lets this process write. With a workspace on an object store rank 0 has it alone."""
    stop_signal: int | None = None
    closing: ExitStack = field(default_factory=ExitStack)
    """What ends with the phase's work, however that ends."""

    @property
    def seed(self) -> int:
        return int(self.spec.seed or 0)

    @property
    def base_dir(self) -> Path:
        return Path(self.file.base_dir)

    @property
    def writes_for_others(self) -> bool:
        """Whether this process writes the files that others read: rank 0, or the first of each node without a shared folder."""
        return self.workers.is_main or (self.file.remote is not None and self.workers.local_rank == 0)

    def keep(self, path: Path) -> None:
        """Say that a file in the phase's directory is whole and worth going on from.

        With a workspace on an object store it is uploaded in the background (:meth:`Uploads.keep`).
        """
        if self.uploads is not None:
            self.uploads.keep(path)

    def fetch_cell(self, path: Path) -> None:
        """Bring an evaluation's cell that another phase of a remote workspace has measured, if one has."""
        if self.uploads is not None:
            self.uploads.fetch_cell(path)

    def input_dir(self, phase: str) -> PhaseDir:
        """The directory of a finished phase that this one refers to."""
        if phase not in self.file.inputs:
            raise BadInput(
                f"phase {phase!r} is referred to, but the phase file's inputs hold {sorted(self.file.inputs)}"
            )
        return PhaseDir(Path(self.file.inputs[phase].path))

    def artifact(self, ref: ArtifactRef) -> Path:
        """File or folder of the artifact that a ``{phase: NAME}`` reference means."""
        assert ref.phase is not None
        directory = self.input_dir(ref.phase)
        result = directory.read_result()
        if result is None:
            raise BadInput(f"phase {ref.phase!r} has no result.json in {directory.root}: it has not finished")
        for artifact in result.artifacts.values():
            if artifact.kind in ref.accepts:
                return directory.root / artifact.path
        raise BadInput(f"phase {ref.phase!r} leaves no {' or '.join(ref.accepts)}")

    def model_location(self, ref: ModelRef | RewardModelRef) -> str:
        """Folder to load from; a hub model's files are in the cache then."""
        if ref.phase is not None:
            return str(self.artifact(ref))
        assert ref.source is not None
        if ref.source.startswith("package:"):
            from trainers.core.packaged import packaged_model

            return str(packaged_model(ref.source.removeprefix("package:")))
        name = hub_name(ref.source, self.base_dir)
        folder = self.base_dir / ref.source if name is None else model_files(name, ref.revision)
        if not folder.is_dir():
            raise BadInput(f"model {ref.source}: there is no such folder in {self.base_dir.resolve()}")
        return str(folder)

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT only ask; the loop answers with :meth:`stop_if_asked`."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if self.lease is not None:
            self.lease.when_lost = lambda: self._on_signal(signal.SIGTERM, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    @property
    def stop_asked(self) -> bool:
        """Whether any process was asked to stop; the same answer everywhere, so call it on all ranks."""
        return self.workers.any(self.stop_signal is not None)

    def stop_if_asked(self) -> None:
        """For phases whose finished units are already on disk. Raises Interrupted."""
        if self.stop_asked:
            self.stop("stopped; finished work is saved and the phase can go on")

    def stop(self, message: str) -> NoReturn:
        """Raise Interrupted, on all ranks at once when uploads are done.

        Once one process has ended, torchrun leaves the others little time.
        """
        try:
            if self.uploads is not None:
                self.uploads.flush()
        finally:
            self.workers.barrier()
        if self.lease is not None:
            self.lease.check()
        raise Interrupted(message)


def artifact_of(ctx: PhaseContext) -> tuple[str, Artifact]:
    """The phase's artifact, with the digest of what lies in its directory."""
    from trainers.files import tree_digest, tree_size

    path = ARTIFACT_NAMES[ctx.type.produces]
    root = ctx.dir.root / path
    found = Artifact(kind=ctx.type.produces, path=path, digest=tree_digest(root), size=tree_size(root))
    return ctx.type.produces, found
