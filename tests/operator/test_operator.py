"""The operator as a process: its rights, its replicas, an API server that misbehaves, what it tells."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.proxy import FaultProxy
from driver import FAST, Driver, OperatorProcess, dpo, manifest, sft
from kueue import quota

from controller.kube.calls import CALLS, LEASE_CALLS, WALL_CALLS
from controller.kube.resources import JOBS, WORKLOADS
from generate.rbac import rules

USER = "system:serviceaccount:alignment-system:alignment-operator"


def by_operator(cluster):
    """Watches are told of when they begin: they go on."""
    return [
        e
        for e in cluster.audited(USER)
        if e["stage"] == ("ResponseStarted" if e["verb"] == "watch" else "ResponseComplete")
    ]


def asked(event):
    what = event.get("objectRef", {})
    resource = what.get("resource", "") + (f"/{what['subresource']}" if what.get("subresource") else "")
    return event["verb"], what.get("apiGroup", ""), resource


class TestRights:
    def test_no_call_is_made_that_is_not_declared_and_none_is_refused(self, driver: Driver):
        driver.apply(manifest("run", sft(), queueName="nobody"))
        driver.until_job("run-sft-1")
        driver.patch("run", {"suspend": True})
        driver.until_condition("run", "Suspended")
        granted = {
            (verb, rule["apiGroups"][0], rule["resources"][0])
            for rule in rules((*CALLS, *WALL_CALLS, *LEASE_CALLS))
            for verb in rule["verbs"]
        }
        made = [e for e in by_operator(driver.cluster) if e.get("objectRef", {}).get("resource")]
        assert {asked(e) for e in made} <= granted
        # Forbidden by a quota or by a namespace that goes away is no question of rights.
        refused = [e for e in made if e.get("annotations", {}).get("authorization.k8s.io/decision") != "allow"]
        assert not [e["requestURI"] for e in refused]

    def test_every_right_is_used(self, driver: Driver):
        """Least privilege: a right that is never needed is taken away. Lists and watches are kopf's."""
        driver.apply(manifest("queued", sft(), queueName="nobody"))
        driver.apply(
            manifest("in-line", sft(), queueName="nobody")
        )  # its Workload is listed once, and then asked for by its name
        driver.apply(manifest("waiting", sft()))  # after ten seconds without a reason, events are asked for one
        driver.until_job("queued-sft-1")
        driver.patch("queued", {"suspend": True})
        driver.until_job("waiting-sft-1")
        named = [thing["metadata"]["name"] for thing in driver.cluster.items("networkpolicies", "-n", driver.namespace)]
        [policy] = [name for name in named if name.startswith("waiting-")]
        patch = '{"spec": {"ingress": []}}'  # for which it is written anew
        driver.cluster.kubectl("patch", "networkpolicy", policy, "-n", driver.namespace, "--type=merge", "-p", patch)
        # One that is gone is asked for by its name, and another is made.
        driver.cluster.kubectl("delete", "pytorchjob", "waiting-sft-1", "-n", driver.namespace)
        driver.until_job("waiting-sft-2")
        # One that may not be made is asked for again and again, each time of the run as it is.
        driver.no_more_jobs()
        driver.apply(manifest("barred", sft()))
        granted = {
            (v, r["apiGroups"][0], r["resources"][0])
            for r in rules((*CALLS, *WALL_CALLS, *LEASE_CALLS))
            for v in r["verbs"]
        }

        def unused():
            return granted - {asked(e) for e in by_operator(driver.cluster)}

        try:
            driver.cluster.wait(lambda: not unused(), 90, "all rights are used")
        except TimeoutError:
            raise AssertionError(f"never used: {unused()}") from None

    def test_secrets_cannot_be_read(self, driver: Driver):
        answer = driver.cluster.kubectl("auth", "can-i", "get", "secrets", "-A", f"--as={USER}", check=False)
        assert answer.strip().startswith("no")

    def test_jobs_are_made_and_deleted_and_changed_only_after_somebody_else_has(self, driver: Driver):
        """To get their owner back; else the operator would fight Kueue over `suspend`."""

        def of_jobs(events):
            found = [e for e in events if e.get("objectRef", {}).get("resource") in ("pytorchjobs", "trainjobs")]
            return [(e["verb"], e["objectRef"].get("namespace"), e["objectRef"].get("name")) for e in found]

        ours, all_of_them = of_jobs(by_operator(driver.cluster)), of_jobs(driver.cluster.audited(verbs=["patch"]))
        assert {verb for verb, *_ in ours} <= {"create", "update", "delete", "get", "list", "watch"}
        changed = {(namespace, name) for verb, namespace, name in ours if verb == "update"}
        assert changed <= {(namespace, name) for _, namespace, name in all_of_them}


