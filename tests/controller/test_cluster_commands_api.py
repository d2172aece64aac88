"""`alignctl` and `kubectl align` against a real API server; the tests write what the operator and a kubelet would."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.client import Cluster
from cluster.proxy import FaultProxy
from cluster_bench import BASE, CREATED, DONE, Bench, attempt, condition, phase

from controller.commands.cluster import follow

pytest.importorskip("kubernetes")


@pytest.fixture
def bench(api_cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    bench = Bench(api_cluster, capsys)
    bench.define_runs()
    yield bench
    api_cluster.delete_namespace(bench.namespace)


# ---------------------------------------------------------------- status


def test_status(bench: Bench) -> None:
    assert bench.call("status") == (
        2,
        f"error: namespace {bench.namespace}: no runs here (another one: -n NAMESPACE)\n",
    )
    bench.run()
    code, output = bench.call("status")
    assert (code, "run helpful in " in output, "is the operator running?" in output) == (0, True, True)
    lost = attempt(1, "Failed", failure="Infrastructure", message="Evicted: disk", node="node-7")
    progress = {"step": 120, "totalSteps": 400, "loss": 0.5, "tokensPerSecond": 1234.5, "etaSeconds": 61}
    bench.write(
        BASE,
        phase("dpo", "Running", lost, attempt(2), progress=progress, startedAt=CREATED),
        phase("reward", "Running", attempt(), queue={"state": "Pending", "message": "no quota for [gpu]"}),
        held={"Stalled": "no progress for 900 s: dpo"}, phase="dpo,reward", progress="1/3 (41%)", startedAt=CREATED,
    )  # fmt: skip
    code, output = bench.call("status")
    assert code == 0
    assert f"run helpful in {bench.namespace}: running (1/3 phases, 41%, " in output
    row = next(line for line in output.splitlines() if line.startswith("dpo "))
    assert row.split()[2:7] == ["Running", "120/400", "0.5000", "1,234", "1m01s"]
    assert "Stalled: no progress for 900 s: dpo\n" in output
    assert "dpo, attempt 1: Infrastructure on node-7: Evicted: disk\n" in output
    assert "reward: queue: Pending: no quota for [gpu]\n" in output


def test_the_newest_run_is_shown_unless_one_is_named(bench: Bench) -> None:
    bench.run("one")
    time.sleep(1.1)  # creation times have seconds
    bench.run("alpha")
    assert "run alpha in" in bench.call("status")[1]
    assert "run one in" in bench.call("status", "--run", "one")[1]
    code, output = bench.call("status", "--run", "on")
    assert (code, output) == (
        2,
        f'error: namespace {bench.namespace}: no run "on" here; runs are: alpha, one (did you mean one?)\n',
    )


def test_a_refused_run_is_told_once(bench: Bench) -> None:
    bench.run()
    refused = {**condition("Accepted", "spec.phases[dpo]: bad"), "status": "False"}
    bench.write(phase="Invalid", conditions=[refused, condition("Failed", "spec.phases[dpo]: bad")])
    output = bench.call("status")[1]
    assert f"run helpful in {bench.namespace}: invalid\n" in output
    assert output.count("spec.phases[dpo]: bad") == 1


@pytest.mark.parametrize(("end", "code"), [("Succeeded", 0), ("Failed", 1)])
def test_watch_ends_with_the_run(bench: Bench, end: str, code: int) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base", progress="0/3 (0%)")
    process = bench.start("status", "--watch")
    assert process.stdout
    assert "base: started" in process.stdout.readline()
    bench.write(phase("base", end, DONE), held={end: "that is all"}, phase=end, progress="1/3 (33%)")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"base: {end.lower()}" in output
    assert f"run helpful in {bench.namespace}: {end.lower()}" in output


def test_ctrl_c_ends_quietly(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    for arguments in (["status", "--watch"], ["logs", "--follow"]):
        process = bench.start(*arguments)
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (130, "")


def test_a_cluster_that_is_away_for_a_while_is_waited_for(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    with FaultProxy(bench.kubeconfig) as proxy:
        bench.kubeconfig = proxy.kubeconfig
        process = bench.start("status", "--watch")
        assert process.stdout
        assert "base: started" in process.stdout.readline()
        away = proxy.break_everything()
        assert "cannot reach http://127.0.0.1:" in process.stdout.readline()
        proxy.remove(away)
        proxy.answer(503, times=1)
        bench.write(phase("base", "Succeeded", DONE), held={"Succeeded": ""}, phase="Succeeded")
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, "base: succeeded" in output) == (0, True)


# ---------------------------------------------------------------- logs


def test_why_there_is_no_log(bench: Bench) -> None:
    bench.run()
    unseen = "phase base was not started: the operator has not seen the run yet\n"
    assert bench.call("logs") == (1, unseen)
    bench.write(phase("base", "Waiting", message="for room"), phase="Waiting")
    assert bench.call("logs") == (1, "phase base was not started: Waiting: for room\n")
    bench.write(phase("base", "Blocked"), held={"Failed": "bad"}, phase="Failed")
    assert bench.call("logs") == (1, "run helpful has ended, and nothing of it has run: bad\n")
    bench.write(BASE, phase("dpo", "Running", attempt()), phase("reward", "Waiting", message="for base"), phase="dpo")
    assert bench.call("logs") == (1, "dpo, attempt 1: its pods have not been made yet\n")
    assert bench.call("logs", "reward") == (1, "phase reward was not started: Waiting: for base\n")
    assert bench.call("logs", "rewrad")[1].endswith("phases are: base, dpo, reward (did you mean reward?)\n")
    gone = "base, attempt 1: its pods are gone and their logs with them. It ended with Succeeded\n"
    assert bench.call("logs", "base") == (1, gone)
    name = bench.pod("dpo")
    assert bench.call("logs") == (1, f"pod {name} does not run yet: not scheduled yet\n")
    unscheduled = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes have a GPU",
    }
    bench.cluster.patch_status("pod", name, bench.namespace, {"conditions": [unscheduled]})
    assert bench.call("logs") == (1, f"pod {name} does not run yet: Unschedulable: 0/2 nodes have a GPU\n")
    assert bench.call("logs", "--pod", "3") == (2, "error: no pod 3 of dpo, attempt 1; its pods are: 0\n")
    assert bench.call("logs", "--attempt", "2")[1] == "dpo, attempt 2: there was none; the last is attempt 1\n"


def test_a_pod_that_waits_for_a_mount_says_which(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    creating = [{"name": "pytorch", "image": "", "imageID": "", "ready": False, "restartCount": 0,
                 "state": {"waiting": {"reason": "ContainerCreating"}}}]  # fmt: skip
    name = bench.pod("base", containerStatuses=creating)
    assert bench.call("logs")[1] == f"pod {name} does not run yet: ContainerCreating\n"
    about = {"kind": "Pod", "name": name, "namespace": bench.namespace}
    about["uid"] = bench.cluster.get("pod", name, "-n", bench.namespace)["metadata"]["uid"]
    for number, message in enumerate(("no such secret", "no such claim")):
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": f"e{number}"}, "involvedObject": about}
        event |= {
            "reason": "FailedMount",
            "type": "Warning",
            "message": message,
            "lastTimestamp": f"2026-01-01T00:00:0{number}Z",
        }
        bench.cluster.apply(event, bench.namespace)
    assert bench.call("logs")[1] == f"pod {name} does not run yet: FailedMount: no such claim\n"


def test_a_log_that_cannot_be_read_is_one_line(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    running = [{"name": "pytorch", "image": "", "imageID": "", "ready": True, "restartCount": 0,
                "state": {"running": {"startedAt": CREATED}}}]  # fmt: skip
    bench.pod("base", node="nowhere", containerStatuses=running)
    code, output = bench.call("logs")
    assert (code, output.count("\n"), output.startswith("error: the log of pod helpful-base-1-")) == (1, 1, True)


def test_following_waits_through_attempts_and_ends_with_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    bench.pod("base", phase="Failed", reason="Evicted", message="disk")
    turn = iter((
        lambda: bench.write(phase("base", "BackingOff", attempt(1, "Failed", failure="Interrupted", message="Evicted"))),
        lambda: bench.cluster.kubectl("delete", "pod", "-n", bench.namespace, "--all", "--force", "--grace-period=0"),
        lambda: bench.pod("base", 2),
        lambda: bench.write(phase("base", "Failed", attempt(2, "Failed")), held={"Failed": ""}, phase="Failed"),
    ))  # fmt: skip
    monkeypatch.setattr(follow, "time", Turns(turn))
    code, output = bench.call("logs", "--follow")
    assert code == 0
    assert output.splitlines() == [
        "pod helpful-base-1-worker-0 never ran: Evicted: disk",
        "base, attempt 1: its pods are gone and their logs with them. It ended with Interrupted: Evicted",
        "pod helpful-base-2-worker-0 does not run yet: not scheduled yet",
    ]


class Turns:
    """In the place of `time`: while the program sleeps, the cluster does the next thing."""

    def __init__(self, turns: Iterator[Callable[[], object]]) -> None:
        self.turns = turns
        self.monotonic = time.monotonic

    def sleep(self, _: float) -> None:
        next(self.turns)()


# ---------------------------------------------------------------- stop and resume


class Operator(threading.Thread):
    """Stops and starts the phase `base` as the spec says."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(daemon=True)
        self.bench = bench
        self.over = threading.Event()

    def __enter__(self) -> "Operator":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        saving = True
        while not self.over.wait(0.3):
            if not self.bench.get()["spec"].get("suspend"):
                self.bench.write(phase("base", "Running", attempt()), phase="base")
            elif saving:
                self.bench.write(
                    phase("base", "Suspended", attempt(1, "Stopping")), held={"Suspended": ""}, phase="Suspended"
                )
                self.over.wait(2)
                saving = False
            else:
                self.bench.write(
                    phase("base", "Suspended", attempt(1, "Stopped")), held={"Suspended": ""}, phase="Suspended"
                )


