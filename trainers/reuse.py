"""What an earlier run of the very same phase left. Found before torch is imported."""

from pathlib import Path

from trainers.contract import Identity, PhaseFile, Result
from trainers.failures import rank
from trainers.lease import FolderLease, this_process
from trainers.origins import difference
from trainers.phase_dir import PhaseDir, adopt, find_finished, intact


def find_finished_result(file: PhaseFile, identity: Identity) -> Result | None:
    """What an earlier run of the very same phase left, if nothing that it was made of has changed since.

    Found before torch is imported: in its own directory, or anywhere in the workspace two levels above.
    """
    directory = PhaseDir(Path(file.output))
    workspace = directory.root.resolve().parent.parent
    elsewhere = (PhaseDir(path) for path in find_finished(workspace, identity.digest))
    found, result = next(((d, r) for d in (directory, *elsewhere) if (r := finished_here(d, identity))), (None, None))
    if found is None:
        return None
    if found.root.resolve() != directory.root.resolve() and rank() == 0:
        # The other ranks find the same result where it was, and end as well.
        with FolderLease(directory.root, this_process(file.run)) as lease:
            adopt(found.root, directory.root, lease.check)
    print(f"{file.phase}: nothing to do, {directory.root} holds this result already")
    return result


def finished_here(directory: PhaseDir, identity: Identity) -> Result | None:
    """The result in this directory, if it is of this identity and what it names is there."""
    result = directory.read_result()
    if result is None or difference(identity, result.identity) is not None:
        return None
    return result if all(intact(artifact, directory.root) for artifact in result.artifacts.values()) else None
