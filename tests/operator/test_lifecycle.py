"""What a user sees of a run's life on a cluster: phases, retries, edits, ends. The kubelet alone is played."""

import json

import pytest
from cluster.client import KubectlError
from cluster.jobs import KINDS
from driver import FAST, ROWS, SOAK, Driver, both, both_in_soak, dpo, manifest, sft


@both
def test_phases_run_in_order_to_success(driver: Driver):
    driver.apply(manifest("run", sft(), dpo()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    assert driver.job_names() == ["run-sft-1"]
    driver.succeed("run-sft-1", metrics={"loss": 1.25})
    driver.succeed("run-dpo-1")
    driver.cluster.kubectl("wait", "--for=condition=Succeeded", "arun/run", "-n", driver.namespace, "--timeout=30s")
    status = driver.status("run")
    assert (status["phase"], status["progress"], status["percent"]) == ("Succeeded", "2/2 (100%)", 100)
    assert driver.phase("run", "sft")["metrics"] == {"loss": 1.25}
    file = json.loads(driver.template("run-dpo-1")["metadata"]["annotations"]["alignment.dev/phase-file"])
    folder = f"{driver.namespace}.run"
    assert status["folder"] == folder
    assert file["inputs"]["sft"] == {"path": f"/workspace/{folder}/sft", "digest": "artifact-of-run-sft-1"}


def test_independent_phases_run_side_by_side(driver: Driver):
    driver.apply(manifest("run", sft(), dpo("a"), dpo("b", beta=0.2)))
    driver.succeed("run-sft-1")
    driver.until_job("run-a-1")
    driver.until_job("run-b-1")
    driver.fail("run-a-1", "BadInput", "no such column")
    driver.until_phase("run", "a", "Failed")
    # What does not need the failed phase goes on.
    assert driver.condition("run", "Failed")["status"] == "False"
    driver.succeed("run-b-1")
    failed = driver.until_condition("run", "Failed")
    assert failed["message"] == "phase a: BadInput: no such column"


RETRIED = {
    "OutOfMemory": ({"outOfMemory": 1}, "OOMKilled: the pod needs more memory than what its node has"),
    "Infrastructure": ({"infrastructure": 1}, "ConnectionError: hub"),
    "Interrupted": ({"interrupted": 1}, "stopped after step 3 of 9; the checkpoint is saved"),
    "Internal": ({"internal": 1}, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize(
    ("driver", "failure"),
    [
        (kind, failure)
        for kind in KINDS
        for failure in RETRIED
        if SOAK or kind == "PyTorchJob" or failure == "OutOfMemory"
    ],
    indirect=["driver"],
)
def test_a_failure_is_tried_again_within_its_classes_budget(driver: Driver, failure: str):
    budget, message = RETRIED[failure]
    none = dict.fromkeys(("outOfMemory", "infrastructure", "interrupted", "internal"), 0)
    driver.apply(manifest("run", sft(), failurePolicy={**FAST, "retries": none | budget}))
    for attempt in (1, 2):
        if failure == "OutOfMemory":
            driver.end(f"run-sft-{attempt}", 137, "", reason="OOMKilled")
        else:
            driver.fail(f"run-sft-{attempt}", failure, message)
    phase = driver.until_phase("run", "sft", "Failed")
    assert (phase["failure"], phase["message"]) == (failure, message)
    assert [a["state"] for a in phase["attempts"]] == ["Failed", "Failed"]
    # The job of the first attempt stays, to be looked at.
    assert driver.job_names() == ["run-sft-1", "run-sft-2"]
    assert len(driver.events("AttemptFailed")) == 1
    assert len(driver.events("PhaseFailed")) == 1


@both_in_soak
@pytest.mark.parametrize("failure", ["BadInput", "GateFailed", "Diverged"])
def test_what_another_attempt_cannot_mend_is_not_tried_again(driver: Driver, failure: str):
    driver.apply(manifest("run", sft(), dpo()))
    driver.fail("run-sft-1", failure, "gate missed: accuracy is 0.4, must be at least 0.5")
    failed = driver.until_condition("run", "Failed")
    assert failed["reason"] == "PhaseFailed"
    assert "accuracy is 0.4, must be at least 0.5" in failed["message"]
    assert driver.phase("run", "dpo")["state"] == "Blocked"
    assert driver.job_names() == ["run-sft-1"]


def test_raising_the_budget_lets_a_failed_run_go_on(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.fail("run-sft-1", "Internal", "RuntimeError: CUDA error: unspecified launch failure")
    driver.until_condition("run", "Failed")
    driver.patch("run", {"failurePolicy": {"retries": {"internal": 1}}})
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")


def annotated(driver: Driver, text: str) -> None:
    name = f"alignment.dev/retry={text}"
    driver.cluster.kubectl("annotate", "--overwrite", "arun/run", name, "-n", driver.namespace)


def test_a_failed_run_tries_again_without_an_edit(driver: Driver):
    driver.apply(manifest("run", sft(), dpo()))
    driver.fail("run-sft-1", "BadInput", "no such file")
    driver.until_condition("run", "Failed")
    generation = driver.run("run")["metadata"]["generation"]
    annotated(driver, "5")
    driver.fail("run-sft-2", "BadInput", "no such file")
    driver.until_condition("run", "Failed")
    # One that was obeyed, or is older, comes back: by a tool that keeps manifests, say.
    annotated(driver, "4 sft")
    annotated(driver, "5")
    annotated(driver, "nonsense")
    driver.cluster.wait(lambda: "refused" in driver.status("run").get("retry", {}), 30, "the nonsense is told")
    assert len(driver.events("RetryRefused")) == 1
    assert driver.job_names() == ["run-sft-1", "run-sft-2"]
    annotated(driver, "6")
    driver.succeed("run-sft-3")
    driver.succeed("run-dpo-1")
    driver.until_condition("run", "Succeeded")
    assert driver.run("run")["metadata"]["generation"] == generation
    assert driver.status("run")["retry"] == {"number": 6}


@both_in_soak
def test_what_has_finished_runs_anew_when_asked_to(driver: Driver):
    driver.apply(manifest("run", sft(), dpo("a"), dpo("b", beta=0.2)))
    for job in ("run-sft-1", "run-a-1", "run-b-1"):
        driver.succeed(job)
    driver.until_condition("run", "Succeeded")
    before = driver.phase("run", "a")["digest"]
    annotated(driver, "1 a")
    driver.start("run-a-2")
    driver.until_phase("run", "a", "Running")
    assert driver.condition("run", "Succeeded")["status"] == "False"
    driver.succeed("run-a-2")
    driver.until_condition("run", "Succeeded")
    assert driver.phase("run", "a")["digest"] != before
    assert driver.job_names() == ["run-a-1", "run-a-2", "run-b-1", "run-sft-1"]
    assert [e["message"] for e in driver.events("PhaseChanged")] == ["phase a: it was asked to, so it runs again"]


@both
def test_a_job_that_someone_deletes_is_a_failure_and_the_next_attempt_follows(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    pod = driver.until_pod_of("run-sft-1")["metadata"]["name"]
    driver.delete_job("run-sft-1")
    driver.cluster.kubectl("delete", "pod", pod, "-n", driver.namespace, "--force", "--ignore-not-found")
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")
    [event] = driver.events("AttemptFailed")
    said = "phase sft, attempt 1 failed: Interrupted: its job was deleted, and not by the operator"
    assert event["message"] == said
    assert driver.job_names() == ["run-sft-2"]


@both
class TestSuspension:
    def test_of_a_run(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo(), suspend=True))
        driver.until_condition("run", "Suspended")
        assert driver.jobs() == []
        driver.patch("run", {"suspend": False})
        driver.start("run-sft-1")
        driver.until_phase("run", "sft", "Running")
        driver.patch("run", {"suspend": True})
        driver.cluster.wait(lambda: not driver.jobs(), 30, "no job is left")
        driver.until_phase("run", "sft", "Suspended")
        driver.patch("run", {"suspend": False})
        # A new attempt, which goes on from what the stopped one has saved; it is no failure.
        driver.succeed("run-sft-2")
        driver.until_job("run-dpo-1")
        assert [a["state"] for a in driver.phase("run", "sft")["attempts"]] == ["Succeeded"]

    def test_of_one_phase(self, driver: Driver):
        driver.apply(manifest("run", sft(), {**dpo("a"), "suspend": True}, dpo("b", beta=0.2)))
        driver.succeed("run-sft-1")
        driver.succeed("run-b-1")
        suspended = driver.until_condition("run", "Suspended")
        assert suspended["message"] == "suspended: a"
        driver.edit_phase("run", {**dpo("a"), "suspend": False})
        driver.succeed("run-a-1")
        driver.until_condition("run", "Succeeded")


@both
def test_a_job_that_somebody_suspends_is_one_that_does_not_begin(driver: Driver):
    """It held up its run for ever, without a word."""
    driver.apply(manifest("run", sft(), failurePolicy={**FAST, "startupTimeoutSeconds": 15}))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    suspended = {"runPolicy": {"suspend": True}} if driver.backend == "PyTorchJob" else {"suspend": True}
    held = ("patch", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--type=merge")
    driver.cluster.kubectl(*held, "-p", json.dumps({"spec": suspended}))
    driver.start("run-sft-2")
    [attempt, _] = driver.phase("run", "sft")["attempts"]
    assert (attempt["state"], attempt["failure"]) == ("Failed", "StartupTimeout")
    assert attempt["message"].startswith(
        "not running after 15 s: its job is suspended, and not by a queue; it goes on when spec."
    )


class TestEdits:
    def test_of_a_phase_that_has_not_begun(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo()))
        driver.start("run-sft-1")
        driver.edit_phase("run", dpo(beta=0.7))
        driver.succeed("run-sft-1")
        annotations = driver.template("run-dpo-1")["metadata"]["annotations"]
        assert json.loads(annotations["alignment.dev/phase-file"])["spec"]["beta"] == 0.7

    @both_in_soak
    def test_of_a_finished_phase_reruns_it_and_what_depends_on_it(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo("a"), dpo("b", beta=0.2), dpo("c", on="a", beta=0.3)))
        for job in ("run-sft-1", "run-a-1", "run-b-1", "run-c-1"):
            driver.succeed(job)
        driver.until_condition("run", "Succeeded")
        driver.edit_phase("run", dpo("a", beta=0.5))
        driver.succeed("run-a-2", artifact="another")
        driver.succeed("run-c-2")
        driver.until_condition("run", "Succeeded")
        assert {e["message"] for e in driver.events("PhaseChanged")} == {
            "phase a: its settings or inputs have changed, so it runs again",
            "phase c: its settings or inputs have changed, so it runs again",
        }
        assert "run-b-2" not in driver.job_names()
        assert "run-sft-2" not in driver.job_names()

    @both
    def test_of_a_running_phase_ends_its_job_and_starts_anew(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.start("run-sft-1")
        driver.until_phase("run", "sft", "Running")
        driver.edit_phase("run", sft(batchSize=4))
        driver.until_job("run-sft-2")
        assert driver.job_names() == ["run-sft-2"]

    @both
    def test_that_removes_a_running_phase_ends_its_job_too(self, driver: Driver):
        driver.apply(manifest("run", sft(), sft("other")))
        driver.start("run-sft-1")
        driver.start("run-other-1")
        driver.until_phase("run", "sft", "Running")
        hold = ("patch", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--type=merge", "-p")
        driver.cluster.kubectl(*hold, json.dumps({"metadata": {"finalizers": ["example.com/slow"]}}))
        driver.patch("run", {"phases": [sft("other")]})
        driver.succeed("run-other-1")
        driver.until_phase("run", "other", "Succeeded")
        said = (
            "is not in the spec any more: its attempt is being stopped; "
            "job run-sft-1 was deleted and stays until somebody removes its finalizer example.com/slow"
        )
        driver.cluster.wait(
            lambda: driver.phase("run", "sft").get("message") == said, 60, "the run says what keeps the job"
        )
        assert driver.condition("run", "Succeeded")["status"] == "False"
        driver.cluster.kubectl(*hold, json.dumps({"metadata": {"finalizers": None}}))
        driver.until_condition("run", "Succeeded", timeout=60)
        assert driver.job_names() == ["run-other-1"]
        assert [p["name"] for p in driver.status("run")["phases"]] == ["other"]

    def test_that_changes_nothing_of_a_result_reruns_nothing(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.succeed("run-sft-1")
        driver.until_condition("run", "Succeeded")
        finished = driver.status("run")["finishedAt"]
        driver.edit_phase("run", sft(checkpoint={"keepLast": 1}))
        generation = driver.run("run")["metadata"]["generation"]
        driver.cluster.wait(lambda: driver.status("run")["observedGeneration"] == generation, 30, "the edit is seen")
        assert driver.job_names() == ["run-sft-1"]
        assert driver.status("run")["finishedAt"] == finished

    def test_that_cannot_be_honoured_is_refused(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.start("run-sft-1")
        driver.until_phase("run", "sft", "Running")
        with pytest.raises(KubectlError, match=r"spec\.workspace cannot be changed once the run has begun"):
            driver.patch("run", {"workspace": {"claimName": "elsewhere"}})


@both
class TestEnds:
    def test_deleting_a_run_deletes_its_jobs_and_pods(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.until_pod_of("run-sft-1")
        driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)
        driver.cluster.wait(lambda: not driver.jobs(), 30, "no job is left")
        driver.cluster.wait(lambda: not driver.cluster.items("pods", "-n", driver.namespace), 30, "no pod is left")

    def test_a_run_of_the_same_name_starts_from_nothing(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        driver.fail("run-sft-1", "BadInput")
        driver.until_condition("run", "Failed")
        driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace, "--cascade=background")
        driver.apply(manifest("run", sft()))
        driver.cluster.wait(
            lambda: any(
                o["uid"] == driver.run("run")["metadata"]["uid"]
                for o in driver.until_job("run-sft-1")["metadata"]["ownerReferences"]
            ), 30, "the new run has a job of its own",
        )  # fmt: skip

    def test_the_runs_deadline(self, driver: Driver):
        driver.apply(manifest("run", sft(), failurePolicy={**FAST, "runDeadlineSeconds": 4}))
        driver.start("run-sft-1")
        failed = driver.until_condition("run", "Failed")
        assert (failed["reason"], failed["message"]) == (
            "DeadlineExceeded",
            "the run took longer than runDeadlineSeconds 4",
        )
        assert driver.jobs() == []

    def test_a_phases_deadline(self, driver: Driver):
        driver.apply(manifest("run", sft(), failurePolicy={**FAST, "phaseDeadlineSeconds": 4}))
        driver.start("run-sft-1")
        failed = driver.until_condition("run", "Failed")
        assert failed["message"] == "phase sft: took longer than phaseDeadlineSeconds 4"

    def test_jobs_go_some_time_after_the_end_and_the_run_stays(self, driver: Driver):
        driver.apply(manifest("run", sft(), ttlSecondsAfterFinished=2))
        driver.succeed("run-sft-1", metrics={"loss": 2})
        driver.until_condition("run", "Succeeded")
        driver.cluster.wait(lambda: not driver.jobs(), 30, "the job is gone")
        assert driver.phase("run", "sft")["metrics"] == {"loss": 2}
        assert driver.condition("run", "Succeeded")["status"] == "True"

    def test_jobs_of_attempts_go_while_the_run_goes_on(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo(), ttlSecondsAfterFinished=3))
        driver.succeed("run-sft-1")
        driver.start("run-dpo-1")
        driver.cluster.wait(lambda: driver.job_names() == ["run-dpo-1"], 40, "the first phase's job is gone")
        driver.succeed("run-dpo-1")
        driver.until_condition("run", "Succeeded")
        driver.cluster.wait(lambda: driver.status("run").get("jobsDeleted"), 30, "nothing is left, and it is known")

    def test_the_run_goes_if_it_says_so(self, driver: Driver):
        driver.apply(manifest("run", sft(), runTtlSecondsAfterFinished=2))
        driver.succeed("run-sft-1")
        runs = ("get", "arun", "-n", driver.namespace, "-o", "name")
        # Nobody who looks now and then has to have seen its end.
        driver.cluster.wait(lambda: not driver.cluster.kubectl(*runs).strip(), 60, "the run is gone")
        assert driver.events("RunSucceeded")
        driver.cluster.wait(lambda: not driver.jobs(), 30, "and its job")

    def test_nothing_keeps_a_namespace(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        job = driver.until_job("run-sft-1")
        for thing in (job, driver.run("run")):
            assert "finalizers" not in thing["metadata"]
            assert not [a for a in thing["metadata"].get("annotations", {}) if "kopf" in a]


@both
class TestStart:
    def test_pods_that_never_run_are_given_up(self, driver: Driver):
        policy = {**FAST, "startupTimeoutSeconds": 3, "retries": {"startupTimeout": 1}}
        driver.apply(manifest("run", sft(), failurePolicy=policy))
        wait = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nothing:1"'}
        driver.write("run-sft-1", 0, "Pending", {"waiting": wait})
        phase = driver.until_phase("run", "sft", "Failed")
        assert phase["failure"] == "StartupTimeout"
        assert [a["failure"] for a in phase["attempts"]] == ["StartupTimeout", "StartupTimeout"]
        assert phase["attempts"][0]["message"].startswith("not running after 3 s: ImagePullBackOff nothing:1: Back-off")

    def test_what_a_pod_waits_for_is_told_meanwhile(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        pod = driver.until_pod_of("run-sft-1")["metadata"]["name"]
        status = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                  "message": 'persistentvolumeclaim "work" not found'}]}  # fmt: skip
        driver.cluster.patch_status("pod", pod, driver.namespace, status)
        told = 'Unschedulable: persistentvolumeclaim "work" not found'
        driver.cluster.wait(lambda: driver.phase("run", "sft").get("message") == told, 30, told)

    def test_a_full_quota_is_waited_for(self, driver: Driver):
        """It ended runs once, after 380 seconds."""
        driver.no_more_jobs()
        driver.apply(manifest("run", sft(), failurePolicy={**FAST, "retries": {"infrastructure": 0}}))
        driver.until_condition("run", "Progressing", reason="JobForbidden", message="exceeded quota: none")
        assert len(driver.events("JobForbidden")) == 1
        driver.cluster.kubectl("delete", "resourcequota", "none", "-n", driver.namespace)
        driver.until_job("run-sft-1")
        assert len(driver.phase("run", "sft")["attempts"]) == 1

    def test_pods_that_may_not_be_made(self, driver: Driver):
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-pods"},
                 "spec": {"hard": {"pods": "0"}}}  # fmt: skip
        driver.cluster.apply(quota, driver.namespace)
        driver.cluster.wait(
            lambda: driver.cluster.get("resourcequota", "no-pods", "-n", driver.namespace).get("status", {}).get("hard"),
            30, "the quota holds",
        )  # fmt: skip
        driver.apply(manifest("run", sft()))
        driver.cluster.wait(
            lambda: "exceeded quota: no-pods" in driver.phase("run", "sft").get("message", ""), 60, "the quota is named"
        )


class TestRefusals:
    """At `kubectl apply`, by the CRD alone."""

    CASES = {
        "two members": ({"name": "x", "sft": {"data": ROWS}, "dpo": dpo()["dpo"]}, "a phase has exactly one of"),
        "a reference to nothing": (dpo("x", on="nobody"), "dpo.policy.phase: not a phase of this run"),
        "itself": (dpo("x", on="x"), "dpo.policy.phase: a phase cannot refer to itself"),
        "a field of the wrong kind": (sft("x", batchSize="many"), "batchSize"),
        "a value out of bounds": (dpo("x", beta=-1), "beta"),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_at_apply(self, driver: Driver, name: str):
        phase, message = self.CASES[name]
        with pytest.raises(KubectlError) as caught:
            driver.apply(manifest("run", sft(), phase))
        assert message in str(caught.value)

    SPECS = {
        "a quantity that is none": (
            {"template": {"resources": {"limits": {"memory": "64 GB"}}}},
            "template.resources.limits.memory",
        ),
        "a variable that cannot be": ({"template": {"env": [{"name": "A B", "value": "x"}]}}, "template.env[0].name"),
        "an image that cannot be": ({"template": {"image": "My Image"}}, "template.image"),
        "no address": ({"workspace": {"uri": "bucket/prefix"}}, "workspace.uri"),
        "two workspaces": ({"workspace": {"uri": "s3://b/p", "claimName": "c"}}, "set exactly one of claimName, uri"),
        "no source of rows": (
            {"phases": [sft(data={"train": [{"limit": 3}]})]},
            "set exactly one of files, hub, synthetic",
        ),
        "no source of a model": ({"model": {"revision": "main"}}, "set exactly one of phase, source, scratch"),
        "no pods": ({"template": {"nodes": 0}}, "template.nodes"),
    }

    @pytest.mark.parametrize("name", SPECS)
    def test_at_apply_outside_the_phases(self, driver: Driver, name: str):
        spec, message = self.SPECS[name]
        with pytest.raises(KubectlError) as caught:
            driver.apply(manifest("run", sft(), **spec))
        assert message in str(caught.value)

    @pytest.mark.parametrize("name", ["a.b", "Upper", "x" * 41])
    def test_names_that_jobs_cannot_be_named_after(self, driver: Driver, name: str):
        with pytest.raises(KubectlError, match=r"metadata\.name"):
            driver.apply(manifest(name, sft()))

    def test_an_unknown_field_is_refused(self, driver: Driver):
        run = json.dumps(manifest("run", sft("x", learningRate=1)))
        with pytest.raises(KubectlError, match="learningRate"):
            driver.cluster.kubectl("create", "-n", driver.namespace, "--validate=strict", "-f", "-", input=run)

    def test_a_loop_is_told_on_the_run(self, driver: Driver):
        driver.apply(manifest("run", dpo("a", on="b"), dpo("b", on="a")))
        accepted = driver.until_condition("run", "Accepted", "False")
        assert "these phases wait for each other: a -> b -> a" in accepted["message"]
        driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)

    def test_a_run_without_a_workspace_or_image_is_told_so(self, driver: Driver):
        run = manifest("run", sft())
        del run["spec"]["workspace"], run["spec"]["template"]
        driver.apply(run)
        accepted = driver.until_condition("run", "Accepted", "False")
        assert "spec.workspace: is not set" in accepted["message"]
        assert "spec.phases[sft].template.image: is not set" in accepted["message"]
        driver.patch("run", {"workspace": {"claimName": "w"}, "template": {"image": "i:1"}})
        driver.until_job("run-sft-1")
        assert driver.condition("run", "Accepted")["status"] == "True"
