"""PyTorchJobs: what is written, and what is read from them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from builders import START, after, digests, make_run, seen, sft, with_status
from builders import job as attempt
from pods import job, pod, said, terminated

from controller.api.status import QueueState, RunStatus
from controller.api.workspace import Workspace
from controller.backends.cluster import observe
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.pytorchjob import render
from controller.backends.cluster.settings import Settings
from controller.operator.defaults import Defaults
from controller.plan.decide import Apply, decide
from controller.plan.observed import JobState
from trainers.contract import FailureClass, PhaseFile, phase_digest
from trainers.phases import phase_type

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
OWNER = Owner("default", "test", "uid-1", "default.test")
WORK = Defaults(workspace=Workspace(claim_name="work"))
RUNNING = {"startedAt": "2026-01-01T00:01:00Z"}


def rendered(run, now=START, *jobs):
    [action] = [a for a in decide(WORK.applied(run), seen(*jobs), now).actions if isinstance(a, Apply)]
    return render(action.job, OWNER, Settings("trainer:1"))


def worker(document):
    return document["spec"]["pytorchReplicaSpecs"]["Worker"]


def container(document):
    return worker(document)["template"]["spec"]["containers"][0]


def environment(document):
    return {item["name"]: item.get("value") for item in container(document)["env"]}


class TestRender:
    def test_one_process_starts_as_on_one_machine(self):
        document = rendered(make_run(sft("base")))
        assert container(document)["command"] == [
            "python",
            "-m",
            "trainers",
            "sft",
            "--spec",
            "/etc/alignment/phase.json",
        ]
        assert "PET_MASTER_ADDR" not in environment(document)

    def test_variables_by_which_pods_meet_are_there_once(self):
        """The API server refuses a pod that has one of them twice."""
        given = {"env": [{"name": "PET_MASTER_PORT", "value": "1"}, {"name": "A", "value": "1"}], "nodes": 2}
        names = [item["name"] for item in container(rendered(make_run(sft("base"), template=given)))["env"]]
        assert len(names) == len(set(names))
        assert environment(rendered(make_run(sft("base"), template=given)))["PET_MASTER_PORT"] == "23456"

    def test_an_attempt_says_whose_it_is_and_which(self):
        """So that of two that write to one folder the later one may."""
        variables = environment(
            rendered(make_run(sft("base"), template={"env": [{"name": "ALIGNMENT_ATTEMPT", "value": "9"}]}))
        )
        assert (variables["ALIGNMENT_RUN_UID"], variables["ALIGNMENT_ATTEMPT"]) == ("uid-1", "1")

    def test_an_attempt_knows_how_often_it_is_halved(self):
        """By its environment: a trainer that does not know it goes by the settings, which are halved already."""
        run = make_run(sft("base"), template={"env": [{"name": "ALIGNMENT_HALVINGS", "value": "9"}]})
        assert environment(rendered(run))["ALIGNMENT_HALVINGS"] == "0"
        oom = FailureClass.OUT_OF_MEMORY
        failed = attempt(run, "base", 1, JobState.FAILED, failure=oom, finished_at=START)
        run = with_status(run, decide(WORK.applied(run), seen(failed), START))
        assert environment(rendered(run, after(3600), failed))["ALIGNMENT_HALVINGS"] == "1"

    def test_several_pods_meet_at_the_first_worker(self):
        document = rendered(make_run(sft("base"), template={"nodes": 2, "procsPerNode": 4}))
        assert container(document)["command"][:3] == ["python", "-m", "trainers.agent"]
        assert (worker(document)["replicas"], document["spec"]["nprocPerNode"]) == (2, "4")
        assert environment(document)["PET_MASTER_ADDR"] == f"{document['metadata']['name']}-worker-0"
        rank = next(e for e in container(document)["env"] if e["name"] == "PET_NODE_RANK")
        assert "replica-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
        assert environment(document)["PET_RDZV_CONF"] == "timeout=604800", "the startup timeout is what ends their wait"

    def test_every_process_of_a_pod_has_a_port_for_its_metrics(self):
        document = rendered(make_run(sft("base"), template={"procsPerNode": 3}))
        ports = [(port["name"], port["containerPort"]) for port in container(document)["ports"]]
        assert ports == [("metrics", 9400), ("metrics-1", 9401), ("metrics-2", 9402)]

    def test_only_workers_and_never_restarted_by_the_training_operator(self):
        document = rendered(make_run(sft("base")))
        assert list(document["spec"]["pytorchReplicaSpecs"]) == ["Worker"]
        assert worker(document)["restartPolicy"] == "Never"
        assert document["spec"]["runPolicy"] == {"cleanPodPolicy": "Running"}

    def test_the_phase_file_has_the_digest_that_the_planner_expects(self):
        """Else the phase would leave a result that nobody waits for."""
        run = make_run(sft("base", batchSize=7))
        annotations = worker(rendered(run))["template"]["metadata"]["annotations"]
        file = PhaseFile.model_validate_json(annotations["alignment.dev/phase-file"])
        spec = phase_type("sft").spec.model_validate(file.spec)
        assert phase_digest("sft", spec, file.image, {}) == digests(run)["base"]
        assert (file.output, file.base_dir) == ("/workspace/default.test/base", "/workspace")

    def test_an_attempt_after_running_out_of_memory_is_told_to_take_less(self):
        run = WORK.applied(make_run(sft("base")))
        full = attempt(run, "base", 1, JobState.FAILED, failure=FailureClass.OUT_OF_MEMORY, finished_at=START)
        (action,) = decide(run, seen(full), after(100)).actions
        annotations = worker(render(action.job, OWNER, Settings("trainer:1")))["template"]["metadata"]["annotations"]
        file = PhaseFile.model_validate_json(annotations["alignment.dev/phase-file"])
        assert file.spec["parallel"]["microBatchTokens"] == 4096
        assert action.job.digest == digests(run)["base"]

    def test_an_object_store_is_mirrored_in_scratch_space(self):
        document = rendered(make_run(sft("base"), workspace={"uri": "s3://bucket/prefix/"}))
        pod_spec = worker(document)["template"]["spec"]
        assert next(v for v in pod_spec["volumes"] if v["name"] == "workspace")["emptyDir"] == {}
        annotations = worker(document)["template"]["metadata"]["annotations"]
        assert json.loads(annotations["alignment.dev/phase-file"])["remote"] == "s3://bucket/prefix"

    def test_the_run_owns_it(self):
        [owner] = rendered(make_run(sft("base")))["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == (
            "AlignmentRun",
            "test",
            "uid-1",
            True,
        )

    def test_labels_are_on_the_job_and_on_its_pods(self):
        document = rendered(make_run(sft("base"), queueName="gpus", queuePriority="high"))
        for labels in (document["metadata"]["labels"], worker(document)["template"]["metadata"]["labels"]):
            assert labels["alignment.dev/run"] == "test"
            assert labels["alignment.dev/phase"] == "base"
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        assert document["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
        assert "suspend" not in document["spec"]["runPolicy"]

    def test_secrets_go_in_by_reference_only(self):
        document = rendered(make_run(sft("base"), template={"secretRefs": ["hub", "s3"]}))
        assert container(document)["envFrom"] == [{"secretRef": {"name": "hub"}}, {"secretRef": {"name": "s3"}}]

    @pytest.mark.parametrize(
        ("cpu", "procs", "threads"),
        [("8", 2, "4"), ("500m", 1, "1"), (3, 2, "1"), ("2500000u", 1, "2"), ("1e1", 1, "10"), (None, 1, None)],
    )
    def test_threads_are_the_pods_share_of_cores(self, cpu, procs, threads):
        resources = {"limits": {"cpu": cpu}} if cpu else {}
        run = make_run(sft("base"), template={"resources": resources, "procsPerNode": procs})
        assert environment(rendered(run)).get("OMP_NUM_THREADS") == threads

    def test_a_users_own_variables_win_except_over_the_contracts(self):
        mine = [{"name": "OMP_NUM_THREADS", "value": "3"}, {"name": "ALIGNMENT_TERMINATION_LOG", "value": "/x"}]
        found = environment(
            rendered(make_run(sft("base"), template={"env": mine, "resources": {"limits": {"cpu": 8}}}))
        )
        assert (found["OMP_NUM_THREADS"], found["ALIGNMENT_TERMINATION_LOG"]) == ("3", "/dev/termination-log")

    def test_claims_are_mounted(self):
        claims = [{"claimName": "data", "mountPath": "/data", "subPath": "a"}]
        document = rendered(make_run(sft("base"), template={"claims": claims}))
        mount = next(m for m in container(document)["volumeMounts"] if m["mountPath"] == "/data")
        volume = next(v for v in worker(document)["template"]["spec"]["volumes"] if v["name"] == mount["name"])
        assert (mount["readOnly"], mount["subPath"], volume["persistentVolumeClaim"]["claimName"]) == (
            True,
            "a",
            "data",
        )

    def test_lost_nodes_are_given_up_when_the_policy_says(self):
        document = rendered(make_run(sft("base"), failurePolicy={"nodeLostSeconds": 7}))
        lost = [t for t in worker(document)["template"]["spec"]["tolerations"] if t["effect"] == "NoExecute"]
        assert [t["tolerationSeconds"] for t in lost] == [7, 7]


class TestObserve:
    def look(self, document, *pods, queue=None, now=NOW):
        return observe.observed_job(document, pods, queue, now)

    def test_live_until_every_pod_runs(self):
        got = self.look(job("Created", replicas=2), pod(0, running=RUNNING))
        assert (got.state, got.running_since, got.failure) == (JobState.LIVE, None, None)
        got = self.look(job("Created", replicas=2), pod(0, running=RUNNING), pod(1, running=RUNNING))
        assert (got.running_since, got.placed) == (datetime(2026, 1, 1, 0, 1, tzinfo=UTC), 2)

    def test_pods_that_have_found_a_place(self):
        assert self.look(job("Created", replicas=2), pod(0, running=RUNNING), pod(1, "Pending", node="")).placed == 1

    def test_the_reason_is_known_before_the_job_has_failed(self):
        got = self.look(job("Created", "Running"), pod(phase="Failed", terminated=terminated(137, reason="OOMKilled")))
        assert (got.state, got.failure) == (JobState.LIVE, FailureClass.OUT_OF_MEMORY)

    def test_failed_only_when_no_pod_writes_any_more(self):
        broken = pod(0, "Failed", terminated=terminated(2, said("BadInput", "x")))
        saving = pod(1, running=RUNNING)
        saving["metadata"]["deletionTimestamp"] = "2026-01-01T00:11:00Z"
        got = self.look(job("Failed", replicas=2), broken, saving)
        assert (got.state, got.failure) == (JobState.LIVE, FailureClass.BAD_INPUT)
        got = self.look(job("Failed", replicas=2), broken)
        assert (got.state, got.failure, got.message) == (JobState.FAILED, FailureClass.BAD_INPUT, "x")

    def test_a_deleted_job_is_gone_when_nothing_of_it_runs(self):
        """Its pod is on a dead node, and stays Terminating until the node comes back."""
        lost = pod(running=RUNNING)
        lost["metadata"]["deletionTimestamp"] = "2026-01-01T00:09:00Z"
        deleted = job("Running", deletionTimestamp="2026-01-01T00:08:00Z")
        assert observe.is_leaving(deleted, [lost], NOW)
        lost["metadata"]["deletionTimestamp"] = "2026-01-01T00:11:00Z"
        assert not observe.is_leaving(deleted, [lost], NOW)
        assert not observe.is_leaving(job("Running"), [pod(phase="Failed")], NOW)

    def test_a_failed_job_whose_pods_are_gone(self):
        got = self.look(job("Failed"))
        assert (got.state, got.failure) == (JobState.FAILED, FailureClass.INFRASTRUCTURE)
        assert "its pods are gone" in got.message
        assert got.guessed, "one that was seen before counts more"

    def test_a_pod_of_a_job_that_the_queue_stopped_has_not_failed(self):
        got = self.look(job("Suspended", suspend=True, queue="gpus"), pod(phase="Failed", terminated=terminated(143)))
        assert (got.state, got.failure, got.may_start_since) == (JobState.LIVE, None, None)

    def test_a_succeeded_workers_peer_may_still_be_at_work(self):
        got = self.look(
            job("Running", replicas=2), pod(0, "Succeeded", terminated=terminated(0)), pod(1, running=RUNNING)
        )
        assert (got.state, got.failure) == (JobState.LIVE, None)

    def test_pods_that_end_one_after_the_other_have_all_run(self):
        """Else a job of several pods had started too late as soon as its first pod had succeeded."""
        first = pod(0, "Succeeded", terminated=terminated(0))
        got = self.look(job("Running", replicas=2), first, pod(1, running=RUNNING))
        assert got.running_since == datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
        assert self.look(job("Running", replicas=2), first).running_since is None, "its peer has not begun"

    @pytest.mark.parametrize("annotations", [{}, {"alignment.dev/digest": ""}])
    def test_a_job_that_has_lost_its_digest_can_be_written_down(self, annotations):
        """A status leaves out what is empty, and one without a digest could not be read again: the run would be refused."""
        got = self.look(job("Running", annotations=annotations), pod(running=RUNNING))
        decision = decide(make_run({**sft("sft")}), seen(got), START)
        assert RunStatus.model_validate(decision.status.document()) == decision.status

    def test_the_result_is_rank_0s_word(self):
        good = said(None, digest="d", artifactDigest="a", metrics={"loss": 1.5, "bad": float("nan")})
        pods = [pod(0, "Succeeded", terminated=terminated(0, good)), pod(1, "Succeeded", terminated=terminated(0))]
        got = observe.result_of(pods)
        assert (got.digest, got.artifact_digest, got.metrics) == ("d", "a", {"loss": 1.5})
        assert observe.result_of(pods[1:]) is None

    @pytest.mark.parametrize(("failure", "known"), [("GateFailed", True), ("Diverged", False)])
    def test_a_phase_that_missed_its_gates_has_left_a_result(self, failure, known):
        word = said(failure, "gate missed", digest="d", artifactDigest="a", metrics={"loss": 1.5})
        assert (observe.result_of([pod(0, "Failed", terminated=terminated(3, word))]) is not None) == known


class TestQueue:
    def workload(self, **conditions):
        return {"metadata": {"name": "w"}, "status": {"conditions": [
            {"type": kind, "status": status, "message": message} for kind, (status, message) in conditions.items()
        ]}}  # fmt: skip

    CASES = {
        "waits": ({"QuotaReserved": ("False", "insufficient quota for cpu")}, QueueState.PENDING, "insufficient quota for cpu"),
        "reserved": ({"QuotaReserved": ("True", "reserved")}, QueueState.QUOTA_RESERVED, "reserved"),
        "admitted": ({"QuotaReserved": ("True", ""), "Admitted": ("True", "in")}, QueueState.ADMITTED, "in"),
        "preempted": (
            {"QuotaReserved": ("False", "no room"), "Evicted": ("True", "preempted"), "Preempted": ("True", "for high")},
            QueueState.PREEMPTED, "for high; no room",
        ),
        "evicted": ({"Evicted": ("True", "not ready in time")}, QueueState.EVICTED, "not ready in time"),
        "evicted, in the same words": (
            {"QuotaReserved": ("False", "The ClusterQueue is stopped"), "Evicted": ("True", "The ClusterQueue is stopped")},
            QueueState.EVICTED, "The ClusterQueue is stopped",
        ),
        "evicted, in more words": (
            {"QuotaReserved": ("False", "LocalQueue a is stopped"), "Evicted": ("True", "The LocalQueue is stopped")},
            QueueState.EVICTED, "LocalQueue a is stopped",
        ),
        "readmitted": (
            {"QuotaReserved": ("True", ""), "Admitted": ("True", "in"), "Evicted": ("False", ""), "Preempted": ("False", "")},
            QueueState.ADMITTED, "in",
        ),
        "no queue": (
            {"QuotaReserved": ("False", "LocalQueue gpus doesn't exist")},
            QueueState.MISSING, "LocalQueue gpus doesn't exist",
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("name", CASES)
    def test_state(self, name):
        conditions, state, message = self.CASES[name]
        got = observe.queue_status(job(queue="gpus"), self.workload(**conditions), True, NOW)
        assert (got.state, got.message, got.workload) == (state, message, "w")

    def test_a_kueue_that_holds_every_job_is_told_of_one_that_names_no_queue(self):
        """Its own word is that LocalQueue "" does not exist."""
        nameless = self.workload(QuotaReserved=("False", "LocalQueue  doesn't exist"))
        got = observe.queue_status(job(suspend=True), nameless, True, NOW)
        assert (got.state, got.message) == (QueueState.MISSING, observe.NO_QUEUE)
        waits = self.workload(QuotaReserved=("False", "no room"))
        assert observe.queue_status(job(suspend=True), waits, True, NOW).message == "no room"

    def test_nobody_queues_the_job(self):
        born = datetime(2026, 1, 1, tzinfo=UTC)
        assert observe.queue_status(job(queue="gpus"), None, True, born + timedelta(seconds=5)) is None
        off = observe.queue_status(job(queue="gpus"), None, True, NOW)
        absent = observe.queue_status(job(queue="gpus"), None, False, NOW)
        assert (off.state, absent.state) == (QueueState.MISSING, QueueState.MISSING)
        assert "switched off" in off.message
        assert "not installed" in absent.message
        held = observe.queue_status(job(queue="gpus", suspend=True), None, True, NOW)
        assert held.state == QueueState.MISSING
        assert "which waits" in held.message


def test_nothing_of_a_backend_is_in_the_planner():
    """A third backend is to follow."""

    import controller.plan as plan

    for path in Path(plan.__file__).parent.glob("*.py"):
        assert "pytorchjob" not in path.read_text().lower(), path.name
