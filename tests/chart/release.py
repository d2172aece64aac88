"""A release of the chart in a cluster of real nodes."""

from pathlib import Path
from typing import Any

import yaml
from cluster import product
from cluster.client import Cluster
from cluster.installed import ONE_THREAD

from chart.helm import Object, helm

RELEASE = "alignment-operator"


def values(namespace: str, **more: Any) -> Object:
    """The images of this tree; in the test's own run the packages come by a claim."""
    enabled = {"enabled": True}
    return {
        "image": {"tag": "test"},
        "defaults": {"trainerImage": {"tag": "test"}, "workspaceClaim": product.WORKSPACE_CLAIM},
        "test": {
            "namespace": namespace,
            "run": {
                "workspace": {"claimName": product.WORKSPACE_CLAIM},
                "template": {"claims": product.TEMPLATE["claims"], "env": ONE_THREAD},
            },
        },
        "monitoring": dict.fromkeys(("podMonitor", "trainersPodMonitor", "prometheusRule", "dashboards"), enabled),
        **more,
    }


class Release:
    """Helm with one cluster, namespace and kubeconfig."""

    def __init__(
        self, cluster: Cluster, namespace: str, folder: Path, name: str = RELEASE, kubeconfig: Path | None = None
    ):
        self.cluster, self.namespace, self.folder, self.name = cluster, namespace, folder, name
        self.kubeconfig = kubeconfig or cluster.kubeconfig

    def helm(self, verb: str, *arguments: str, values: Object | None = None) -> str:
        flags = ["--namespace", self.namespace, "--kubeconfig", str(self.kubeconfig)]
        if values is not None:
            flags += ["--values", "-"]
        if verb != "test":
            flags += ["--wait", "--timeout", "170s"]
        text = yaml.safe_dump(values) if values is not None else None
        return helm(verb, self.name, *arguments, *flags, text=text, kubeconfig=self.kubeconfig, timeout=320)

    def test(self) -> str:
        return self.helm("test", "--logs", "--timeout", "170s")

    def deployment(self) -> Object:
        return self.cluster.get("deployment", RELEASE, "-n", self.namespace)

    def holder(self) -> str:
        lease = self.cluster.get("lease", "alignment-operator", "-n", self.namespace)
        return str(lease.get("spec", {}).get("holderIdentity") or "")


def package(source: Path, folder: Path) -> Path:
    return Path(helm("package", str(source), "--destination", str(folder)).split(": ", 1)[1].strip())
