"""Rows of a JSONL file by number, without the file in memory: where its lines begin is found once and kept.

Of a ``.json`` file that is one list: where its items begin and end.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from struct import Struct
from typing import IO

import numpy as np

from trainers import data_files, json_lists, json_text
from trainers.contract import Infrastructure
from trainers.core.kept_folders import hold
from trainers.files import locked, new_directory, read_into
from trainers.json_text import MAX_LINE, Damaged, Malformed

BLOCK = 64 * 2**20
"""Bytes that a thread looks through for lines: numpy and the system do nearly all of it, without Python's lock."""

CHUNK = 2**18
"""Bytes of them that are looked through at a time: what stays in a processor's cache is looked through three times as fast."""

NEWLINE = ord("\n")

BLANK = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
"""What a blank line is made of, and what one that is not may begin with."""

PLAIN, STARTS, ENDS, BLANKS, DAMAGE = "plain", "starts.i64", "ends.i64", "blanks.i64", "damage"


OFFSET = Struct("<q")


class Lines:
    """What :func:`trainers.jsonl.items` yields of a file, by number; items of a list as the bytes that they are."""

    def __init__(self, path: Path, index: Path) -> None:
        """``index`` is a folder that :func:`indexed` has filled."""
        self._path = path
        self._file = os.open(index / PLAIN if path.suffix == ".gz" else path, os.O_RDONLY)
        self._stat = os.fstat(self._file)
        self._starts = _mapped(index / STARTS)
        self._ends = _mapped(index / ENDS) if (index / ENDS).exists() else None
        blanks = _mapped(index / BLANKS)
        self._rows_before_blanks = np.asarray(blanks) - np.arange(len(blanks))
        self._damage = (index / DAMAGE).read_text() or None

    def __len__(self) -> int:
        """The place of a damage, behind the last line before it, is one more."""
        return len(self._starts) - len(self._rows_before_blanks) + (self._damage is not None)

    def __getitem__(self, row: int) -> tuple[str, bytes | Malformed]:
        """Raises Infrastructure for a file that was edited since it was opened: an attempt anew reads the new one."""
        number = row + int(np.searchsorted(self._rows_before_blanks, row, side="right"))
        place = f"{self._path}{':' if self._ends is None else ' row '}{number + 1}"
        if self._damage is not None and row == len(self) - 1:
            return place, Damaged(self._damage)
        start, end = self._span(number)
        line = os.pread(self._file, min(end - start, MAX_LINE + 1), start)
        now = os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise Infrastructure(f"{self._path} was edited while it was read; start the phase again")
        if start == 0:
            line = line.removeprefix(data_files.BOM)
        return place, line if len(line) <= MAX_LINE else Malformed(json_text.LONG)

    def _span(self, number: int) -> tuple[int, int]:
        """Where a line begins and ends."""
        start = int(self._starts[number])
        if self._ends is not None:
            return start, int(self._ends[number])
        return start, int(self._starts[number + 1]) if number + 1 < len(self._starts) else self._stat.st_size


def indexed(path: Path, folder: Path) -> Lines:
    """A file's lines; their places are kept in ``folder``, which belongs to this content alone.

    A compressed file has no places to go to: it is unpacked into the folder, as far as it is whole. Raises BadInput or
    Infrastructure for a file that cannot be read.
    """
    hold(folder)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not all(
            (folder / name).exists() for name in _parts(path)
        ):  # some are missing if somebody removes it by hand
            with new_directory(folder) as made:
                _index(path, made)
    return Lines(path, folder)


def _parts(path: Path) -> list[str]:
    """Files of an index."""
    packed, ends = [PLAIN] if path.suffix == ".gz" else [], [ENDS] if data_files.is_list(path) else []
    return [*packed, *ends, STARTS, BLANKS, DAMAGE]


