"""JSONL, read and written in one place: one JSON value a line, lines end at ``\\n`` and nowhere else.

Everything that reads or writes such files goes through here, so that whatever is written can be read again: a text may
hold U+2028, U+0085 or a carriage return, all of which Python's ``splitlines`` takes for the end of a line.
Imports no torch.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from trainers.contract import BadInput

MAX_NESTING = 64
"""Levels of objects and lists in a row. Python reads, pickles and compares nested values by recursion, which has an end."""


BOM = b"\xef\xbb\xbf"
"""The byte order mark that Windows programs put at the start of a file."""


TABLES = (".parquet", ".csv", ".tsv", ".arrow")
"""Ends of files that are no lines of JSON, but that ``datasets`` reads."""


class Malformed(ValueError):
    """A line or a row that cannot be used; the message says why, without the place."""


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(``file:number`` for messages, line) of every line that is not blank.

    Raises BadInput with file and line for a file that cannot be read or decompressed.
    """
    for number, line in enumerate(_all_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _all_lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix(BOM) if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}:{number + 1}: cannot be read: damaged gzip file ({error})") from error
    except PermissionError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def items(path: Path) -> Iterator[tuple[str, Any]]:
    """Like :func:`lines`; of a ``.json`` file that is one list, (``file row number``, value) of every item."""
    if path.suffix in TABLES:
        raise BadInput(
            f"{path}: not JSONL; a folder of {path.suffix} files is read as a data set: hub: {{name: FOLDER}}"
        )
    _, first = next(lines(path), ("", b"")) if ".json" in path.suffixes[-2:] else ("", b"")
    yield from _listed(path) if first.lstrip().startswith(b"[") else lines(path)


def _listed(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        found = parse(b"".join(_all_lines(path)))
    except Malformed as problem:
        raise BadInput(f"{path}: {problem}") from problem
    for number, value in enumerate(found, 1):
        yield f"{path} row {number}", value


def _open(path: Path) -> gzip.GzipFile | IO[bytes]:
    """Binary, because text files are split at carriage returns too."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def parse(line: bytes | str) -> Any:
    """The value in a line. Raises Malformed.

    Stricter than Python, which reads what is no JSON (NaN) and what cannot be written as UTF-8 again (lone surrogates).
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
        # The end of the line is not part of it: an error there would be put on the next line.
        value = json.loads(text.rstrip(" \t\r\n"), parse_float=_finite, parse_constant=_refuse_constant)
        if "\\u" in text:  # the only way for a surrogate to get in
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 text ({error.reason} at byte {error.start + 1})") from error
    except UnicodeEncodeError as error:
        raise Malformed(f"half a character: \\u{ord(error.object[error.start]):04x} alone is no text") from error
    except json.JSONDecodeError as error:
        line_number = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise Malformed(f"not valid JSON ({error.msg} at {line_number}column {error.colno})") from error
    except RecursionError as error:
        raise Malformed(f"nested deeper than {MAX_NESTING} levels") from error
    except Malformed:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise Malformed(f"not valid JSON ({error})") from error
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(value) > MAX_NESTING:
        raise Malformed(f"nested deeper than {MAX_NESTING} levels")
    return value


def read(path: Path) -> Iterator[Any]:
    """Every value of a file. Raises BadInput with file and line at the first that cannot be used."""
    for place, line in lines(path):
        try:
            yield parse(line)
        except Malformed as problem:
            raise BadInput(f"{place}: {problem}") from problem


def read_whole_lines(path: Path) -> Iterator[Any]:
    """What a file that is appended to holds so far; a line that a kill has torn is left out."""
    for _, line in lines(path):
        try:
            yield parse(line)
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
    value = float(digits)
    if not math.isfinite(value):
        raise Malformed(f"the number {digits[:20]} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is no JSON; leave the key out or write null")


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
    return depth
