"""What a whole cluster meets: servers killed, its state restored from a backup, rights and kinds taken away and given back.

Runs are on their way meanwhile. After each they have to end as one that met nothing. `make soak` runs all of it.
"""

import os
import time
from collections.abc import Iterator

import pytest
from cluster.client import Cluster
from cluster.proxy import FaultProxy
from driver import ROOT, OperatorProcess, free_port
from ends import watched_ends
from sweep import Scene, plain

CRD = ROOT / "manifests/base/crd.yaml"
RBAC = ROOT / "manifests/base/rbac.yaml"
WHOLE = bool(os.environ.get("SOAK"))
OTHERS = ("etcd", "kube-controller-manager", "kube-scheduler", "kueue", "kwok")
SERVERS = ("kube-apiserver", "training-operator", *(OTHERS if WHOLE else ()))


@pytest.fixture(scope="module")
def scene(kwok_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    kwok_cluster.define(CRD)
    kwok_cluster.apply(ROOT / "manifests/base/namespace.yaml")
    kwok_cluster.apply(RBAC)
    mine = kwok_cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    with FaultProxy(mine) as proxy, watched_ends(kwok_cluster) as ends:
        operator = OperatorProcess(mine, free_port(), tmp_path_factory.mktemp("disasters") / "log").start()
        scene = Scene(kwok_cluster, proxy, operator, ends)
        leads(scene)
        scene.begin(["still"])
        scene.finish(["still"], 60)
        scene.finish(["still", "none"], 2)  # the last event is told after the last write
        scene.calm = plain(scene.statuses()["still"], "still")
        assert scene.over(["still"])
        yield scene
        scene.operator.stop("kill")


def leads(scene: Scene) -> None:
    scene.cluster.wait(lambda: scene.operator.metric("alignment_operator_leader") == 1, 120, "it leads")


def kubelet(scene: Scene) -> None:
    """Starts the operator again when it has ended, or says that it is not well."""
    assert scene.operator.process is not None
    if scene.operator.process.poll() is None and scene.operator.get("healthz")[0] == 503:
        scene.operator.stop("kill")
    if scene.operator.process.poll() is not None:
        scene.operator.start()


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_is_killed(scene: Scene, server: str):
    names = [f"{server}-{i}" for i in range(4)]
    scene.begin(names)
    for _ in range(2):
        scene.cluster.restart_server(server)
        scene.finish(names, 1.5, lambda: kubelet(scene))
    scene.finish(names, 180, lambda: kubelet(scene))
    assert not (wrong := scene.wrong(dict.fromkeys(names, f"{server} killed"))), "\n".join(wrong)


def test_rights_are_taken_away_and_given_back(scene: Scene):
    names = [f"rights-{i}" for i in range(4)]
    scene.begin(names)
    scene.cluster.kubectl("delete", "clusterrolebinding", "alignment-operator")
    scene.finish(names, 5, lambda: kubelet(scene))
    assert not scene.over(names)
    scene.cluster.apply(RBAC)
    scene.finish(names, 180, lambda: kubelet(scene))
    assert not (wrong := scene.wrong(dict.fromkeys(names, "without rights for 5 s"))), "\n".join(wrong)


@pytest.mark.soak
def test_the_kind_is_deleted_and_defined_again(scene: Scene):
    """All runs go with it, and what is theirs. Applied anew they run as any, once the watchdog has found the watches dead."""
    names = [f"kind-{i}" for i in range(2)]
    scene.begin(names)
    scene.cluster.kubectl("delete", "-f", str(CRD), timeout=120)
    for _ in range(3):
        kubelet(scene)
        time.sleep(1)
    scene.cluster.define(CRD)
    again = [f"defined-{i}" for i in range(4)]
    scene.begin(again)
    scene.finish(again, 240, lambda: kubelet(scene))
    assert not (wrong := scene.wrong(dict.fromkeys(again, "of a kind that was deleted"))), "\n".join(wrong)


def test_etcd_is_restored_from_a_backup(scene: Scene):
    """Runs that have ended since are on their way again, and runs applied since are gone and can be applied again."""
    known, later = [f"known-{i}" for i in range(4)], [f"later-{i}" for i in range(2)]
    scene.begin(known)
    scene.cluster.save("backup")
    scene.begin(later)
    scene.finish([*known, *later], 120, lambda: kubelet(scene))
    assert scene.over([*known, *later])
    leads(scene)
    scene.cluster.restore("backup")
    restored = time.monotonic()
    scene.finish(known, 300, lambda: kubelet(scene))
    print(f"runs of before the backup have ended {time.monotonic() - restored:.0f} s after it was restored")
    assert scene.over(known)
    statuses = scene.statuses()
    assert not {*later} & {*statuses}
    assert [plain(statuses[name], name) for name in known] == [scene.calm] * len(known)
    scene.begin(later)
    scene.finish(later, 120, lambda: kubelet(scene))
    assert scene.over(later)
    jobs = [job["metadata"]["name"] for job in scene.cluster.items("pytorchjobs", "-A")]
    assert all(len([job for job in jobs if job.startswith(f"{name}-")]) == 2 for name in (*known, *later))
