"""Reading conditions, which all objects of Kubernetes have alike."""

from collections.abc import Mapping
from typing import Any

Object = Mapping[str, Any]


def condition(thing: Object, kind: str) -> Object:
    """Empty if it has none of this kind."""
    found = thing.get("status", {}).get("conditions") or ()
    return next((c for c in found if c["type"] == kind), {})
