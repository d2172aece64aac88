"""What an earlier run of the very same phase left. Found before torch is imported."""

from pathlib import Path

from trainers.contract import PhaseFile, Result
from trainers.failures import rank
from trainers.fingerprints import same_data
from trainers.pins import commits
from trainers.spec import PhaseSpec
from trainers.workspace import PhaseDir, adopt, find_finished, intact


def find_finished_result(file: PhaseFile, spec: PhaseSpec, digest: str) -> Result | None:
    """What an earlier run of the very same phase left, if its data has not changed since.

    Found before torch is imported: in its own directory, or anywhere in the workspace two levels above.
    """
    directory = PhaseDir(Path(file.output))
    workspace = directory.root.resolve().parent.parent
    elsewhere = (PhaseDir(path) for path in find_finished(workspace, digest))
    found = next((d for d in (directory, *elsewhere) if _is_current(d, file, spec, digest)), None)
    if found is None:
        return None
    if found.root.resolve() != directory.root.resolve() and rank() == 0:
        # The other ranks find the same result where it was, and end as well.
        adopt(found.root, directory.root)
    result = found.read_result()
    assert result is not None
    print(f"{file.phase}: nothing to do, {directory.root} holds this result already")
    return result


def _is_current(directory: PhaseDir, file: PhaseFile, spec: PhaseSpec, digest: str) -> bool:
    result = directory.read_result()
    if result is None or result.digest != digest or result.commits != commits(spec, Path(file.base_dir)):
        return False
    if not all(intact(artifact, directory.root) for artifact in result.artifacts.values()):
        return False
    return same_data(result, spec, Path(file.base_dir))