def test_stop_and_resume(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    with Operator(bench):
        code, output = bench.call("stop")
    assert code == 0
    again = f"--kubeconfig {bench.kubeconfig} -n {bench.namespace} --run helpful"
    assert output.splitlines() == [
        "stopping run helpful: unfinished work is being saved",
        "waiting for base",
        f"stopped; it continues with: alignctl resume {again}",
    ]
    assert f"run helpful in {bench.namespace}: suspended" in bench.call("status")[1]
    with FaultProxy(bench.kubeconfig) as proxy:
        lost, bench.kubeconfig = proxy.lose_answer(method="PATCH"), proxy.kubeconfig
        assert bench.call("stop")[0] == 0, "twice is as good as once"
        bench.kubeconfig = bench.cluster.kubeconfig
    assert lost.hits == 1
    code, output = bench.call("resume")
    assert (code, output) == (0, f"run helpful goes on; watch it with: alignctl status --watch {again}\n")
    assert bench.get()["spec"]["suspend"] is False
    with Operator(bench):
        bench.cluster.wait(lambda: bench.get()["status"]["phase"] == "base")
    assert bench.call("resume")[1] == "run helpful is not stopped: running\n"


def test_stop_of_what_has_ended_or_ends_meanwhile(bench: Bench) -> None:
    bench.run()
    bench.write(phase("base", "Succeeded", DONE), held={"Succeeded": ""}, phase="Succeeded")
    assert bench.call("stop") == (0, "run helpful has ended: succeeded\n")
    assert bench.call("resume") == (0, "run helpful has ended: succeeded\n")
    assert not bench.get()["spec"].get("suspend")


REFUSED = {**condition("Accepted", "spec.x: is wrong"), "status": "False", "reason": "InvalidSpec"}


def retry_of(bench: Bench) -> str:
    return str(bench.get()["metadata"].get("annotations", {}).get("alignment.dev/retry", ""))


def test_retry(bench: Bench) -> None:
    bench.run()
    failed = phase("dpo", "Failed", attempt(1, "Failed", failure="BadInput"), failure="BadInput")
    bench.write(BASE, failed, held={"Failed": "no"}, phase="Failed")
    code, output = bench.call("retry", "helpful")
    assert (code, output.splitlines()[0]) == (0, "run helpful: dpo tries again")
    assert "watch it with: alignctl status --watch " in output
    first = retry_of(bench)
    assert first.isdigit()
    assert "run helpful in" in bench.call("status")[1]
    assert "changed, not seen by the operator yet" in bench.call("status")[1]
    assert bench.call("retry", "helpful", "--from", "dpo")[0] == 0
    number, *names = retry_of(bench).split()
    assert (int(number) > int(first), names) == (True, ["dpo"])
    bench.write(BASE, failed, held={"Failed": "no"}, phase="Failed", retry={"number": 9_999_999_999})
    assert "run helpful: all phases run anew\n" in bench.call("rerun", "helpful")[1]
    assert retry_of(bench) == "10000000000 *"


def test_retry_of_what_cannot_be(bench: Bench) -> None:
    bench.run()
    missed = phase("dpo", "Failed", DONE, failure="GateFailed")
    bench.write(BASE, missed, held={"Failed": "gate"}, phase="Failed")
    code, output = bench.call("retry", "helpful")
    assert (code, output.splitlines()) == (
        0,
        [
            "run helpful has no phase to try again: failed",
            "phase dpo has finished and missed its gate: --from dpo runs it anew",
        ],
    )
    assert bench.call("retry", "helpful", "--from", "dp") == (
        2, 'error: --from: "dp" is not a phase of run helpful; phases are: base, dpo, reward (did you mean dpo?)\n',
    )  # fmt: skip
    assert 'no run "helpfull" here' in bench.call("retry", "helpfull")[1]
    bench.write(BASE, missed, held={"Failed": "gate"}, phase="Failed", retry={"number": 1, "refused": "no such phase"})
    assert "Not tried again: no such phase\n" in bench.call("status")[1]
    assert retry_of(bench) == ""


def test_retry_says_what_it_waits_for(bench: Bench) -> None:
    """It said that phases try again, which a run that is invalid, or a phase that is suspended, does not."""
    bench.run()
    failed = phase("dpo", "Failed", attempt(1, "Failed", failure="BadInput"), failure="BadInput")
    bench.write(BASE, failed, held={"Failed": "no"}, phase="Failed")
    suspended = [{"op": "add", "path": "/spec/phases/1/suspend", "value": True}]
    edit = ("patch", "alignmentrun", "helpful", "-n", bench.namespace)
    bench.cluster.kubectl(*edit, "--type=json", "-p", json.dumps(suspended))
    assert "phase dpo stays suspended: its own `suspend` is true\n" in bench.call("retry", "helpful")[1]
    bench.write(BASE, failed, held={"Failed": "no"}, phase="Invalid")
    refused = [{"op": "replace", "path": "/status/conditions/0", "value": REFUSED}]
    bench.cluster.kubectl(*edit, "--subresource=status", "--type=json", "-p", json.dumps(refused))
    assert "it begins when the run is valid: spec.x: is wrong\n" in bench.call("rerun", "helpful")[1]


def test_a_run_that_is_being_deleted_is_not_tried_again(bench: Bench) -> None:
    bench.run()
    edit = ("patch", "alignmentrun", "helpful", "-n", bench.namespace, "--type=merge", "-p")
    bench.cluster.kubectl(*edit, json.dumps({"metadata": {"finalizers": ["example.com/slow"]}}))
    bench.cluster.kubectl("delete", "alignmentrun", "helpful", "-n", bench.namespace, "--wait=false")
    for command in (("retry", "helpful"), ("retry", "helpful", "--from", "dpo"), ("rerun", "helpful")):
        assert bench.call(*command) == (
            2, "error: run helpful: is being deleted: apply it once more when it is gone\n",
        )  # fmt: skip
    assert retry_of(bench) == ""
    bench.cluster.kubectl(*edit, json.dumps({"metadata": {"finalizers": None}}))


def test_stop_without_an_operator_says_so(bench: Bench) -> None:
    bench.run()
    code, output = bench.call("stop", "--timeout", "1")
    assert code == 1
    assert "the operator has not seen it within 1 s: is it running? The run stays marked to be stopped" in output
    assert bench.get()["spec"]["suspend"] is True


def test_one_of_several_runs_has_to_be_named(bench: Bench) -> None:
    bench.run("one")
    bench.run("two")
    assert bench.call("stop") == (
        2,
        f"error: namespace {bench.namespace}: say which run you mean with --run: one, two\n",
    )
    assert bench.call("resume", "--run", "two")[1] == "run two is not stopped: not seen by the operator yet\n"


# ---------------------------------------------------------------- rights and errors


def test_no_rights_bad_tokens_and_dead_servers_get_one_line(bench: Bench, tmp_path: Path) -> None:
    bench.run()
    bench.kubeconfig = bench.cluster.service_account_kubeconfig(bench.namespace, "default")
    code, output = bench.call("status")
    assert (code, output.count("\n")) == (1, 1)
    assert output.startswith(
        'error: not allowed: alignmentruns.alignment.dev is forbidden: User "system:serviceaccount:'
    )
    good = bench.kubeconfig
    config = json.loads(bench.cluster.kubectl("config", "view", "--raw", "-o", "json", "--kubeconfig", str(good)))
    for change, line in (
        (
            {"users": [{"name": config["users"][0]["name"], "user": {"token": "old"}}]},
            "does not accept your credentials",
        ),
        (
            {"clusters": [{"name": config["clusters"][0]["name"], "cluster": {"server": "https://127.0.0.1:1"}}]},
            "Connection refused",
        ),
    ):
        bench.kubeconfig = tmp_path / "kubeconfig"
        bench.kubeconfig.write_text(json.dumps({**config, **change}))
        code, output = bench.call("logs")
        assert (code, output.count("\n"), line in output) == (1, 1, True), output


def test_these_rights_are_enough(bench: Bench) -> None:
    """What a user needs; events are only read if they may be."""
    rules = [
        {"apiGroups": ["alignment.dev"], "resources": ["alignmentruns"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    rbac, names = "rbac.authorization.k8s.io", {"name": "user"}
    subject = {"kind": "ServiceAccount", "name": "default", "namespace": bench.namespace}
    role = {"kind": "Role", "name": "user", "apiGroup": rbac}
    bench.cluster.apply(
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": names, "rules": rules}, bench.namespace
    )
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": names,
        "subjects": [subject],
        "roleRef": role,
    }
    bench.cluster.apply(binding, bench.namespace)
    bench.run()
    bench.write(phase("base", "Running", attempt()), phase="base")
    name = bench.pod("base")
    bench.kubeconfig = bench.cluster.service_account_kubeconfig(bench.namespace, "default")
    assert bench.call("status")[0] == 0
    assert bench.call("logs") == (1, f"pod {name} does not run yet: not scheduled yet\n")
    assert bench.call("stop", "--timeout", "0")[0] == 1
    assert bench.call("resume")[0] == 0


def test_as_a_plugin_of_kubectl(bench: Bench, tmp_path: Path) -> None:
    """The current context and its namespace, with no option at all."""
    bench.run()
    config = json.loads(bench.cluster.kubectl("config", "view", "--raw", "-o", "json"))
    for context in config["contexts"]:
        context["context"]["namespace"] = bench.namespace
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBECONFIG": f"{tmp_path / 'none'}:{tmp_path / 'kubeconfig'}"}

    def kubectl(*arguments: str) -> tuple[int, str]:
        command = [str(bench.cluster.kubectl_binary), "align", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, output = kubectl("status")
    assert (code, f"run helpful in {bench.namespace}: not seen" in output) == (0, True), output
    assert "Usage: kubectl align logs" in kubectl("logs", "--help")[1]
    assert kubectl("stop", "--timeout", "0")[0] == 1
    assert kubectl("resume")[1] == "run helpful goes on; watch it with: kubectl align status --watch --run helpful\n"
    code, output = kubectl("status", "--workspace", "here")
    assert (code, "no run has been started in this workspace" in output) == (2, True)
