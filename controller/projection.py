"""What is kept of runs, jobs and pods: as much as a look reads, in as few bytes as can be. Pure.

A projection has the shape of its object, so whoever reads it cannot tell, and need not know. That nothing is missing is seen
to by the tests, which read all their pods and jobs through these.
"""

import json
import zlib
from typing import Any

from controller.api import meta
from controller.kube.resources import BETWEEN, PODS, PYTORCHJOBS, RUNS, TRAINJOBS, Resource

Object = dict[str, Any]
Shape = Any
"""A tree of the names that are kept; True keeps all that is below, a list has the shape of each item."""

IDENTITY = {
    **dict.fromkeys(("name", "namespace", "uid", "ownerReferences", "creationTimestamp", "deletionTimestamp"), True),
    "labels": True,
}
CONDITIONS = [dict.fromkeys(("type", "status", "reason", "message", "lastTransitionTime"), True)]

RUN = {
    "apiVersion": True,
    "kind": True,
    "metadata": {**IDENTITY, "generation": True, "annotations": {meta.ANNOTATION_RETRY: True}},
    "spec": True,
    "status": True,
}
JOB = {
    **IDENTITY,
    "annotations": dict.fromkeys((meta.ANNOTATION_DIGEST, meta.ANNOTATION_RUN_UID, meta.ANNOTATION_QUEUE), True),
    "finalizers": True,
}
PYTORCHJOB = {
    "kind": True,
    "metadata": JOB,
    "spec": {"runPolicy": {"suspend": True, "managedBy": True}, "pytorchReplicaSpecs": {"Worker": {"replicas": True}}},
    "status": {"conditions": CONDITIONS, "completionTime": True, "startTime": True},
}
TRAINJOB = {
    "kind": True,
    "metadata": JOB,
    "spec": {"suspend": True, "managedBy": True, "trainer": {"numNodes": True}},
    "status": {"conditions": CONDITIONS},
}
WHOSE = {"metadata": IDENTITY}
"""Of what is between a job and its pods."""
POD = {
    "metadata": IDENTITY,
    "spec": {
        "nodeName": True,
        "containers": [{"name": True, "image": True, "resources": {"limits": {"memory": True}}}],
    },
    "status": {
        **dict.fromkeys(("phase", "reason", "message", "podIP"), True),
        "conditions": [dict.fromkeys(("type", "status", "reason", "message"), True)],
        "containerStatuses": [{"name": True, "state": True}],
        "initContainerStatuses": [{"name": True, "image": True, "state": {"waiting": True}}],
    },
}
SHAPES: dict[Resource, Shape] = {
    RUNS: RUN, PYTORCHJOBS: PYTORCHJOB, TRAINJOBS: TRAINJOB, PODS: POD, **dict.fromkeys(BETWEEN, WHOSE),
}  # fmt: skip


def project(found: Any, shape: Shape) -> Any:
    """``found`` without what its shape does not name."""
    if isinstance(shape, dict) and isinstance(found, dict):
        return {name: project(found[name], below) for name, below in shape.items() if name in found}
    if isinstance(shape, list) and isinstance(found, list):
        return [project(item, shape[0]) for item in found]
    return found


def slim(resource: Resource, document: Object) -> Object:
    """What is kept of it, with its version."""
    found: Object = project(document, SHAPES[resource])
    found["metadata"]["resourceVersion"] = document["metadata"]["resourceVersion"]
    return found


def pack(resource: Resource, document: Object) -> bytes:
    text = json.dumps(project(document, SHAPES[resource]), separators=(",", ":"), sort_keys=True)
    return zlib.compress(text.encode(), 1)


def unpack(body: bytes) -> Object:
    found: Object = json.loads(zlib.decompress(body))
    return found
