"""YAML as users write it: safe, with what Kubernetes could not hold either refused by line before it is built."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from trainers.json_text import MAX_NESTING

MOST_VALUES = 100_000
"""Of a document, after aliases: ten lines of them can mean a billion values."""

_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BaseLoader):
    """Safe loading with corrections: `1e-4` is a number, as in JSON and on a cluster, and a key given twice is an error.

    So is a number that fits in no 64 bits, and what only looks like a date.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            found = super().construct_object(node, deep=deep)
        except (ValueError, OverflowError) as error:
            raise _error(f"{_shown(node)} cannot be read ({error})", node.start_mark) from error
        if isinstance(found, int) and found.bit_length() > 64:
            raise _error(f"the number {_shown(node)} is too large", node.start_mark)
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if key_node.tag != "tag:yaml.org,2002:merge" else None
            if not isinstance(key, Hashable):
                raise _error("a key must be a text, not a list or mapping", key_node.start_mark)
            if key is not None and key in seen:
                raise _error(f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
# Tried after YAML 1.1's own integers and floats, which know no exponent without a dot.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> list[Any]:
    """The documents in a text. Raises YAMLError, with a mark for the place.

    What an alias stands for is there as often as it is named: a setting of one phase had been set in all that shared its anchor.
    """
    _check(text)
    return [_tree(document) for document in yaml.load_all(text, Loader=_Loader)]


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tree(inner) for key, inner in value.items()}
    return [_tree(inner) for inner in value] if isinstance(value, list) else value


def _check(text: str) -> None:
    """Refuse by its events what cannot be built: libyaml's own recursion ends the process, without a word."""
    open_: list[tuple[str | None, int]] = []  # anchor, and values before it, of what is not closed yet
    sizes: dict[str, int] = {}
    values = 0
    for event in yaml.parse(text, Loader=_BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_):
                raise _error(f"*{event.anchor} stands inside what it means", event.start_mark)
            values += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            sizes |= {anchor: values - before} if anchor else {}
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, values - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        if len(open_) > MAX_NESTING:
            raise _error(f"nested deeper than {MAX_NESTING} levels", event.start_mark)
        if values > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES:,} values, counting what aliases stand for", event.start_mark)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _shown(node: Any) -> str:
    text = str(node.value)
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
