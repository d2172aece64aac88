"""JSONL, read and written in one place: one JSON value a line, lines end at ``\\n`` and nowhere else.

Everything that reads or writes such files goes through here, so that whatever is written can be read again: a text may
hold U+2028, U+0085 or a carriage return, all of which Python's ``splitlines`` takes for the end of a line. Whatever a
file holds, no more of it than :data:`MAX_LINE` is in memory at a time. Imports no torch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.contract import BadInput, Infrastructure
from trainers.data_files import BOM, DAMAGE, damage, is_list, opened, unreadable
from trainers.json_lists import listed
from trainers.json_text import LONG, MAX_LINE, Damaged, Malformed, value


def lines(path: Path) -> Iterator[tuple[str, bytes | Malformed]]:
    """(``file:number`` for messages, line) of every line that is not blank; for :func:`trainers.json_text.value`.

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
            found = (line if len(line) <= MAX_LINE else _behind_long_line(some) for line in iter(some, b""))
            for first in islice(found, 1):
                yield first.removeprefix(BOM) if isinstance(first, bytes) else first
            yield from found
    except DAMAGE as error:
        yield Damaged(damage(error))
    except OSError as error:
        raise unreadable(path, error) from error


def _behind_long_line(some: partial[bytes]) -> Malformed:
    while (rest := some()) and not rest.endswith(b"\n"):
        pass
    return Malformed(LONG)


def items(path: Path) -> Iterator[tuple[str, Any]]:
    """Like :func:`lines`; of a ``.json`` file that is one list, (``file row number``, value) of every item.

    Raises Infrastructure for a file that was edited while it was read: its rows are of no one state.
    """
    before = _state(path)
    yield from listed(path) if is_list(path) else lines(path)
    if _state(path) != before:
        raise Infrastructure(f"{path} was edited while it was read; start the phase again")


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


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
