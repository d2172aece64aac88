"""Rows as other projects write them, turned into this project's schemas. Imports no torch.

A format is a function from a row of the world to a row of :data:`trainers.formats.schemas.SCHEMAS`; a source names one
by `format`. Adding one takes a function, its line in :data:`FORMATS` and its name in ``DataSource.format``.
"""

from collections.abc import Callable, Mapping

from trainers.formats.alpaca import alpaca
from trainers.formats.conversations import messages, preference_messages, prompt_completion, sharegpt
from trainers.formats.hh import hh
from trainers.formats.schemas import Row, check_row, plain_row
from trainers.json_text import Malformed

FORMATS: Mapping[str, Callable[[Row], Row]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "messages": messages,
    "preference-messages": preference_messages,
    "hh": hh,
    "prompt-completion": prompt_completion,
}
"""By the name that a source gives as `format`. Each raises Malformed for a row that is not of the format."""


def seed_row(raw: object, schema: str, name: str | None, columns: Mapping[str, str]) -> Row:
    """A row of a source as a row of ``schema``, its columns renamed and its format converted.

    Raises Malformed, with the format that the row seems to be of if it is another than ``name``.
    """
    row = renamed(raw, columns)
    try:
        return _converted(row, schema, name)
    except Malformed as problem:
        raise Malformed(f"{problem}{_hint(row, schema, name, problem)}") from problem


def renamed(raw: object, columns: Mapping[str, str]) -> Row:
    """A row with what its columns hold under the names that are wanted too.

    Raises Malformed for what is no object, and for one without such a column: what else it has under the wanted name is
    not what was asked for. A column may hold null.
    """
    if not isinstance(raw, dict):
        raise Malformed(f"expected an object, got {type(raw).__name__}")
    for key, column in columns.items():
        if column not in raw:
            raise Malformed(f"column {column!r}, wanted as {key!r}, is missing; this one has {_keys(raw)}")
    return {**raw, **{key: raw[column] for key, column in columns.items()}}


def _converted(row: Row, schema: str, name: str | None) -> Row:
    found = plain_row(FORMATS[name](row) if name else row, schema)
    check_row(found, schema)
    return found


def _fits(row: Row, schema: str, name: str | None) -> bool:
    try:
        _converted(row, schema, name)
    except Malformed:
        return False
    return True


def _hint(row: Row, schema: str, name: str | None, problem: Malformed) -> str:
    """The format that the row is of; else what a row that lacks a key has, for whoever has to write `columns`."""
    if name is not None and _fits(row, schema, None):
        return f"; its keys are right without `format: {name}`"
    for other in FORMATS:
        if other != name and _fits(row, schema, other):
            return f"; its keys are those of `format: {other}`"
    if "is missing" not in str(problem) or not row:
        return ""
    return f"; this one has {_keys(row)} (`columns` renames keys, `format` names a known form)"


def _keys(row: Row) -> str:
    names = [repr(key[:40]) for key in row]
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "no keys"
