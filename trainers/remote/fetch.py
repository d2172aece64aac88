"""A workspace on an object store: what a phase finds there and fetches before it starts. Imports no torch.

The local workspace is an empty folder of each pod's own. The object of local ``<workspace>/X`` is ``<remote>/X``.
The first process of each node fetches for all of them; only rank 0 writes to the store (:mod:`trainers.remote.uploads`), but
for checkpoints (:mod:`trainers.remote.checkpoints`).
"""

import atexit
import glob
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from trainers.contract import BadInput, Identity, PhaseFile, PhaseType, Result, canonical_json, sha256_text
from trainers.files import write_atomic
from trainers.lease import WRITERS, this_process
from trainers.origins import difference, origins_of
from trainers.phase_dir import PhaseDir, open_directory
from trainers.pins import hub_names, pinned_spec, pins_folder
from trainers.remote.checkpoints import StoredCheckpoints
from trainers.remote.lease import StoreLease
from trainers.remote.phase import Objects, RemotePhase
from trainers.remote.store import Store
from trainers.remote.uploads import Uploads
from trainers.spec import PhaseSpec, SpecModel, addresses, is_address, model_sources

ADDRESSES = ".objects"
"""Folder of the local workspace for data and models that a spec gives by address."""


class Found(SpecModel):
    """What a node's first process found out for all of them."""

    identity: Identity
    result: Result | None = None


class Remote:
    """One phase's data, models, inputs, unfinished work and result, as far as they lie on an object store."""

    def __init__(self, kind: PhaseType, file: PhaseFile, spec: PhaseSpec, digest: str) -> None:
        self.kind, self.spec, self.digest = kind, spec, digest
        self.dir = PhaseDir(Path(file.output))
        self.workspace = self.dir.root.parent.parent
        self.file = localised(file, spec, self.workspace)
        """The phase file with local paths in the place of addresses."""
        self.phase = RemotePhase(Store(file.remote), self.workspace, self.dir, digest) if file.remote else None
        self.lease = self._lease() if self.phase is not None and is_main() else None
        """What lets rank 0 write there."""
        self.identity = Identity(digest=digest)
        """Known once :meth:`find_finished` has fetched the data."""

    def _lease(self) -> StoreLease:
        assert self.phase is not None
        name = self.phase.name_of(self.dir.root.parent / WRITERS / self.dir.root.name)
        return StoreLease(self.phase.store, f"{name}.json", this_process(self.file.run))

    def find_finished(self) -> Result | None:
        """Fetch the data; then a result of this identity from anywhere in the remote workspace.

        It is in this phase's remote folder afterwards.
        """
        text = once_per_node("found", self._find_finished)
        found = Found.model_validate_json(text)
        self.identity = found.identity
        return found.result

    def _find_finished(self) -> str:
        for _, source in self.spec.data_sources():
            if source.files is not None:
                self._fetch_files(source.files)
        self.identity = self._identity()
        result = self._whole_result() if self.phase is not None else None
        return Found(identity=self.identity, result=result).model_dump_json(by_alias=True)

    def _identity(self) -> Identity:
        spec = self.kind.spec.model_validate(self.file.spec)
        marks = self._model_marks()
        if self.phase is not None and any(hub_names(spec, Path(self.file.base_dir), marks)):
            self._fetch_pins()
        spec = pinned_spec(spec, self.file, marks)
        origins = origins_of(self.kind, spec, Path(self.file.base_dir), marks)
        return Identity(digest=self.digest, origins=origins)

    def _model_marks(self) -> dict[str, str]:
        """Identity of models in an object store, by their local sources: names, sizes and times, as they are large."""
        marks = {}
        for source in model_sources(self.spec):
            place = self._model_place(source)
            objects = place[0].find(place[1]) if place is not None else {}
            if objects:
                listed = {name: (found.size, found.modified) for name, found in objects.items()}
                local = str(self.workspace / ADDRESSES / address_path(source)) if is_address(source) else source
                marks[local] = sha256_text(canonical_json(listed))
            elif is_address(source):
                raise BadInput(f"model {source}: there are no objects below it")
        return marks

    def _model_place(self, source: str) -> tuple[Store, str] | None:
        """Where a model's objects are, or would be."""
        if is_address(source):
            return _at(source)
        inside = _inside(source) if self.phase is not None else None
        return (self.phase.store, inside) if self.phase is not None and inside is not None else None

    def _whole_result(self) -> Result | None:
        assert self.phase is not None
        for folder, result in self.phase.results():
            if difference(self.identity, result.identity) is None:
                if folder != self.phase.name and is_main():
                    self.phase.adopt(folder)
                print(f"{self.file.phase}: nothing to do, {self.phase.store.address(folder)} holds this result already")
                return result
        return None

    def fetch(self) -> None:
        """Fetch models, inputs and unfinished work into the local workspace, and make the remote folder this identity's.

        Raises BadInput for an input that has not finished or is damaged, and for a model that is not there.
        """
        once_per_node("fetched", self._fetch)

    def _fetch(self) -> str:
        for source in model_sources(self.spec):
            self._fetch_model(source)
        if self.phase is not None:
            self.phase.identity = self.identity
            if is_main():
                self.phase.open()
            open_directory(self.dir, self.identity)
            for name, entry in self.file.inputs.items():
                self.phase.fetch_input(name, Path(entry.path), self.kind.reads_beside)
            self.phase.fetch_unfinished()
        return ""

    def uploads(self) -> Uploads | None:
        """What puts the phase's work into the remote workspace; only rank 0 does."""
        if self.phase is None or not is_main():
            return None
        return Uploads(self.phase, tuple(Path(entry.path) for entry in self.file.inputs.values()))

    def checkpoints(self, uploads: Uploads | None) -> StoredCheckpoints | None:
        """What puts each node's part of checkpoints there; the first process of each node does."""
        if self.phase is None or int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return None
        return StoredCheckpoints(self.phase, uploads)

    def _fetch_pins(self) -> None:
        """The commits that earlier phases of the run have read from the hub."""
        assert self.phase is not None
        found = self.phase.store.find(self.phase.name_of(pins_folder(self.file)))
        self.phase.store.download({name: self.workspace / name for name in found}, found)

    def keep_pins(self) -> None:
        """Say to the run's later phases which commits this one reads."""
        if self.phase is not None and is_main():
            self.phase.store.upload({self.phase.name_of(path): path for path in pins_folder(self.file).glob("*--*")})

    def _fetch_files(self, pattern: str) -> None:
        """Data given by address, or by a path in a remote workspace."""
        if is_address(pattern):
            store, name = _at(pattern)
            found = store.glob(name)
            _mirror(store, found, _parent(self.workspace, store), name)
        elif self.phase is not None and (inside := _inside(pattern)) is not None:
            store, name = self.phase.store, inside
            found = store.glob(name)
            store.download({name: Path(self.file.base_dir) / name for name in found}, found)
        else:
            return
        if not found:
            raise BadInput(f"no object matches {store.address(name)}")

    def _fetch_model(self, source: str) -> None:
        if (place := self._model_place(source)) is None:
            return
        store, name = place
        found = store.find(name)
        if is_address(source):
            _mirror(store, found, _parent(self.workspace, store), f"{name}/**")
        else:  # without objects it is a model of the hub
            store.download({name: Path(self.file.base_dir) / name for name in found}, found)


