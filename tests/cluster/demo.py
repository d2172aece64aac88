"""`make demo-cluster`: real nodes with the operator in a pod, and a namespace in which a run can be tried."""

import json
import os
import sys
from pathlib import Path

import yaml

from cluster import launch, product
from cluster.assets import Assets
from cluster.client import Cluster

NAMESPACE = "demo"
MANIFESTS = product.ROOT / "manifests" / "base"


class NotPossible(Exception):
    """The message says what is missing."""


def check() -> None:
    if not (MANIFESTS / "operator.yaml").exists():
        raise NotPossible("manifests/base/operator.yaml is missing")


def install(running: launch.Running, assets: Assets) -> str:
    """What to type next."""
    cluster = Cluster("node", Path(running.info["kubeconfig"]), assets.binary("kubectl"), running.state)
    install_operator(cluster, assets)
    _make_namespace(cluster, assets)
    run = _write_run(running.state / "quickstart.yaml")
    return _TEXT.format(
        kubeconfig=cluster.kubeconfig,
        bin=assets.root / "bin",
        venv=Path(sys.executable).parent,
        namespace=NAMESPACE,
        run=run,
    )


def install_operator(cluster: Cluster, assets: Assets) -> None:
    """The manifests as shipped, with an image of the working tree; returns when a replica is ready."""
    cluster.load_image(product.operator_image(assets, cluster.state / "images" / "operator.tar"))
    cluster.define(MANIFESTS / "crd.yaml")
    for name in ("namespace", "rbac"):
        cluster.apply(MANIFESTS / f"{name}.yaml")
    documents = list(yaml.safe_load_all((MANIFESTS / "operator.yaml").read_text()))
    for document in documents:
        if document["kind"] != "Deployment":
            continue
        for container in document["spec"]["template"]["spec"]["containers"]:
            container["image"] = product.OPERATOR
    cluster.apply(documents)
    cluster.kubectl("rollout", "status", "deployment/alignment-operator", "-n", "alignment-system", timeout=180)


def _make_namespace(cluster: Cluster, assets: Assets) -> None:
    cluster.load_image(product.trainer_image(assets, cluster.state / "images" / "trainer.tar"))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    cluster.apply(product.claims(NAMESPACE, cluster.state / "workspace"))


def _write_run(out: Path) -> Path:
    """The quickstart's run, placed in this cluster."""
    run = yaml.safe_load((product.ROOT / "configs" / "quickstart.yaml").read_text())
    run["spec"]["workspace"] = {"claimName": product.WORKSPACE_CLAIM}
    # One pod on each node at a time: they share this machine's cores.
    resources = {"requests": {"cpu": f"{0.75 * (os.cpu_count() or 1):g}"}}
    run["spec"]["template"] = run["spec"].get("template", {}) | product.TEMPLATE | {"resources": resources}
    out.write_text(json.dumps(run, indent=1))
    return out


_TEXT = """
The cluster is up, with the operator in the namespace alignment-system. Try:

  export KUBECONFIG={kubeconfig} PATH={bin}:{venv}:$PATH
  kubectl apply -n {namespace} -f {run}
  kubectl get alignmentruns -n {namespace} --watch
  kubectl get pytorchjobs,pods -n {namespace}
  alignctl status -n {namespace} --run quickstart --watch
  kubectl wait -n {namespace} --for=condition=Succeeded alignmentrun/quickstart --timeout=30m

`make cluster-down` takes everything away.
"""
