"""What a phase's rows become, for its steps: read and encoded when a step reaches them, once on each node.

Few rows are encoded before the first step, and held by every process. Of more, a step's are found by their number
(:mod:`trainers.core.sources`), encoded by the node's first process and its helpers (:mod:`trainers.core.encoders`) into
a cache in the workspace (:mod:`trainers.core.row_store`), and read from there by all. See docs/adr/0010.
"""

import os
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from trainers.contract import BadInput, DataRecord
from trainers.core import row_cache
from trainers.core.context import PhaseContext
from trainers.core.encoders import MOST_PROCESSES, Ahead, Block, Encoder
from trainers.core.kept_folders import drop_unused, hold
from trainers.core.order import BatchOrder, Mixture, Part
from trainers.core.records import unpacked
from trainers.core.row_store import Fate, RowStore
from trainers.core.rows import Item, check_share, encode_sources, read_rows
from trainers.core.sources import Joined, RowSource, hold_source, open_source, raw_rows
from trainers.fingerprints import fingerprint
from trainers.spec import DataSource, MixedSource, RowPolicy

T = TypeVar("T", bound=Item)

HELD_ROWS = 4096
"""Rows of a field that are encoded before the first step, and held in memory if they are all."""

PLANNED = 4096
"""Places whose rows are looked up at a time."""

UNUSABLE = (Fate.MALFORMED, Fate.REFUSED)

Plan = Iterator[Block]


@dataclass(frozen=True)
class Encoding(Generic[T]):
    """How rows of a schema become examples."""

    schema: str
    encode: "partial[list[T]]"
    """Of a module's function that takes a row. All that decides its result is among its arguments: they name the cache."""
    kind: type[T]
    check: Callable[[list[T]], None] | None = None
    """Raises BadInput for examples that the phase cannot use."""
    skips: bool = False
    """Skip a row that ``encode`` refuses, whatever the policy says of malformed ones."""


