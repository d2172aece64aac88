"""JSONL, read and written in one place: one JSON value a line, lines end at ``\\n`` and nowhere else.

Everything that reads or writes such files goes through here, so that whatever is written can be read again: a text may
hold U+2028, U+0085 or a carriage return, all of which Python's ``splitlines`` takes for the end of a line. Whatever a
file holds, no more of it than :data:`MAX_LINE` is in memory at a time. Imports no torch.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, NoReturn

from trainers.contract import BadInput, Infrastructure

MAX_LINE = 16 * 2**20
"""Bytes of a line, or of a list's item: fifty times what the longest context holds."""

MAX_NESTING = 64
"""Levels of objects and lists in a row. Python reads, pickles and compares nested values by recursion, which has an end."""

LONG = f"longer than {MAX_LINE:,} bytes: no model reads so long a row"

BOM = b"\xef\xbb\xbf"
"""The byte order mark that Windows programs put at the start of a file."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""What a file of two bytes per character begins with."""

TABLES = (".parquet", ".csv", ".tsv", ".arrow")
"""Ends of files that are no lines of JSON, but that ``datasets`` reads."""

DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error)
"""What unpacking a file raises when it is not as it was written."""


class Malformed(ValueError):
    """A line or a row that cannot be used; the message says why, without the place."""


class Damaged(Malformed):
    """The same of a line behind which nothing of the file can be read."""


def lines(path: Path) -> Iterator[tuple[str, bytes | Malformed]]:
    """(``file:number`` for messages, line) of every line that is not blank; for :func:`value`.

    In the place of a line that is too long stands what is wrong with it, and so does it where a compressed file is
    damaged: there the file ends. Raises BadInput or Infrastructure for a file that cannot be read.
    """
    for number, line in enumerate(_all_lines(path), 1):
        if isinstance(line, Malformed) or line.strip():
            yield f"{path}:{number}", line


def _all_lines(path: Path) -> Iterator[bytes | Malformed]:
    try:
        with opened(path) as file:
            some = partial(file.readline, MAX_LINE + 1)
            yield some().removeprefix(BOM)
            for line in iter(some, b""):
                yield line if len(line) <= MAX_LINE else _behind_long_line(some)
    except DAMAGE as error:
        yield Damaged(damage(error))
    except OSError as error:
        raise unreadable(path, error) from error


def _behind_long_line(some: partial[bytes]) -> Malformed:
    while (rest := some()) and not rest.endswith(b"\n"):
        pass
    return Malformed(LONG)


def damage(error: Exception) -> str:
    """What a damaged file is said to be, from its first lost line on."""
    return f"cannot be read from here on: damaged gzip file ({error})"


def unreadable(path: Path, error: OSError) -> Exception:
    """A file that may not be read is the user's to mend; one that is gone or on a failing disk may be there later."""
    kind = BadInput if isinstance(error, PermissionError | IsADirectoryError) else Infrastructure
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def items(path: Path) -> Iterator[tuple[str, Any]]:
    """Like :func:`lines`; of a ``.json`` file that is one list, (``file row number``, value) of every item.

    Raises Infrastructure for a file that was edited while it was read: its rows are of no one state.
    """
    from trainers.json_lists import listed

    before = _state(path)
    yield from listed(path) if is_list(path) else lines(path)
    if _state(path) != before:
        raise Infrastructure(f"{path} was edited while it was read; start the phase again")


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


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


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


def value(found: Any) -> Any:
    """The value of what :func:`items` yields: that in a line, or an item as it is. Raises Malformed."""
    if isinstance(found, bytes):
        return parse(found)
    if isinstance(found, Malformed):
        raise found
    return found


def parse(line: bytes | str) -> Any:
    """The value in a line. Raises Malformed.

    Stricter than Python, which reads what is no JSON (NaN), what says two things (a key twice), and what cannot be
    written as UTF-8 again (lone surrogates).
    """
    text = line if isinstance(line, str) else _decoded(line)
    try:
        # The end of the line is not part of it: an error there would be put on the next line.
        found = STRICT.decode(text.rstrip(" \t\r\n"))
    except json.JSONDecodeError as error:
        line_number = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise Malformed(f"{not_json(error)} at {line_number}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise reason(error) from error
    check(found, text)
    return found


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if line.startswith(UTF_16):
            raise Malformed("not UTF-8 text but UTF-16: save the file as UTF-8") from error
        raise Malformed(f"not UTF-8 text ({error.reason} at byte {error.start + 1})") from error


def not_json(error: json.JSONDecodeError) -> str:
    """The beginning of what is said of it; the place follows, and a bracket."""
    zero = error.doc[error.pos : error.pos + 1] == "\0"
    return f"not valid JSON ({'a NUL byte, as a crash or another encoding leaves them,' if zero else error.msg}"


def reason(error: Exception) -> Malformed:
    """Why a value cannot be used that is no worse than JSON."""
    if isinstance(error, Malformed):
        return error
    if isinstance(error, RecursionError):
        return Malformed(f"nested deeper than {MAX_NESTING} levels")
    return Malformed(f"not valid JSON ({error})")  # an integer of more digits than Python converts


def check(found: Any, text: str) -> None:
    """Raise Malformed for a value, and the text it was read from, that Python reads and others would not."""
    if "\\u" in text:  # the only way for a surrogate to get in
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise Malformed(f"half a character: {half} alone is no text") from error
        except RecursionError as error:
            raise reason(error) from error
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(found) > MAX_NESTING:
        raise Malformed(f"nested deeper than {MAX_NESTING} levels")


def read(path: Path) -> Iterator[Any]:
    """Every value of a file. Raises BadInput with file and line at the first that cannot be used."""
    for place, line in lines(path):
        try:
            yield value(line)
        except Malformed as problem:
            raise BadInput(f"{place}: {problem}") from problem


def read_whole_lines(path: Path) -> Iterator[Any]:
    """What a file that is appended to holds so far; a line that a kill has torn is left out."""
    for _, line in lines(path):
        try:
            yield value(line)
        except Malformed:
            continue


def dump(row: Mapping[str, Any]) -> str:
    """A row as one line, with its end. Raises ValueError for what is no JSON: NaN, infinities, half characters."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text + "\n"


def dumps(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(map(dump, rows))


def _finite(digits: str) -> float:
    """A number that overflows is infinite to Python."""
    number = float(digits)
    if not math.isfinite(number):
        raise Malformed(f"the number {digits[:20]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is no JSON; leave the key out or write null")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Of a key that is there twice Python takes the last, other programs the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed(f"the key {twice[:40]!r} is there twice")
    return found


STRICT = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_distinct)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
    return depth
