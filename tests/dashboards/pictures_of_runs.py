"""The pictures in docs/dashboards: two whole runs and some others on real nodes, seen by a real Prometheus.

`make dashboard-pictures`, a quarter of an hour on two cores. Not one of the tests.
"""

import time

import yaml
from cluster.client import Cluster
from cluster.installed import Runs, place_for_runs
from monitoring.prometheus import Prometheus

from controller.api import meta
from controller.compose import compose, read_document
from dashboards.boards import ROOT, Scope, Value
from dashboards.picture import Object, Server, draw

OUT = ROOT / "docs/dashboards"
PHASE = "dpo"
CPU = {"requests": {"cpu": "800m"}}
"""Two pods at a time on each of the nodes, which share this machine's cores."""
OTHER: Object = {
    "spec": {
        "phases": [
            {"name": "sft", "sft": {"optim": {"lr": 1.0e-3}}},
            {"name": PHASE, "dpo": {"beta": 0.3}},
            {"name": "distill", "distill": {"divergenceBeta": 0.9}},
        ]
    }
}


def test_pictures(monitored: Prometheus, installed: Cluster):
    begin = time.time()
    with place_for_runs(installed) as runs:
        _apply(runs)
        _lose_a_pod(runs)
        for name in ("helpful-v1", "helpful-v2"):
            runs.until_succeeded(name, timeout=2400)
        time.sleep(30)
        _draw(monitored, runs, begin)


def _apply(runs: Runs) -> None:
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "training"}}
    runs.cluster.apply({**queue, "spec": {"clusterQueue": "none"}}, runs.namespace)
    minimal = yaml.safe_load((ROOT / "manifests/samples/minimal.yaml").read_text())["spec"]
    minimal.pop("workspace", None)
    runs.apply("helpful-v1", _quickstart())
    runs.apply("helpful-v2", _quickstart(OTHER))
    runs.apply("waits-for-its-turn", {**minimal, "queueName": "training"})
    runs.apply("for-later", {**minimal, "suspend": True})
    phases = [{"name": "sft", "sft": {"data": {"train": [{"files": "nothing/*.jsonl"}]}}}]
    runs.apply("no-data", {**minimal, "phases": phases})


def _quickstart(*changes: Object) -> Object:
    base = read_document(ROOT / "configs/quickstart.yaml")
    spec: Object = compose(base, [read_document(ROOT / "tests/dashboards/pictured.yaml"), *changes])["spec"]
    del spec["workspace"]
    return {**spec, "template": {**spec.get("template", {}), "resources": CPU}}


def _lose_a_pod(runs: Runs) -> None:
    """A failure of a class that is tried again."""
    runs.wait("work is saved", lambda: runs.checkpoints("helpful-v1", "sft"), 1200)
    runs.kubectl("delete", "pods", "-l", f"{meta.LABEL_RUN}=helpful-v1,{meta.LABEL_PHASE}=sft", "--wait=false")


def _draw(prometheus: Prometheus, runs: Runs, begin: float) -> None:
    one, both = "helpful-v1", ["helpful-v1", "helpful-v2"]
    chosen: dict[str, dict[str, Value]] = {
        "fleet": {"namespace": "$__all", "state": "$__all", "search": ""},
        "run": {"namespace": runs.namespace, "run": one, "phase": "$__all"},
        "compare": {
            "namespace": runs.namespace,
            "run": both,
            "phase": PHASE,
            "model": ["sft", "dpo", "ppo", "distill"],
        },
    }
    OUT.mkdir(parents=True, exist_ok=True)
    for name, values in chosen.items():
        draw(name, Server(prometheus.url), Scope(values, begin, time.time(), scrape=2), OUT / f"{name}.png")
