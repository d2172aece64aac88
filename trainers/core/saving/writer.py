"""A thread of each process that writes what was staged, while training goes on.

Every process's thread writes the same folders in the same order, and they talk over a group of their own: what training
sends meanwhile never mixes with it. A folder gets its name once all shards are on disk, so that a crash at any moment
leaves the one before.
"""

import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from trainers.core.context import PhaseContext
from trainers.core.presence import PATIENCE
from trainers.core.saving.staging import Staged, StagedPlanner
from trainers.core.saving.storage import Index, ShardWriter, State, first_failure, write_json
from trainers.files import commit_directory, draft_directory

T = TypeVar("T")

# One process alone is no accident here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Writer:
    def __init__(self, ctx: PhaseContext) -> None:
        self.ctx = ctx
        self.group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if ctx.workers.world > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoints")

    def write(self, folder: Path, staged: Staged, state: State, after: Callable[[], None]) -> Future[float]:
        """Write a folder and upload it, then call ``after``. All processes take part.

        The future gives the seconds that it took, or raises the first error of any process, in all of them.
        """
        return self._thread.submit(self._write, folder, staged, state, after)

    def _write(self, folder: Path, staged: Staged, state: State, after: Callable[[], None]) -> float:
        begin = time.monotonic()
        temporary = draft_directory(folder)
        try:
            index = self._shards(temporary, staged)
            self._together(lambda: self._commit(temporary, folder, state, index))
        except BaseException:
            # What a full disk cut off must not fill it further.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._upload(folder)
        self._together(after)
        return time.monotonic() - begin

    def _shards(self, folder: Path, staged: Staged) -> Index:
        """Write all processes' shards. Returns their index, in those that keep it."""
        rank = self.ctx.workers.rank
        storage = ShardWriter(folder, rank, self.ctx.writes_for_others)
        try:
            save(
                {},
                storage_writer=storage,
                planner=StagedPlanner(staged),
                process_group=self.group,
                no_dist=not self.group,
            )
        except CheckpointException as error:
            raise first_failure(error) from error
        if self.group is None or self.ctx.file.remote is None:
            return storage.index
        found = [storage.index]
        dist.broadcast_object_list(found, 0, self.group)
        return found[0]

    def _commit(self, temporary: Path, folder: Path, state: State, index: Index) -> None:
        if self.ctx.writes_for_others:
            write_json(temporary, state, index)
            commit_directory(temporary, folder)

    def _upload(self, folder: Path) -> None:
        """Put each node's shards into the store, and say so there when all are in it."""
        store = self.ctx.stored
        if self.ctx.file.remote is None:
            return
        main = self.ctx.workers.is_main
        self._together(lambda: store.open(folder) if store and main else None)
        found = self._together(lambda: store.upload(folder, main) if store else {})
        marks = {name: mark for part in found for name, mark in part.items()}
        self._together(lambda: store.commit(folder, marks) if store and main else None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What all processes' ``work`` returns, or the first one's error in all of them."""
        if self.group is None:
            return [work()]
        found: list[Any] = [None] * self.ctx.workers.world
        try:
            own: Any = work()
        except Exception as error:  # noqa: BLE001 - raised again, in every process
            own = error
        dist.all_gather_object(found, own, self.group)
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found
