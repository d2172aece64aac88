"""Whole runs on fake nodes, each met by one fault at one of the operator's calls; all of them side by side.

A run has a namespace of its own, by its own name, so that the calls about it can be told from all others by their paths, and
counted. What must be the same as in a run that met nothing is its end.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.client import Cluster
from cluster.proxy import FaultProxy, Rule
from driver import OperatorProcess
from ends import Ends
from scale import apply, scripted

Object = dict[str, Any]
Inject = Callable[[FaultProxy, str, int], Rule]

STALL_SECONDS = 31.0
"""The operator waits for 30 for an answer, and the API server carries the request out after that."""

REFUSED = "the API server refused the job: the test's proxy answers 422"
"""What is said of a phase whose job may not be made as it is: to ask again would not change it."""

_MARK = re.compile(r"-x[a-z2-7]{12}\b")
"""Of jobs whose names could be another run's as well."""

FAULTS: dict[str, Inject] = {
    "reset before": lambda proxy, path, skip: proxy.refuse(path=path, skip=skip),
    "reset after": lambda proxy, path, skip: proxy.lose_answer(path=path, skip=skip),
    "half an answer": lambda proxy, path, skip: proxy.cut(path=path, skip=skip),
    "another's page": lambda proxy, path, skip: proxy.garble(path=path, skip=skip),
    "stall": lambda proxy, path, skip: proxy.delay(STALL_SECONDS, path=path, skip=skip),
    **{
        str(code): lambda proxy, path, skip, code=code: proxy.answer(code, path=path, skip=skip)
        for code in (401, 403, 404, 409, 410, 422, 500, 503, 504)
    },
    "429": lambda proxy, path, skip: proxy.answer(429, path=path, skip=skip, retry_after=1),
}


@dataclass
class Scene:
    """A cluster, an operator behind a proxy, and how a run that meets nothing ends."""

    cluster: Cluster
    proxy: FaultProxy
    operator: OperatorProcess
    ends: Ends
    backend: str = "PyTorchJob"
    """What its runs have."""
    calls: int = 0
    """About a run that meets nothing."""
    calm: Object = field(default_factory=dict)
    """Its status in the end."""

    def begin(self, names: list[str]) -> None:
        """A run of each of these names, in a namespace of that name. All at once: kubectl takes a second."""
        spaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in names]
        apply(self.cluster, spaces, "")
        self.cluster.created.extend(names)
        give_claims(self.cluster, names)
        apply(self.cluster, [run_of(name, self.backend) for name in names], "")

    def statuses(self) -> dict[str, Object]:
        return {item["metadata"]["name"]: item.get("status", {}) for item in self.cluster.items("arun", "-A")}

    def over(self, names: list[str]) -> bool:
        found = self.statuses()
        return all(is_over(found.get(name, {})) for name in names)

    def finish(self, names: list[str], timeout: float, each: Callable[[], None] = lambda: None) -> None:
        """Wait, at most so long, and do something every second."""
        deadline = time.monotonic() + timeout
        while not self.over(names) and time.monotonic() < deadline:
            each()
            time.sleep(1)

    def wrong(self, names: dict[str, str]) -> list[str]:
        """What is wrong with the ends of these runs, by what they have met."""
        found = self.statuses()
        verdicts = [
            (met, self._verdict(found.get(name, {}), self.ends.created(name), name)) for name, met in names.items()
        ]
        return [f"{met}: {why}" for met, why in verdicts if why]

    def _verdict(self, status: Object, jobs: list[str], name: str) -> str:
        if not is_over(status):
            return f"never came to an end: {_short(status)}"
        if REFUSED in _short(status):
            return (
                ""
                if _holds(status, "Failed") and len(jobs) < len(self.calm["phases"])
                else f"jobs {jobs}: {_short(status)}"
            )
        if [_MARK.sub("", job) for job in jobs] != [f"{name}-{phase['name']}-1" for phase in self.calm["phases"]]:
            return f"its jobs were {jobs}: {_short(status)}"
        found = differences(self.calm, plain(status, name))
        return f"ends otherwise: {found}" if found else ""


def calls_of(namespace: str) -> str:
    """Calls about what is in a namespace, watches left out: kopf's are of all namespaces."""
    return rf"/namespaces/{namespace}/(?!.*[?&]watch=)"


def give_claims(cluster: Cluster, namespaces: list[str]) -> None:
    """As provisioned storage would be, each is bound before a pod comes that wants it.

    A pod that comes between is set aside by the scheduler for five minutes if it has not heard of the volume by then.
    """
    apply(cluster, [part for name in namespaces for part in claim(name)], "")

    def bound() -> bool:
        claims = cluster.items("persistentvolumeclaims", "-A")
        mine = [one["status"].get("phase") for one in claims if one["metadata"]["namespace"] in namespaces]
        return mine == ["Bound"] * len(namespaces)

    cluster.wait(bound, 300, "the claims are bound", every=1 if len(namespaces) > 1 else 0.2)


def claim(namespace: str) -> list[Object]:
    """Fake pods mount nothing, but the scheduler looks for their claims."""
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace},
              "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": "/nowhere"},
                       "storageClassName": "", "claimRef": {"namespace": namespace, "name": "work"}}}  # fmt: skip
    return [
        volume,
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "work", "namespace": namespace},
         "spec": {**spec, "volumeName": namespace}},
    ]  # fmt: skip


def run_of(name: str, backend: str) -> Object:
    run = scripted(name)
    run["metadata"]["namespace"] = name
    run["spec"]["backend"] = backend
    return run


def is_over(status: Object) -> bool:
    return _holds(status, "Succeeded") or _holds(status, "Failed")


def _holds(status: Object, kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in status.get("conditions", ()))


def plain(status: Object, namespace: str) -> Object:
    """Without what two equal runs differ in: times, UIDs, the namespace in names and paths, and how far a fake pod says it is.

    Its address is this machine's, and a trainer of another test may answer there.
    """
    text = _MARK.sub("", json.dumps(status, sort_keys=True)).replace(namespace, "NAMESPACE")
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "UID", text)
    text = re.sub(r'"checkpointStep": \d+', '"checkpointStep": 0', text)
    found: Object = json.loads(text)
    return found


def _short(status: Object) -> str:
    phases = [
        (p["name"], p.get("state"), p.get("message"), [a.get("message") for a in p.get("attempts", [])])
        for p in status.get("phases", [])
    ]
    return f"{[c['type'] for c in status.get('conditions', ()) if c['status'] == 'True']} {phases}"


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{at}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{at}[{i}]")]
    return [] if one == other else [f"{at}: {one!r} -> {other!r}"]
