"""The CustomResourceDefinition."""

from typing import Any

import yaml

from controller.api import meta
from controller.api.run import RunSpec
from controller.api.status import RunStatus
from generate import NOTICE
from generate.rules import one_member_rule, reference_paths, reference_rule, self_reference_rule, tighten
from generate.structural import DETAILS, Schema, structural_schema

COLUMNS = (
    ("Phase", ".status.phase", "Running phases, or how the run ended"),
    ("Progress", ".status.progress", "Finished phases of all"),
    ("Step", ".status.step", "Step of the running phase"),
    ("Loss", ".status.loss", "Loss of the running phase"),
    ("Tokens/s", ".status.tokensPerSecond", "Throughput of the running phase"),
    ("ETA", ".status.eta", "Estimated time to the end of the running phase"),
)


def crd() -> dict[str, Any]:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{meta.PLURAL}.{meta.GROUP}"},
        "spec": {
            "group": meta.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": meta.KIND,
                "listKind": f"{meta.KIND}List",
                "plural": meta.PLURAL,
                "singular": meta.SINGULAR,
                "shortNames": list(meta.SHORT_NAMES),
                "categories": ["all"],
            },
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    columns = [{"name": n, "type": "string", "jsonPath": p, "description": d} for n, p, d in COLUMNS]
    columns.append({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
    return {
        "name": meta.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": _resource_schema()},
    }


def _resource_schema() -> Schema:
    rules = [
        {
            # What is finished lies there, and nobody would find it at the new place.
            "rule": "!has(oldSelf.status) || !has(oldSelf.status.startedAt) || "
            "(has(self.spec.workspace) == has(oldSelf.spec.workspace) && "
            "(!has(self.spec.workspace) || self.spec.workspace == oldSelf.spec.workspace))",
            "message": "spec.workspace cannot be changed once the run has begun: make a new run",
        },
        {
            "rule": "!has(oldSelf.status) || !has(oldSelf.status.backend) || !has(self.spec.backend) || "
            "self.spec.backend == oldSelf.status.backend",
            "message": "spec.backend cannot be changed once the run has begun: make a new run",
        },
    ]
    return {
        "type": "object",
        "description": "A whole alignment pipeline: applied to a cluster or run on one machine.",
        "required": ["spec"],
        "x-kubernetes-validations": rules,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": meta.RUN_NAME_LENGTH, "pattern": meta.DNS_LABEL},
                },
            },
            "spec": spec_schema(),
            "status": _status_schema(),
        },
    }


def spec_schema() -> Schema:
    """The spec, with what CEL and list types can check on top of the models."""
    schema = _told_once(_described_once(structural_schema(RunSpec, "spec")), set())
    phases = schema["properties"]["phases"] = _left_open(_described_once(schema["properties"]["phases"], IN_PHASES))
    _leave_unset(phases["items"]["properties"]["template"])
    phases |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    for steps in reference_paths():
        tighten(phases["items"], steps, meta.MAX_PHASES, meta.PHASE_NAME_LENGTH)
    phases["x-kubernetes-validations"] = [reference_rule()]
    phases["items"]["x-kubernetes-validations"] = [one_member_rule(), self_reference_rule()]
    return schema


def _leave_unset(template: Schema) -> None:
    """What a phase's template does not say is the run's: a default there would win over it."""
    for field in template["properties"].values():
        field.pop("default", None)


EVERYWHERE = frozenset({"trainOn"})
"""Fields below which nothing is described: every model has a tokenizer's list, and its sources are those of data."""

IN_PHASES = frozenset({"scratch", "rows", "template"})
"""The same within phases: new models and templates are described at the run's own, a benchmark's rows are those of data."""


def _described_once(schema: Schema, fields: frozenset[str] = EVERYWHERE, below: bool = False) -> Schema:
    """Without the texts below some fields, of which there are many copies.

    kubectl keeps the whole in an annotation, which has room for less than all of them.
    """
    kept = {key: value for key, value in schema.items() if not (below and key == "description")}
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = _described_once(kept[name], fields, below)
    if "properties" in kept:
        kept["properties"] = {
            name: _without_texts_below(value) if name in fields and not below else _described_once(value, fields, below)
            for name, value in kept["properties"].items()
        }
    return kept


def _left_open(schema: Schema) -> Schema:
    """What new tokenizers of phases are trained on is checked by the operator alone: a dozen copies of all that data can be."""
    if "items" in schema:
        return schema | {"items": _left_open(schema["items"])}
    if "properties" not in schema:
        return schema
    opened = {name: _left_open(field) for name, field in schema["properties"].items()}
    for name in EVERYWHERE & opened.keys():
        opened[name] = opened[name] | {"items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return schema | {"properties": opened}


def _told_once(schema: Schema, told: set[str]) -> Schema:
    """Texts of fields that all phase types have are whole where they occur first, and begin there alike elsewhere."""
    brief = dict(schema)
    if said := schema.get("description"):
        brief["description"] = DETAILS.split(said)[0] if said in told else said
        told.add(said)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            brief[name] = _told_once(schema[name], told)
    if "properties" in schema:
        brief["properties"] = {name: _told_once(field, told) for name, field in schema["properties"].items()}
    return brief


def _without_texts_below(schema: Schema) -> Schema:
    bare = _described_once(schema, frozenset(), below=True)
    return bare | {"description": schema["description"]} if "description" in schema else bare


def _status_schema() -> Schema:
    schema = _without_defaults(structural_schema(RunStatus, "status"))
    for name, key in (("conditions", "type"), ("phases", "name")):
        schema["properties"][name] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return schema


def _without_defaults(schema: Schema) -> Schema:
    """The server must not add empty fields to a status: `kubectl describe` would show them all."""
    plain = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in plain:
        plain["properties"] = {name: _without_defaults(inner) for name, inner in plain["properties"].items()}
    if isinstance(plain.get("items"), dict):
        plain["items"] = _without_defaults(plain["items"])
    return plain


def crd_yaml() -> str:
    return f"# {NOTICE}\n" + yaml.dump(crd(), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """Without anchors: other tools read the file too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
