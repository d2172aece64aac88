"""Kubernetes quantities: as users write them, and as numbers."""

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, StringConstraints, WithJsonSchema

QUANTITY = r"^[0-9]+(\.[0-9]*)?([KMGTPE]i|[numkMGTPE]|[eE][0-9]+)?$"


def _written(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Quantity = Annotated[
    str,
    BeforeValidator(_written),
    StringConstraints(pattern=QUANTITY),
    WithJsonSchema(
        {"anyOf": [{"type": "integer"}, {"type": "string"}], "pattern": QUANTITY, "x-kubernetes-int-or-string": True}
    ),
]
"""A Kubernetes quantity: `8`, `500m`, `64Gi`."""

SUFFIXES = {"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "": Fraction(1)}
SUFFIXES |= {suffix: Fraction(1000**i) for i, suffix in enumerate("kMGTPE", start=1)}
SUFFIXES |= {f"{suffix}i": Fraction(1024**i) for i, suffix in enumerate("KMGTPE", start=1)}


def byte_count(quantity: str) -> int:
    """`80Gi`, `1.5G`, `128974848`, `1e9`: whole bytes, rounded down. Raises ValueError for what is no quantity."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?)([numkMGTPE]?|[KMGTPE]i)", quantity)
    if found is None:
        raise ValueError(f"{quantity!r} is not a quantity, such as 80Gi")
    return int(Fraction(found[1]) * SUFFIXES[found[2]])
