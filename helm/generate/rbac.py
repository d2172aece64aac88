"""Rights: exactly the calls that :mod:`controller.kube.calls` declares, and what people may do with runs."""

from collections.abc import Iterable
from typing import Any

import yaml

from controller.api import meta
from controller.kube.calls import CALLS, LEASE_CALLS, SMOKE_CALLS, WALL_CALLS, Call
from generate import NOTICE

Object = dict[str, Any]

EDITOR_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
VIEWER_VERBS = ["get", "list", "watch"]


def rules(calls: Iterable[Call]) -> list[Object]:
    """One rule for each resource, with the verbs that are used."""
    verbs: dict[tuple[str, str], set[str]] = {}
    for call in calls:
        resource = call.resource.plural + (f"/{call.resource.subresource}" if call.resource.subresource else "")
        verbs.setdefault((call.resource.group, resource), set()).add(call.verb)
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(found)}
        for (group, resource), found in verbs.items()
    ]


def rbac_yaml() -> str:
    """What the chart's templates read."""
    return f"# {NOTICE}\n" + yaml.safe_dump(_plain(granted()), sort_keys=False, width=120)


def granted() -> Object:
    """Rules by whom they are for. People's are joined to Kubernetes' own roles: whoever edits a namespace may run in it."""
    return {
        "operator": rules(CALLS),
        "walls": rules(WALL_CALLS),
        "leader": _leader(),
        "test": rules(SMOKE_CALLS),
        "people": {
            "view": {"joins": ["view", "edit", "admin"], "rules": [_runs(VIEWER_VERBS)]},
            "edit": {"joins": ["edit", "admin"], "rules": [_runs(EDITOR_VERBS)]},
        },
    }


def _leader() -> list[Object]:
    """The one Lease; what is created has no name yet when Kubernetes looks."""
    create = [call for call in LEASE_CALLS if call.verb == "create"]
    named = rules(call for call in LEASE_CALLS if call.verb != "create")
    return [*rules(create), *({**rule, "resourceNames": [meta.PRODUCT]} for rule in named)]


def _runs(verbs: list[str]) -> Object:
    return {"apiGroups": [meta.GROUP], "resources": [meta.PLURAL], "verbs": verbs}


def _plain(found: Object) -> Object:
    """Without shared parts, which YAML would write as anchors."""
    plain: Object = yaml.safe_load(yaml.safe_dump(found, sort_keys=False))
    return plain
