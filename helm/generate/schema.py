"""JSON schemas for editors: for a whole run, and for fragments, in which nothing is required."""

import json
from typing import Any

from controller.api.run import AlignmentRun
from generate import NOTICE

Schema = dict[str, Any]


def run_schema() -> Schema:
    schema = AlignmentRun.model_json_schema(by_alias=True)
    schema["properties"].pop("status")
    return {"$comment": NOTICE, "$schema": "https://json-schema.org/draft/2020-12/schema", **_without_unused(schema)}


def fragment_schema() -> Schema:
    """Any part of a run; a null deletes what an earlier document set. List items are named, where they have names."""
    schema = _partial(run_schema())
    return {**schema, "title": "Fragment of an AlignmentRun"}


def _partial(node: Any) -> Any:
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _partial(value) for key, value in node.items() if key not in ("required", "minItems")}
    if isinstance(node.get("properties"), dict):
        result["properties"] = {name: _or_null(_partial(field)) for name, field in node["properties"].items()}
    return result


def _or_null(field: Schema) -> Schema:
    beside: Schema = {key: field[key] for key in ("description", "title") if key in field}
    return {**beside, "anyOf": [field, {"type": "null"}]}


def _without_unused(schema: Schema) -> Schema:
    """Definitions that only the status used."""
    definitions = schema.pop("$defs")
    used: set[str] = set()
    queue = [schema]
    while queue:
        text = json.dumps(queue.pop())
        names = {name for name in definitions if f'"#/$defs/{name}"' in text} - used
        used |= names
        queue += [definitions[name] for name in names]
    return {**schema, "$defs": {name: definitions[name] for name in sorted(used)}}


def schema_json(schema: Schema) -> str:
    # The notice has to be in the first line, so the document cannot begin with a lone brace.
    return "{" + json.dumps(schema, indent=1, ensure_ascii=False).removeprefix("{").lstrip() + "\n"
