"""The test cluster itself: every tier comes up, does what the other tests rely on, and leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster import launch, requirements
from cluster.assets import locate
from cluster.client import Cluster, KubectlError
from cluster.images import Layer, write_image
from cluster.network import Network
from cluster.processes import wait_for

RESTRICTED_POD = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def pytorchjob(name: str, container: str = "pytorch", replicas: int = 2, queue: str = "", **pod: object) -> dict:
    """A job of workers alone; ``pod`` goes to the container, ``annotations`` to the pods."""
    metadata = {"annotations": pod.pop("annotations", {})}
    spec = {
        "restartPolicy": "Never",
        "securityContext": RESTRICTED_POD,
        "containers": [{"name": container, "image": "local/python:1", "securityContext": RESTRICTED, **pod}],
    }
    worker = {"replicas": replicas, "restartPolicy": "Never", "template": {"metadata": metadata, "spec": spec}}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": {"kueue.x-k8s.io/queue-name": queue} if queue else {}},
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": {"Worker": worker}},
    }


def ended(cluster: Cluster, namespace: str, job: str, how: str, timeout: float = 30) -> None:
    cluster.wait(lambda: cluster.condition("pytorchjob", job, namespace, how), timeout, f"{job} {how}")


def pod(cluster: Cluster, namespace: str, name: str) -> dict:
    return cluster.get("pod", name, "-n", namespace)["status"]


# ---- api


def test_the_real_webhook_refuses_a_job_without_a_pytorch_container(api_cluster: Cluster) -> None:
    with pytest.raises(KubectlError, match="pytorch"):
        api_cluster.apply(pytorchjob("wrong", container="main"), api_cluster.namespace())


def test_the_training_operator_makes_pods_that_stay_pending(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace()
    api_cluster.apply(pytorchjob("good"), namespace)
    api_cluster.wait(lambda: len(api_cluster.items("pods", "-n", namespace)) == 2, 20, "two pods")
    assert pod(api_cluster, namespace, "good-worker-0")["phase"] == "Pending"


def test_a_pod_can_be_ended_by_hand(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace()
    api_cluster.apply(pytorchjob("by-hand", replicas=1), namespace)
    api_cluster.wait(lambda: api_cluster.items("pods", "-n", namespace), 20, "the pod")
    api_cluster.patch_status("pod", "by-hand-worker-0", namespace, {"phase": "Succeeded"})
    ended(api_cluster, namespace, "by-hand", "Succeeded")


def test_what_is_got_is_what_kubectl_shows(api_cluster: Cluster) -> None:
    """Although it is asked of the API server."""
    namespace = api_cluster.namespace()
    api_cluster.apply(pytorchjob("shown", replicas=1), namespace)
    pod = "training.kubeflow.org/job-name=shown"
    api_cluster.wait(lambda: api_cluster.items("pods", "-n", namespace, "-l", pod), 20, "the pod")
    here = ("-n", namespace)
    asked = [
        ("pods", *here, "-l", pod),
        ("pods", *here, "-l", "no=one"),
        ("pytorchjob", "shown", *here),
        ("serviceaccounts", *here),
    ]
    for arguments in (*asked, ("namespace", namespace), ("crd", "pytorchjobs.kubeflow.org"), ("leases", "-A")):
        shown = json.loads(api_cluster.kubectl("get", *arguments, "-o", "json"))
        got = api_cluster.get(*arguments)
        assert got.get("items", got) == shown.get("items", shown), arguments
    with pytest.raises(KubectlError, match="NotFound"):
        api_cluster.get("pod", "nothing", "-n", namespace)


def test_a_namespace_is_restricted_unless_told_otherwise(api_cluster: Cluster) -> None:
    privileged = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "i", "securityContext": {"privileged": True}}]},
    }
    with pytest.raises(KubectlError, match="PodSecurity"):
        api_cluster.apply(privileged, api_cluster.namespace())
    api_cluster.apply(privileged, api_cluster.namespace(restricted=False))


def test_a_service_account_has_its_own_rights_and_is_audited(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace()
    kubeconfig = api_cluster.service_account_kubeconfig(namespace, "default")
    api_cluster.kubectl(f"--kubeconfig={kubeconfig}", "get", "--raw", "/version")
    with pytest.raises(KubectlError, match="Forbidden"):
        api_cluster.kubectl(f"--kubeconfig={kubeconfig}", "get", "secrets")
    refused = api_cluster.audited(f"{namespace}:default", ["list"])
    assert refused[-1]["responseStatus"]["code"] == 403


def queue(cpus: int) -> list[dict]:
    quota = [{"name": "cpu", "nominalQuota": cpus}, {"name": "memory", "nominalQuota": "100Gi"}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": "test", "resources": quota}]}]
    api = "kueue.x-k8s.io/v1beta2"
    return [
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": "test"}},
        {
            "apiVersion": api,
            "kind": "ClusterQueue",
            "metadata": {"name": "test"},
            "spec": {"namespaceSelector": {}, "resourceGroups": groups},
        },
    ]


def test_kueue_admits_what_fits_its_quota(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace()
    local = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "test"}}
    api_cluster.apply([*queue(cpus=3)])
    api_cluster.apply(local | {"spec": {"clusterQueue": "test"}}, namespace)
    resources = {"requests": {"cpu": "1", "memory": "1Gi"}}
    for name in ("first", "second"):
        api_cluster.apply(pytorchjob(name, queue="test", resources=resources), namespace)

    def suspended(name: str) -> bool:
        return api_cluster.get("pytorchjob", name, "-n", namespace)["spec"]["runPolicy"]["suspend"]

    api_cluster.wait(lambda: not suspended("first"), 20, "the first job is admitted")
    assert suspended("second")
    api_cluster.kubectl("delete", "pytorchjob", "first", "-n", namespace)
    api_cluster.wait(lambda: not suspended("second"), 20, "the second job is admitted")


# ---- kwok


def test_pods_on_fake_nodes_succeed(kwok_cluster: Cluster) -> None:
    namespace = kwok_cluster.namespace()
    kwok_cluster.apply(pytorchjob("fine", annotations={"test.alignment.dev/message": "done: all"}), namespace)
    ended(kwok_cluster, namespace, "fine", "Succeeded")
    container = pod(kwok_cluster, namespace, "fine-worker-0")["containerStatuses"][0]["state"]["terminated"]
    assert (container["exitCode"], container["message"]) == (0, "done: all")


def test_a_scripted_failure_has_its_code_and_reason(kwok_cluster: Cluster) -> None:
    namespace = kwok_cluster.namespace()
    script = {"outcome": "fail", "exit_code": "137", "reason": "OOMKilled", "seconds": "300ms"}
    annotations = {f"test.alignment.dev/{key}": value for key, value in script.items()}
    kwok_cluster.apply(pytorchjob("oom", annotations=annotations), namespace)
    ended(kwok_cluster, namespace, "oom", "Failed")
    container = pod(kwok_cluster, namespace, "oom-worker-0")["containerStatuses"][0]["state"]["terminated"]
    assert (container["exitCode"], container["reason"]) == (137, "OOMKilled")


def test_the_environment_scripts_pods_too_and_by_attempt(kwok_cluster: Cluster) -> None:
    namespace = kwok_cluster.namespace()
    env = [{"name": "TEST_POD_OUTCOME", "value": "forever"}, {"name": "TEST_POD_OUTCOME_2", "value": "evict"}]
    for attempt in ("1", "2"):
        job = pytorchjob(f"attempt-{attempt}", replicas=1, env=env)
        template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        template["metadata"]["labels"] = {"alignment.dev/attempt": attempt}
        kwok_cluster.apply(job, namespace)
    ended(kwok_cluster, namespace, "attempt-2", "Failed")
    evicted = pod(kwok_cluster, namespace, "attempt-2-worker-0")
    assert evicted["reason"] == "Evicted"
    assert "DisruptionTarget" in [one["type"] for one in evicted["conditions"]]
    assert pod(kwok_cluster, namespace, "attempt-1-worker-0")["phase"] == "Running"


def test_pods_that_never_start_and_pods_that_are_lost(kwok_cluster: Cluster) -> None:
    namespace = kwok_cluster.namespace()
    for outcome in ("pending", "lost"):
        annotations = {"test.alignment.dev/outcome": outcome}
        kwok_cluster.apply(pytorchjob(outcome, replicas=1, annotations=annotations), namespace)
    kwok_cluster.wait(lambda: pod(kwok_cluster, namespace, "lost-worker-0")["phase"] == "Running", 20, "it runs")
    kwok_cluster.kubectl("delete", "pod", "lost-worker-0", "-n", namespace, "--wait=false")
    bound = pod(kwok_cluster, namespace, "pending-worker-0")
    assert (bound["phase"], bound["conditions"][0]["type"]) == ("Pending", "PodScheduled")
    assert "deletionTimestamp" in kwok_cluster.get("pod", "lost-worker-0", "-n", namespace)["metadata"]


# ---- node

PEERS = textwrap.dedent("""
    import os, pathlib, socket, time
    name = socket.gethostname()
    server = socket.create_server(("", 5000))
    other = name[:-1] + ("1" if name.endswith("0") else "0")
    for _ in range(100):
        try:
            socket.create_connection((other, 5000), timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    else:
        raise SystemExit("the other pod cannot be reached")
    server.accept()
    print(os.getuid(), "reached", other)
""")


def test_two_pods_on_two_nodes_reach_each_other_by_name(node_cluster: Cluster) -> None:
    namespace = node_cluster.namespace()
    job = pytorchjob(
        "peers", command=["python", "-c", PEERS], ports=[{"name": "pytorchjob-port", "containerPort": 23456}]
    )
    spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    spec["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"training.kubeflow.org/job-name": "peers"}},
        }
    ]
    node_cluster.apply(job, namespace)
    ended(node_cluster, namespace, "peers", "Succeeded", 60)
    pods = node_cluster.items("pods", "-n", namespace)
    assert {one["spec"]["nodeName"] for one in pods} == set(node_cluster.nodes)
    assert node_cluster.kubectl("logs", "peers-worker-0", "-n", namespace) == "1000 reached peers-worker-1\n"


def test_an_image_of_our_own_runs(node_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "hello.py").write_text("import os; print(os.environ['GREETING'], os.getuid())")
    base = locate().image("python")
    layer = Layer(tmp_path / "app", "/opt/app")
    entrypoint = ["python", "/opt/app/hello.py"]
    archive = write_image(
        "hello:test",
        [layer],
        tmp_path / "hello.tar",
        base,
        user="1234",
        env={"GREETING": "hello"},
        entrypoint=entrypoint,
    )
    node_cluster.load_image(archive)
    namespace = node_cluster.namespace(restricted=False)
    node_cluster.kubectl("run", "hello", "--image=hello:test", "--restart=Never", "-n", namespace)
    node_cluster.wait(lambda: pod(node_cluster, namespace, "hello")["phase"] == "Succeeded", 30, "it runs")
    assert node_cluster.kubectl("logs", "hello", "-n", namespace) == "hello 1234\n"


def test_memory_over_the_limit_is_a_real_oom_kill(node_cluster: Cluster) -> None:
    namespace = node_cluster.namespace()
    greedy = ["python", "-c", "x = bytearray(200 * 1024**2)"]
    node_cluster.apply(
        pytorchjob("oom", replicas=1, command=greedy, resources={"limits": {"memory": "64Mi"}}), namespace
    )
    ended(node_cluster, namespace, "oom", "Failed", 60)
    container = pod(node_cluster, namespace, "oom-worker-0")["containerStatuses"][0]["state"]["terminated"]
    assert (container["exitCode"], container["reason"]) == (137, "OOMKilled")


def test_a_node_that_loses_power_is_noticed_and_comes_back(node_cluster: Cluster) -> None:
    name = node_cluster.nodes[-1]

    def ready() -> bool:
        return node_cluster.condition("node", name, "default", "Ready")

    node_cluster.kill_node(name)
    node_cluster.wait(lambda: not ready(), 60, f"{name} is NotReady")
    node_cluster.start_node(name)
    node_cluster.wait(ready, 60, f"{name} is Ready again")


# ---- nothing is left

OWNER = """
import os, sys, time
from cluster import launch
running = launch.start(sys.argv[1], 1)
print(running.state, flush=True)
time.sleep(600)
"""


def test_a_killed_owner_leaves_nothing(api_cluster: Cluster) -> None:
    leaves_nothing("api")


def test_a_killed_owner_of_nodes_leaves_nothing(node_cluster: Cluster) -> None:
    leaves_nothing("node")


def leaves_nothing(tier: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tier], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout
    state = Path(owner.stdout.readline().strip())
    assert state.exists()
    assert left_of(state)
    owner.send_signal(signal.SIGKILL)
    wait_for(lambda: not left_of(state), 30, f"nothing of {state} is left")


def test_a_killed_keeper_leaves_nothing_after_the_next_start(api_cluster: Cluster) -> None:
    running = launch.start("api", 0)
    running.process.kill()
    running.process.wait()
    wait_for(lambda: not processes_of(running.state), 10, "its processes end")
    launch.remove_stale()
    assert not left_of(running.state)


def left_of(state: Path) -> list[str]:
    """Whatever exists of a cluster: processes, mounts, its folder; of a slot also namespaces, bridge and cgroups."""
    left = processes_of(state) + [line for line in Path("/proc/mounts").read_text().splitlines() if f"{state}/" in line]
    left += [str(state)] if state.exists() else []
    if state.parent == Path("/var/tmp"):
        network = Network(int(state.name.removeprefix("alignment-cluster") or 0))
        left += [str(path) for path in Path("/run/netns").glob(f"{network.namespace(0)[:-1]}*")]
        left += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{network.name}")]
        left += [path.name for path in Path("/sys/class/net").glob(network.name)]
    return left


def processes_of(state: Path) -> list[str]:
    """By their command lines; the test's own are not among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{state}/" in command or f'"{state}"' in command:
            found.append(command)
    return found


# ---- the fixtures


def run_pytest(test: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One test of this file in a session of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::{test}"]
    without = {key: value for key, value in os.environ.items() if key not in ("CI", "KUBECONFIG")}
    return subprocess.run(command, env=without | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_summary_says_that_a_tier_did_not_run(tmp_path: Path) -> None:
    done = run_pytest("test_audit_events_are_json", ALIGNMENT_CLUSTER_ASSETS=str(tmp_path))
    assert done.returncode == 0
    assert "api tier did NOT run" in done.stdout
    in_ci = run_pytest("test_audit_events_are_json", ALIGNMENT_CLUSTER_ASSETS=str(tmp_path), CI="true")
    assert in_ci.returncode == 1
    assert "lacks binaries (etcd, " in in_ci.stdout


def test_a_named_context_is_used_and_left_clean(api_cluster: Cluster) -> None:
    before = {one["metadata"]["name"] for one in api_cluster.items("namespaces")}
    test = "test_a_namespace_is_restricted_unless_told_otherwise"
    done = run_pytest(test, KUBECONFIG=str(api_cluster.kubeconfig), ALIGNMENT_TEST_CONTEXT="test")
    assert done.returncode == 0, done.stdout

    def left() -> set[str]:
        return {one["metadata"]["name"] for one in api_cluster.items("namespaces")} - before

    assert any(event["verb"] == "delete" for event in api_cluster.audited("admin", ["delete"]))
    api_cluster.wait(lambda: not left(), 60, "the namespaces of the other session go away")


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda program: None if program == "containerd" else program)
    assert "containerd missing; apt-get install containerd" in requirements.missing("node")


def test_audit_events_are_json(api_cluster: Cluster) -> None:
    assert api_cluster.audit_log
    assert json.loads(api_cluster.audit_log.read_text().splitlines()[0])["kind"] == "Event"
