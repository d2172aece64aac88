"""What becomes of a run when somebody edits it. The kubelet alone is played."""

import json
import re

import pytest
from cluster.client import KubectlError
from driver import Driver, both, both_in_soak, dpo, manifest, sft


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
        said = re.compile(
            "is not in the spec any more: its attempt is being stopped; (pod run-sft-1-[^ ]+ has not ended; )?"
            "job run-sft-1 was deleted and stays until somebody removes its finalizer example.com/slow"
        )
        driver.cluster.wait(
            lambda: said.fullmatch(driver.phase("run", "sft").get("message", "")), 60, "the run says what keeps the job"
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
