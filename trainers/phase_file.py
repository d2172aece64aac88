"""Reading a phase file and the spec in it. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainers import __version__
from trainers.contract import BadInput, PhaseFile, PhaseType


def read_phase_file(path: Path, kind: PhaseType, changes: Iterable[tuple[str, object]]) -> PhaseFile:
    document: Any = None
    try:
        document = _parsed(path.read_text())
        for dotted, value in changes:
            set_at(document["spec"], dotted, value)
        file = PhaseFile.model_validate(document)
    except (ValidationError, KeyError, TypeError) as error:
        version = document.get("version") if isinstance(document, dict) else ""
        raise BadInput(f"phase file {path}: {_first_problem(error)}{_versions(version)}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # also a date or number that is none
        raise BadInput(f"phase file {path}: {' '.join(str(error).split())}") from error
    return file if file.phase else file.model_copy(update={"phase": kind.name})


def parse_spec(kind: PhaseType, file: PhaseFile) -> Any:
    try:
        return kind.spec.model_validate(file.spec)
    except ValidationError as error:
        raise BadInput(f"{kind.name}: {_first_problem(error)}{_versions(file.version)}") from error


def _parsed(text: str) -> Any:
    """JSON as it is written: YAML would take `1e-05` for a text."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def _versions(writer: object) -> str:
    """What another version wrote may be unknown here, or may have been known here once."""
    if writer in (None, "", __version__):
        return ""
    return (
        f"; this trainer is version {__version__}, the phase file was written by version {str(writer)[:40]}: "
        "use an image of that version, or leave the setting out"
    )


OF_LISTS = {
    "tuple_type": "Input should be a list",
    "too_short": "It has {actual_length} items, and {min_length} or more belong there",
    "too_long": "It has {actual_length} items, and {max_length} or fewer belong there",
}
"""Kinds of errors for which pydantic speaks of tuples, which neither YAML nor JSON has."""


def in_words(detail: ErrorDetails) -> str:
    """What pydantic says of a value."""
    said = OF_LISTS.get(detail["type"])
    return detail["msg"] if said is None else said.format(**detail.get("ctx", {}))


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if not first["loc"]:  # of settings that do not go together: the message has all that matters
        return first["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {in_words(first)} (got {str(first['input'])[:80]!r})"


def set_at(document: Any, path: str, value: object) -> None:
    """Set what lies at a dotted path such as `data.train[0].limit` or `data.train.0.limit`."""
    *way, last = path.replace("[", ".").replace("]", "").split(".")
    for part in way:
        document = document[int(part)] if isinstance(document, list) else document.setdefault(part, {})
    document[last] = value
