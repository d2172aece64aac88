"""What a whole cluster meets: servers killed, its state restored from a backup, rights and kinds taken away and given back.

Runs are on their way meanwhile. After each they have to end as one that met nothing. `make soak` runs all of it.
"""

import os
import time
from collections.abc import Iterator

import pytest
from cluster.client import Cluster
from cluster.jobs import KINDS
from cluster.proxy import FaultProxy
from driver import ROOT, OperatorProcess, free_port
from ends import watched_ends
from sweep import Scene, differences, plain

CRD = ROOT / "manifests/base/crd.yaml"
RBAC = ROOT / "manifests/base/rbac.yaml"
WHOLE = bool(os.environ.get("SOAK"))
OTHERS = ("etcd", "kube-controller-manager", "kube-scheduler", "kueue", "kwok", "jobset", "trainer-controller-manager")
LEASES = ("its-own", *(["of-another"] if WHOLE else []))
"""Whose name the Lease of the backup has, for the operator that leads when it is restored."""
WENT_BACK = "is older than its last renewal: a backup was restored"
ANOTHERS = "lease alignment-system/alignment-operator is held by"
TOO_LATE = "lease alignment-system/alignment-operator was not renewed in time"
"""Where the API server was away for longer than a Lease holds."""
SERVERS = ("kube-apiserver", "training-operator", *(OTHERS if WHOLE else ()))


@pytest.fixture(scope="module", params=KINDS if WHOLE else ["PyTorchJob"])
def scene(
    request: pytest.FixtureRequest, kwok_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    kwok_cluster.define(CRD)
    kwok_cluster.apply(ROOT / "manifests/base/namespace.yaml")
    kwok_cluster.apply(RBAC)
    mine = kwok_cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    with FaultProxy(mine) as proxy, watched_ends(kwok_cluster, kind=KINDS[request.param]) as ends:
        operator = OperatorProcess(mine, free_port(), tmp_path_factory.mktemp("disasters") / "log").start()
        scene = Scene(kwok_cluster, proxy, operator, ends, request.param)
        leads(scene)
        [still] = named(scene, "still", 1)
        scene.begin([still])
        scene.finish([still], 60)
        scene.finish([still, "none"], 2)  # the last event is told after the last write
        scene.calm = plain(scene.statuses()[still], still)
        assert scene.over([still])
        yield scene
        scene.operator.stop("kill")


def named(scene: Scene, what: str, count: int) -> list[str]:
    """Short enough for their jobs to be called after them whole."""
    return [f"{what[:18]}-{scene.backend[:2].lower()}-{i}" for i in range(count)]


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
    names = named(scene, server, 4)
    scene.begin(names)
    for _ in range(2):
        scene.cluster.restart_server(server)
        scene.finish(names, 1.5, lambda: kubelet(scene))
    scene.finish(names, 180, lambda: kubelet(scene))
    assert not (wrong := scene.wrong(dict.fromkeys(names, f"{server} killed"))), "\n".join(wrong)


def test_rights_are_taken_away_and_given_back(scene: Scene):
    names = named(scene, "rights", 4)
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
    names = named(scene, "kind", 2)
    scene.begin(names)
    scene.cluster.kubectl("delete", "-f", str(CRD), timeout=120)
    for _ in range(3):
        kubelet(scene)
        time.sleep(1)
    scene.cluster.define(CRD)
    again = named(scene, "defined", 4)
    scene.begin(again)
    scene.finish(again, 240, lambda: kubelet(scene))
    assert not (wrong := scene.wrong(dict.fromkeys(again, "of a kind that was deleted"))), "\n".join(wrong)


@pytest.mark.parametrize("lease", LEASES)
def test_etcd_is_restored_from_a_backup(scene: Scene, lease: str):
    """Runs that have ended since are on their way again, and runs applied since are gone and can be applied again.

    The operator leads all the time, or is another one than at the backup: either way its Lease is not as it was left.
    """
    known, later = named(scene, f"known-{lease}", 4), named(scene, f"later-{lease}", 2)
    scene.begin(known)
    leads(scene)
    scene.cluster.save(label := f"{lease}-{scene.backend}")
    held = holder(scene)
    if lease == "of-another":
        scene.operator.stop("kill")
    scene.begin(later)
    scene.finish([*known, *later], 120, lambda: kubelet(scene))
    assert scene.over([*known, *later])
    leads(scene)
    assert (holder(scene) == held) == (lease == "its-own")
    before = len(scene.operator.log.read_text())
    scene.cluster.restore(label)
    restored = time.monotonic()
    scene.finish(known, 300, lambda: kubelet(scene))
    print(
        f"lease {lease}: runs of before the backup have ended {time.monotonic() - restored:.0f} s after it was restored"
    )
    assert scene.over(known)
    ends = (WENT_BACK, TOO_LATE) if lease == "its-own" else (ANOTHERS, TOO_LATE)
    assert any(end in scene.operator.log.read_text()[before:] for end in ends)
    statuses = scene.statuses()
    assert not {*later} & {*statuses}
    assert [differences(scene.calm, plain(statuses[name], name)) for name in known] == [[]] * len(known)
    scene.begin(later)
    scene.finish(later, 120, lambda: kubelet(scene))
    assert scene.over(later)
    jobs = [job["metadata"]["name"] for job in scene.cluster.items(KINDS[scene.backend].plural, "-A")]
    assert all(len([job for job in jobs if job.startswith(f"{name}-")]) == 2 for name in (*known, *later))


def holder(scene: Scene) -> str:
    return str(scene.cluster.get("lease", "alignment-operator", "-n", "alignment-system")["spec"]["holderIdentity"])
