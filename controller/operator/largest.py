"""The largest runs that whoever installs the operator allows, by namespace."""

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from controller.backends.cluster.settings import LargestRuns


class BadLargest(ValueError):
    """The message names the option, its value and what would be right."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Limit:
    namespaces: list[str]
    most: dict[str, int]


LIMITS = TypeAdapter(list[Limit])


def largest_runs(text: str | None) -> LargestRuns:
    """Where several are about one namespace, all hold."""
    found: dict[str, dict[str, int]] = {}
    for limit in _read(text) if text else ():
        for namespace in limit.namespaces:
            known = found.setdefault(namespace, {})
            known |= {what: min(most, known.get(what, most)) for what, most in limit.most.items()}
    return found


def _read(text: str) -> list[Limit]:
    try:
        return LIMITS.validate_json(text)
    except ValidationError as error:
        wanted = '[{"namespaces": ["a"], "most": {"nodes": 8, "nvidia.com/gpu": 64}}]'
        raise BadLargest(f"--largest-runs {text}: is no JSON list as {wanted}") from error
