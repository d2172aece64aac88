"""Rows become records in processes beside the training, in the order in which its steps reach them."""

import ctypes
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np

from trainers import json_text
from trainers.contract import BadInput
from trainers.core.records import packed
from trainers.core.row_store import Fate, Record, RowStore
from trainers.core.sources import RowSource
from trainers.formats import seed_row
from trainers.formats.schemas import Row
from trainers.spec import DataSource

MOST_PROCESSES = 16
TASK_ROWS = 256
"""Rows that one process encodes at a time: some tenths of a second."""

LOOKED_AT = 64
"""Blocks of the plan that are looked through at a time: where all rows are known, nothing shall wait for the next."""

NICENESS = 10
"""What trains comes first: the work beside it is ahead of it."""


@dataclass(frozen=True)
class Encoder:
    """What makes records of one source's rows."""

    rows: RowSource
    store: RowStore
    source: DataSource
    schema: str
    encode: Callable[[Row], list[Any]]

    def run(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        self.store.write(rows, map(self._record, rows))

    def _record(self, row: int) -> Record:
        raw = self.rows[row][1]
        try:
            checked = seed_row(json_text.value(raw), self.schema, self.source.format, self.source.columns)
        except json_text.Malformed as problem:
            return Record(Fate.MALFORMED, [str(problem).encode()])
        try:
            items = self.encode(checked)
        except BadInput as problem:
            return Record(Fate.REFUSED, [str(problem).encode()])
        if not items:
            return Record(Fate.DROPPED, [])
        return Record(Fate.SHORTENED if any(item.shortened for item in items) else Fate.USED, list(map(packed, items)))


class Block(NamedTuple):
    """Rows of one source, some of which may be known already."""

    source: int
    rows: np.ndarray


class Task(NamedTuple):
    block: Block
    future: Future[None]


class Ahead:
    """Encodes what a plan reaches, as far ahead as there are processors, in a node's first process."""

    def __init__(
        self, encoders: list[Encoder], plan: Iterator[Block], processes: int, look_at: Callable[[Block], None]
    ) -> None:
        """``look_at`` is shown what is done, and raises for what a step must not come to."""
        self._encoders, self._plan, self._processes, self._look_at = encoders, plan, processes, look_at
        self._pool: ProcessPoolExecutor | None = None
        self._usable = True
        self._tasks: list[Task] = []
        self._given = [np.zeros(encoder.store.num_rows, dtype=bool) for encoder in encoders]

    def ensure(self, source: int, rows: np.ndarray) -> None:
        """Return when all of these rows have records."""
        self._go_ahead()
        encoder = self._encoders[source]
        while len(missing := rows[encoder.store.fates(rows) == 0]):
            task = next(
                (t for t in self._tasks if t.block.source == source and np.isin(missing, t.block.rows).any()), None
            )
            if task is None:
                encoder.run(np.unique(missing).tolist())
            else:
                self._finish(task)
                self._go_ahead()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _go_ahead(self) -> None:
        """Give the processes more to do, if they have little left."""
        for task in [task for task in self._tasks if task.future.done()]:
            self._finish(task)
        looked_at = 0
        while self._usable and len(self._tasks) < 4 * self._processes and looked_at < LOOKED_AT:
            looked_at += 1
            block = next(self._plan, None)
            if block is None:
                break
            self._submit(block)

    def _submit(self, block: Block) -> None:
        given = self._given[block.source]
        rows = np.unique(block.rows[~given[block.rows]])
        rows = rows[self._encoders[block.source].store.fates(rows) == 0]
        given[rows] = True
        for first in range(0, len(rows), TASK_ROWS):
            some = Block(block.source, rows[first : first + TASK_ROWS])
            try:
                self._tasks.append(Task(some, self._started().submit(_run, some.source, some.rows.tolist())))
            except BrokenProcessPool as error:
                self._give_up(error)

    def _finish(self, task: Task) -> None:
        """Raises what the task has raised."""
        try:
            task.future.result()
        except BrokenProcessPool as error:
            self._give_up(error)
        else:
            self._tasks = [other for other in self._tasks if other is not task]
            self._look_at(task.block)

    def _give_up(self, error: BrokenProcessPool) -> None:
        """A process was ended from outside. What its tasks had to do is done here, when it is needed."""
        print(f"rows are encoded in the training process from now on: {error}", file=sys.stderr)
        self._usable, self._tasks = False, []

    def _started(self) -> ProcessPoolExecutor:
        """Processes that begin as copies of this one, as `torch`'s own loaders do: a tokenizer need not be sent to them."""
        if self._pool is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # they are parallel already
            known = (self._encoders, os.getpid())
            self._pool = ProcessPoolExecutor(self._processes, get_context("fork"), _begin, known)
            # A process that was forked itself waits for its children before anybody tells them that there is no more work;
            # and its queues, which are the way to tell them, are closed at priority 10.
            Finalize(None, _shut, (weakref.ref(self._pool),), exitpriority=100)
        return self._pool


def _shut(pool: Callable[[], ProcessPoolExecutor | None]) -> None:
    if (found := pool()) is not None:
        found.shutdown(cancel_futures=True)


_encoders: list[Encoder] = []
"""A process's own."""


def _begin(encoders: list[Encoder], parent: int) -> None:
    global _encoders  # noqa: PLW0603 - an initializer has no other way to leave something
    _encoders = encoders
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(NICENESS)
    _die_with(parent)


def _die_with(parent: int) -> None:
    """Also when it is killed; else a process would wait for work for ever. Linux alone has the call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has died before that
        os.kill(os.getpid(), signal.SIGKILL)


def _run(source: int, rows: list[int]) -> None:
    _encoders[source].run(rows)
