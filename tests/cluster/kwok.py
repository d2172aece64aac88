"""Fake nodes by kwok, where thousands of pods are wanted; see cluster.stages for what their pods do."""

import json
from pathlib import Path
from typing import Any

from cluster.assets import Assets
from cluster.controlplane import Place, apply, kubectl
from cluster.processes import Children
from cluster.stages import pod_stages

_CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "500", "nvidia.com/gpu": "8"}


def start(place: Place, assets: Assets, children: Children, count: int) -> list[str]:
    """Names of the nodes, which are Ready."""
    config = place.state / "stages.yaml"
    shipped = json.loads(assets.manifest("kwok").read_text())
    config.write_text("\n---\n".join(json.dumps(stage) for stage in [*shipped, *pod_stages()]))
    command: list[str | Path] = [
        assets.binary("kwok"), f"--kubeconfig={place.kubeconfig}", f"--config={config}", "--manage-all-nodes=false",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--node-lease-duration-seconds=40",
        # Pods are asked for their metrics, and what a test asks must not leave the machine.
        "--cidr=127.1.0.0/16",
    ]  # fmt: skip
    children.start("kwok", command)
    names = [f"fake-{number}" for number in range(1, count + 1)]
    apply(place, assets, [_node(name) for name in names])
    kubectl(place, assets, "wait", "--for=condition=Ready", "node", "-l", "type=kwok", "--timeout=60s")
    return names


def _node(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name, "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "type": "kwok"},
        },
        "status": {"allocatable": _CAPACITY, "capacity": _CAPACITY},
    }  # fmt: skip
