"""Rotary angles that transformers changes with the longest row of a batch: `longrope` (Phi-3's), `dynamic`.

A row's scores would hang on the rows beside it, and keys that are kept on tokens still to come. So models are read with the
angles of short rows, which are transformers' own up to so many positions, and have no more than these.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def same_angles(config: Mapping[str, Any]) -> int | None:
    """Positions up to which rows of any length have the same angles; None: there are no others."""
    return min((limit for rope in _ropes(config) if (limit := _limit(config, rope)) is not None), default=None)


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One, or one for each kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    yield from (part for part in (found, *found.values()) if isinstance(part, Mapping))


def _limit(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int | None:
    kind = rope.get("rope_type") or rope.get("type")
    whole: int | None = config.get("max_position_embeddings")
    if kind == "dynamic":
        return whole
    if kind not in ("longrope", "su") or rope.get("short_factor") == rope.get("long_factor"):
        return None
    return config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or whole
