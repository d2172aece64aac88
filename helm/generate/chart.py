"""The chart's README and values.schema.json, both from values.yaml: a comment above each value describes it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controller.api.backend import BackendName
from controller.api.quantities import QUANTITY
from controller.api.template import LARGEST_ID
from generate import NOTICE

Schema = dict[str, Any]

QUALIFIED = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
"""Names of labels and annotations."""
STRINGS: Schema = {
    "type": "object",
    "patternProperties": {QUALIFIED: {"type": "string"}},
    "additionalProperties": False,
}
LABEL: Schema = {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
LABELS: Schema = {"type": "object", "patternProperties": {QUALIFIED: LABEL}, "additionalProperties": False}
FREE: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", "maxLength": 253}
LABEL_NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION: Schema = {"type": "string", "pattern": "^(([0-9]+)(ms|[smhdwy]))*$"}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
# Neither a tag nor a registry: each has a value of its own.
REPOSITORY: Schema = {"type": "string", "pattern": "^[a-z0-9]+([._/-]+[a-z0-9]+)*$"}
# An address of registry and folder, as in an image's name, so without https://.
REGISTRY: Schema = {
    "type": "string",
    "pattern": "^([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?)?$",
}
TAG: Schema = {"type": "string", "pattern": "^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$"}
QUANTITIES: Schema = {
    "type": "object",
    "patternProperties": {
        "^(cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMG]i|[a-z0-9.-]+/[A-Za-z0-9._-]+)$": {
            "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": QUANTITY}]
        }
    },
    "additionalProperties": False,
}
ENV: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "value": {"type": "string"}, "valueFrom": FREE},
        "additionalProperties": False,
    },
}

SELECTOR: Schema = {
    "type": "object",
    "properties": {
        "matchLabels": LABELS,
        "matchExpressions": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["key", "operator"],
                "properties": {
                    "key": {"type": "string", "pattern": QUALIFIED},
                    "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
                    "values": {"type": "array", "items": LABEL},
                },
                "additionalProperties": False,
                "if": {"properties": {"operator": {"enum": ["In", "NotIn"]}}},
                "then": {"required": ["values"], "properties": {"values": {"minItems": 1}}},
                "else": {"properties": {"values": {"maxItems": 0}}},
            },
        },
    },
    "additionalProperties": False,
}
NETWORK: Schema = {"type": "string", "pattern": "^[0-9A-Fa-f.:]+/[0-9]{1,3}$"}
PEERS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "minProperties": 1,
        "properties": {
            "podSelector": SELECTOR,
            "namespaceSelector": SELECTOR,
            "ipBlock": {
                "type": "object",
                "required": ["cidr"],
                "properties": {"cidr": NETWORK, "except": {"type": "array", "items": NETWORK}},
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
        # Whoever is known by an address is not selected.
        "dependencies": {"ipBlock": {"maxProperties": 1}},
    },
}
"""As a NetworkPolicy has them."""

ALLOWED: Schema = {
    "type": "array",
    "uniqueItems": True,
    "items": {"type": "string", "pattern": r"^[^\s*]*\*?$", "minLength": 1},
}
LARGEST_RUN: Schema = {
    "type": "object",
    "minProperties": 1,
    "properties": {"nodes": {"type": "integer", "minimum": 1}},
    # Devices are whole, and a pod that names none has none.
    "patternProperties": {QUALIFIED.replace("/)?", "/)"): {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}
LIMITS: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {**LABEL_NAME, "maxLength": 40},
        "namespaces": {"type": "array", "uniqueItems": True, "minItems": 1, "items": LABEL_NAME},
        "namespaceSelector": FREE,
        **dict.fromkeys(("images", "serviceAccounts", "claims", "secrets", "queues"), ALLOWED),
        "nodeSelector": {"type": "object", "patternProperties": {QUALIFIED: ALLOWED}, "additionalProperties": False},
        "maxNodes": {"type": "integer", "minimum": 1},
        "largestRun": LARGEST_RUN,
    },
    "oneOf": [{"required": ["namespaces"]}, {"required": ["namespaceSelector"]}],
    "additionalProperties": False,
}

RULES: dict[str, Schema] = {
    "limits": {"type": "array", "items": LIMITS},
    "imagePullSecrets": {
        "type": "array",
        "items": {"type": "object", "required": ["name"], "properties": {"name": NAME}, "additionalProperties": False},
    },
    **dict.fromkeys(("labels", "commonLabels", "podLabels", "nodeSelector"), LABELS),
    **dict.fromkeys(("annotations", "podAnnotations", "deploymentAnnotations"), STRINGS),
    **dict.fromkeys(("imageRegistry", "registry"), REGISTRY),
    **{
        key: {**LABEL_NAME, "pattern": f"^$|{LABEL_NAME['pattern']}"}
        for key in ("nameOverride", "fullnameOverride", "queue")
    },
    **dict.fromkeys(("podSecurityContext", "securityContext", "affinity", "run"), FREE),
    "resources": {
        "type": "object",
        "properties": dict.fromkeys(("requests", "limits"), QUANTITIES) | {"claims": OBJECTS},
        "additionalProperties": False,
    },
    **dict.fromkeys(("tolerations", "topologySpreadConstraints", "relabelings", "metricRelabelings"), OBJECTS),
    **dict.fromkeys(("from", "metricsFrom"), PEERS),
    **dict.fromkeys(("interval", "scrapeTimeout"), DURATION),
    **dict.fromkeys(("workspaceClaim", "priorityClassName", "namespace", "storageClassName"), NAME),
    "image.repository": REPOSITORY,
    # Empty: there is no default.
    "trainerImage.repository": {**REPOSITORY, "pattern": f"^$|{REPOSITORY['pattern']}"},
    "tag": TAG,
    "userID": {"type": "integer", "minimum": 0, "maximum": LARGEST_ID},
    "runbooks": {"type": "string", "pattern": "^(https?://.+)?$"},
    "digest": DIGEST,
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "watchNamespaces": {"type": "array", "uniqueItems": True, "items": LABEL_NAME},
    "backend": {"enum": [str(name) for name in BackendName]},
    "logFormat": {"enum": ["json", "text"]},
    "logLevel": {"enum": ["debug", "info", "warning", "error"]},
    "workers": {"type": "integer", "minimum": 1},
    "watchdogSeconds": {"type": "number", "exclusiveMinimum": 0},
    "extraEnv": ENV,
    "replicaCount": {"type": "integer", "minimum": 0},
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 0},
    "maxUnavailable": {
        "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^([0-9]|[1-9][0-9]|100)%$"}]
    },
    "apiServerPorts": {"type": "array", "minItems": 1, "items": PORT},
    "timeoutSeconds": {"type": "integer", "minimum": 1},
    "size": {"type": "string", "pattern": QUANTITY},
    "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
}
"""By the value's name, or its last two names where one is ambiguous. Others have the type of their default."""

