"""What is wrong with a run, one line each: the field's path, the value, and what would be right."""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from controller.api.meta import DNS_LABEL
from controller.api.quantities import QUANTITY
from trainers.phase_file import in_words

Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Problem:
    path: str
    """Where, in the run's own spelling: `spec.phases[dpo].dpo.beta`."""
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidRun(ValueError):
    """A run that cannot be used; carries every problem, not just the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if no known word is close."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def from_validation(error: ValidationError, model: type[BaseModel], document: object) -> list[Problem]:
    """pydantic's errors in our words."""
    return [
        Problem(yaml_path(detail["loc"], document), _message(detail, model))
        for detail in error.errors()
        if not _follows_from_another(detail)
    ]


def _follows_from_another(detail: ErrorDetails) -> bool:
    """pydantic also calls a list too short when its items are bad."""
    return detail["type"] == "too_short" and bool(detail["input"])


def yaml_path(location: Sequence[int | str], document: object) -> str:
    """`spec.phases[dpo].dpo.beta`: list items go by name if they have one, else by index."""
    path, here = "", document
    for part in location:
        if isinstance(part, int) and isinstance(here, list):
            here = here[part] if part < len(here) else None
            path += f"[{item_label(here, part)}]"
        else:
            here = here.get(part) if isinstance(here, dict) else None
            path += f".{part}" if path else str(part)
    return path


def item_label(item: object, index: int) -> str:
    name = item.get("name") if isinstance(item, dict) else None
    return name if isinstance(name, str) and name else str(index)


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:  # noqa: PLR0911 -- one line per kind of error
    kind, context, value = detail["type"], detail.get("ctx", {}), shown(detail["input"])
    if kind == "extra_forbidden":
        return _unknown_field(detail["loc"], model)
    if kind == "missing":
        return "is required and not set"
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch" and context.get("pattern") == DNS_LABEL:
        return f"{value} is not a name: use lower-case letters, digits and '-', beginning and ending with a letter or digit"
    if kind == "string_pattern_mismatch" and context.get("pattern") == QUANTITY:
        return f"{value} is not a quantity: a number, and a unit such as m, k, M, G, Ki, Mi or Gi behind it (80Gi)"
    if kind in ("literal_error", "enum"):
        return f"{value} is not one of {context['expected']}" + _nearest_literal(detail)
    if detail["input"] is None:
        return f"is empty; {_lower(in_words(detail))}"
    return f"{value}: {_lower(in_words(detail))}"


def _nearest_literal(detail: ErrorDetails) -> str:
    expected = str(detail.get("ctx", {})["expected"]).replace(" or ", ", ")
    return nearest(str(detail["input"]), [word.strip("' ") for word in expected.split(",")])


def _unknown_field(location: Sequence[int | str], model: type[BaseModel]) -> str:
    known = field_names(model, location[:-1])
    name = str(location[-1])
    if close := nearest(name, known):
        return f"no such field{close}"
    return f"no such field; fields here are {', '.join(known)}" if known else "no such field"


def field_names(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names that the object at this place can have, in YAML's spelling."""
    here: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        fields = here.model_fields if here is not None else {}
        here = next((_model_in(f.annotation) for name, f in fields.items() if part in (f.alias or name, name)), None)
    return [field.alias or name for name, field in here.model_fields.items()] if here is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X`, `X | None`, `tuple[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for inner in typing.get_args(annotation):
        if (found := _model_in(inner)) is not None:
            return found
    return None


def shown(value: object) -> str:
    """A value as a message has it: texts in quotes, and not too long."""
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    # By identity: 0 == False, and a batch size of 0 must not be shown as false.
    return next(
        (word for word, thing in (("true", True), ("false", False), ("null", None)) if value is thing), str(value)
    )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].removesuffix(".")
