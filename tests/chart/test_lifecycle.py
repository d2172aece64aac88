"""The chart on real nodes: install, test, upgrade and roll back under a run that trains, uninstall without a trace.

All namespaces enforce the restricted Pod Security level.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster.client import Cluster, KubectlError
from cluster.installed import Runs, place_for_runs
from monitoring import prometheus_operator

from chart.helm import CHART, ROOT, HelmError, Loader, Object, helm, one
from chart.inventory import inventory
from chart.release import RELEASE, Release, package, values

pytestmark = [pytest.mark.node, pytest.mark.slow]

CRD = "alignmentruns.alignment.dev"
ROWS = [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 2000}}]
SCRATCH = {"hiddenSize": 32, "numLayers": 2, "tokenizer": {"kind": "word", "vocabSize": 128, "trainOn": ROWS}}


def training(steps: int) -> Object:
    """Two phases, so that whichever operator is there has something to start."""
    data = {"train": ROWS, "maxLength": 32, "packing": False}
    sft = {"data": data, "batchSize": 32, "duration": {"maxSteps": steps}, "checkpoint": {"everySeconds": 1}}
    then = {"data": data, "model": {"phase": "sft"}, "duration": {"maxSteps": 2}}
    return {"model": {"scratch": SCRATCH}, "phases": [{"name": "sft", "sft": sft}, {"name": "then", "sft": then}]}


def previous_version(folder: Path) -> Path:
    """None has been published yet. This stands for it: one replica, an older number, a CRD that lacks a field."""
    source = folder / "previous" / CHART.name
    shutil.copytree(CHART, source)
    chart = yaml.safe_load((source / "Chart.yaml").read_text()) | {"version": "0.0.9", "appVersion": "0.0.9"}
    (source / "Chart.yaml").write_text(yaml.safe_dump(chart))
    text = (source / "values.yaml").read_text()
    (source / "values.yaml").write_text(text.replace("\nreplicaCount: 2\n", "\nreplicaCount: 1\n"))
    crd = yaml.safe_load((source / "files/crd.yaml").read_text())
    del spec_fields(crd)["ttlSecondsAfterFinished"]
    (source / "files/crd.yaml").write_text(yaml.safe_dump(crd))
    return package(source, folder)


def spec_fields(crd: Object) -> Object:
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]


@pytest.fixture(scope="module")
def prepared(fresh_cluster: Cluster) -> Cluster:
    """With the kinds of the Prometheus Operator, and nothing of ours."""
    fresh_cluster.define(prometheus_operator.kinds())
    return fresh_cluster


@pytest.fixture
def runs(prepared: Cluster) -> Iterator[Runs]:
    with place_for_runs(prepared) as place:
        yield place


def test_life_cycle(prepared: Cluster, runs: Runs, tmp_path: Path):
    cluster = prepared
    release = Release(cluster, cluster.namespace("system"), tmp_path)
    chosen, old, new = values(runs.namespace), previous_version(tmp_path), package(CHART, tmp_path)
    before = inventory(cluster)

    notes = release.helm("install", str(old), values=chosen)
    assert f"helm test {RELEASE} --namespace {release.namespace}" in notes
    assert "WARNING" not in notes
    tried = release.test()
    assert f"alignmentrun {RELEASE}-test in namespace {runs.namespace}: succeeded" in tried
    assert cluster.items("arun", "-n", runs.namespace) == [], "the test takes its run away"
    assert release.deployment()["status"]["readyReplicas"] == 1

    # ---- upgrade in the middle of training
    runs.apply("upgraded", training(300))
    runs.until_checkpoint("upgraded", "sft")
    job = cluster.get("pytorchjob", "upgraded-sft-1", "-n", runs.namespace)["metadata"]["uid"]
    first = release.holder()
    release.helm("upgrade", str(new), values=chosen)
    assert release.deployment()["status"]["readyReplicas"] == 2
    assert "ttlSecondsAfterFinished" in spec_fields(cluster.get("crd", CRD))
    goes_on_in_one_attempt(runs, "upgraded", 300)
    assert cluster.get("pytorchjob", "upgraded-sft-1", "-n", runs.namespace)["metadata"]["uid"] == job
    cluster.wait(lambda: release.holder() not in ("", first), 120, "another replica has taken over")

    # ---- roll back in the middle of training
    runs.apply("rolled-back", {**training(301), "ttlSecondsAfterFinished": 86400})
    runs.until_checkpoint("rolled-back", "sft")
    release.helm("rollback", "1")
    assert release.deployment()["spec"]["replicas"] == 1
    assert "ttlSecondsAfterFinished" not in spec_fields(cluster.get("crd", CRD))
    goes_on_in_one_attempt(runs, "rolled-back", 301)

    # ---- away: what people have made stays
    release.helm("uninstall")
    left = inventory(cluster) - before
    assert ("CustomResourceDefinition.apiextensions.k8s.io/v1", "<none>", CRD) in left
    assert {name for kind, _, name in left if kind.startswith("AlignmentRun.")} == {"upgraded", "rolled-back"}
    # Kubernetes makes an APIService for the kind's group.
    kept = (CRD, "v1alpha1.alignment.dev")
    others = {thing for thing in left if thing[1] != runs.namespace and thing[2] not in kept}
    assert gone(cluster, others), others

    # ---- and again, with the same runs in the cluster, this time to leave nothing
    release.helm("install", str(new), values={**chosen, "crds": {"keep": False}})
    cluster.wait(release.holder, 60, "a replica acts")
    assert [len(phase["attempts"]) for phase in runs.status("upgraded")["phases"]] == [1, 1]
    # As the README has it. The garbage collector's watch has just broken with the change of the kind, for seconds.
    cluster.kubectl("delete", "alignmentruns", "--all", "--all-namespaces", timeout=120)
    ours = ("-l", "app.kubernetes.io/managed-by=alignment-operator")
    cluster.kubectl("wait", "--for=delete", "pytorchjobs,pods", *ours, "--all-namespaces", "--timeout=2m", timeout=130)
    release.helm("uninstall")
    assert gone(cluster, inventory(cluster) - before)


def goes_on_in_one_attempt(runs: Runs, name: str, steps: int) -> None:
    status = runs.until_succeeded(name, 150)
    assert [(p["name"], [a["state"] for a in p["attempts"]]) for p in status["phases"]] == [
        ("sft", ["Succeeded"]),
        ("then", ["Succeeded"]),
    ]
    assert runs.result(name, "sft")["steps"] == steps


def gone(cluster: Cluster, things: set[tuple[str, str, str]]) -> bool:
    """Within a minute: what is deleted goes when its owner has."""
    try:
        cluster.wait(lambda: not things & inventory(cluster), 60, "nothing is left", every=2)
    except TimeoutError:
        raise AssertionError(f"left: {sorted(things & inventory(cluster))}") from None
    return True


def test_listed_namespaces_need_no_rights_in_the_cluster(prepared: Cluster, runs: Runs, tmp_path: Path):
    """Installed by somebody who may do nothing outside two namespaces, where the kind is already known."""
    cluster, team = prepared, runs.namespace
    other = cluster.namespace("other")
    home = cluster.namespace("system")
    cluster.apply(ROOT / "manifests/base/crd.yaml")
    cluster.wait(lambda: "alignmentruns" in cluster.kubectl("api-resources", "-o", "name"), 30, "the kind is known")
    release = Release(cluster, home, tmp_path, kubeconfig=installer(cluster, home, team))
    chosen = values(team, watchNamespaces=[team], crds={"enabled": False}, rbac={"aggregate": False})

    release.helm("install", str(CHART), values=chosen)
    account = f"--as=system:serviceaccount:{home}:{RELEASE}"
    for verb, resource in (("list", "alignmentruns"), ("create", "pytorchjobs"), ("list", "pods")):
        assert can(cluster, verb, resource, account, "-n", team)
        for where in (["-n", other], ["-n", home], ["--all-namespaces"]):
            assert not can(cluster, verb, resource, account, *where), (verb, resource, where)
    assert can(cluster, "update", f"leases/{RELEASE}", account, "-n", home)
    assert not can(cluster, "update", "leases/another", account, "-n", home)
    assert not can(cluster, "get", "secrets", account, "-n", team)
    assert f"in namespace {team}: succeeded" in release.test()

    # ---- a second operator: not for the same namespace, but for another
    second = Release(cluster, cluster.namespace("second"), tmp_path, name="second")
    with pytest.raises(
        HelmError, match=f"another operator .release {RELEASE} in namespace {home}. already has namespace {team}"
    ):
        second.helm("install", str(CHART), values=chosen)
    with pytest.raises(HelmError, match=r"exists and cannot be imported|already has"):
        second.helm("install", str(CHART), values=values("", watchNamespaces=[other]))
    with pytest.raises(HelmError, match=rf"already has namespace {team}: uninstall it"):
        second.helm("install", str(CHART), values=values("", crds={"enabled": False}))
    with for_all(cluster), pytest.raises(HelmError, match=r"another operator .* already has all namespaces"):
        second.helm("install", str(CHART), values=values(other, watchNamespaces=[other], crds={"enabled": False}))
    theirs = values(
        other, watchNamespaces=[other], crds={"enabled": False}, fullnameOverride=RELEASE, rbac={"aggregate": False}
    )
    second.helm("install", str(CHART), values=theirs)
    cluster.wait(second.holder, 60, "it acts in its namespace")
    assert release.holder() != second.holder()

    # ---- a test that fails says why, and its run stays to be looked at
    broken = {**theirs, "test": {**theirs["test"], "timeoutSeconds": 5}}
    second.helm("upgrade", str(CHART), values=broken)
    with pytest.raises(HelmError, match="failed"):
        second.helm("test", "--timeout", "60s")
    log = cluster.kubectl("logs", f"{RELEASE}-test", "-n", second.namespace)
    assert f"kubectl describe alignmentrun {RELEASE}-test -n {other}" in log
    assert cluster.items("arun", "-n", other)

    # ---- one that says what nobody understands is refused, not shortened
    typo = {**theirs, "test": {**theirs["test"], "run": {**theirs["test"].get("run", {}), "phazes": []}}}
    second.helm("upgrade", str(CHART), values=typo)
    with pytest.raises(HelmError, match="failed"):
        second.helm("test", "--timeout", "60s")
    assert 'unknown field "spec.phazes"' in cluster.kubectl("logs", f"{RELEASE}-test", "-n", second.namespace)


@contextlib.contextmanager
def for_all(cluster: Cluster) -> Iterator[None]:
    """As if an operator for all namespaces were there."""
    text = helm("template", "everywhere", str(CHART), "--namespace", "elsewhere", "--set", "crds.enabled=false")
    binding = one([d for d in yaml.load_all(text, Loader) if d], "ClusterRoleBinding")
    cluster.apply(binding)
    try:
        yield
    finally:
        cluster.kubectl("delete", "clusterrolebinding", binding["metadata"]["name"])


def installer(cluster: Cluster, *namespaces: str) -> Path:
    """Somebody with all rights in these namespaces and none elsewhere."""
    home = namespaces[0]
    account = {"kind": "ServiceAccount", "name": "installer", "namespace": home}
    cluster.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "installer"}}, home)
    for namespace in namespaces:
        cluster.create(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "installer"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                "subjects": [account],
            },
            namespace,
        )  # fmt: skip
    return cluster.service_account_kubeconfig(home, "installer")


def can(cluster: Cluster, *arguments: str) -> bool:
    try:
        return cluster.kubectl("auth", "can-i", *arguments).strip() == "yes"
    except KubectlError:  # kubectl's way to say no
        return False
