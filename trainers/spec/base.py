"""What every setting of a run is: strict keys, immutable, documented; and walks over nested ones."""

import functools
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class SpecModel(BaseModel):
    """Base of everything a user writes: strict keys, immutable, documented by attribute docstrings."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which exactly one is set, as in Kubernetes' unions."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset()
    """Fields that cannot change a result, so that editing them keeps it and the work on it."""

    SHRINKS: ClassVar[frozenset[str]] = frozenset()
    """Fields of which less needs less memory and gives the same result."""

    @model_validator(mode="after")
    def _one_member_of(self) -> Self:
        if self.one_of:
            require_one(self, *self.one_of)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The same rule for the API server, which refuses the run as soon as it is applied."""
        schema = handler(core)
        if cls.one_of:
            names = [to_camel(name) for name in cls.one_of]
            given = ", ".join(f"has(self.{name})" for name in names)
            rule = {"rule": f"[{given}].filter(x, x).size() == 1", "message": f"set exactly one of {', '.join(names)}"}
            handler.resolve_ref_schema(schema)["x-kubernetes-validations"] = [rule]
        return schema

    def document(self, **kwargs: Any) -> dict[str, Any]:
        """The YAML/JSON form: camelCase keys, unset options left out."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True, **kwargs)


def is_address(text: str) -> bool:
    """Whether a path is an address in an object store, such as `s3://bucket/name`."""
    return "://" in text


def members_set(model: BaseModel, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(model, name) is not None]


def require_one(model: SpecModel, *names: str) -> None:
    """Raise ValueError unless exactly one of the fields is set (a Kubernetes-style one-of)."""
    found = members_set(model, names)
    if len(found) != 1:
        wanted = ", ".join(to_camel(name) for name in names)
        got = " and ".join(to_camel(name) for name in found) or "none of them"
        raise ValueError(f"set exactly one of {wanted}; got {got}")


T = TypeVar("T", bound=SpecModel)


def find_models(root: SpecModel, kind: type[T], path: str = "") -> Iterator[tuple[str, T]]:
    """Depth-first walk over a spec, yielding (dotted camelCase path, model) for every instance of ``kind``."""
    for name, alias in _nesting(type(root)):
        yield from _find_in(getattr(root, name), kind, f"{path}.{alias}" if path else alias)


@functools.cache
def _nesting(model: type[SpecModel]) -> tuple[tuple[str, str], ...]:
    """Fields that may hold models, with their names in YAML: a walk over all of them is most of what a look at a run costs."""
    fields = model.model_fields.items()
    return tuple((name, field.alias or name) for name, field in fields if not _is_plain(field.annotation))


def _is_plain(annotation: Any) -> bool:
    """Whether no value of this type can be or hold a model."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal or annotation in (None, type(None), Ellipsis):
        return True
    if inner:
        return all(map(_is_plain, inner))
    return isinstance(annotation, type) and issubclass(annotation, str | int | float | datetime)


def _find_in(value: object, kind: type[T], path: str) -> Iterator[tuple[str, T]]:
    if isinstance(value, kind):
        yield path, value
    if isinstance(value, SpecModel):
        yield from find_models(value, kind, path)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _find_in(item, kind, f"{path}[{i}]")


def identifying(spec: T) -> T:
    """The spec with everything that cannot change a result at its default, at whatever depth it lies."""
    return _rewritten(spec, _without_choice)


def shrunk(spec: T, times: int, kind: type[SpecModel] = SpecModel) -> T:
    """The spec with everything that may shrink to save memory halved so often, down to what its field allows; of parts of
    one kind alone, if asked.
    """

    def halved(model: SpecModel) -> dict[str, object]:
        return {name: _halved(model, name, times) for name in model.SHRINKS} if isinstance(model, kind) else {}

    return _rewritten(spec, halved)


def grown(spec: T, times: int) -> T:
    """The largest that, :func:`shrunk` so often, is this one."""

    def doubled(model: SpecModel) -> dict[str, object]:
        return {name: (getattr(model, name) + 1 << times) - 1 for name in model.SHRINKS}

    return _rewritten(spec, doubled)


def _rewritten(model: T, change: Callable[[SpecModel], dict[str, object]]) -> T:
    """A copy in which every model, at any depth, has the fields that ``change`` gives it."""
    fields = {name: getattr(model, name) for name in type(model).model_fields}
    update = {name: _rewritten_in(value, change) for name, value in fields.items()} | change(model)
    # What stays as it was is not set by that: files that go to other versions have only what is set.
    changed = {name: value for name, value in update.items() if value != fields[name]}
    return model.model_copy(update=changed) if changed else model


def _rewritten_in(value: object, change: Callable[[SpecModel], dict[str, object]]) -> object:
    if isinstance(value, tuple):
        return tuple(_rewritten_in(item, change) for item in value)
    return _rewritten(value, change) if isinstance(value, SpecModel) else value


def _without_choice(model: SpecModel) -> dict[str, object]:
    fields = {name: field for name, field in type(model).model_fields.items() if name in model.NOT_IDENTITY}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def _halved(model: SpecModel, name: str, times: int) -> int:
    lowest = next(m.ge for m in type(model).model_fields[name].metadata if hasattr(m, "ge"))
    value: int = getattr(model, name)
    return max(value >> times, lowest)
