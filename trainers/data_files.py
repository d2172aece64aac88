"""Files of rows, opened: packed or not, whole or damaged, lines or one list. Imports no torch."""

import gzip
import zlib
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

from trainers.contract import BadInput, Infrastructure

BOM = b"\xef\xbb\xbf"
"""The byte order mark that Windows programs put at the start of a file."""

TABLES = (".parquet", ".csv", ".tsv", ".arrow")
"""Ends of files that are no lines of JSON, but that ``datasets`` reads."""

DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)
"""What unpacking a file raises when it is not as it was written."""


def opened(path: Path) -> IO[bytes]:
    """Binary, because text files are split at carriage returns too; unpacked."""
    return BufferedReader(_Unpacked(path), 2**17) if path.suffix == ".gz" else path.open("rb")


class _Unpacked(RawIOBase):
    """A compressed file for a buffer in front of it, without which each line is read by Python.

    It gives what one look into the file yields: a buffer that wants more loses that when the next look finds a damage.
    """

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._file.read1(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def is_list(path: Path) -> bool:
    """Whether a file is one list, not lines. Raises BadInput for a table, which is neither."""
    if path.suffix in TABLES:
        raise BadInput(
            f"{path}: not JSONL; a folder of {path.suffix} files is read as a data set: hub: {{name: FOLDER}}"
        )
    return ".json" in path.suffixes[-2:] and _first_character(path) == b"["


def _first_character(path: Path) -> bytes:
    """The first that is no blank; none in a file that is damaged before it."""
    try:
        with opened(path) as file:
            some = file.read(len(BOM)).removeprefix(BOM)
            while not some.strip() and (more := file.read(2**16)):
                some = more
            return some.strip()[:1]
    except DAMAGE:
        return b""
    except OSError as error:
        raise unreadable(path, error) from error


def damage(error: Exception) -> str:
    """What a damaged file is said to be, from its first lost line on."""
    return f"cannot be read from here on: damaged gzip file ({error})"


def unreadable(path: Path, error: OSError) -> Exception:
    """A file that may not be read is the user's to mend; one that is gone or on a failing disk may be there later."""
    kind = BadInput if isinstance(error, PermissionError | IsADirectoryError) else Infrastructure
    return kind(f"{path}: cannot be read: {error.strerror or error}")
