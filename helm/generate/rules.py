"""CEL rules: what the API server itself can know to be wrong with a run."""

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from controller.api.run import MEMBERS
from trainers.phases import REGISTRY
from trainers.spec import ArtifactRef, SpecModel

Rule = dict[str, str]
Schema = dict[str, Any]


RESERVED = frozenset(
    {
        "as",
        "break",
        "const",
        "continue",
        "else",
        "false",
        "for",
        "function",
        "if",
        "import",
        "in",
        "let",
        "loop",
        "namespace",
        "null",
        "package",
        "return",
        "true",
        "var",
        "void",
        "while",
    }
)


def _field(name: str) -> str:
    """A field's name in CEL: words of the language itself are escaped, else the type of what they name is unknown."""
    return f"__{name}__" if name in RESERVED else name


def one_member_rule() -> Rule:
    members = ", ".join(f"has(self.{_field(name)})" for name in MEMBERS)
    return {
        "rule": f"[{members}].filter(x, x).size() == 1",
        "message": f"a phase has exactly one of {', '.join(MEMBERS)}",
    }


def self_reference_rule() -> Rule:
    """On an entry: no reference names the entry itself."""
    rule, told = _of_references("self", lambda ref: f"{ref} != self.name")
    said = ".phase: a phase cannot refer to itself"
    return {"rule": rule, "messageExpression": _first(told, said), "message": f"a reference{said}"}


def reference_rule() -> Rule:
    """On the list of entries: every reference names one of them. The names are put together once for all."""
    rule, told = _of_references("p", lambda ref: f"{ref} in names")
    said, names = ".phase: not a phase of this run", "[self.map(q, q.name)]"
    told = [(f"self.all(p, {test.replace(' in names', ' in self.map(q, q.name)')})", path) for test, path in told]
    return {
        "rule": f"{names}.all(names, self.all(p, {rule}))",
        "messageExpression": _first(told, said),
        "message": f"a reference{said}",
    }


def _of_references(root: str, test: typing.Callable[[str], str]) -> tuple[str, list[tuple[str, str]]]:
    """Whether all references of an entry hold, and each by itself with its path, to tell which do not.

    In one rule: the API server evaluates all rules of the spec with every write of the status, and to begin takes it longer
    than what is evaluated. Its messages are worked out where it fails.
    """
    by_type: dict[str, list[str]] = {}
    for kind, *steps in reference_paths():
        by_type.setdefault(_field(kind), []).append(f"({_expression(tuple(steps), f'{root}.{_field(kind)}', test)})")
    ladder = "".join(f"has({root}.{kind}) ? {' && '.join(found)} : " for kind, found in by_type.items())
    return f"{ladder}true", [(_expression(steps, root, test), ".".join(steps)) for steps in reference_paths()]


def _first(tests: list[tuple[str, str]], said: str) -> str:
    """What is said of the first that does not hold."""
    ladder = "".join(f"!({test}) ? '{path}' : " for test, path in tests)
    return f"({ladder}'a reference') + '{said}'"


def reference_paths() -> Iterator[tuple[str, ...]]:
    """`(dpo, policy)`, `(evaluate, models[])`: every place in a phase entry that can hold `{phase: NAME}`."""
    for entry in REGISTRY:
        yield from _paths(entry.spec, (entry.name,))


def _paths(model: type[BaseModel], steps: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        inner, many = _model_of(field.annotation)
        if inner is None:
            continue
        here = (*steps, (field.alias or name) + ("[]" if many else ""))
        if issubclass(inner, ArtifactRef):
            yield here
        elif issubclass(inner, SpecModel):
            yield from _paths(inner, here)


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """(model, whether there is a list of them) for `X`, `X | None` and `tuple[X, ...]`."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return (annotation if issubclass(annotation, BaseModel) else None), False
    many = typing.get_origin(annotation) in (tuple, list)
    for argument in typing.get_args(annotation):
        found, inner_many = _model_of(argument)
        if found is not None:
            return found, many or inner_many
    return None, False


def _expression(steps: tuple[str, ...], root: str, test: typing.Callable[[str], str], depth: int = 0) -> str:
    """True unless the reference is there and fails the test. Absent objects on the way are fine."""
    if not steps:
        return f"!has({root}.phase) || {test(f'{root}.phase')}"
    step, rest = steps[0].removesuffix("[]"), steps[1:]
    place = f"{root}.{_field(step)}"
    if steps[0].endswith("[]"):
        item = f"i{depth}"
        inner = f"{place}.all({item}, {_expression(rest, item, test, depth + 1)})"
    else:
        inner = _expression(rest, place, test, depth)
    return f"!has({place}) || ({inner})"


def tighten(schema: Schema, steps: tuple[str, ...], max_items: int, max_length: int) -> None:
    """Bound the lists and names that a rule walks over: the API server weighs rules by the longest possible input."""
    here = schema
    for step in steps:
        here = here["properties"][step.removesuffix("[]")]
        if step.endswith("[]"):
            here["maxItems"] = min(here.get("maxItems", max_items), max_items)
            here = here["items"]
    here["properties"]["phase"]["maxLength"] = max_length
