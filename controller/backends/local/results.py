"""Finished phases in a workspace, and whether they still hold: what they were made of may have changed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from controller.plan.observed import ObservedResult, Unfinished
from controller.plan.resolve import ResolvedPhase
from trainers.contract import BadInput, Identity, Origins, PhaseType, Result
from trainers.origins import difference, origins_of
from trainers.phase_dir import PhaseDir, finished_phases, intact
from trainers.spec import PhaseSpec, identifying


class Results:
    """Reads results, each file once per change; what they were made of is looked at once."""

    def __init__(self, workspace: Path, base_dir: Path) -> None:
        self.workspace = workspace
        self.base_dir = base_dir
        self._read: dict[Path, tuple[tuple[int, int], Result | None]] = {}
        self._stale: dict[tuple[Path, tuple[int, int]], str | None] = {}
        self._origins: dict[tuple[str, str], Origins | None] = {}

    def of_phase(self, root: Path, kind: PhaseType, spec: PhaseSpec) -> ObservedResult | None:
        """What lies in a phase's directory."""
        result = self._result(root)
        return _observed(result, self._why_stale(root, result, kind, spec), root) if result is not None else None

    def finished(self, own: Path, digest: str, kind: PhaseType, spec: PhaseSpec) -> Path | None:
        """A directory anywhere in the workspace with a result of this digest that still holds; ``own`` is the phase's.

        Which commit another run has read from the hub, and which this one would, the phase itself compares.
        """
        for root, result in self._all():
            known = root == own or not result.commits
            if result.digest == digest and known and self._why_stale(root, result, kind, spec) is None:
                return root
        return None

    def by_digest(self, phases: Sequence[ResolvedPhase]) -> Mapping[str, ObservedResult]:
        """Results anywhere in the workspace with the settings of one of these phases, that still hold."""
        return {
            result.digest: _observed(result, None, root)
            for root, result in self._all()
            for phase in phases
            if _same_settings(result, phase) and self._why_stale(root, result, phase.type, phase.spec) is None
        }

    def identity(self, digest: str, kind: PhaseType, spec: PhaseSpec) -> Identity | None:
        """What a phase that starts now would be working on; None for one that will tell that its data is not there."""
        key = (kind.name, spec.model_dump_json())
        if key not in self._origins:
            self._origins[key] = self._origins_of(kind, spec)
        origins = self._origins[key]
        return Identity(digest=digest, origins=origins) if origins is not None else None

    def unfinished(self, root: Path, kind: PhaseType, spec: PhaseSpec) -> Unfinished | None:
        """Work in a phase's directory that has no result yet."""
        directory = PhaseDir(root)
        then = directory.read_identity()
        if directory.result.exists() or then is None:
            return None
        now = self.identity(then.digest, kind, spec)
        steps = [p.name.removeprefix("step-") for p in directory.checkpoints.glob("step-*") if p.is_dir()]
        newest = max([0, *(int(s) for s in steps if s.isdigit())])
        return Unfinished(then.digest, newest, difference(now, then) if now is not None else None)

    def _origins_of(self, kind: PhaseType, spec: PhaseSpec) -> Origins | None:
        try:
            return origins_of(kind, spec, self.base_dir)
        except (BadInput, OSError):
            return None

    def _all(self) -> Iterator[tuple[Path, Result]]:
        for root in finished_phases(self.workspace):
            result = self._result(root)
            if result is not None:
                yield root, result

    def _result(self, root: Path) -> Result | None:
        directory = PhaseDir(root)
        try:
            stat = directory.result.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        mark = (stat.st_mtime_ns, stat.st_ino)
        if self._read.get(root, (None, None))[0] != mark:
            self._read[root] = (mark, directory.read_result())
        return self._read[root][1]

    def _why_stale(self, root: Path, result: Result, kind: PhaseType, spec: PhaseSpec) -> str | None:
        # Not the artifact's digest: a phase that runs again on changed data may leave the same one.
        key = (root, self._read[root][0])
        if key not in self._stale:
            self._stale[key] = self._lost(root, result) or self._changed(result, kind, spec)
        return self._stale[key]

    @staticmethod
    def _lost(root: Path, result: Result) -> str | None:
        lost = [artifact.path for artifact in result.artifacts.values() if not intact(artifact, root)]
        return f"its {lost[0]} is no longer whole" if lost else None

    def _changed(self, result: Result, kind: PhaseType, spec: PhaseSpec) -> str | None:
        now = self.identity(result.digest, kind, spec)
        return difference(now, result.identity) if now is not None else "its data is not there any more"


def _same_settings(result: Result, phase: ResolvedPhase) -> bool:
    if result.type != phase.type.name:
        return False
    try:
        return identifying(type(phase.spec).model_validate(result.settings)) == identifying(phase.spec)
    except ValidationError:  # those of another version
        return False


def _observed(result: Result, stale: str | None, root: Path) -> ObservedResult:
    return ObservedResult(
        digest=result.digest,
        artifact_digest=result.artifact_digest,
        metrics=result.metrics,
        settings=result.settings,
        inputs=result.inputs,
        stale=stale,
        place=str(root),
    )
