"""What a checkpoint is on disk: a folder of safetensors shards, one of each process that wrote it, and two JSON files.

``index.json`` says where the pieces of every tensor lie, and gives a sum of each one's content, since safetensors tells
when a file was cut short but not when blocks of it were lost. ``state.json`` has the rest, and the digests of both. So
torch.distributed.checkpoint reads any part of any tensor, whoever wrote it, and nothing that is read is a pickle.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainers.contract import canonical_json, sha256_text
from trainers.core.tensors import DamagedError, check_tensors, write_tensors
from trainers.files import empty_directory, fsync_file, room_for
from trainers.spec import SpecModel

INDEX, STATE = "index.json", "state.json"


class Piece(SpecModel):
    """A part of a tensor, as one process wrote it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    sum: int
    """Of its content (:func:`trainers.core.tensors.content_sum`)."""


class Entry(SpecModel):
    """A tensor and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class State(SpecModel):
    """A checkpoint without its tensors."""

    step: int
    seconds: float
    """Of work so far."""
    state: dict[str, Any]
    """What a phase wants to go on with beside tensors."""
    needs: str | None = None
    """Folder with the best weights so far, which lies beside."""
    index: str = ""
    """Digest of the index."""


class Index(SpecModel):
    tensors: dict[str, Entry]

    def shapes(self, prefix: str) -> dict[str, torch.Size]:
        """Shapes of the tensors whose names begin so, by the rest of their names."""
        found = {name.removeprefix(prefix): entry for name, entry in self.tensors.items() if name.startswith(prefix)}
        return {name: torch.Size(entry.shape) for name, entry in found.items()}

    def files(self) -> dict[str, dict[str, Entry]]:
        """What each file holds: entries of one piece, by name."""
        found: dict[str, dict[str, Entry]] = {}
        for name, entry in self.tensors.items():
            for piece in entry.pieces:
                found.setdefault(piece.file, {})[name] = entry.model_copy(update={"pieces": (piece,)})
        return found


@dataclass(frozen=True)
class Folder:
    """A checkpoint that is there to be read. What its JSON files say is whole; its shards are still to be checked."""

    path: Path
    state: State
    index: Index

    def check(self, share: int, shares: int) -> None:
        """Read this share of the shards, each whole, and compare it with the index. Raises DamagedError."""
        for file, entries in sorted(self.index.files().items())[share::shares]:
            wanted = {name: (e.dtype, e.pieces[0].shape, e.pieces[0].sum) for name, e in entries.items()}
            check_tensors(self.path / file, wanted)

    def fill(self, prefix: str, targets: Mapping[str, torch.Tensor]) -> None:
        """Read tensors in place, of DTensors this process's shard; their names are known without the prefix."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        wanted = {f"{prefix}{name}": tensor for name, tensor in targets.items()}
        # Every process has the whole index, so none has to ask another where its parts are.
        try:
            load(wanted, storage_reader=ShardReader(self), planner=planner, no_dist=True)
        except CheckpointException as error:
            raise first_failure(error) from error


def first_failure(error: CheckpointException) -> BaseException:
    """The error itself, of the first process that had one: what it is wrapped in is no Exception, which nobody catches."""
    return error.failures[min(error.failures)][0]


def read_folder(path: Path) -> Folder:
    """Raises DamagedError, also for a folder of another format."""
    state, _ = _read_json(path / STATE, State)
    index, digest = _read_json(path / INDEX, Index)
    if state.index != digest:
        raise DamagedError(f"{INDEX} belongs to another checkpoint")
    return Folder(path, state, index)


def read_state(path: Path) -> State:
    """A folder's state alone. Raises DamagedError."""
    return _read_json(path / STATE, State)[0]


def _read_json(path: Path, kind: type[Any]) -> tuple[Any, str]:
    """(content, its digest)"""
    try:
        document = json.loads(path.read_text())
        content, digest = document["content"], document["sha256"]
        if sha256_text(canonical_json(content)) != digest:
            raise DamagedError(f"{path.name} is not what was written")
        return kind.model_validate(content), digest
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path.name}: {error}") from error


def write_json(folder: Path, state: State, index: Index) -> None:
    content = index.model_dump(by_alias=True, mode="json")
    digest = sha256_text(canonical_json(content))
    _write_json(folder / INDEX, content, digest)
    found = state.model_copy(update={"index": digest}).model_dump(by_alias=True)
    _write_json(folder / STATE, found, sha256_text(canonical_json(found)))


def _write_json(path: Path, content: object, digest: str) -> None:
    path.write_text(json.dumps({"content": content, "sha256": digest}))


@dataclass
class ShardWriter(StorageWriter):
    """Writes a process's pieces into one file of a folder."""

    folder: Path
    rank: int
    creates: bool
    """Whether this process makes the folder, for itself and others."""
    index: Index = field(default_factory=lambda: Index(tensors={}))
    """On rank 0, once all processes have written."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self.creates:
            empty_directory(self.folder)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"shard-{self.rank:05}.safetensors"
        tensors = {item.index.fqn: cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items}
        sums: dict[str, int] = {}
        if tensors:
            with room_for(sum(tensor.nbytes for tensor in tensors.values())):
                sums = write_tensors(self.folder / name, tensors)
                fsync_file(self.folder / name)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(i.index, 0, (name, sums[i.index.fqn])) for i in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for found in results for result in found}
        tensors = {name: _entry(name, found, written) for name, found in metadata.state_dict_metadata.items()}
        self.index = Index(tensors=tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _entry(name: str, found: Any, written: Mapping[MetadataIndex, tuple[str, int]]) -> Entry:
    places = [(chunk, written[MetadataIndex(name, chunk.offsets)]) for chunk in found.chunks]
    pieces = (Piece(offset=c.offsets, shape=c.sizes, file=file, sum=total) for c, (file, total) in places)
    return Entry(dtype=str(found.properties.dtype), shape=found.size, pieces=tuple(pieces))


class ShardReader(StorageReader):
    """Reads what :class:`ShardWriter` wrote."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any) -> Metadata:
        return Metadata({name: _metadata(entry) for name, entry in self.folder.index.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file(item.storage_index), []).append(item)
        for name, items in by_file.items():
            self._read(self.folder.path / name, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file(self, index: MetadataIndex) -> str:
        pieces = self.folder.index.tensors[index.fqn].pieces
        return next(piece.file for piece in pieces if piece.offset == tuple(index.offset or ()))

    def _read(self, path: Path, items: Iterable[ReadItem], planner: LoadPlanner) -> None:
        with safe_open(path, "pt") as file:
            for item in items:
                target = planner.resolve_tensor(item).detach()
                where = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                name = item.storage_index.fqn
                target.copy_(file.get_slice(name)[where] if where else file.get_tensor(name))
                planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _metadata(entry: Entry) -> TensorStorageMetadata:
    dtype = getattr(torch, entry.dtype.removeprefix("torch."))
    chunks = [ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.shape)) for p in entry.pieces]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry.shape), chunks)
