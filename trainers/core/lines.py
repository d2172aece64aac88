"""Rows of a JSONL file by number, without the file in memory: where its lines begin is found once and kept."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from trainers import jsonl
from trainers.contract import Infrastructure
from trainers.files import locked, new_directory
from trainers.jsonl import MAX_LINE, Damaged, Malformed

CHUNK = 1 << 20
"""Bytes that are looked through at a time: what stays in a processor's cache is looked through three times as fast."""

BLANK = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)
"""What a blank line is made of, and what one that is not may begin with."""

PLAIN, STARTS, BLANKS, DAMAGE = "plain.jsonl", "starts.i64", "blanks.i64", "damage"


class Lines:
    """What :func:`trainers.jsonl.lines` yields of a file, by number."""

    def __init__(self, path: Path, index: Path) -> None:
        """``index`` is a folder that :func:`indexed` has filled."""
        plain = index / PLAIN
        self._path = path
        self._file = os.open(plain if plain.exists() else path, os.O_RDONLY)
        self._stat = os.fstat(self._file)
        self._starts = _mapped(index / STARTS)
        blanks = _mapped(index / BLANKS)
        self._rows_before_blanks = np.asarray(blanks) - np.arange(len(blanks))
        damage = index / DAMAGE
        self._damage = damage.read_text() if damage.exists() else None

    def __len__(self) -> int:
        """The place of a damage, behind the last line before it, is one more."""
        return len(self._starts) - len(self._rows_before_blanks) + (self._damage is not None)

    def __getitem__(self, row: int) -> tuple[str, bytes | Malformed]:
        """Raises Infrastructure for a file that was edited since it was opened: an attempt anew reads the new one."""
        if self._damage is not None and row == len(self) - 1:
            return f"{self._path}:{len(self._starts) + 1}", Damaged(self._damage)
        number = row + int(np.searchsorted(self._rows_before_blanks, row, side="right"))
        start = int(self._starts[number])
        end = int(self._starts[number + 1]) if number + 1 < len(self._starts) else self._stat.st_size
        line = os.pread(self._file, min(end - start, MAX_LINE + 1), start)
        now = os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise Infrastructure(f"{self._path} was edited while it was read; start the phase again")
        if number == 0:
            line = line.removeprefix(jsonl.BOM)
        return f"{self._path}:{number + 1}", line if len(line) <= MAX_LINE else Malformed(jsonl.LONG)


def indexed(path: Path, folder: Path) -> Lines:
    """A file's lines; their places are kept in ``folder``, which belongs to this content alone.

    A compressed file has no places to go to: it is unpacked into the folder, as far as it is whole. Raises BadInput or
    Infrastructure for a file that cannot be read.
    """
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with new_directory(folder) as made:
                _index(path, made)
    return Lines(path, folder)


def _index(path: Path, folder: Path) -> None:
    if path.suffix == ".gz":
        _unpack(path, folder)
        path = folder / PLAIN
    blanks: list[int] = []
    with path.open("rb", buffering=0) as file, (folder / STARTS).open("wb") as starts:
        number = 0
        for found, first in _lines(file.fileno()):
            starts.write(found.tobytes())
            for i in np.flatnonzero(np.isin(first, BLANK)).tolist():
                if first[i] == ord("\n") or not _line_at(file.fileno(), int(found[i])).strip():
                    blanks.append(number + i)
            number += len(found)
    (folder / BLANKS).write_bytes(np.array(blanks, dtype=np.int64).tobytes())


def _lines(file: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(where lines begin, their first bytes), some at a time. The first line may begin with a byte order mark."""
    offset, buffer = 0, bytearray(CHUNK)
    whole = np.frombuffer(buffer, dtype=np.uint8)
    begins = True  # whether the chunk's first byte is a line's first
    while size := os.preadv(file, [buffer], offset):
        chunk = whole[:size]
        ends = np.flatnonzero(chunk == ord("\n"))
        starts = ends[: len(ends) - (size in (ends[-1:] + 1))] + 1
        if begins:
            starts = np.concatenate([[0], starts])
        begins = bool(chunk[-1] == ord("\n"))
        first = chunk[starts].copy()
        if offset == 0 and chunk[: len(jsonl.BOM)].tobytes() == jsonl.BOM:
            first[0] = BLANK[0]  # to be looked at
        yield starts + offset, first
        offset += size


def _line_at(file: int, offset: int) -> bytes:
    """As much of a line as says whether it is blank; one that is too long to be read is not."""
    line = b""
    while b"\n" not in line and len(line) <= MAX_LINE and (more := os.pread(file, CHUNK, offset + len(line))):
        line += more
    line = line.partition(b"\n")[0]
    if len(line) > MAX_LINE:
        return jsonl.LONG.encode()
    return line.removeprefix(jsonl.BOM) if offset == 0 else line


def _unpack(path: Path, folder: Path) -> None:
    """Whole lines, and what is wrong with the file behind them."""
    with (folder / PLAIN).open("wb") as file:
        try:
            with jsonl.opened(path) as packed:
                while chunk := packed.read1(CHUNK):  # type: ignore[attr-defined]
                    file.write(chunk)
        except jsonl.DAMAGE as error:
            (folder / DAMAGE).write_text(jsonl.damage(error))
            file.truncate(_end_of_lines(folder / PLAIN, file))
        except OSError as error:
            raise jsonl.unreadable(path, error) from error


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
