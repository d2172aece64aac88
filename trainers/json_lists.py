"""A list in a ``.json`` file, read item by item: such files are often larger than what a process should hold."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trainers.contract import BadInput
from trainers.data_files import BOM, DAMAGE, damage, opened, unreadable
from trainers.json_text import LONG, MAX_LINE, STRICT, Damaged, Malformed, check, not_json
from trainers.json_text import reason as reason_of

CHUNK = 2**18
"""Bytes that are read at a time, unless an item is longer."""

BLANKS = re.compile(r"[ \t\r\n]*")

LENIENT = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)
"""For where an item ends that is not as it should be."""


def listed(path: Path) -> Iterator[tuple[str, Any]]:
    """(``file row number``, value or what is wrong with it) of every item of a file that is a list. Raises as :func:`spans`."""
    for number, (_, item) in enumerate(spans(path), 1):
        yield f"{path} row {number}", item


def spans(path: Path) -> Iterator[tuple[tuple[int, int], Any]]:
    """(bytes of the unpacked file from which and up to which an item goes, value or what is wrong with it) of every item.

    Raises BadInput with line and column where it is no JSON: where the next item begins nobody knows then.
    """
    end = 0
    try:
        with opened(path) as file:
            for (start, end), item in _items(_Window(file)):
                yield (start, end), item if end - start <= MAX_LINE else Malformed(LONG)
    except DAMAGE as error:
        yield (end, end), Damaged(damage(error))
    except _Broken as problem:
        raise BadInput(f"{path}: {problem}") from problem
    except OSError as error:
        raise unreadable(path, error) from error


class _Broken(ValueError):
    """The list itself cannot be read any further."""


class _Window:
    """The part of a text that is looked at."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # Bytes that are no UTF-8 become half characters, which an item of a list may not hold.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        first = file.read(len(BOM))
        self.text = self._decode(first.removeprefix(BOM))
        self.at = 0
        self.ended = False
        self._line, self._column = 1, 1
        self._offset, self._counted = len(BOM) if first.startswith(BOM) else 0, 0

    def more(self) -> None:
        """Drop what lies behind, and read as much again as is left."""
        self._line, self._column = self._place(self.at)
        self.offset()
        self._counted = 0
        # What one look yields: one that wants more loses it when it finds a damage behind.
        chunk = self._file.read1(max(CHUNK, len(self.text) - self.at))  # type: ignore[attr-defined]
        self.ended = not chunk
        self.text, self.at = self.text[self.at :] + self._decode(chunk, self.ended), 0

    def next(self) -> str:
        """The next character that is no blank, or none at the end; the window stands before it."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def offset(self) -> int:
        """Bytes of the file that lie behind."""
        passed = self.text[self._counted : self.at]
        self._offset += len(passed) if passed.isascii() else len(passed.encode(errors="surrogateescape"))
        self._counted = self.at
        return self._offset

    def take(self, wanted: str) -> str:
        """Go behind the next character, which is one of those wanted. Raises _Broken."""
        found = self.next()
        if not found or found not in wanted:
            raise self.broken(json.JSONDecodeError(f"Expecting {' or '.join(map(repr, wanted))}", self.text, self.at))
        self.at += 1
        return found

    def broken(self, error: json.JSONDecodeError) -> _Broken:
        line, column = self._place(error.pos)
        return _Broken(f"{not_json(error)} at line {line}, column {column})")

    def _place(self, position: int) -> tuple[int, int]:
        """(line, column) in the file of a position in the window."""
        lines = self.text.count("\n", 0, position)
        if not lines:
            return self._line, self._column + position
        return self._line + lines, position - self.text.rfind("\n", 0, position)


def _items(window: _Window) -> Iterator[tuple[tuple[int, int], Any]]:
    window.take("[")
    if window.next() == "]":
        window.take("]")
    else:
        yield _spanned(window)
        while window.take(",]") == ",":
            window.next()
            yield _spanned(window)
    if window.next():
        raise window.broken(json.JSONDecodeError("Extra data", window.text, window.at))


def _spanned(window: _Window) -> tuple[tuple[int, int], Any]:
    start = window.offset()
    item = _item(window)
    return (start, window.offset()), item


def _item(window: _Window) -> Any:
    """The next item, or what is wrong with it; the window stands behind it."""
    while True:
        try:
            found, end = _decoded(window.text, window.at)
        except json.JSONDecodeError as error:  # perhaps because the window ends
            if window.ended:
                raise window.broken(error) from error
        else:
            # Of "1.5e+3" the first part, or two, are numbers too.
            if end + len("e+") < len(window.text) or window.ended:
                window.at = end
                return found
        if len(window.text) - window.at > MAX_LINE:
            raise _Broken(f"line {window._line}: an item, or what begins like one, is {LONG}")
        window.more()


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """(value or what is wrong with it, where it ends). Raises JSONDecodeError for what has no end."""
    try:
        found, end = STRICT.raw_decode(text, at)
        raw = text[at:end]
        if not raw.isascii():
            raw.encode()
        check(found, raw)
    except UnicodeEncodeError as error:
        return Malformed(f"not UTF-8 text ({ord(error.object[error.start]) - 0xDC00:#x} is no character)"), end
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _Broken(str(reason_of(error))) from error
    except ValueError as error:
        return reason_of(error), LENIENT.raw_decode(text, at)[1]
    return found, end
