"""A JSON value in a text, read more strictly than Python does, and what is said of one that cannot be used. Imports no torch."""

import json
import math
from typing import Any, NoReturn

MAX_LINE = 16 * 2**20
"""Bytes of a line, or of a list's item: fifty times what the longest context holds."""

MAX_NESTING = 64
"""Levels of objects and lists in a row. Python reads, pickles and compares nested values by recursion, which has an end."""

LONG = f"longer than {MAX_LINE:,} bytes: no model reads so long a row"

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""What a file of two bytes per character begins with."""


class Malformed(ValueError):
    """A line or a row that cannot be used; the message says why, without the place."""


class Damaged(Malformed):
    """The same of a line behind which nothing of the file can be read."""


def value(found: Any) -> Any:
    """The value of what :func:`trainers.jsonl.items` yields: that in a line, or an item as it is. Raises Malformed."""
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
