"""Finished phases in a workspace, and whether they still hold: the data they were made from may have changed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from controller.plan.observed import ObservedResult, Unfinished
from trainers.contract import BadInput, Result
from trainers.fingerprints import fingerprint
from trainers.spec import DataSource, PhaseSpec, is_address
from trainers.workspace import HISTORY, PhaseDir, intact


class Results:
    """Reads results, each file once per change; checks the data behind each result once."""

    def __init__(self, workspace: Path, base_dir: Path) -> None:
        self.workspace = workspace
        self.base_dir = base_dir
        self._read: dict[Path, tuple[tuple[int, int], Result | None]] = {}
        self._stale: dict[tuple[Path, tuple[int, int]], str | None] = {}
        self._fingerprints: dict[str, str | None] = {}

    def of_phase(self, root: Path, spec: PhaseSpec) -> ObservedResult | None:
        """What lies in a phase's directory."""
        result = self._result(root)
        return _observed(result, self._why_stale(root, result, spec), root) if result is not None else None

    def finished(self, digest: str, spec: PhaseSpec) -> Path | None:
        """A directory anywhere in the workspace with a result of this digest that still holds."""
        for root, result in self._all():
            if result.digest == digest and self._why_stale(root, result, spec) is None:
                return root
        return None

    def by_digest(self) -> Mapping[str, ObservedResult]:
        """Everything in the workspace. Data is not checked: that needs the spec."""
        return {result.digest: _observed(result, None, root) for root, result in self._all()}

    def _all(self) -> Iterator[tuple[Path, Result]]:
        for pattern in ("*/*/result.json", f"*/{HISTORY}/*/result.json"):
            for path in sorted(self.workspace.glob(pattern)):
                result = self._result(path.parent)
                if result is not None:
                    yield path.parent, result

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

    def _why_stale(self, root: Path, result: Result, spec: PhaseSpec) -> str | None:
        # Not the artifact's digest: a phase that runs again on changed data may leave the same one.
        key = (root, self._read[root][0])
        if key not in self._stale:
            self._stale[key] = self._lost(root, result) or self._changed_data(result, spec)
        return self._stale[key]

    @staticmethod
    def _lost(root: Path, result: Result) -> str | None:
        lost = [artifact.path for artifact in result.artifacts.values() if not intact(artifact, root)]
        return f"its {lost[0]} is no longer whole" if lost else None

    def _changed_data(self, result: Result, spec: PhaseSpec) -> str | None:
        sources = dict(spec.data_sources())
        for record in result.data:
            source = sources.get(record.source)
            if source is None or (source.files is not None and is_address(source.files)):
                continue  # what lies in an object store, the phase itself looks at
            if self._fingerprint(source) != record.fingerprint:
                return f"data changed: {source.files or record.source}"
        return None

    def _fingerprint(self, source: DataSource) -> str | None:
        """The same data is often read by several phases, so it is hashed once."""
        key = source.model_dump_json()
        if key not in self._fingerprints:
            try:
                self._fingerprints[key] = fingerprint(source, self.base_dir)
            except BadInput:
                self._fingerprints[key] = None
        return self._fingerprints[key]


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


def unfinished(root: Path) -> Unfinished | None:
    """Work in a phase's directory that has no result yet."""
    directory = PhaseDir(root)
    if directory.result.exists() or not directory.identity.exists():
        return None
    steps = [p.name.removeprefix("step-") for p in directory.checkpoints.glob("step-*") if p.is_dir()]
    return Unfinished(directory.identity.read_text().strip(), max([0, *(int(s) for s in steps if s.isdigit())]))
