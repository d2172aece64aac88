"""manifests/ is what the chart makes, and real kubectl and a real API server take all of it."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster import build
from cluster.client import Cluster
from monitoring import prometheus_operator

from chart.helm import NAMESPACE, Loader, Object, one, template
from chart.manifests import MANIFESTS, rendered, without_helm
from chart.trial_of_scanner import trainers

OVERLAYS: dict[str, Object] = {
    "gpu": {
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "preference": {
                            "matchExpressions": [{"key": "nvidia.com/gpu.present", "operator": "DoesNotExist"}]
                        },
                    }
                ]
            }
        }
    },
    "cpu": {"defaults": {"trainerImage": {"tag": "0.1.0-cpu"}}},
    "kueue": {"defaults": {"queue": "alignment"}},
    "air-gapped": {"global": {"imageRegistry": "registry.example.com", "imagePullSecrets": [{"name": "registry"}]}},
}
"""Each overlay, and the chart's values that say the same."""


def kustomize(path: str | Path) -> list[Object]:
    kubectl = build.ensure("api").binary("kubectl")
    command = [str(kubectl), "kustomize", str(MANIFESTS / path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [document for document in yaml.load_all(text, Loader) if document]


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(o["kind"], o["metadata"]["name"]): sorted_env(o) for o in objects}


def sorted_env(document: Object) -> Object:
    """kustomize puts a variable that it adds first."""
    if document["kind"] == "Deployment":
        for container in document["spec"]["template"]["spec"]["containers"]:
            container["env"].sort(key=lambda item: item["name"])
    return document


def from_chart(values: Object) -> dict[tuple[str, str], Object]:
    return by_name(without_helm(template({**values, "crds": {"enabled": False}}, "--skip-tests")))


def test_nothing_has_drifted_from_the_chart() -> None:
    for path, text in rendered().items():
        assert (MANIFESTS / path).read_text() == text, f"manifests/{path} is out of date: run `make manifests`"


def test_the_base_is_the_chart_as_it_comes_with_namespace_and_crd() -> None:
    found = by_name(kustomize("base"))
    crd = found.pop(("CustomResourceDefinition", "alignmentruns.alignment.dev"))
    namespace = found.pop(("Namespace", NAMESPACE))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found == from_chart({})
    assert crd["spec"] == one(template(), "CustomResourceDefinition")["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_says_what_the_charts_values_say(overlay: str) -> None:
    base, found = by_name(kustomize("base")), by_name(kustomize(f"overlays/{overlay}"))
    expected = from_chart(OVERLAYS[overlay])
    changed = {key for key, document in found.items() if key in base and base[key] != document}
    assert changed == {("Deployment", "alignment-operator")}
    for key in changed:
        assert found[key] == expected[key]
    added = {kind for kind, _ in found.keys() - base.keys()}
    assert added == ({"ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"} if overlay == "kueue" else set())
    assert base.keys() <= found.keys()


def test_every_folder_of_overlays_is_looked_at() -> None:
    for folder in ("overlays", "components"):
        assert {path.name for path in (MANIFESTS / folder).iterdir()} == set(OVERLAYS)


def test_overlays_components_can_be_had_together(tmp_path: Path) -> None:
    def address(name: str) -> str:
        return os.path.relpath((MANIFESTS / name).resolve(), tmp_path.resolve())

    together = ["gpu", "kueue", "air-gapped"]
    mine = {"resources": [address("base")], "components": [address(f"components/{name}") for name in together]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    found = by_name(kustomize(tmp_path))
    expected = from_chart({key: value for name in together for key, value in OVERLAYS[name].items()})
    assert found["Deployment", "alignment-operator"] == expected["Deployment", "alignment-operator"]
    assert ("ClusterQueue", "alignment") in found


def test_monitoring_is_the_charts() -> None:
    found = by_name(kustomize("monitoring"))
    assert found == {
        key: document
        for key, document in by_name(
            without_helm(template(yaml.safe_load((MANIFESTS / "monitoring/values.yaml").read_text()), "--skip-tests"))
        ).items()
        if key[0] in ("PodMonitor", "PrometheusRule", "ConfigMap")
    }
    assert {kind for kind, _ in found} == {"PodMonitor", "PrometheusRule", "ConfigMap"}


def apply(cluster: Cluster, path: str, *more: str) -> str:
    """Again and again, as people do."""
    text = ""
    for _ in range(2):
        text = cluster.kubectl("apply", "--server-side", "-k", str(MANIFESTS / path), "--validate=strict", *more)
    return text


@pytest.fixture
def with_monitors(api_cluster: Cluster) -> Cluster:
    api_cluster.define(prometheus_operator.kinds())
    return api_cluster


def test_a_real_api_server_takes_all_of_it(with_monitors: Cluster) -> None:
    cluster = with_monitors
    assert "deployment.apps/alignment-operator serverside-applied" in apply(cluster, "base")
    for overlay in OVERLAYS:
        assert "deployment.apps/alignment-operator serverside-applied" in apply(cluster, f"overlays/{overlay}")
    cluster.kubectl(
        "apply", "--server-side", "-n", cluster.namespace(), "-f", str(MANIFESTS / "components/kueue/local-queue.yaml")
    )
    assert "podmonitor.monitoring.coreos.com/alignment-operator-trainers" in apply(cluster, "monitoring")
    # Other tests have an operator outside pods here.
    cluster.kubectl("delete", "deployment", "alignment-operator", "-n", NAMESPACE)
    for kind, name in (("clusterqueue", "alignment"), ("resourceflavor", "alignment")):
        cluster.kubectl("delete", kind, name)


def test_pods_for_the_scanner_can_be_made():
    """`make scan` is run by hand, and would notice late that it cannot."""
    assert [pod["spec"]["containers"][0]["name"] for pod in trainers()] == ["pytorch", "node"] * 2
