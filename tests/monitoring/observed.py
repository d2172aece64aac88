"""pytest plugin: runs on real nodes under the eyes of a real Prometheus, once a session.

``monitored`` scrapes the installed operator and every trainer each second; ``observed`` is what it saw of the shortened
quickstart and of runs that fail, are retried, wait in a queue and are suspended. Tests of metrics, dashboards and
alerts look at the same data, which stays when the pods have gone: ask at ``observed.end``, or over a range that ends
there.
"""

import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import product
from cluster.client import Cluster
from cluster.installed import Runs, place_for_runs

from controller.compose import compose, read_document
from monitoring.prometheus import Prometheus
from monitoring.prometheus_operator import PrometheusOperator

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
LETTERS = {"task": "letters", "split": "demonstrations"}
MODEL = {
    "hiddenSize": 32, "numLayers": 2,
    "tokenizer": {"kind": "word", "vocabSize": 128, "trainOn": [{"synthetic": {**LETTERS, "count": 400}}]},
}  # fmt: skip
DATA = {
    "train": [{"synthetic": {**LETTERS, "count": 2000}}], "eval": [{"synthetic": {**LETTERS, "count": 100, "seed": 7}}],
    "maxLength": 32, "packing": False,
}  # fmt: skip
QUEUE = "nothing-left"


@dataclass
class Watch:
    """What could be seen while it lasted: every pod, every target, the metrics' declarations, the newest pages."""

    prometheus: Prometheus
    cluster: Cluster
    namespaces: list[str]
    pods: dict[str, Object] = field(default_factory=dict)
    targets: dict[str, Object] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        for namespace in self.namespaces:
            pods = self.cluster.items("pods", "-n", namespace)
            self.pods |= {pod["metadata"]["name"]: pod for pod in pods if pod["status"].get("podIP")}
        self.metadata |= self.prometheus.metadata()
        for target in self.prometheus.targets():
            self.targets[target["scrapeUrl"]] = target
            if target["health"] == "up":
                self.pages |= _page(target["scrapeUrl"])


@dataclass
class Observed:
    """``runs`` has the runs of these names: quickstart, bad, retried, queued, suspended."""

    prometheus: Prometheus
    runs: Runs
    watch: Watch
    begin: float
    end: float

    @property
    def window(self) -> str:
        """For `metric[WINDOW]` at ``end``: all of it."""
        return f"{int(self.end - self.begin) + 1}s"


@pytest.fixture(scope="session")
def monitored(installed: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, configured by the Prometheus Operator from this project's monitors and rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    operator = PrometheusOperator(installed, folder)
    installed.apply(monitoring_manifests(installed))
    prometheus = Prometheus(folder, operator.configuration(jobs=2))
    yield prometheus
    prometheus.stop()
    operator.stop()


def monitoring_manifests(cluster: Cluster) -> list[Object]:
    """As `kubectl apply -k manifests/monitoring` would apply them."""
    text = cluster.kubectl("kustomize", str(ROOT / "manifests" / "monitoring"))
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="session")
def observed(monitored: Prometheus, installed: Cluster) -> Iterator[Observed]:
    with place_for_runs(installed) as runs:
        begin = time.time()
        watch = Watch(monitored, installed, [runs.namespace, "alignment-system"])
        _start_all(runs)
        _see(watch, runs, "work is saved", lambda: runs.checkpoints("retried", "sft"), 600)
        runs.kubectl("delete", "pod", "retried-sft-1-worker-0", "--wait=false")
        _see(watch, runs, "all runs have ended", lambda: _ended(runs, {"quickstart", "retried", "bad"}), 1500)
        yield Observed(monitored, runs, watch, begin, time.time())


def _start_all(runs: Runs) -> None:
    runs.cluster.apply([*_empty_queue(runs.namespace), _stranger()], runs.namespace)
    runs.apply("queued", {**_training(), "queueName": QUEUE})
    runs.apply("suspended", {**_training(), "suspend": True})
    runs.apply("bad", _training(data={"train": [{"files": "nothing/*.jsonl"}]}))
    runs.apply("retried", _training(), procsPerNode=2)
    runs.apply("quickstart", quickstart())


def quickstart() -> Object:
    """The shortened quickstart's spec, without the workspace that it names."""
    fragment = read_document(ROOT / "tests/pipeline/short.yaml")
    spec = compose(read_document(ROOT / "configs/quickstart.yaml"), [fragment])["spec"]
    del spec["workspace"]
    return spec


def _training(**changes: Any) -> Object:
    sft = {
        "data": DATA, "batchSize": 32, "duration": {"maxSteps": 100},
        "checkpoint": {"everySteps": 5}, "evaluation": {"everySteps": 20}, **changes,
    }  # fmt: skip
    policy = {"backoff": {"initialSeconds": 1, "maxSeconds": 1}}
    return {"model": {"scratch": MODEL}, "failurePolicy": policy, "phases": [{"name": "sft", "sft": sft}]}


def _empty_queue(namespace: str) -> list[Object]:
    """Without a ClusterQueue behind it, it admits nothing."""
    metadata = {"name": QUEUE, "namespace": namespace}
    return [
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": metadata,
         "spec": {"clusterQueue": f"none-{namespace}"}},
    ]  # fmt: skip


def _stranger() -> Object:
    """A pod with a metrics port that is not of a run."""
    container = {
        "name": "pytorch", "image": product.TRAINER, "command": ["sleep", "infinity"],
        "ports": [{"name": "metrics", "containerPort": 9400}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger", "labels": {"app": "stranger"}},
        "spec": {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 0},
    }  # fmt: skip


def _see(watch: Watch, runs: Runs, what: str, predicate: Any, timeout: float = 120) -> None:
    def look() -> Any:
        watch.look()
        return predicate()

    runs.wait(what, look, timeout)


def _ended(runs: Runs, names: set[str]) -> bool:
    ended = {
        item["metadata"]["name"]
        for item in runs.cluster.items("arun", "-n", runs.namespace)
        for condition in item.get("status", {}).get("conditions", [])
        if condition["type"] in ("Succeeded", "Failed") and condition["status"] == "True"
    }
    return names <= ended


def _page(url: str) -> dict[str, str]:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return {url: answer.read().decode()}
    except OSError:  # it ended between the scrape and now
        return {}
