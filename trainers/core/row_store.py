"""What rows have become, on disk, written once and read by every process of a node.

A table in a sparse file has 8 bytes for each row: where its record stands, and what became of the row. Records stand in
segments, files that get their name when they are whole and never change. A segment is on disk before the table says so:
a writer that is killed leaves at most a segment that nobody knows of. Several writers may work at once: both put the same
records, and the table names one of them.
"""

import os
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np

from trainers.files import fsync_directory, locked

HEAD = Struct("<II")
"""In front of a record: its length, and a CRC-32 of its row's number and of it.

A segment that is lost leaves its number to the next, whose records are not those that the table means.
"""

OPEN_SEGMENTS = 256
OFFSET_BITS = 35
"""Of 64: a segment has 32 GB at most."""


class Fate(IntEnum):
    """What became of a row. 0 in the table: not known yet."""

    USED = 1
    SHORTENED = 2
    DROPPED = 3
    MALFORMED = 4
    REFUSED = 5
    """By what encodes it: a chat template may."""


FATE_BITS = 3


class Record(NamedTuple):
    fate: Fate
    parts: list[bytes]
    """Examples that the row became; of one that cannot be used, the reason."""


class RowStore:
    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        self.num_rows = num_rows
        folder.mkdir(exist_ok=True)
        path = folder / "table"
        with locked(folder / "lock"), path.open("ab") as file:
            file.truncate(max(file.tell(), 8 * max(num_rows, 1)))  # runs with other limits may share it
        self._table = np.memmap(path, dtype=np.uint64, mode="r+")
        self._opened = lru_cache(OPEN_SEGMENTS)(_Segment)
        self._next = len(list(folder.glob("segment-*")))

    def fates(self, rows: np.ndarray) -> np.ndarray:
        """:class:`Fate` of each row, or 0: (N,) to (N,)."""
        return (self._table[rows] & np.uint64(2**FATE_BITS - 1)).astype(np.int64)

    def read(self, row: int) -> Record | None:
        """None for a row that has no record yet, or a damaged one, which is to be made again."""
        entry = int(self._table[row])
        fate, place = entry & (2**FATE_BITS - 1), entry >> FATE_BITS
        if fate == 0:
            return None
        try:
            content = self._opened(self._segment(place >> OFFSET_BITS)).read(row, place & (2**OFFSET_BITS - 1))
        except (OSError, ValueError):
            return None
        return Record(Fate(fate), _split(content))

    def write(self, rows: Iterable[int], records: Iterable[Record]) -> None:
        """Add rows' records as one segment, then their places."""
        content, entries = bytearray(), []
        for row, record in zip(rows, records, strict=True):
            entries.append((row, len(content), record.fate))
            body = _joined(record.parts)
            content += HEAD.pack(len(body), _checksum(row, body)) + body
        segment = self._new_segment(bytes(content))
        for row, offset, fate in entries:
            self._table[row] = ((segment << OFFSET_BITS | offset) << FATE_BITS) | fate

    def forget(self, row: int) -> None:
        """Its record is damaged."""
        self._table[row] = 0

    def _segment(self, number: int) -> Path:
        return self.folder / f"segment-{number:07d}"

    def _new_segment(self, content: bytes) -> int:
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            while not _named(temporary, self._segment(self._next)):
                self._next += 1
        finally:
            os.unlink(temporary)
        fsync_directory(self.folder)
        return self._next


def _named(temporary: str, path: Path) -> bool:
    """Give a whole file a name that no other has."""
    with suppress(FileExistsError):
        os.link(temporary, path)
        return True
    return False


class _Segment:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._file)

    def read(self, row: int, offset: int) -> bytes:
        """Raises ValueError for a record that is damaged, or another row's."""
        head = os.pread(self._file, HEAD.size, offset)
        if len(head) < HEAD.size:
            raise ValueError("a record is cut off")
        length, checksum = HEAD.unpack(head)
        content = os.pread(self._file, length, offset + HEAD.size)
        if len(content) != length or _checksum(row, content) != checksum:
            raise ValueError("a record is damaged")
        return content


def _checksum(row: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(row.to_bytes(8, "little")))


COUNT = Struct("<I")


def _joined(parts: list[bytes]) -> bytes:
    return b"".join(COUNT.pack(len(part)) + part for part in parts)


def _split(content: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(content):
        (size,) = COUNT.unpack_from(content, at)
        parts.append(content[at + COUNT.size : at + COUNT.size + size])
        at += COUNT.size + size
    return parts