PLACEHOLDER: Schema = {
    "enabled": {"type": "boolean", "description": "Not used here: for charts of which this one is a part."}
}


class Undocumented(Exception):
    """A value without a comment above it, or without a type."""


@dataclass
class Value:
    path: str
    description: str
    default: Any
    members: list["Value"] = field(default_factory=list)
    """Of a group; a map that is documented as a whole has none."""


def read_values(text: str) -> list[Value]:
    """Raises Undocumented."""
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return _members(root, yaml.safe_load(text), text.splitlines(), "")


def _members(node: yaml.MappingNode, defaults: dict[str, Any], lines: list[str], prefix: str) -> list[Value]:
    found = []
    for key, inner in node.value:
        path, default = f"{prefix}{key.value}", defaults[key.value]
        value = Value(path, _comment(lines, key.start_mark.line), default)
        if not value.description:
            raise Undocumented(f"values.yaml, line {key.start_mark.line + 1}: {path} has no description above it")
        if isinstance(inner, yaml.MappingNode) and _is_group(inner, lines):
            value.members = _members(inner, default, lines, f"{path}.")
        found.append(value)
    return found


def _is_group(node: yaml.MappingNode, lines: list[str]) -> bool:
    return not node.flow_style and any(_comment(lines, key.start_mark.line) for key, _ in node.value)


def _comment(lines: list[str], line: int) -> str:
    """The block of comment lines right above."""
    block: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].lstrip().removeprefix("#").strip())
    return " ".join(block)


# ---------------------------------------------------------------- the schema


def values_schema(values: list[Value]) -> str:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "$comment": NOTICE, **_group(values)}
    schema["properties"] |= PLACEHOLDER
    # Charts around this one put theirs there too.
    schema["properties"]["global"]["additionalProperties"] = True
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _group(values: list[Value]) -> Schema:
    return {
        "type": "object",
        "properties": {
            value.path.rpartition(".")[2]: {"description": value.description, **_schema_of(value)} for value in values
        },
        "additionalProperties": False,
    }


def _schema_of(value: Value) -> Schema:
    if value.members:
        return _group(value.members)
    names = value.path.split(".")
    for key in (".".join(names[-2:]), names[-1]):
        if key in RULES:
            return RULES[key]
    for kind, name in ((bool, "boolean"), (int, "integer"), (str, "string")):
        if isinstance(value.default, kind):
            return {"type": name}
    raise Undocumented(f"values.yaml: {value.path} needs an entry in {__name__}.RULES")


# ---------------------------------------------------------------- the README


def readme(template: str, values: list[Value]) -> str:
    return template.replace("{{ notice }}", NOTICE).replace("{{ values }}", "\n".join(_table(values)))


def _table(values: list[Value]) -> Iterator[str]:
    yield from ("| value | default | |", "| --- | --- | --- |")
    yield from (_row(value) for value in values if not value.members)
    for group in values:
        if group.members:
            yield from ("", f"### {group.path}", "", group.description, "")
            yield from ("| value | default | |", "| --- | --- | --- |", *_rows(group.members))


def _rows(values: list[Value]) -> Iterator[str]:
    for value in values:
        yield _row(value)
        yield from _rows(value.members)


def _row(value: Value) -> str:
    default = "" if value.members else f"`{json.dumps(value.default)}`"
    return f"| `{value.path}` | {default} | {value.description} |".replace("\\", "\\\\")


def chart_files(root: Path) -> dict[str, str]:
    """Path below the chart to content."""
    values = read_values((root / "values.yaml").read_text())
    return {
        "values.schema.json": values_schema(values),
        "README.md": readme((root / "README.md.tmpl").read_text(), values),
    }
