"""Where a run's pods go. What the scheduler would not take is refused before, so that a mistake shows at once."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from controller.api.labels import KEY, LabelValue, Selected
from controller.api.problems import shown
from trainers.spec import SpecModel

RULE: dict[str, JsonValue] = {
    "rule": "self.operator.contains('Exist') == (self.values.size() == 0)",
    "message": "Exists and DoesNotExist have no values, others do",
}

MOST = 2**31 - 1
LARGEST = 2**63 - 1
"""That the scheduler compares with."""


class NodeAffinity(SpecModel):
    """What a label of the node must be or, with a weight, should be."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-validations": [RULE]})

    key: str = Field(pattern=KEY, max_length=317)
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How it is compared; Gt and Lt with one number."""
    values: tuple[LabelValue, ...] = Field(default=(), max_length=64)
    """With what."""
    weight: int | None = Field(default=None, ge=1, le=100)
    """How much it is preferred; without one it is required."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if bool(self.values) == (self.operator in ("Exists", "DoesNotExist")):
            wanted = "has no values" if self.values else "needs values"
            raise ValueError(f"{self.key}: {self.operator} {wanted}")
        if self.operator in ("Gt", "Lt") and not (len(self.values) == 1 and _is_int64(self.values[0])):
            given = shown(", ".join(self.values))
            raise ValueError(
                f"{self.key}: {self.operator} needs one value, a whole number up to {LARGEST}, not {given}"
            )
        return self

    @property
    def expression(self) -> dict[str, object]:
        return self.document(exclude={"weight"}, exclude_defaults=True) | {"operator": self.operator}


def _is_int64(text: str) -> bool:
    """A label has no sign. Of longer texts Python would not make a number at all."""
    return text.isdigit() and int(text) <= LARGEST


class PodAffinity(SpecModel):
    """Pods beside which, or apart from which, the pods are or, with a weight, should be."""

    topology_key: str = Field(pattern=KEY, max_length=317)
    """Label of nodes: those with the same value are one place."""
    apart: bool = False
    """Keep away from them in place of going to them."""
    match_labels: Selected | None = None
    """Labels of the pods; those of the same job unless set."""
    weight: int | None = Field(default=None, ge=1, le=100)
    """How much it is preferred; without one it is required."""


class Affinity(SpecModel):
    """Where pods go, in fewer words than a pod says it."""

    nodes: tuple[NodeAffinity, ...] = Field(default=(), max_length=16)
    """By the nodes' labels: all that have no weight hold."""
    pods: tuple[PodAffinity, ...] = Field(default=(), max_length=16)
    """By what else is there."""


class TopologySpread(SpecModel):
    """How evenly a job's pods are spread, as in a pod."""

    topology_key: str = Field(pattern=KEY, max_length=317)
    """Label of nodes: those with the same value are one place."""
    max_skew: int = Field(default=1, ge=1, le=MOST)
    """How many more one place may have than another."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    """What happens where that cannot be."""
    min_domains: int | None = Field(default=None, ge=1, le=MOST)
    """How many places there are to be at least; with DoNotSchedule."""
    match_labels: Selected | None = None
    """Labels of the pods that are counted; those of the same job unless set."""

    @model_validator(mode="after")
    def _domains_are_for_must(self) -> Self:
        if self.min_domains is not None and self.when_unsatisfiable != "DoNotSchedule":
            raise ValueError(f"minDomains {self.min_domains} needs whenUnsatisfiable: DoNotSchedule")
        return self


class Toleration(SpecModel):
    key: str | None = None
    """Taint key; all keys unless set."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """How the value is compared."""
    value: str | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; all effects unless set."""
    toleration_seconds: int | None = None
    """For NoExecute: how long the pod may stay."""
