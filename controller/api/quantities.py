"""Kubernetes quantities: as users write them, and as numbers."""

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, StringConstraints, WithJsonSchema

QUANTITY = r"^[0-9]{1,19}(\.[0-9]{0,9})?([KMGTPE]i|[numkMGTPE]|[eE][0-9]{1,2})?$"
"""Bounded, since strangers write them: 1e999999999 would be a number that fills the operator's memory."""


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


def number(quantity: str) -> Fraction:
    """`8`, `500m`, `80Gi`, `1e9`, exactly. Raises ValueError for what is no quantity."""
    if re.fullmatch(QUANTITY, quantity) is None:
        raise ValueError(f"{quantity!r} is not a quantity, such as 80Gi")
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)(.*)", quantity)
    assert found is not None
    return Fraction(found[1]) * SUFFIXES[found[2]]


def byte_count(quantity: str) -> int:
    """Rounded down. Raises ValueError for what is no quantity."""
    return int(number(quantity))
