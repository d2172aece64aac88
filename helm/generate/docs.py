"""Reference pages: every field of a run, and every metric."""

import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from controller.api.quantities import Quantity
from controller.api.run import AlignmentRun, FailurePolicy, ObjectMeta, PhaseEntry, RunSpec
from controller.api.template import Template
from controller.operator import metrics as operator_metrics
from generate import NOTICE
from trainers.metrics import METRICS, MetricDef
from trainers.phases import REGISTRY
from trainers.spec import PhaseSpec, SpecModel

INTRODUCTION = """\
# AlignmentRun

One YAML document describes a whole pipeline. `alignctl run FILE` runs it on one machine, `kubectl apply -f FILE` on a
cluster. Unknown fields are errors. `{phase: NAME}` refers to what another phase of the run leaves, and makes this phase
wait for it.
"""


def run_page() -> str:
    """docs/reference/alignmentrun.md."""
    parts = [f"<!-- {NOTICE} -->\n", INTRODUCTION]
    parts += [
        _section("Top level", AlignmentRun, skip=("status",)),
        _section("metadata", ObjectMeta),
        _section("spec", RunSpec),
    ]
    parts.append(_phases_section())
    told: set[type[BaseModel]] = {AlignmentRun, ObjectMeta, RunSpec}
    for entry in REGISTRY:
        parts.append(_section(f"spec.phases[].{entry.name}", entry.spec, note=f"Leaves: {entry.produces}."))
        told.add(entry.spec)
    shared = _reachable([FailurePolicy, Template, RunSpec, *(entry.spec for entry in REGISTRY)], told)
    parts += [_section(model.__name__, model) for model in shared]
    return "\n".join(parts)


def _phases_section() -> str:
    fields = PhaseEntry.model_fields
    rows = [_row(name, field) for name, field in fields.items()]
    rows += [f"| `{e.name}` | [{e.spec.__name__}](#specphases{e.name}) | | {_first_line(e.spec)} |" for e in REGISTRY]
    return _table("spec.phases[]", "One phase: a name, and exactly one member that says the type.", rows)


def _section(title: str, model: type[BaseModel], skip: tuple[str, ...] = (), note: str = "") -> str:
    rows = [_row(field.alias or name, field) for name, field in model.model_fields.items() if name not in skip]
    return _table(title, " ".join(text for text in (_doc(model), note) if text), rows)


def _table(title: str, text: str, rows: list[str]) -> str:
    lines = [f"## {title}", "", *([text, ""] if text else [])]
    return "\n".join([*lines, "| field | type | default | |", "| --- | --- | --- | --- |", *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    description = (field.description or "").replace("\n", " ").replace("|", r"\|")
    return f"| `{field.alias or name}` | {_type(field.annotation)} | {_default(field)} | {description} |"


def _doc(model: type[BaseModel]) -> str:
    own = model.__dict__.get("__doc__") or ""
    return " ".join(own.split())


def _first_line(model: type[BaseModel]) -> str:
    return _doc(model).replace("|", r"\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=False)
    if value is None:
        return ""
    if isinstance(value, SpecModel):
        set_fields = value.document(exclude_defaults=True)
        return f"`{set_fields}`".replace("'", "") if set_fields else ""
    if isinstance(value, tuple | list | dict):
        return f"`{list(value) if not isinstance(value, dict) else value}`".replace("'", "") if value else ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:  # noqa: PLR0911 -- one line per kind of type
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"map of {_type(arguments[1])}"
    if origin is typing.Annotated:
        return "quantity" if annotation == Quantity else _type(arguments[0])
    options = [a for a in arguments if a is not type(None) and a is not ...]
    if options:
        return " or ".join(_type(option) for option in options)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.__name__
        return "[phase](#specphases)" if issubclass(annotation, PhaseEntry) else f"[{name}](#{name.lower()})"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(annotation, "any value")


def _reachable(roots: list[type[BaseModel]], told: set[type[BaseModel]]) -> list[type[BaseModel]]:
    """Models that fields lead to, by name; what has a section of its own is left out."""
    found: dict[str, type[BaseModel]] = {}
    queue = list(roots)
    while queue:
        model = queue.pop()
        for inner in _models_in_fields(model):
            if inner.__name__ not in found and inner not in told and not issubclass(inner, PhaseEntry | PhaseSpec):
                found[inner.__name__] = inner
                queue.append(inner)
    return [found[name] for name in sorted(found)]


def _models_in_fields(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        yield from _models_in(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


# ---------------------------------------------------------------- metrics


def metrics_page() -> str:
    """docs/reference/metrics.md."""
    lines = [
        f"<!-- {NOTICE} -->",
        "",
        "# Metrics",
        "",
        "Every rank of a phase serves these under `/metrics`. All carry the labels `run`, `phase`, `type` and `rank`.",
        "",
        "| name | kind | further labels | |",
        "| --- | --- | --- | --- |",
        *map(_metric_row, METRICS),
        "",
        "The operator serves these under `/metrics` on its port 8080.",
        "",
        "| name | kind | labels | |",
        "| --- | --- | --- | --- |",
        *map(_metric_row, operator_metrics.METRICS),
    ]
    return "\n".join(lines) + "\n"


def _metric_row(metric: MetricDef) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"
