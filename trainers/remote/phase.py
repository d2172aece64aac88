"""A phase's folder on an object store: results, inputs and unfinished work, each whole or not there. Imports no torch.

- ``result.json`` is written last and is the only sign of success, as on a disk.
- A checkpoint is a folder, and an upload can be torn between two of its files. So its manifest (names, sizes, digests)
  is written last, and what does not agree with its manifest is not there.
- An object store cannot search, so ``.index/KEY/<run>/<phase>`` says where to look for a result of that digest, or for
  an evaluation's cell of that name. It is a hint: what lies there is checked before it is used.
"""

import hashlib
import posixpath
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from trainers.contract import Artifact, BadInput, Identity, Result
from trainers.files import commit_directory, tree_digest, write_atomic
from trainers.phase_dir import PhaseDir, history_dir
from trainers.remote.store import Damaged, Object, Store
from trainers.spec import SpecModel

INDEX = ".index"
MANIFEST = ".manifest.json"
IDENTITY = "identity.json"
CELLS = "cells"
UNFINISHED = (
    "metrics.jsonl",
    "wandb-id",
    "reference/*",
    "top-k/*.safetensors",
    "checkpoints/part-*.jsonl",
    f"{CELLS}/*.json",
)
"""Single files that a phase goes on from; each is whole or not there."""
NOT_ADOPTED = ("checkpoints", "attempts")
STEP = re.compile(r"step-(\d+)$")
BEST = re.compile(r"best-(\d+)$")

Objects = Mapping[str, Object]


class FileMark(SpecModel):
    size: int
    sha256: str


class Manifest(SpecModel):
    """What a whole folder holds."""

    identity: str
    """Mark of the identity that this is work of."""
    files: dict[str, FileMark]


