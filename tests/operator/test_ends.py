"""How runs end and what they leave: deleted, too late, after their time. The kubelet alone is played."""

from driver import FAST, Driver, both, dpo, manifest, sft


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