# ---------------------------------------------------------------- data and models by address


def localised(file: PhaseFile, spec: PhaseSpec, workspace: Path) -> PhaseFile:
    """The phase file with the local paths of what is given by address."""
    places = {text: str(workspace / ADDRESSES / address_path(text)) for text in addresses(spec)}
    return file.model_copy(update={"spec": _replaced(file.spec, places)})


def _replaced(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


def address_path(address: str) -> str:
    """`s3://bucket/a/b` as a relative path. Raises BadInput for one that leads elsewhere."""
    scheme, _, rest = address.partition("://")
    path = posixpath.normpath(rest.rstrip("/"))
    if "@" in path.split("/")[0]:
        raise BadInput(
            f"{scheme}://…@{path.split('@', 1)[1]}: credentials come from the environment, not in an address"
        )
    if path != rest.rstrip("/") or path.startswith((".", "/")):
        raise BadInput(f"{address}: not an address of the form {scheme}://bucket/name")
    return f"{scheme}/{path}"


def _at(address: str) -> tuple[Store, str]:
    """An address's bucket, and the name in it."""
    scheme, bucket, *rest = address_path(address).split("/", 2)
    return Store(f"{scheme}://{bucket}"), "".join(rest)


def _parent(workspace: Path, store: Store) -> Path:
    return workspace / ADDRESSES / address_path(store.uri)


def _inside(path: str) -> str | None:
    """A relative path's name in the workspace; None for one that leads out of it, or for a packaged model."""
    name = posixpath.normpath(path)
    return None if name.startswith(("/", "..", "package:")) or name == "." else name


def _mirror(store: Store, objects: Objects, folder: Path, pattern: str) -> None:
    """Download objects, and drop what else matches here: it was deleted there since an earlier start."""
    store.download({name: folder / name for name in objects}, objects)
    for path in glob.glob(str(folder / pattern), recursive=True):
        if Path(path).is_file() and Path(path).relative_to(folder).as_posix() not in objects:
            Path(path).unlink()


# ---------------------------------------------------------------- processes


def is_main() -> bool:
    """Whether this is rank 0; known before torch is imported."""
    return int(os.environ.get("RANK", "0")) == 0


def once_per_node(what: str, work: Callable[[], str]) -> str:
    """Do the work in this node's first process; the others wait, and all return what it returned.

    There is no process group yet, so a file says when it is done. If the first process fails, torchrun ends the others.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return work()
    marker = Path(tempfile.gettempdir()) / f"alignment-{_launch()}-{what}"
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        text = work()
        write_atomic(marker, text)
        if not text:  # else the others may read it after this process has ended
            atexit.register(marker.unlink, missing_ok=True)
        return text
    while not marker.exists():
        time.sleep(0.1)
    return marker.read_text()


def _launch() -> str:
    """Names this start of this node's processes: their parent, when it began, and how often it has restarted them."""
    parent = psutil.Process(os.getppid())
    return f"{parent.pid}-{int(parent.create_time() * 100)}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
