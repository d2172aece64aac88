"""The Prometheus Operator beside a test cluster: it turns monitors and rules into a Prometheus' configuration.

It makes everything but the pods (`replicas: 0`): the tests run Debian's Prometheus on this machine instead, with that
configuration and the rights of the ServiceAccount that such a pod would have.
"""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import yaml
from cluster import build
from cluster.client import Cluster, KubectlError
from cluster.processes import Children, free_ports

from monitoring.prometheus import version

Object = dict[str, Any]
NAMESPACE, NAME = "monitoring", "tests"
SELECTED = {"release": "kube-prometheus-stack"}
"""Labels that a monitor or rule must have to be looked at."""
_POD = {"POD_NAME": f"prometheus-{NAME}-0", "SHARD": "0"}
_KINDS = {"prometheuses", "podmonitors", "servicemonitors", "prometheusrules", "probes", "scrapeconfigs"}
# As Prometheus' own documentation of kubernetes_sd_configs has it.
_RIGHTS = [
    {"apiGroups": [""], "resources": ["services", "endpoints", "pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
]


class PrometheusOperator:
    """Runs until ``stop``, or until this process ends."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self._assets = assets = build.ensure("monitoring")
        cluster.define(kinds())
        self._children = Children(folder)
        self._children.start(
            "prometheus-operator",
            [assets.binary("prometheus-operator"), f"--web.listen-address=127.0.0.1:{free_ports(1)[0]}"],
            {"KUBECONFIG": str(cluster.kubeconfig)},
        )
        cluster.apply(_instance())

    def configuration(self, jobs: int) -> Object:
        """Prometheus' configuration as soon as it has that many scrape jobs, for a Prometheus on this machine.

        Rules must have been applied before the monitors.
        """
        config: Object = {}

        def is_complete() -> bool:
            nonlocal config
            config = self._made()
            return len(config.get("scrape_configs", [])) == jobs

        self._children.wait_for(is_complete, 60, f"the Prometheus Operator has made {jobs} scrape jobs")
        self._discover(config["scrape_configs"])
        return {**config, "rule_files": self._rules()}

    def _discover(self, jobs: list[Object]) -> None:
        """Debian's Prometheus cannot ask Kubernetes: Prometheus' own discovery does beside it, and hands over files."""
        wanted = self.folder / "discovery" / "kubernetes"
        wanted.parent.mkdir()
        kubeconfig = str(self.cluster.service_account_kubeconfig(NAMESPACE, NAME))
        asked = []
        for number, job in enumerate(jobs):
            (discovery,) = job.pop("kubernetes_sd_configs")
            asked.append({**discovery, "kubeconfig_file": kubeconfig})
            job["file_sd_configs"] = [{"files": [f"{wanted}.{number}.json"]}]
        wanted.write_text(json.dumps(asked))
        self._children.start("prometheus-discovery", [self._assets.binary("prometheus-discovery"), wanted])

    def _made(self) -> Object:
        try:
            secret = self.cluster.get("secret", f"prometheus-{NAME}", "-n", NAMESPACE)
        except KubectlError:
            return {}
        text = gzip.decompress(base64.b64decode(secret["data"]["prometheus.yaml.gz"])).decode()
        for variable, value in _POD.items():  # a pod's sidecar fills them in
            text = text.replace(f"$({variable})", value)
        return yaml.safe_load(text)

    def _rules(self) -> list[str]:
        """Their ConfigMaps' contents as files; a pod would mount them."""
        paths = []
        for found in self.cluster.items("configmaps", "-n", NAMESPACE, "-l", f"prometheus-name={NAME}"):
            for name, text in found.get("data", {}).items():
                paths.append(self.folder / name)
                paths[-1].write_text(text)
        return [str(path) for path in paths]

    def stop(self) -> None:
        for name in list(self._children.running):
            self._children.kill(name)


def kinds() -> list[Object]:
    """The CustomResourceDefinitions that the Prometheus Operator cannot be without."""
    every = json.loads(build.ensure("monitoring").manifest("prometheus-operator").read_text())
    return [kind for kind in every if kind["spec"]["names"]["plural"] in _KINDS]


def _instance() -> list[Object]:
    """A Prometheus that looks into every namespace, with its rights."""
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": f"prometheus-{NAME}"}
    metadata = {"name": NAME, "namespace": NAMESPACE}
    selectors = {
        f"{kind}{what}": selector
        for kind in ("podMonitor", "serviceMonitor", "rule")
        for what, selector in (("Selector", {"matchLabels": SELECTED}), ("NamespaceSelector", {}))
    }
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": role["name"]}, "rules": _RIGHTS},
        {"apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": role["name"]}, "roleRef": role,
         "subjects": [account]},
        {
            "apiVersion": "monitoring.coreos.com/v1", "kind": "Prometheus", "metadata": metadata,
            "spec": {
                "version": version(), "replicas": 0, "serviceAccountName": NAME,
                "scrapeInterval": "1s", "scrapeTimeout": "1s", "evaluationInterval": "1s", **selectors,
            },
        },
    ]  # fmt: skip
