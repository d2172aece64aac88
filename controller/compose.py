"""From files and flags to one document: YAML reading, fragments, `--set`. Knows YAML, not what a run means."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from controller.api.problems import InvalidRun, Problem, item_label, nearest
from controller.api.run import MEMBERS
from controller.yaml_text import parse_yaml

Document = dict[str, Any]

LARGEST = 2 * 2**20
"""Bytes of a file: an object of a cluster has 1.5 MB at most."""


def read_document(path: Path) -> Document:
    """The one YAML mapping in a file."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InvalidRun([Problem(str(path), f"larger than {LARGEST:,} bytes; one AlignmentRun is expected")])
        documents = parse_yaml(content.decode())
    except OSError as error:
        raise InvalidRun([Problem(str(path), error.strerror or str(error))]) from error
    except UnicodeDecodeError as error:
        raise InvalidRun([Problem(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})")]) from error
    except yaml.YAMLError as error:
        raise InvalidRun([_syntax_problem(path, error)]) from error
    if len(documents) != 1:
        raise InvalidRun([Problem(str(path), f"holds {len(documents)} YAML documents; one AlignmentRun is expected")])
    if not isinstance(documents[0], dict):
        raise InvalidRun([Problem(str(path), "is not a YAML mapping; one AlignmentRun is expected")])
    return documents[0]


def _syntax_problem(path: Path, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    return Problem(place, "not valid YAML: " + (", ".join(text for text in said if text) or str(error).splitlines()[0]))


def compose(base: Document, fragments: Iterable[Document], settings: Iterable[str] = ()) -> Document:
    """The document with fragments merged in order, then settings applied."""
    document = base
    for fragment in fragments:
        document = merge(document, fragment)
    for setting in settings:
        document = apply_setting(document, setting)
    return document


# ---------------------------------------------------------------- fragments


def merge(base: Any, overlay: Any) -> Any:
    """Merge as Helm merges values: maps deep, lists replace, null deletes; but lists of named items merge by name."""
    if isinstance(base, Mapping) and isinstance(overlay, Mapping):
        return _merge_maps(base, overlay)
    if _named(base) and _named(overlay):
        return _merge_named(base, overlay)
    return _without_nulls(overlay)


def _merge_maps(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Document:
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in overlay.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _without_nulls(value: Any) -> Any:
    """A null in an overlay deletes, also where there is nothing to delete."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return copy.deepcopy(value)


def _named(value: Any) -> bool:
    """A list of maps that all have a name."""
    items = value if isinstance(value, list) else []
    return bool(items) and all(isinstance(item, Mapping) and isinstance(item.get("name"), str) for item in items)


def _merge_named(base: list[Any], overlay: list[Any]) -> list[Any]:
    """Items keep the base's order, new ones follow. A phase whose member is deleted (`{name: ppo, ppo: null}`) is gone."""
    merged = {item["name"]: item for item in base}
    for item in overlay:
        name = item["name"]
        merged[name] = _merge_item(merged[name], item) if name in merged else _without_nulls(item)
        if _members(item) and not _members(merged[name]):
            del merged[name]
    return list(merged.values())


def _merge_item(before: Mapping[str, Any], item: Mapping[str, Any]) -> Document:
    """A phase given another type loses the settings of its old one."""
    wanted = [member for member in _members(item) if item[member] is not None]
    kept = {key: value for key, value in before.items() if not (wanted and key in MEMBERS and key not in wanted)}
    return _merge_maps(kept, item)


def _members(item: Mapping[str, Any]) -> list[str]:
    return [member for member in MEMBERS if member in item]


# ---------------------------------------------------------------- --set


def apply_setting(document: Document, setting: str) -> Document:
    """`spec.phases.dpo.dpo.beta=0.2`: list items go by name or index, the value is YAML, null deletes."""
    path, separator, text = setting.partition("=")
    if not separator or not path:
        raise InvalidRun([Problem(f"--set {setting}", "expected PATH=VALUE, for example spec.seed=1")])
    try:
        (value,) = parse_yaml(text) if text.strip() else (None,)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidRun([Problem(f"--set {setting}", "the value is not valid YAML")]) from error
    result = copy.deepcopy(document)
    _assign(result, _split(path), value, f"--set {path}")
    return result


def _split(path: str) -> list[str]:
    """Split at dots; `\\.` is a dot in a key, `phases[dpo]` is `phases.dpo`."""
    dotted = re.sub(r"\[([^\]]*)\]", r".\1", path)
    return [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", dotted)]


def _assign(document: Any, path: list[str], value: Any, shown: str) -> None:
    for part in path[:-1]:
        document = _descend(document, part, shown)
    key: Any = _key(document, path[-1], shown)
    if value is None:
        _delete(document, key)
    else:
        document[key] = value


def _descend(document: Any, part: str, shown: str) -> Any:
    key = _key(document, part, shown)
    if isinstance(document, dict) and document.get(key) is None:
        document[key] = {}
    inner = document[key]
    if not isinstance(inner, dict | list):
        raise InvalidRun([Problem(shown, f"{part} is {inner!r}, which has no fields")])
    return inner


def _key(document: Any, part: str, shown: str) -> Any:
    if isinstance(document, dict):
        return part
    labels = [item_label(item, i) for i, item in enumerate(document)]
    if part in labels:
        return labels.index(part)
    if part.isdigit() and int(part) < len(labels):
        return int(part)
    raise InvalidRun(
        [Problem(shown, f"no item {part} in the list; items are {', '.join(labels)}{nearest(part, labels)}")]
    )


def _delete(document: Any, key: Any) -> None:
    if isinstance(document, dict):
        document.pop(key, None)
    else:
        del document[key]
