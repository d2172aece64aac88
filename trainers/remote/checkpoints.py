"""Checkpoints in an object store. Imports no torch.

Each node's first process uploads what its node wrote. Rank 0 then writes the manifest, without which a folder counts as
torn. All of it runs in the thread that writes checkpoints (:mod:`trainers.core.saving.writer`).
"""

import json
from collections.abc import Mapping
from pathlib import Path

from trainers.remote.phase import BEST, MANIFEST, STEP, FileMark, Manifest, RemotePhase, mark_of
from trainers.remote.store import Damaged
from trainers.remote.uploads import Uploads

SHARDS = "shard-*"


class StoredCheckpoints:
    def __init__(self, phase: RemotePhase, uploads: Uploads | None) -> None:
        self.phase, self.store = phase, phase.store
        self.uploads = uploads
        """On rank 0."""

    def open(self, folder: Path) -> None:
        """Before files of an older folder of that name are replaced: it counts as torn, and what it held goes."""
        name = self.phase.name_of(folder)
        self.store.delete(sorted(self.store.find(name), key=lambda found: not found.endswith(MANIFEST)))

    def upload(self, folder: Path, everything: bool) -> dict[str, FileMark]:
        """This node's files: all that the folder holds, or shards alone."""
        files = [path for path in sorted(folder.glob("*" if everything else SHARDS)) if path.is_file()]
        self.store.upload({self.phase.name_of(path): path for path in files})
        return {path.name: mark_of(path) for path in files}

    def commit(self, folder: Path, marks: Mapping[str, FileMark]) -> None:
        """Say that the folder is whole. The metrics so far go first: who goes on from here needs them."""
        if self.uploads is not None:
            self.uploads.send_metrics()
        content = Manifest(identity=self.phase.identity.mark, files=dict(marks)).model_dump_json(by_alias=True)
        self.store.create(f"{self.phase.name_of(folder)}/{MANIFEST}", content.encode())

    def fetch(self, folder: Path) -> None:
        """Bring what this node lacks of a whole folder."""
        name = self.phase.name_of(folder)
        self.phase.fetch_folder(name, self.store.find(name))

    def prune(self, newest: int) -> None:
        """Delete all but the newest whole ones and the best weights that they need, and torn ones that are older."""
        objects = self.store.find(f"{self.phase.name}/checkpoints")
        steps = self.phase.folders(objects, STEP)
        whole = [folder for folder in steps if self.phase.is_whole(folder, objects)]
        kept = whole[-max(1, newest) :]
        dropped = [f for f in steps[: steps.index(whole[-1])] if f not in kept] if whole else []
        best = self.phase.folders(objects, BEST)[:-1]  # the newest may be one that no checkpoint knows of yet
        if best:
            needed = [self._needs(folder) for folder in kept]
            dropped += [folder for folder in best if folder.rsplit("/", 1)[1] not in needed]
        for folder in dropped:
            names = [name for name in objects if name.startswith(f"{folder}/")]
            self.store.delete(sorted(names, key=lambda name: not name.endswith(MANIFEST)))

    def drop(self) -> None:
        self.store.delete(self.store.find(f"{self.phase.name}/checkpoints"))

    def _needs(self, folder: str) -> str | None:
        """The folder with best weights that a whole checkpoint refers to."""
        try:
            found = json.loads(self.store.read(f"{folder}/state.json") or b"null")
            return str(found["content"]["needs"])
        except (ValueError, KeyError, TypeError, Damaged):
            return None
