"""Rows of a hub dataset that is not downloaded whole, by number: taken in the stream's order, and kept as they come.

They are kept in blocks, Arrow files that also say where the stream stood behind them. So a row that was reached once is
never asked for again, and another process or another attempt goes on from the last block: whole shards before it are not
read again.
"""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainers.contract import BadInput
from trainers.core.hub import from_hub
from trainers.core.kept_folders import hold
from trainers.files import locked, write_atomic
from trainers.fingerprints import fingerprint
from trainers.formats.schemas import Row
from trainers.spec import DataSource, HubDataset

BLOCK = 1024
"""Rows of a file."""

OPEN_BLOCKS = 64

STATE = b"stream"
"""Key of a block's metadata: the state of `datasets` behind it."""


class Streamed:
    """The first rows of a stream: (place for messages, row) by number. Raises BadInput for one behind the stream's end."""

    def __init__(self, hub: HubDataset, limit: int, root: Path) -> None:
        self._hub, self._limit = hub, limit
        self._folder = hold(stream_folder(hub, root))
        self._stream: Stream | None = None
        self._next: tuple[int, int] | None = None
        """Process that the stream belongs to, and the block that it gives next."""

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has a stream of its own."""
        return {**vars(self), "_stream": None}

    def __len__(self) -> int:
        return self._limit

    def __getitem__(self, row: int) -> tuple[str, Row]:
        number, at = divmod(row, BLOCK)
        path = self._path(number)
        if not path.exists():
            self._fetch(row)
        table = _mapped(path) if path.exists() else None
        if table is None or table.num_rows <= at:
            found = sum(_mapped(block).num_rows for block in self._folder.glob("rows-*.arrow"))
            raise BadInput(
                f"{shown(self._hub)} ends after {found} rows, before its limit of {self._limit}: lower the limit"
            )
        return f"{shown(self._hub)} row {row + 1}", table.slice(at, 1).to_pylist()[0]

    def _path(self, number: int) -> Path:
        return self._folder / f"rows-{number:07d}.arrow"

    def _fetch(self, row: int) -> None:
        """Take blocks until those of all rows that are shuffled with this one are there, or the stream ends."""
        window = self._hub.shuffle_buffer
        last = min((row // window + 1) * window, self._limit) - 1
        with locked(self._folder / "lock"):
            number = next(number for number in count() if not self._path(number).exists())
            if number == 0 or _mapped(self._path(number - 1)).num_rows == BLOCK:
                while number <= last // BLOCK and self._take(number):
                    number += 1

    def _take(self, number: int) -> bool:
        """Write the next block. Whether more may follow it: a stream's last block is a short one."""
        # Another process has gone on; or this one was forked, and shares files and connections with the one that opened them.
        if self._stream is None or self._next != (os.getpid(), number):
            state = _mapped(self._path(number - 1)).schema.metadata[STATE] if number else None
            self._stream = Stream(self._hub, state)
        block = self._stream.next()
        self._next = os.getpid(), number + 1
        content = BytesIO()
        with pa.ipc.new_file(content, block.schema.with_metadata({STATE: self._stream.state})) as writer:
            writer.write_table(block)
        write_atomic(self._path(number), content.getvalue())
        return bool(block.num_rows == BLOCK)


def stream_folder(hub: HubDataset, root: Path) -> Path:
    """Where a stream's rows are kept."""
    same = hub.model_copy(update={"shuffle_buffer": 1})  # neither this nor the limit decides what comes
    return root / f"stream-{fingerprint(DataSource(hub=same, limit=1), root)[:32]}"


class Stream:
    """Blocks of rows, one after the other. A failure of the network is tried again from where the stream stood."""

    def __init__(self, hub: HubDataset, state: bytes | None = None) -> None:
        self._hub = hub
        self.state = state
        """Of `datasets`, behind the last block; None at the beginning."""
        self._blocks: Iterator[pa.Table] | None = None

    def next(self) -> pa.Table:
        """(BLOCK rows), fewer or none at the end. Raises Infrastructure or BadInput as :func:`from_hub` does."""
        return from_hub(f"dataset {shown(self._hub)}", self._try)

    def _try(self) -> pa.Table:
        if self._blocks is None:
            self._open()
        blocks, self._blocks = self._blocks, None  # whatever fails ends it
        block = next(blocks, pa.table({}))  # type: ignore[arg-type]
        self._blocks, self.state = blocks, json.dumps(self._dataset.state_dict()).encode()
        return block

    def _open(self) -> None:
        from datasets import load_dataset

        hub = self._hub
        found = load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=True)
        self._dataset = found.with_format("arrow")
        if self.state is not None:
            self._dataset.load_state_dict(json.loads(self.state))
        self._blocks = self._dataset.iter(batch_size=BLOCK)


def streamed(hub: HubDataset) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of all rows of a stream, which are kept nowhere."""
    stream = Stream(hub)
    blocks = iter(lambda: stream.next().to_pylist(), [])
    for number, row in enumerate(chain.from_iterable(blocks), 1):
        yield f"{shown(hub)} row {number}", row


def shown(hub: HubDataset) -> str:
    return f"{hub.name}[{hub.split}]"


@lru_cache(OPEN_BLOCKS)
def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
