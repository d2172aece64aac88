"""Conditions as Kubernetes means them: one per type, and a transition time that moves only when the status does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from controller.api import meta
from controller.api.status import Condition
from controller.api.text import LONG_LIMIT, plain

ORDER = (meta.ACCEPTED, meta.ADMITTED, meta.PROGRESSING, meta.SUSPENDED, meta.STALLED, meta.SUCCEEDED, meta.FAILED)


@dataclass(frozen=True)
class Claim:
    """What is to be said under one condition type."""

    holds: bool
    reason: str
    message: str = ""


def update(
    before: Sequence[Condition], claims: Mapping[str, Claim], generation: int | None, now: datetime
) -> tuple[Condition, ...]:
    """The conditions with these claims; types that nothing is claimed about stay as they were."""
    old = {condition.type: condition for condition in before}
    new = {kind: _condition(kind, claim, old.get(kind), generation, now) for kind, claim in claims.items()}
    merged = old | new
    return tuple(merged[kind] for kind in ORDER if kind in merged)


def _condition(kind: str, claim: Claim, before: Condition | None, generation: int | None, now: datetime) -> Condition:
    status: Literal["True", "False"] = "True" if claim.holds else "False"
    unchanged = before is not None and before.status == status
    return Condition(
        type=kind,
        status=status,
        reason=claim.reason,
        message=plain(claim.message, LONG_LIMIT),
        observed_generation=generation,
        last_transition_time=before.last_transition_time if unchanged and before else now,
    )
