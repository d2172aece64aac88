"""Labels and annotations that users give pods: what Kubernetes takes, and none of those that the operator lives by."""

import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints, WithJsonSchema

from controller.api import meta

KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
MOST = 32
ANNOTATION_LIMIT = 16384
"""Characters of one value: beside it a pod has its phase's settings, and 256 KiB for all of them."""

OWN_PREFIXES = (f"{meta.GROUP}/", "training.kubeflow.org/")
OWN_LABELS = (
    meta.LABEL_NAME,
    meta.LABEL_PART_OF,
    meta.LABEL_COMPONENT,
    meta.LABEL_MANAGED_BY,
    meta.LABEL_QUEUE,
    meta.LABEL_QUEUE_PRIORITY,
)
"""Beside those with our prefixes. A queue is asked for by `spec.queueName`."""

MALFORMED = "is no key: NAME or PREFIX/NAME, the name of 63 characters at most"


def _rules(own: Collection[str]) -> list[dict[str, str]]:
    """The same for the API server."""
    owned = [*(f"k.startsWith('{prefix}')" for prefix in OWN_PREFIXES), *([f"k in {list(own)}"] if own else [])]
    return [
        {"rule": f"self.all(k, k.matches('{KEY}'))", "message": "a key is NAME or PREFIX/NAME"},
        {"rule": f"!self.exists(k, {' || '.join(owned)})", "message": "a key is the operator's own"},
    ]


def _checked(own: Collection[str]) -> AfterValidator:
    def check(given: dict[str, str]) -> dict[str, str]:
        for key in given:
            if not re.fullmatch(KEY, key):
                raise ValueError(f'"{key}" {MALFORMED}')
            if key.startswith(OWN_PREFIXES) or key in own:
                raise ValueError(f'"{key}" is the operator\'s own: leave it out')
        if len(given) > MOST:
            raise ValueError(f"{len(given)} are too many: {MOST} at most")
        return given

    return AfterValidator(check)


def _schema(value: dict[str, Any], rules: list[dict[str, str]]) -> WithJsonSchema:
    values = {"type": "string", **value}
    said = {"x-kubernetes-validations": rules} if rules else {}
    return WithJsonSchema({"type": "object", "maxProperties": MOST, "additionalProperties": values, **said})


LABEL_VALUES = {"maxLength": 63, "pattern": VALUE}
LabelValue = Annotated[str, StringConstraints(pattern=VALUE, max_length=63)]
Labels = Annotated[dict[str, LabelValue], _checked(OWN_LABELS), _schema(LABEL_VALUES, _rules(OWN_LABELS))]
Annotations = Annotated[
    dict[str, Annotated[str, StringConstraints(max_length=ANNOTATION_LIMIT)]],
    _checked(()),
    _schema({"maxLength": ANNOTATION_LIMIT}, _rules(())),
]
Selected = Annotated[
    dict[Annotated[str, StringConstraints(pattern=KEY, max_length=317)], LabelValue], _schema(LABEL_VALUES, [])
]
"""Labels to select by: anybody's."""