class TestTells:
    def test_metrics(self, driver: Driver, operator):
        # Not Infrastructure: so fail the runs of earlier tests, whose namespaces are being deleted.
        before = operator.metric('alignment_operator_attempt_failures_total{class="OutOfMemory",type="sft"}')
        driver.apply(manifest("run", sft()))
        driver.fail("run-sft-1", "OutOfMemory")
        driver.succeed("run-sft-2")
        driver.until_condition("run", "Succeeded")
        runs = f'alignment_operator_runs{{namespace="{driver.namespace}",state="Succeeded"}}'
        driver.cluster.wait(lambda: operator.metric(runs) == 1, 10, "the run is counted")
        after = operator.metric('alignment_operator_attempt_failures_total{class="OutOfMemory",type="sft"}')
        assert after == before + 1
        assert operator.metric('alignment_operator_retries_total{class="OutOfMemory",type="sft"}') >= 1
        assert operator.metric("alignment_operator_phase_duration_seconds_count") >= 1
        assert operator.metric("alignment_operator_reconcile_seconds_count") > 5
        assert operator.metric("alignment_operator_leader") == 1

    def test_logs_are_json(self, driver: Driver, operator):
        driver.apply(manifest("logged", sft()))
        driver.until_job("logged-sft-1")
        line = driver.cluster.wait(
            lambda: next((text for text in operator.log.read_text().splitlines() if driver.namespace in text), None),
            10,
            "a line",
        )
        said = json.loads(line)
        assert (said["run"], said["reason"], said["severity"]) == ("logged", "AttemptStarted", "info")

    def test_events_are_for_transitions_only(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo()))
        driver.start("run-sft-1")
        driver.until_phase("run", "sft", "Running")
        for step in range(5):
            driver.cluster.kubectl("annotate", "arun", "run", "-n", driver.namespace, f"nudge={step}", "--overwrite")
        driver.succeed("run-sft-1")
        driver.succeed("run-dpo-1")
        driver.until_condition("run", "Succeeded")
        driver.cluster.wait(lambda: driver.events("RunSucceeded"), 10, "the last event")
        assert sorted(e["reason"] for e in driver.events()) == [
            "AttemptStarted", "AttemptStarted", "PhaseSucceeded", "PhaseSucceeded", "RunSucceeded",
        ]  # fmt: skip

    def test_a_run_at_rest_is_left_alone(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.succeed("run-sft-1")
        driver.until_condition("run", "Succeeded")
        version = driver.run("run")["metadata"]["resourceVersion"]
        time.sleep(3)
        assert driver.run("run")["metadata"]["resourceVersion"] == version


class TestReplicas:
    def test_only_one_acts_and_another_goes_on(self, driver: Driver, operator, operator_factory):
        """The shared operator leads. A second one waits, and takes over when the first dies without a word."""
        second = operator_factory().start()
        driver.cluster.wait(lambda: second.get("readyz")[0] == 200, 30, "the second is ready")
        assert (operator.metric("alignment_operator_leader"), second.metric("alignment_operator_leader")) == (1, 0)
        driver.apply(manifest("run", sft(), dpo()))
        driver.until_job("run-sft-1")
        assert second.metric("alignment_operator_reconcile_seconds_count") == 0
        operator.stop("kill")
        driver.succeed("run-sft-1")
        driver.cluster.wait(lambda: second.metric("alignment_operator_leader") == 1, 40, "the second leads")
        driver.until_job("run-dpo-1")
        # The first comes back, and the second hands over at once when it is asked to end.
        operator.start()
        driver.cluster.wait(lambda: operator.get("readyz")[0] == 200, 30, "the first is back")
        assert second.stop() == 0
        driver.cluster.wait(lambda: operator.metric("alignment_operator_leader") == 1, 10, "the first leads again")
        driver.succeed("run-dpo-1")
        driver.until_condition("run", "Succeeded")

    def test_a_restart_forgets_nothing(self, driver: Driver, operator):
        policy = {**FAST, "retries": {"infrastructure": 1}}
        driver.apply(manifest("run", sft(), failurePolicy=policy))
        driver.fail("run-sft-1", "Infrastructure", "first")
        driver.until_job("run-sft-2")
        assert operator.stop() == 0
        driver.fail("run-sft-2", "Infrastructure", "second")
        operator.start()
        phase = driver.until_phase("run", "sft", "Failed")
        assert [a["message"] for a in phase["attempts"]] == ["first", "second"]


class TestFaults:
    """An operator behind a proxy that misbehaves, beside the shared one, which is stopped meanwhile."""

    @pytest.fixture
    def faulty(self, driver: Driver, operator, operator_factory):
        operator.stop()
        mine = driver.cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
        with FaultProxy(mine) as proxy:
            running = operator_factory(kubeconfig=proxy.kubeconfig).start()
            driver.cluster.wait(lambda: running.metric("alignment_operator_leader") == 1, 90, "it leads")
            yield proxy, running
            running.stop()  # killed, it would leave a Lease that the next one has to wait for
        operator.start()
        driver.cluster.wait(lambda: operator.metric("alignment_operator_leader") == 1, 40, "the shared one leads again")

    def test_errors_lost_answers_and_conflicts_do_no_harm(self, driver: Driver, faulty):
        proxy, running = faulty
        faults = [
            proxy.answer(500, method="POST", path="/pytorchjobs", times=2),
            proxy.answer(429, method="GET", path="/pods", times=2, retry_after=1),
            proxy.answer(409, method="PUT", path="/status", times=3),
            proxy.lose_answer(method="PUT", path="/alignmentruns/run/status", times=2),
            proxy.lose_answer(method="POST", path="/pytorchjobs", times=1),
            proxy.answer(503, method="POST", path="/events", times=3),
            proxy.refuse(method="GET", path="/alignmentruns/run$", times=2),
        ]
        driver.apply(manifest("run", sft(), dpo()))
        driver.until_job("run-sft-1", timeout=90)  # nearly all of them strike before it: a wait behind each
        driver.succeed("run-sft-1")
        driver.succeed("run-dpo-1")
        driver.until_condition("run", "Succeeded", timeout=60)
        assert driver.job_names() == ["run-dpo-1", "run-sft-1"]
        assert sum(fault.hits for fault in faults) >= 10
        assert running.metric('alignment_operator_reconcile_seconds_count{outcome="bug"}') == 0

    def test_an_edit_meanwhile_is_not_overwritten(self, driver: Driver, faulty):
        """The status is written against the version that was read; a conflict means: look again."""
        proxy, _ = faulty
        driver.apply(manifest("run", sft(), suspend=True))
        driver.until_condition("run", "Suspended")
        proxy.delay(2.0, method="PUT", path="/alignmentruns/run/status", times=1)
        driver.patch("run", {"suspend": False})
        driver.patch("run", {"suspend": True, "seed": 7})
        driver.cluster.wait(
            lambda: driver.status("run")["observedGeneration"] == driver.run("run")["metadata"]["generation"],
            30,
            "it settles",
        )
        driver.until_condition("run", "Suspended")
        driver.cluster.wait(lambda: not driver.jobs(), 20, "no job is left")

    def test_a_dead_watch_is_noticed(self, driver: Driver, operator, operator_factory):
        """The stream stays open and says nothing: kopf reconnects in vain, and only /healthz can tell."""
        from controller.operator import watchdog

        operator.stop()
        mine = driver.cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
        with FaultProxy(mine) as proxy:
            running = operator_factory("--watchdog-seconds", "1", kubeconfig=proxy.kubeconfig).start()
            driver.cluster.wait(lambda: running.metric("alignment_operator_leader") == 1, 90, "it leads")
            driver.apply(manifest("seen", sft()))
            driver.until_job("seen-sft-1")
            compared = 'alignment_operator_api_requests_total{code="200",resource="alignmentruns",verb="watch"}'
            driver.cluster.wait(lambda: running.metric(compared) >= 1, 60, "what it was told has been compared")
            assert running.get("healthz")[0] == 200
            proxy.freeze_watches()
            driver.apply(manifest("unseen", sft()))
            _, said = driver.cluster.wait(
                lambda: (got := running.get("healthz"))[0] == 503 and got, 90, "/healthz says that the watch is dead"
            )
            assert re.search(r"watches are dead: .*alignmentruns", said)
            running.stop()
        assert watchdog.EVERY_SECONDS <= 60
        operator.start()
        driver.until_job("unseen-sft-1")

    def test_an_api_server_that_goes_away_for_a_while(self, driver: Driver, faulty):
        proxy, _ = faulty
        driver.apply(manifest("run", sft()))
        driver.until_job("run-sft-1")
        rule = proxy.refuse(path="", times=10_000)
        driver.succeed("run-sft-1")
        time.sleep(4)
        assert driver.condition("run", "Succeeded")["status"] == "False"
        rule.times = 0
        driver.until_condition("run", "Succeeded", timeout=60)


class TestWithoutTheOperator:
    def test_a_namespace_goes_away(self, driver: Driver, operator):
        """Nothing of a run waits for an operator that has been uninstalled."""
        namespace = Driver(driver.cluster, driver.cluster.namespace("leaving"))
        namespace.apply(manifest("run", sft()))
        namespace.until_pod("run-sft-1-worker-0")
        operator.stop()
        driver.cluster.delete_namespace(namespace.namespace, wait=True)
        operator.start()


def tenant(driver: Driver, *others: str, role: str = "alignment-operator") -> Path:
    """Credentials of an operator with the rights of a ClusterRole in the driver's namespace and in these."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "tenant"}}
    driver.cluster.apply(account, driver.namespace)
    for namespace, granted, kind in (
        *((namespace, role, "ClusterRole") for namespace in (driver.namespace, *others)),
        ("alignment-system", "alignment-operator-leader", "Role"),
    ):
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": f"tenant-{driver.namespace}"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": granted},
            "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": driver.namespace}],
        }  # fmt: skip
        driver.cluster.apply(binding, namespace)
    return driver.cluster.service_account_kubeconfig(driver.namespace, "tenant")


def test_one_that_is_newer_than_its_chart_goes_on_without_the_rights_that_came_since(
    driver: Driver, operator: OperatorProcess, operator_factory: Callable[..., OperatorProcess], request
):
    """To get a Workload by its name, and to update jobs: each look at a run that needed one had ended with the refusal."""
    lacks = {("get", resource) for resource in WORKLOADS} | {("update", resource) for resource in JOBS}
    older = f"older-{driver.namespace}"
    granted = rules(call for call in (*CALLS, *WALL_CALLS) if (call.verb, call.resource) not in lacks)
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"}
    driver.cluster.apply({**kind, "metadata": {"name": older}, "rules": granted})
    request.addfinalizer(lambda: driver.cluster.kubectl("delete", "clusterrole", older))
    operator.stop()
    request.addfinalizer(operator.start)
    mine = tenant(driver, role=older)
    running = operator_factory("--namespace", driver.namespace, "--metrics-readers", "[]", kubeconfig=mine).start()
    driver.cluster.apply(quota(driver.namespace, "1"))
    one_cpu = {"image": "nothing:1", "resources": {"requests": {"cpu": 1}}}
    for name in ("first", "second"):
        driver.apply(manifest(name, sft(), queueName="alignment", template=one_cpu))
        driver.until_job(f"{name}-sft-1")
    for name in ("second", "first"):
        driver.cluster.wait(
            lambda run=name: driver.phase(run, "sft").get("queue", {}).get("workload"), 60, "it is known"
        )
    driver.succeed("first-sft-1")
    driver.until_condition("first", "Succeeded")
    driver.until_condition("second", "Admitted", timeout=60)
    patch = json.dumps([{"op": "remove", "path": "/metadata/ownerReferences"}])
    driver.cluster.kubectl("patch", "pytorchjob", "second-sft-1", "-n", driver.namespace, "--type=json", "-p", patch)
    lost = "somebody took the owner reference away from job second-sft-1"
    driver.cluster.wait(lambda: lost in driver.phase("second", "sft").get("message", ""), 60, lost)
    driver.succeed("second-sft-1")
    driver.until_condition("second", "Succeeded", timeout=60)
    assert running.stop() == 0
    told = [line for line in running.log.read_text().splitlines() if "the operator lacks a right" in line]
    assert len(told) == 2, told
    assert 'cannot get resource \\"workloads\\"' in told[0] and 'cannot update resource \\"pytorchjobs\\"' in told[1]
    assert "; again in" not in running.log.read_text()


class TestNamespaces:
    def test_several_with_rights_in_them_alone(self, driver: Driver, operator, operator_factory):
        """Role bindings in two namespaces instead of one for the cluster."""
        operator.stop()
        second = Driver(driver.cluster, driver.cluster.namespace("second"))
        mine = tenant(driver, second.namespace)
        arguments = ("--namespace", driver.namespace, "--namespace", second.namespace, "--watchdog-seconds", "2")
        running = operator_factory(*arguments, kubeconfig=mine).start()
        for one in (driver, second):
            one.apply(manifest("run", sft()))
            one.until_job("run-sft-1")
            one.succeed("run-sft-1")
            one.until_condition("run", "Succeeded")
        time.sleep(5)
        assert running.get("healthz")[0] == 200
        assert running.stop() == 0
        operator.start()

    def test_one_that_is_deleted_takes_nothing_from_the_others(self, driver: Driver, operator, operator_factory):
        """kopf gives up after a minute of being forbidden to list; the operator would be down for everybody."""
        operator.stop()
        mine = tenant(driver, gone := driver.cluster.namespace("gone"))
        driver.cluster.delete_namespace(gone, wait=True)
        arguments = ("--namespace", gone, "--namespace", driver.namespace, "--watchdog-seconds", "2")
        running = operator_factory(*arguments, kubeconfig=mine).start()
        driver.cluster.wait(lambda: running.get("readyz")[0] == 200, 30, "it is ready")
        driver.apply(manifest("run", sft()))
        driver.succeed("run-sft-1")
        driver.until_condition("run", "Succeeded")
        assert f"namespace {gone} is not watched, it is deleted or lacks the operator's Role" in running.log.read_text()
        assert "could not be checked" not in running.log.read_text()
        # It comes back with its Role: watches begin at a start only.
        driver.cluster.kubectl("create", "namespace", gone)
        tenant(driver, gone)
        assert running.process is not None
        assert running.process.wait(60) == 0
        assert f"namespace {gone} may be read now" in running.log.read_text()
        again = Driver(driver.cluster, gone)
        running.start()
        again.apply(manifest("run", sft()))
        again.until_job("run-sft-1")
        assert running.stop() == 0
        driver.cluster.delete_namespace(gone)
        operator.start()

    def test_only_those_that_are_named(self, driver: Driver, operator, operator_factory):
        operator.stop()
        other = Driver(driver.cluster, driver.cluster.namespace("other"))
        mine = operator_factory("--namespace", driver.namespace).start()
        driver.cluster.wait(lambda: mine.metric("alignment_operator_leader") == 1, 90, "it leads")
        other.apply(manifest("run", sft()))
        driver.apply(manifest("run", sft()))
        driver.until_job("run-sft-1")
        time.sleep(2)
        assert other.jobs() == []
        assert mine.stop() == 0
        operator.start()
        other.until_job("run-sft-1")
