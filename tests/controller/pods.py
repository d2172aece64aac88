"""Pods and PyTorchJobs as the API server shows them, with as little in them as the code reads, and as they are kept."""

import json
from typing import Any

from controller.projection import POD, PYTORCHJOB, project

Object = dict[str, Any]
NOW = "2026-01-01T00:10:00Z"


def owner(version: str, kind: str, name: str, uid: str) -> Object:
    return {"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": True}


def pod(index: int = 0, phase: str = "Running", node: str = "node-1", **state: Any) -> Object:
    """``state`` is one of running, waiting, terminated; other keys go into the status."""
    kinds = ("running", "waiting", "terminated")
    container = {key: value for key, value in state.items() if key in kinds}
    status = {key: value for key, value in state.items() if key not in kinds}
    statuses = [{"name": "pytorch", "state": container}] if container else []
    found = {
        "metadata": {
            "name": f"job-worker-{index}",
            "uid": f"pod-{index}",
            "labels": {"training.kubeflow.org/replica-index": str(index), "training.kubeflow.org/job-name": "test-sft-1"},
            "ownerReferences": [owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")],
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": "pytorch", "image": "a/b:1", "resources": {"limits": {"memory": "300Mi"}}}],
        },
        "status": {"phase": phase, "containerStatuses": statuses, **status},
    }  # fmt: skip
    return project(found, POD)


def terminated(code: int, message: str = "", reason: str = "Error", at: str = NOW) -> Object:
    return {
        "exitCode": code,
        "message": message,
        "reason": reason,
        "finishedAt": at,
        "startedAt": "2026-01-01T00:00:30Z",
    }


def said(failure: str | None, message: str = "", **more: Any) -> str:
    return json.dumps({"failure": failure, "message": message, **more})


def disruption(reason: str, message: str = "") -> list[Object]:
    return [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]


def job(
    *conditions: str, suspend: bool = False, replicas: int = 1, queue: str | None = None, **metadata: Any
) -> Object:
    found = {
        "kind": "PyTorchJob",
        "metadata": {
            "name": "test-sft-1",
            "namespace": "default",
            "uid": "job-1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "alignment.dev/phase": "sft",
                "alignment.dev/attempt": "1",
                **({"kueue.x-k8s.io/queue-name": queue} if queue else {}),
            },
            "annotations": {"alignment.dev/digest": "d"},
            **metadata,
        },
        "spec": {
            "runPolicy": {"suspend": suspend},
            "pytorchReplicaSpecs": {"Worker": {"replicas": replicas}},
        },
        "status": {"conditions": [{"type": c, "status": "True", "message": f"{c}!"} for c in conditions]},
    }
    return project(found, PYTORCHJOB)