class RemotePhase:
    """A phase's folder in the store, beside the local one."""

    def __init__(self, store: Store, workspace: Path, directory: PhaseDir, digest: str) -> None:
        self.store, self.workspace, self.dir, self.digest = store, workspace, directory, digest
        self.identity = Identity(digest=digest)
        """What unfinished work belongs to; set before any is fetched or kept."""
        self.name = self.name_of(directory.root)

    def name_of(self, path: Path) -> str:
        """The object of a local path, or the folder of a local folder. Raises BadInput for one outside the workspace."""
        if not path.is_relative_to(self.workspace):
            raise BadInput(f"{path} is not in the workspace, {self.workspace}")
        return path.relative_to(self.workspace).as_posix()

    # -- results

    def results(self) -> Iterator[tuple[str, Result]]:
        """(folder, result) of every whole result of this digest, this phase's own folder first."""
        others = (folder for folder in self.indexed(self.digest) if folder != self.name)
        for folder in chain([self.name], others):
            result = self._whole_result(folder)
            if result is not None and result.digest == self.digest:
                yield folder, result

    def indexed(self, key: str) -> Iterator[str]:
        """Folders in which something of that name may lie."""
        for name in self.store.find(f"{INDEX}/{key}"):
            yield name.removeprefix(f"{INDEX}/{key}/")

    def mark(self, key: str, folder: str) -> None:
        self.store.write(f"{INDEX}/{key}/{folder}", b"")

    def _whole_result(self, folder: str) -> Result | None:
        """The result of a finished phase whose artifacts are still there, by their sizes."""
        objects = self.store.find(folder)
        result = self._result(folder) if f"{folder}/result.json" in objects else None
        if result is None or not all(_intact(a, folder, objects) for a in result.artifacts.values()):
            return None
        return result

    def _result(self, folder: str) -> Result | None:
        """A damaged one counts as not finished."""
        try:
            return Result.model_validate_json(self.store.read(f"{folder}/result.json") or b"")
        except (ValueError, Damaged):
            return None

    def adopt(self, folder: str) -> None:
        """Give this phase the result of an equal one."""
        self.set_aside()
        names = [name.removeprefix(f"{folder}/") for name in self.store.find(folder)]
        names = [n for n in names if n != "result.json" and n.split("/")[0] not in NOT_ADOPTED]
        self.store.copy({f"{folder}/{name}": f"{self.name}/{name}" for name in names})
        self.mark(self.digest, self.name)
        self.store.copy({f"{folder}/result.json": f"{self.name}/result.json"})

    def set_aside(self) -> None:
        """Move what lies in this phase's folder to the history. Nothing computed is ever deleted.

        What was killed in between is moved again: the identity, which says that there is something, goes last.
        """
        objects = self.store.find(self.name)
        last = [f"{self.name}/{name}" for name in ("result.json", IDENTITY) if f"{self.name}/{name}" in objects]
        if not last:
            return
        target = self._history()
        moved = {name: target + name.removeprefix(self.name) for name in objects}
        self.store.copy({name: to for name, to in moved.items() if name not in last})
        for name in objects:
            if name.startswith(f"{self.name}/{CELLS}/"):
                self.mark(posixpath.basename(name), target)
        if result := self._result(self.name):
            self.mark(result.digest, target)
        self.store.copy({name: moved[name] for name in last})
        first = [name for name in last if name.endswith("result.json")]
        self.store.delete([*first, *(name for name in objects if name not in last), *last[len(first) :]])

    def _history(self) -> str:
        result = self._result(self.name)
        found = result or self._identity()
        target = self.name_of(history_dir(self.dir.root, found.digest if found else "damaged"))
        return f"{target}.{int(time.time())}" if self.store.find(target) else target

    def _identity(self) -> Identity | None:
        """What the unfinished work in the remote folder belongs to."""
        try:
            return Identity.model_validate_json(self.store.read(f"{self.name}/{IDENTITY}") or b"")
        except (ValueError, Damaged):
            return None

    def open(self) -> None:
        """Make the remote folder this identity's. Writing early also shows early that writing is allowed."""
        objects = self.store.find(self.name)
        other = f"{self.name}/{IDENTITY}" in objects and self._identity() != self.identity
        if other or f"{self.name}/result.json" in objects:
            self.set_aside()
        self.store.write(f"{self.name}/{IDENTITY}", self.identity.model_dump_json(by_alias=True).encode())

    # -- what is fetched

    def fetch_input(self, name: str, root: Path, beside: tuple[str, ...]) -> None:
        """A finished phase's result, its artifacts and the files beside them that match; whole, or BadInput."""
        folder = self.name_of(root)
        objects = self.store.find(folder)
        result = self._result(folder)
        if result is None:
            raise BadInput(f"phase {name!r} has no result.json in {self.store.address(folder)}: it has not finished")
        for artifact in result.artifacts.values():
            self._fetch_artifact(name, root, artifact, objects)
        wanted = [n for n in objects if any(fnmatch(n, f"{folder}/{pattern}") for pattern in beside)]
        self.store.download({n: self.workspace / n for n in wanted}, objects)
        write_atomic(root / "result.json", self.store.read(f"{folder}/result.json") or b"")

    def _fetch_artifact(self, phase: str, root: Path, artifact: Artifact, objects: Objects) -> None:
        name = self.name_of(root / artifact.path)
        files = {n: self.workspace / n for n in objects if n == name or n.startswith(f"{name}/")}
        problem = (
            f"phase {phase!r}: {self.store.address(name)} is not what its result.json says; delete that result.json"
        )
        try:
            self.store.download(files, objects)
        except Damaged as error:
            raise BadInput(f"{problem} to have the phase run again") from error
        if not files or tree_digest(root / artifact.path) != artifact.digest:
            raise BadInput(f"{problem} to have the phase run again")

    def fetch_unfinished(self) -> None:
        """This identity's unfinished work: single files, the newest whole checkpoint, and the best weights."""
        objects = self.store.find(self.name)
        if self._identity() != self.identity or f"{self.name}/result.json" in objects:
            return
        wanted = [n for n in objects if any(fnmatch(n, f"{self.name}/{pattern}") for pattern in UNFINISHED)]
        self.store.download({n: self.workspace / n for n in wanted}, objects)
        for folder in self.folders(objects, BEST):
            self.fetch_folder(folder, objects)
        for folder in reversed(self.folders(objects, STEP)):
            if self.fetch_folder(folder, objects):
                break

    def folders(self, objects: Objects, kind: re.Pattern[str]) -> list[str]:
        """Folders of checkpoints or best weights, whole or not, oldest first."""
        folders = {posixpath.dirname(n) for n in objects if n.startswith(f"{self.name}/checkpoints/")}
        found = [(int(match.group(1)), folder) for folder in folders if (match := kind.search(folder))]
        return [folder for _, folder in sorted(found)]

    def is_whole(self, folder: str, objects: Objects) -> bool:
        """Whether every file of a manifest is there, by its size, and the work is this identity's."""
        return self._manifest(folder, objects) is not None

    def _manifest(self, folder: str, objects: Objects) -> Manifest | None:
        if f"{folder}/{MANIFEST}" not in objects:
            return None
        try:
            manifest = Manifest.model_validate_json(self.store.read(f"{folder}/{MANIFEST}") or b"")
        except (ValueError, Damaged):
            return None
        sizes = {name: objects[f"{folder}/{name}"].size for name in manifest.files if f"{folder}/{name}" in objects}
        whole = sizes == {name: mark.size for name, mark in manifest.files.items()}
        return manifest if whole and manifest.identity == self.identity.mark else None

    def fetch_folder(self, folder: str, objects: Objects) -> bool:
        """Fetch a folder if it is what its manifest says."""
        final = self.workspace / folder
        temporary = final.with_name(f".{final.name}.tmp")
        manifest = self._manifest(folder, objects)
        if manifest is not None and _holds(final, manifest):
            return True
        shutil.rmtree(temporary, ignore_errors=True)
        if manifest is not None and self._fetch_as_marked(folder, manifest, objects, temporary):
            commit_directory(temporary, final)
            return True
        print(f"{self.store.address(folder)} is torn, trying an older one", file=sys.stderr)
        return False

    def _fetch_as_marked(self, folder: str, manifest: Manifest, objects: Objects, target: Path) -> bool:
        try:
            self.store.download({f"{folder}/{name}": target / name for name in manifest.files}, objects)
        except Damaged:
            return False
        return all(mark_of(target / name) == mark for name, mark in manifest.files.items())


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether all files are here. Where nodes have folders of their own, each wrote only its own shards."""
    paths = {folder / name: mark for name, mark in manifest.files.items()}
    return all(path.is_file() and path.stat().st_size == mark.size for path, mark in paths.items())


def mark_of(path: Path) -> FileMark:
    with path.open("rb") as file:
        return FileMark(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _intact(artifact: Artifact, folder: str, objects: Objects) -> bool:
    name = f"{folder}/{artifact.path}"
    sizes = [found.size for n, found in objects.items() if n == name or n.startswith(f"{name}/")]
    return bool(sizes) and artifact.size in (0, sum(sizes))
