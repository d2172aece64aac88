"""What an earlier run of the very same phase left. Found before torch is imported."""

from pathlib import Path

from trainers.contract import Identity, PhaseFile, Result
from trainers.failures import rank
from trainers.origins import difference
from trainers.workspace import PhaseDir, adopt, find_finished, intact


def find_finished_result(file: PhaseFile, identity: Identity) -> Result | None:
    """What an earlier run of the very same phase left, if nothing that it was made of has changed since.

    Found before torch is imported: in its own directory, or anywhere in the workspace two levels above.
    """
    directory = PhaseDir(Path(file.output))
    workspace = directory.root.resolve().parent.parent
    elsewhere = (PhaseDir(path) for path in find_finished(workspace, identity.digest))
    found = next((d for d in (directory, *elsewhere) if _is_current(d, identity)), None)
    if found is None:
        return None
    result = found.read_result()
    assert result is not None
    if found.root.resolve() != directory.root.resolve() and rank() == 0:
        # The other ranks find the same result where it was, and end as well.
        adopt(found.root, directory.root)
    print(f"{file.phase}: nothing to do, {directory.root} holds this result already")
    return result


def _is_current(directory: PhaseDir, identity: Identity) -> bool:
    result = directory.read_result()
    if result is None or difference(identity, result.identity) is not None:
        return False
    return all(intact(artifact, directory.root) for artifact in result.artifacts.values())