def _index(path: Path, folder: Path) -> None:
    (folder / DAMAGE).touch()
    if path.suffix == ".gz":
        _unpack(path, folder)
    if data_files.is_list(path):
        _index_list(path, folder)
    else:
        _index_lines(folder / PLAIN if path.suffix == ".gz" else path, folder)


def _index_list(path: Path, folder: Path) -> None:
    with (folder / STARTS).open("wb") as starts, (folder / ENDS).open("wb") as ends:
        for (start, end), item in json_lists.spans(path):
            if not isinstance(item, Damaged):
                starts.write(OFFSET.pack(start))
                ends.write(OFFSET.pack(end))
    (folder / BLANKS).touch()


def _index_lines(path: Path, folder: Path) -> None:
    blanks: list[int] = []
    with (
        path.open("rb", buffering=0) as file,
        (folder / STARTS).open("wb") as starts,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        number, size = 0, os.fstat(file.fileno()).st_size
        for found, first in threads.map(partial(_starts, file.fileno(), size), range(0, size, BLOCK)):
            starts.write(found.tobytes())
            for i in np.flatnonzero(np.isin(first, BLANK)).tolist():
                if first[i] == NEWLINE or not _line_at(file.fileno(), int(found[i])).strip():
                    blanks.append(number + i)
            number += len(found)
    (folder / BLANKS).write_bytes(np.array(blanks, dtype=np.int64).tobytes())


def _starts(file: int, size: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """(where lines begin in a block of a file of this size, their first bytes): (N,) int64 and uint8.

    The first line may begin with a byte order mark: its first byte is said to be a blank, to be looked at.
    """
    buffer = bytearray(CHUNK + 1)
    found = [_starts_in(file, offset, buffer) for offset in range(begin, min(begin + BLOCK, size), CHUNK)]
    starts, first = map(np.concatenate, zip(*found, strict=True))
    if begin == 0 and os.pread(file, len(data_files.BOM), 0) == data_files.BOM:
        first[0] = BLANK[0]
    return starts, first


def _starts_in(file: int, offset: int, buffer: bytearray) -> tuple[np.ndarray, np.ndarray]:
    """The same of a chunk. A line begins behind a line's end, so the byte before the chunk is looked at, too."""
    buffer[0] = NEWLINE
    before = int(offset > 0)
    size = 1 - before + read_into(file, memoryview(buffer)[1 - before :], offset - before)
    seen = np.frombuffer(buffer, dtype=np.uint8)
    found = np.flatnonzero(seen[: size - 1] == NEWLINE) + 1 if size > 1 else np.zeros(0, dtype=np.int64)
    return found + (offset - 1), seen[found]


def _line_at(file: int, offset: int) -> bytes:
    """As much of a line as says whether it is blank; one that is too long to be read is not."""
    line = b""
    while b"\n" not in line and len(line) <= MAX_LINE and (more := os.pread(file, CHUNK, offset + len(line))):
        line += more
    line = line.partition(b"\n")[0]
    if len(line) > MAX_LINE:
        return json_text.LONG.encode()
    return line.removeprefix(data_files.BOM) if offset == 0 else line


def _unpack(path: Path, folder: Path) -> None:
    """What can be read of it, if only in part up to the last whole line, and what is wrong with it behind that."""
    with (folder / PLAIN).open("wb") as file:
        try:
            with data_files.opened(path) as packed:
                while chunk := packed.read1(CHUNK):  # type: ignore[attr-defined]
                    file.write(chunk)
        except data_files.DAMAGE as error:
            (folder / DAMAGE).write_text(data_files.damage(error))
            if not data_files.is_list(path):
                file.truncate(_end_of_lines(folder / PLAIN, file))
        except OSError as error:
            raise data_files.unreadable(path, error) from error


def _end_of_lines(path: Path, file: IO[bytes]) -> int:
    """Where the last whole line ends."""
    file.flush()
    end = path.stat().st_size
    with path.open("rb") as found:
        while end:
            start = max(0, end - CHUNK)
            found.seek(start)
            at = found.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.int64, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.int64)