class Examples(ABC, Generic[T]):
    """The examples of some sources, by number: one example each, or all that one row has become."""

    def __init__(self, sources: tuple[DataSource, ...], seed: int, where: str) -> None:
        self._sources, self._seed, self._where = sources, seed, where

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Numbers of each source."""

    @abstractmethod
    def take(self, sources: np.ndarray, numbers: np.ndarray) -> list[T]:
        """The examples of these numbers, (N,). Raises BadInput for a row that is refused, with its place."""

    @abstractmethod
    def follow(self, plan: Plan) -> None:
        """What will be taken, in this order. Raises BadInput if its first rows say that too few can be used."""

    @abstractmethod
    def records(self, plan: Plan) -> list[DataRecord]:
        """What became of the rows that a plan reaches. Raises BadInput when too few of them could be used."""

    def steps(self, batch_size: int, epochs: float, max_steps: int | None, full: bool = False) -> "Steps[T]":
        """``full``: a step whose rows cannot all be used takes the next ones too, until it has ``batch_size`` examples."""
        parts = [_part(size, source) for size, source in zip(self.sizes, self._sources, strict=True)]
        for i, part in enumerate(parts):
            if part.weight is not None and not part.size:
                raise BadInput(f"{self._where}[{i}]: it has a weight, and no row that can be used")
        mixture = Mixture(tuple(parts), self._seed)
        window = next((source.hub.shuffle_buffer for source in self._sources if source.hub and source.is_stream), None)
        order = BatchOrder(mixture.size, batch_size, epochs, max_steps, self._seed, window)
        return Steps(self, mixture, order, batch_size if full else 1)

    def everything(self) -> list[T]:
        """All examples, source by source in the order of their rows."""
        return list(self.each())

    def each(self) -> Iterator[T]:
        """The same, one after the other."""
        self.follow(self._all())
        for block in self._all():
            yield from self.take(np.full(len(block.rows), block.source), block.rows)

    def all_records(self) -> list[DataRecord]:
        return self.records(self._all())

    def _all(self) -> Plan:
        return in_order(self.sizes)


def _part(size: int, source: DataSource) -> Part:
    return Part(size, source.epochs, source.weight) if isinstance(source, MixedSource) else Part(size)


class Steps(Generic[T]):
    """What each optimizer step sees: a pure function of (seed, step)."""

    def __init__(self, examples: Examples[T], mixture: Mixture, order: BatchOrder, least: int) -> None:
        self._examples, self._mixture, self._order, self._least = examples, mixture, order, least
        self._followed = False

    @property
    def total_steps(self) -> int:
        return self._order.total_steps

    @property
    def steps_of_first_pass(self) -> range:
        """The steps until every example that some step sees has been seen."""
        return self._order.first_batches()

    def ends_epoch(self, step: int) -> bool:
        return self._order.ends_epoch(step)

    def batch(self, step: int) -> list[T]:
        """A step's examples. One whose rows cannot be used takes rows of the next one too."""
        if not self._followed:
            self._examples.follow(self._plan(step))
            self._followed = True
        first, last = self._order.places(step)
        items, wanted = self._between(first, last), min(self._least, last - first)
        while len(items) < wanted:
            items += self._between(last, last + 1)
            last += 1
        return items

    def records(self) -> list[DataRecord]:
        """What became of the rows that the steps reach."""
        return self._examples.records(self._plan(0))

    def _between(self, first: int, last: int) -> list[T]:
        source, number = self._at(first, last)
        return self._examples.take(source, number)

    def _at(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return self._mixture.at(*self._order.at(np.arange(first, last)))[:2]

    def _plan(self, step: int) -> Plan:
        """Blocks of the steps from this one on, then of those before it."""
        start, total = self._order.places(step)[0], self._order.total_examples
        for first in (*range(start, total, PLANNED), *range(0, start, PLANNED)):
            end = total if first >= start else start
            source, number = self._at(first, min(first + PLANNED, end))
            for i in np.unique(source).tolist():
                yield Block(i, number[source == i])


class InOrder(Generic[T]):
    """What each number has become, source by source; for what uses every one once. One example, none, or several."""

    def __init__(self, examples: Examples[T], first: int) -> None:
        """``first``: the number that is asked for first; then come those behind it."""
        self._examples, self._ends = examples, list(accumulate(examples.sizes))
        if first < len(self):
            examples.follow(in_order(examples.sizes, first))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> list[T]:
        source = bisect_right(self._ends, number)
        row = number - (self._ends[source - 1] if source else 0)
        return self._examples.take(np.array([source]), np.array([row]))


def in_order(sizes: list[int], first: int = 0) -> Plan:
    """Blocks of all rows of sources of these sizes, without the first ones."""
    for source, size in enumerate(sizes):
        for start in range(min(first, size), size, PLANNED):
            yield Block(source, np.arange(start, min(start + PLANNED, size)))
        first = max(0, first - size)


def no_steps() -> Steps[Any]:
    """Those of no rows."""
    return Steps(_None((), 0, ""), Mixture((), 0), BatchOrder(0, 1, 1, 0, 0), 1)


def open_examples(
    ctx: PhaseContext, sources: tuple[DataSource, ...], encoding: Encoding[T], policy: RowPolicy, where: str
) -> Examples[T]:
    """The examples of a field's sources. Raises BadInput for rows that cannot be read, or when too few can be used."""
    if any(source.is_stream for source in sources):
        return _Stored(ctx, sources, encoding, policy, where)
    rows = chain.from_iterable(islice(raw_rows(source, ctx.base_dir), source.limit) for source in sources)
    many = sum(1 for _ in islice(rows, HELD_ROWS + 1)) > HELD_ROWS
    return (_Stored if many else _Held)(ctx, sources, encoding, policy, where)


class _None(Examples[T]):
    """No examples."""

    @property
    def sizes(self) -> list[int]:
        return []

    def take(self, sources: np.ndarray, numbers: np.ndarray) -> list[T]:
        return []

    def follow(self, plan: Plan) -> None:
        """Nothing is left to do."""

    def records(self, plan: Plan) -> list[DataRecord]:
        return []


class _Held(Examples[T]):
    """All examples in memory: a number is an example."""

    def __init__(
        self, ctx: PhaseContext, sources: tuple[DataSource, ...], encoding: Encoding[T], policy: RowPolicy, where: str
    ) -> None:
        super().__init__(sources, ctx.seed, where)
        rows = read_rows(sources, encoding.schema, ctx.base_dir, policy, where)
        refusals = policy.model_copy(update={"on_malformed": "skip"}) if encoding.skips else policy
        self._items = encode_sources(rows, encoding.encode, refusals, where)
        self._records = rows.records
        if encoding.check is not None:
            encoding.check([item for items in self._items for item in items])

    @property
    def sizes(self) -> list[int]:
        return [len(items) for items in self._items]

    def follow(self, plan: Plan) -> None:
        """Nothing is left to do."""

    def take(self, sources: np.ndarray, numbers: np.ndarray) -> list[T]:
        return [self._items[s][n] for s, n in zip(sources.tolist(), numbers.tolist(), strict=True)]

    def records(self, plan: Plan) -> list[DataRecord]:
        """Of all rows: they were all read."""
        return self._records


class _Stored(Examples[T]):
    """Examples in the node's cache: a number is a row, and what it becomes is known when it is reached."""

    def __init__(
        self, ctx: PhaseContext, sources: tuple[DataSource, ...], encoding: Encoding[T], policy: RowPolicy, where: str
    ) -> None:
        super().__init__(sources, ctx.seed, where)
        self._ctx, self._encoding, self._policy = ctx, encoding, policy
        self._leads = ctx.workers.local_rank == 0
        stops = () if policy.on_malformed == "skip" else (UNUSABLE[0],) if encoding.skips else UNUSABLE
        self._stops = np.array(stops, dtype=np.int64)
        root = row_cache.cache_root(ctx)
        names = [row_cache.cache_name(ctx, source, encoding.schema, encoding.encode) for source in sources]
        folders = [hold(root / name) for name in names]
        if self._leads:
            for source in sources:
                hold_source(source, ctx.base_dir, root)
            drop_unused(root)  # what is used here is held by now, though no process may have used it just before
        self._encoders = [self._encoder(*found, root) for found in zip(sources, folders, strict=True)]
        self._ahead: Ahead | None = None
        self._fates: list[Counter[int]] = [Counter() for _ in sources]

    def _encoder(self, source: DataSource, folder: Path, root: Path) -> Encoder:
        found = open_source(source, self._ctx.base_dir, root)
        rows = _limited(found, source.limit)
        if self._policy.on_malformed == "stop" and isinstance(found, Joined) and (why := found.damage(len(rows))):
            raise BadInput(why)  # whether or not a step would ever reach it
        store = RowStore(folder, len(rows))
        return Encoder(rows, store, source, self._encoding.schema, self._encoding.encode)

    @property
    def sizes(self) -> list[int]:
        return [len(encoder.rows) for encoder in self._encoders]

    def follow(self, plan: Plan) -> None:
        """The first rows are encoded at once, so that what is wrong with all is not found out late."""
        first = list(islice(plan, len(self._encoders)))
        if self._leads:
            if self._ahead is not None:
                self._ahead.close()
            self._ahead = Ahead(self._encoders, chain(first, plan), _processes(), self._stop_at)
        for block in first:
            self._ensure(*block)
            self._stop_at(block)
            self._count(*block)
        self._check_share()
        self._fates = [Counter() for _ in self._encoders]

    def take(self, sources: np.ndarray, numbers: np.ndarray) -> list[T]:
        with self._ctx.meter.part("data"):
            for source in np.unique(sources).tolist():
                rows = numbers[sources == source]
                self._ensure(source, rows)
                self._stop_at(Block(source, rows))
                self._count(source, rows)
            taken = zip(sources.tolist(), numbers.tolist(), strict=True)
            items = [item for source, row in taken for item in self._read(source, row)]
        if sum(counts.total() for counts in self._fates) >= HELD_ROWS:
            self._check_share()
        if self._encoding.check is not None:
            self._encoding.check(items)
        return items

    def _ensure(self, source: int, rows: np.ndarray) -> None:
        """Return when the rows have records."""
        if self._ahead is not None:
            self._ahead.ensure(source, rows)
        while not self._encoders[source].store.fates(rows).all():
            time.sleep(0.01)

    def _read(self, source: int, row: int) -> list[T]:
        encoder = self._encoders[source]
        while (record := encoder.store.read(row)) is None:
            if self._leads:
                encoder.run([row])
            else:
                time.sleep(0.1)
        if record.fate in UNUSABLE:
            return []
        return [unpacked(self._encoding.kind, part) for part in record.parts]

    def _stop_at(self, block: Block) -> None:
        """Raise BadInput for a row that may not be skipped."""
        wrong = np.isin(self._encoders[block.source].store.fates(block.rows), self._stops)
        if wrong.any():
            raise BadInput(self._refusal(block.source, int(block.rows[wrong][0])))

    def _count(self, source: int, rows: np.ndarray) -> None:
        self._fates[source].update(self._encoders[source].store.fates(rows).tolist())

    def _check_share(self) -> None:
        """Raise BadInput when too few of the rows taken so far can be used."""
        all_fates = sum(self._fates, Counter[int]())
        used = all_fates[Fate.USED] + all_fates[Fate.SHORTENED]
        if not used or used < self._policy.min_rows * all_fates.total():
            check_share(self._counted(self._fates), self._policy, self._where)

    def _refusal(self, source: int, row: int) -> str:
        encoder = self._encoders[source]
        record = encoder.store.read(row)
        return f"{encoder.rows[row][0]}: {record.parts[0].decode() if record else 'it cannot be used'}"

    def records(self, plan: Plan) -> list[DataRecord]:
        reached = self._reached(plan)
        counted = self._ctx.workers.from_main(lambda: self._final(reached))
        check_share(counted, self._policy, self._where)
        return counted

    def _reached(self, plan: Plan) -> list[np.ndarray]:
        """Whether each row of each source is reached: (rows,) bool."""
        reached = [np.zeros(size, dtype=bool) for size in self.sizes]
        for source, rows in plan:
            reached[source][rows] = True
            if all(rows.all() for rows in reached):
                break
        return reached

    def _final(self, reached: list[np.ndarray]) -> list[DataRecord]:
        fates = []
        for source, rows in enumerate(map(np.flatnonzero, reached)):
            self._ensure(source, rows)
            fates.append(Counter(self._encoders[source].store.fates(rows).tolist()))
        return self._counted(fates, reached)

    def _counted(self, fates: list[Counter[int]], reached: list[np.ndarray] | None = None) -> list[DataRecord]:
        return [self._record(i, counts, None if reached is None else reached[i]) for i, counts in enumerate(fates)]

    def _record(self, source: int, counts: Counter[int], reached: np.ndarray | None) -> DataRecord:
        encoder = self._encoders[source]
        return DataRecord(
            source=f"{self._where}[{source}]",
            fingerprint=fingerprint(encoder.source, self._ctx.base_dir),
            rows=counts[Fate.USED] + counts[Fate.SHORTENED],
            shortened=counts[Fate.SHORTENED],
            dropped=counts[Fate.DROPPED],
            skipped=(skipped := sum(counts[fate] for fate in UNUSABLE)),
            first_skipped=self._first_refused(source, reached) if skipped else "",
            unreached=0 if reached is None else int((~reached).sum()),
        )

    def _first_refused(self, source: int, reached: np.ndarray | None) -> str:
        store = self._encoders[source].store
        rows = np.arange(store.num_rows) if reached is None else np.flatnonzero(reached)
        return self._refusal(source, int(rows[np.isin(store.fates(rows), UNUSABLE)][0]))


class _First:
    """The first rows of a source."""

    def __init__(self, rows: RowSource, count: int) -> None:
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        return self._rows[row]


def _limited(rows: RowSource, limit: int | None) -> RowSource:
    return rows if limit is None or limit >= len(rows) else _First(rows, limit)


def _processes() -> int:
    """Processors that no rank of this node needs, but one at least."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(os.sched_getaffinity(0)) - ranks, MOST_PROCESSES))
