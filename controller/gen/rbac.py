"""Rights: exactly the calls that :mod:`controller.kube` declares, and what people may do with runs."""

from collections.abc import Iterable
from typing import Any

import yaml

from controller.api import meta
from controller.gen import NOTICE
from controller.kube import CALLS, LEASE_CALLS, Call

Object = dict[str, Any]

NAMESPACE = "alignment-system"
NAME = meta.PRODUCT
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": NAME}
RBAC = "rbac.authorization.k8s.io"

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


def objects() -> list[Object]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": LABELS | {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(NAME, NAMESPACE)},
        _role("ClusterRole", NAME, None, rules(CALLS)),
        _binding("ClusterRoleBinding", NAME, None, "ClusterRole"),
        _role("Role", f"{NAME}-leader", NAMESPACE, rules(LEASE_CALLS)),
        _binding("RoleBinding", f"{NAME}-leader", NAMESPACE, "Role"),
        _people("view", VIEWER_VERBS),
        _people("edit", EDITOR_VERBS),
    ]


def _metadata(name: str, namespace: str | None) -> Object:
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": LABELS}


def _role(kind: str, name: str, namespace: str | None, granted: list[Object]) -> Object:
    return {"apiVersion": f"{RBAC}/v1", "kind": kind, "metadata": _metadata(name, namespace), "rules": granted}


def _binding(kind: str, name: str, namespace: str | None, role: str) -> Object:
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": kind,
        "metadata": _metadata(name, namespace),
        "roleRef": {"apiGroup": RBAC, "kind": role, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
    }


def _people(level: str, verbs: list[str]) -> Object:
    """Joined to Kubernetes' own roles of that name, so whoever may edit a namespace may run alignments in it."""
    role = _role("ClusterRole", f"{NAME}-{level}", None, [_runs(verbs)])
    targets = ("view", "edit", "admin") if level == "view" else ("edit", "admin")
    labels = {f"{RBAC}/aggregate-to-{target}": "true" for target in targets}
    role["metadata"] = {**role["metadata"], "labels": LABELS | labels}
    return role


def _runs(verbs: list[str]) -> Object:
    return {"apiGroups": [meta.GROUP], "resources": [meta.PLURAL], "verbs": verbs}


def rbac_yaml() -> str:
    return f"# {NOTICE}\n" + yaml.safe_dump_all(_plain(objects()), sort_keys=False, width=120)


def _plain(found: list[Object]) -> list[Object]:
    """Without shared parts, which YAML would write as anchors."""
    return [yaml.safe_load(yaml.safe_dump(item, sort_keys=False)) for item in found]
