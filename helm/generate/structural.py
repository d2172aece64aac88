"""From pydantic's JSON schema to the structural schema that Kubernetes wants.

An allow-list: a keyword that is not known here is an error with the field's path, because a schema that the API server
silently reads otherwise than pydantic is worse than none.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

DETAILS = re.compile(r"(?<=[.!?]) (?=[A-Z`])|[;:] |, for example")
"""Where a description has said what a field is."""

COPIED = frozenset(
    {
        "type",
        "description",
        "enum",
        "pattern",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "maxProperties",
        "format",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-validations",
    }
)
DROPPED = frozenset(
    {"title", "default", "additionalProperties", "required", "properties", "items", "$ref", "anyOf", "const"}
)
SIGNS = {
    "minimum": ("minimum", ">="),
    "maximum": ("maximum", "<="),
    "exclusiveMinimum": ("minimum", ">"),
    "exclusiveMaximum": ("maximum", "<"),
}
BOUNDS = frozenset(SIGNS)
FORMATS = frozenset({"date-time"})


class NotStructural(TypeError):
    """A model that cannot be a Kubernetes schema."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def structural_schema(model: type[BaseModel], path: str) -> Schema:
    """The model inlined, camelCase, without anything that the API server refuses."""
    document = model.model_json_schema(by_alias=True)
    return _Converter(document.pop("$defs", {})).convert(document, path)


class _Converter:
    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions
        self._open: list[str] = []
        """Definitions being inlined, to notice recursion."""
        self._told: set[str] = set()
        """Definitions that have been inlined with all that is said of their fields."""

    def convert(self, node: Schema, path: str) -> Schema:
        if "$ref" in node:
            return self._reference(node, path)
        if "anyOf" in node:
            return self._either(node, path)
        self._check_keywords(node, path)
        result = {key: node[key] for key in node if key in COPIED}
        result |= _bounds(node) | _constant(node) | _default(node)
        kind = result.get("type")
        if kind == "object":
            result |= self._object(node, path)
        elif kind == "array":
            result |= self._array(node, path)
        elif kind is None and "enum" not in result:
            raise NotStructural(path, "no type; give the field one, or make it a mapping that is kept as it is")
        return result

    def _check_keywords(self, node: Schema, path: str) -> None:
        unknown = set(node) - COPIED - DROPPED - BOUNDS
        if unknown:
            raise NotStructural(path, f"no rule for the keywords {', '.join(sorted(unknown))}")
        if node.get("format") not in (None, *FORMATS):
            raise NotStructural(path, f"no rule for the format {node['format']}")

    def _reference(self, node: Schema, path: str) -> Schema:
        name = node["$ref"].removeprefix("#/$defs/")
        if name in self._open:
            raise NotStructural(path, f"{name} contains itself; Kubernetes has no recursive schemas")
        self._open.append(name)
        inlined = self.convert(self._definitions[name], path)
        self._open.pop()
        if name in self._told:
            inlined = _in_brief(inlined)
        self._told.add(name)
        beside = {key: value for key, value in node.items() if key in ("description",)}
        return _pruned(inlined | beside | _default(node))

    def _either(self, node: Schema, path: str) -> Schema:
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        beside = {key: node[key] for key in node if key in COPIED} | _default(node)
        nullable = {"nullable": True} if len(options) < len(node["anyOf"]) else {}
        if node.get("x-kubernetes-int-or-string"):
            pattern = {"pattern": node["pattern"]} if "pattern" in node else {}
            return {"anyOf": options, "x-kubernetes-int-or-string": True} | pattern | beside | nullable
        if len(options) != 1:
            raise NotStructural(
                path, f"a union of {len(options)} types is not structural; use one optional field per type"
            )
        return _pruned(self.convert(options[0], path) | beside | nullable)

    def _object(self, node: Schema, path: str) -> Schema:
        if "properties" in node:
            properties = {name: self.convert(field, f"{path}.{name}") for name, field in node["properties"].items()}
            required = {"required": sorted(node["required"])} if node.get("required") else {}
            return {"properties": properties} | required
        values = node.get("additionalProperties")
        if isinstance(values, dict) and values:
            return {"additionalProperties": self.convert(values, f"{path}.*")}
        return {"x-kubernetes-preserve-unknown-fields": True}

    def _array(self, node: Schema, path: str) -> Schema:
        if not isinstance(node.get("items"), dict):
            raise NotStructural(path, "items of different types; use a list of one type")
        return {"items": self.convert(node["items"], f"{path}[]")}


def _in_brief(schema: Schema, depth: int = 0) -> Schema:
    """The schema with the beginning of its own fields' descriptions: all is said where its model first occurs.

    A model of data or of a model occurs in dozens of places, and kubectl takes a CRD of at most 256 KiB.
    """
    brief = {key: value for key, value in schema.items() if key != "description"}
    if "description" in schema and depth <= 1:
        brief["description"] = DETAILS.split(schema["description"])[0]
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            brief[name] = _in_brief(schema[name], depth)
    if "properties" in schema:
        brief["properties"] = {name: _in_brief(field, depth + 1) for name, field in schema["properties"].items()}
    return brief


def _bounds(node: Schema) -> Schema:
    """Exclusive bounds are a number in JSON Schema and a flag beside the bound in OpenAPI v3.

    A fractional bound becomes a CEL rule: the API server cuts it to an integer when the value is written as one, so that
    `0` would not be below `0.5`.
    """
    result: Schema = {}
    rules = []
    for key, (bound, sign) in SIGNS.items():
        value = node.get(key)
        if value is not None and float(value).is_integer():
            result |= {bound: value} | ({key: True} if key != bound else {})
        elif value is not None:
            rules.append({"rule": f"self {sign} {value}", "message": f"must be {sign} {value}"})
    return result | ({"x-kubernetes-validations": rules} if rules else {})


def _constant(node: Schema) -> Schema:
    return {"enum": [node["const"]]} if "const" in node else {}


def _pruned(schema: Schema) -> Schema:
    """Its default without what the API server fills in by itself: an empty object gets its fields' own defaults."""
    return schema | {"default": _own_words(schema["default"], schema)} if "default" in schema else schema


def _own_words(value: Any, schema: Schema) -> Any:
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    said = {key: _own_words(inner, fields.get(key, {})) for key, inner in value.items()}
    return {key: inner for key, inner in said.items() if inner != fields.get(key, {}).get("default")}


def _default(node: Schema) -> Schema:
    """`default: null` would mean what absence means."""
    return {"default": node["default"]} if node.get("default") is not None else {}
