"""TrainJobs: what is written, and what is read from them."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from builders import START, make_run, seen, sft
from pods import NOW, owner

from controller.api.backend import BackendName
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseStatus, RunStatus
from controller.api.workspace import Workspace
from controller.backends.cluster import evidence, kinds, observe, pytorchjob, runtimes, trainjob
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.settings import Settings
from controller.commands.cluster.pods import Pod
from controller.kube.answers import ApiError, Conflict
from controller.kube.calls import Call
from controller.kube.resources import TRAINJOBS
from controller.operator.defaults import Defaults
from controller.plan.decide import Apply, decide
from controller.plan.job import NAME_LIMIT, PhaseJob, job_name
from controller.plan.observed import JobState
from controller.projection import TRAINJOB, project

Object = dict[str, Any]

OWNER = Owner("default", "test", "uid-1", "default.test")
SETTINGS = Settings("trainer:1")
WORK = Defaults(workspace=Workspace(claim_name="work"))
QUEUE = "kueue.x-k8s.io/queue-name"


def asked(*phases: Any, **spec: Any) -> PhaseJob:
    run = WORK.applied(make_run(*(phases or (sft("base"),)), **spec))
    [action] = [a for a in decide(run, seen(), START).actions if isinstance(a, Apply)]
    return action.job


def rendered(**spec: Any) -> tuple[Object, Object]:
    """The job and its runtime."""
    job = asked(**spec)
    return trainjob.render(job, OWNER, SETTINGS), trainjob.runtime(job, OWNER, SETTINGS)


def the_job(runtime: Object) -> Object:
    [only] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return only["template"]


def pod_spec(runtime: Object) -> Object:
    return the_job(runtime)["spec"]["template"]["spec"]


def environment(runtime: Object) -> Mapping[str, Any]:
    [container] = pod_spec(runtime)["containers"]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


class TestRender:
    def test_the_job_refers_to_a_runtime_of_its_own(self):
        job, runtime = rendered()
        reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job["metadata"]["name"]}
        assert job["spec"]["runtimeRef"] == reference
        assert (runtime["kind"], runtime["metadata"]["name"]) == ("TrainingRuntime", reference["name"])
        for thing in (job, runtime):
            [whose] = thing["metadata"]["ownerReferences"]
            assert (whose["kind"], whose["uid"], whose["controller"]) == ("AlignmentRun", "uid-1", True)

    def test_nothing_is_said_that_is_a_queues_to_say(self):
        job, runtime = rendered(queueName="gpus", queuePriority="high")
        assert set(job["spec"]) == {"runtimeRef", "trainer"}, "neither suspend, nor managedBy, nor runtimePatches"
        assert job["metadata"]["labels"][QUEUE] == "gpus"
        assert runtime["metadata"]["labels"][QUEUE] == "gpus", "limits of namespaces read it there"
        made = [runtime["spec"]["template"], the_job(runtime), the_job(runtime)["spec"]["template"]]
        assert not [thing for thing in made if QUEUE in thing["metadata"]["labels"]], (
            "one queues the job, not its parts"
        )

    def test_one_failed_pod_ends_it_and_nothing_starts_again(self):
        _, runtime = rendered()
        assert the_job(runtime)["spec"]["backoffLimit"] == 0
        assert pod_spec(runtime)["restartPolicy"] == "Never"
        assert "failurePolicy" not in runtime["spec"]["template"]["spec"]

    def test_the_pods_are_those_of_a_pytorchjob(self):
        """But for what their controllers want otherwise."""
        many: Object = {"nodes": 2, "procsPerNode": 2, "nodeSelector": {"pool": "a"}, "annotations": {"x/y": "z"}}
        job = asked(template=many)
        other = pytorchjob.render(job, OWNER, SETTINGS)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        ours = the_job(trainjob.runtime(job, OWNER, SETTINGS))["spec"]["template"]
        assert ours["metadata"] == other["metadata"]
        assert ours["spec"].keys() - other["spec"].keys() == {"restartPolicy"}
        [mine], [theirs] = ours["spec"].pop("containers"), other["spec"].pop("containers")
        assert {**other["spec"], "restartPolicy": "Never"} == ours["spec"]
        differ = {name for name in mine if mine[name] != theirs[name]}
        assert differ == {"name", "env"}

    def test_all_that_is_made_of_it_has_its_labels(self):
        """By which it is found: the job's, the JobSet's, the Job's, the pods'."""
        job, runtime = rendered()
        made = [job, runtime["spec"]["template"], the_job(runtime), the_job(runtime)["spec"]["template"]]
        for thing in made:
            assert thing["metadata"]["labels"]["alignment.dev/run"] == "test"
            assert thing["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "alignment-operator"

    def test_the_trainer_knows_its_pods(self):
        job, runtime = rendered(template={"nodes": 3})
        assert the_job(runtime)["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
        assert pod_spec(runtime)["containers"][0]["name"] == "node"
        assert (job["spec"]["trainer"], runtime["spec"]["mlPolicy"]) == ({"numNodes": 3}, {"numNodes": 3})


class TestMeeting:
    def test_pods_meet_at_the_first_by_its_name_in_the_jobsets_service(self):
        job, runtime = rendered(template={"nodes": 2, "procsPerNode": 4})
        name, found = job["metadata"]["name"], environment(runtime)
        assert (found["PET_NNODES"], found["PET_NPROC_PER_NODE"]) == ("2", "4")
        assert found["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert found["PET_NODE_RANK"] == {"fieldRef": {"fieldPath": path}}

    def test_processes_of_one_pod_need_no_place_to_meet(self):
        _, runtime = rendered(template={"procsPerNode": 2})
        found = environment(runtime)
        assert (found["PET_NNODES"], found["PET_NPROC_PER_NODE"]) == ("1", "2")
        assert "PET_MASTER_ADDR" not in found

    def test_the_longest_name_leaves_room_for_what_is_made_of_it(self):
        """JobSet refuses what would make names of pods longer than 63."""
        name = job_name("r" * 40, "p" * 30, 10**6)
        assert len(name) == NAME_LIMIT
        assert len(f"{name}-node-0-4095-abcde") <= 63


def job(*conditions: tuple[str, str], suspend: bool = False, **metadata: Any) -> Object:
    found = {
        "kind": "TrainJob",
        "metadata": {
            "name": "test-sft-1", "namespace": "default", "uid": "job-1", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"alignment.dev/phase": "sft", "alignment.dev/attempt": "1"},
            "annotations": {"alignment.dev/digest": "d"}, **metadata,
        },
        "spec": {"suspend": suspend, "trainer": {"numNodes": 2}},
        "status": {
            "conditions": [{"type": t, "status": s, "message": f"{t}!", "lastTransitionTime": NOW} for t, s in conditions]
        },
    }  # fmt: skip
    return project(found, TRAINJOB)


class TestReading:
    def test_its_ends(self):
        assert observe.ended(job()) is None
        assert observe.ended(job(("Suspended", "False"))) is None
        assert observe.ended(job(("Failed", "False"))) is None
        assert observe.ended(job(("Suspended", "False"), ("Complete", "True"))) == "Succeeded"
        assert observe.ended(job(("Failed", "True"))) == "Failed"
        assert observe.finished_at(job(("Failed", "True"))) == datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
        assert observe.finished_at(job()) is None

    def test_its_queue(self):
        assert observe.is_suspended(job(suspend=True))
        assert not observe.is_suspended(job())

    def test_since_when_it_may_have_pods(self):
        made = datetime(2026, 1, 1, tzinfo=UTC)
        assert observe.running_since(job()) == made
        assert observe.running_since(job(("Suspended", "True"), suspend=True)) == made
        assert observe.running_since(job(("Suspended", "False"))) == datetime(2026, 1, 1, 0, 10, tzinfo=UTC)

    def test_how_many_pods_it_has(self):
        assert trainjob.nodes(job()) == 2

    @pytest.mark.parametrize(
        ("name", "place"),
        [("test-sft-1-node-0-0-x7k2p", 0), ("test-sft-1-node-0-12-abcde", 12), ("anything", -1), ("x-1-ABCDE", -1)],
    )
    def test_a_pods_place(self, name: str, place: int):
        made = {"metadata": {"name": name, "ownerReferences": [owner("batch/v1", "Job", "test-sft-1-node-0", "b-1")]}}
        assert evidence.index(made) == place

    def test_a_pod_is_of_the_kind_of_what_made_it(self):
        made = {"metadata": {"ownerReferences": [owner("batch/v1", "Job", "test-sft-1-node-0", "b-1")]}}
        assert kinds.of_pod(made).KIND == "TrainJob"
        assert (Pod(made).job, Pod(made).container) == ("test-sft-1", "node"), "whose log it is"


def begun(**status: Any) -> RunStatus:
    attempt = Attempt(number=1, digest="d", state=AttemptState.RUNNING)
    return RunStatus(phases=(PhaseStatus(name="base", type="sft", attempts=(attempt,)),), **status)


def with_status(run: AlignmentRun, status: RunStatus | None) -> AlignmentRun:
    return run.model_copy(update={"status": status})


class TestChoice:
    TRAINJOBS = Defaults(backend=BackendName.TRAINJOB)

    def of(self, defaults: Defaults, status: RunStatus | None = None, **spec: Any) -> str:
        run = with_status(make_run(sft("base"), **spec), status)
        return kinds.of_run(defaults.applied(run)).KIND

    def test_a_run_says_it_and_else_the_operator(self):
        assert self.of(Defaults()) == "PyTorchJob"
        assert self.of(self.TRAINJOBS) == "TrainJob"
        assert self.of(self.TRAINJOBS, backend="PyTorchJob") == "PyTorchJob"
        assert self.of(Defaults(), backend="TrainJob") == "TrainJob"

    def test_a_run_keeps_what_it_has_begun_with(self):
        assert self.of(Defaults(), begun(backend="TrainJob")) == "TrainJob"
        assert self.of(self.TRAINJOBS, begun(backend="PyTorchJob"), backend="TrainJob") == "PyTorchJob"

    def test_what_began_before_there_was_a_choice_has_pytorchjobs(self):
        assert self.of(self.TRAINJOBS, begun()) == "PyTorchJob"

    def test_what_has_not_begun_may_still_change(self):
        assert self.of(self.TRAINJOBS, RunStatus()) == "TrainJob"

    def test_it_is_told_once_work_has_begun(self):
        run = self.TRAINJOBS.applied(with_status(make_run(sft("base")), RunStatus()))
        assert self.TRAINJOBS.remembered(RunStatus(), run).backend is None
        assert self.TRAINJOBS.remembered(begun(), run).backend == "TrainJob"

    def test_a_run_that_cannot_be_read_is_looked_after_as_what_it_has_begun_as(self):
        run = make_run(sft("base"))
        unread = run.model_copy(
            update={"spec": run.spec.model_construct(phases=()), "status": begun(backend="TrainJob")}
        )
        assert kinds.of_run(unread).KIND == "TrainJob"


class Server:
    """Of runtimes and jobs, with a Trainer that knows a runtime only after some tries."""

    def __init__(self, runtime: Object | None = None, refusals: int = 0) -> None:
        self.runtime, self.refusals, self.jobs = runtime, refusals, 0

    async def get_runtime(self, namespace: str, name: str) -> Object | None:
        return self.runtime

    async def create_runtime(self, runtime: Object) -> Object:
        self.runtime = {**runtime, "metadata": {**runtime["metadata"], "resourceVersion": "1"}}
        return self.runtime

    async def update_runtime(self, runtime: Object) -> Object:
        self.runtime = runtime
        return runtime

    async def create_job(self, kind: Any, job: Object) -> Object:
        assert kind == TRAINJOBS
        if self.refusals:
            self.refusals -= 1
            raise ApiError(Call("create", kind), "x", 403, "must be created before the TrainJob")
        self.jobs += 1
        return {**job, "metadata": {**job["metadata"], "uid": "job-1"}}


class TestRuntimes:
    RUN = make_run(sft("base"))

    def create(self, server: Server, **spec: Any) -> Object:
        run = self.RUN.model_copy(update={"metadata": self.RUN.metadata.model_copy(update={"uid": "uid-1"})})
        wanted, runtime = rendered(**spec)
        api: Any = server
        return asyncio.run(runtimes.create_with(api, run, runtime, TRAINJOBS, wanted))

    def test_it_is_the_jobs_from_then_on(self):
        server = Server()
        made = self.create(server)
        assert server.runtime is not None
        [whose] = server.runtime["metadata"]["ownerReferences"]
        assert (whose["kind"], whose["uid"], whose["controller"]) == ("TrainJob", made["metadata"]["uid"], True)
        assert server.runtime["metadata"]["resourceVersion"] == "1", "nobody's edit is overwritten"

    def test_one_that_is_left_of_another_try_gets_the_settings_of_now(self):
        _, before = rendered(template={"image": "old:1"})
        server = Server(before)
        self.create(server, template={"image": "new:1"})
        assert server.runtime is not None
        assert pod_spec(server.runtime)["containers"][0]["image"] == "new:1"

    def test_somebody_elses_is_left_alone(self):
        _, theirs = rendered()
        theirs["metadata"]["ownerReferences"] = [owner("apps/v1", "Deployment", "web", "w")]
        server = Server(theirs)
        with pytest.raises(runtimes.Taken, match="TrainingRuntime test-base-1 of Deployment web"):
            self.create(server)
        assert (server.runtime, server.jobs) == (theirs, 0)

    def test_the_trainer_has_time_to_notice_a_new_one(self):
        server = Server(refusals=2)
        self.create(server)
        assert server.jobs == 1

    def test_a_refusal_that_stays_is_one(self):
        with pytest.raises(ApiError, match="must be created before"):
            self.create(Server(refusals=9))
        _, there = rendered()
        with pytest.raises(ApiError):  # one that it knows
            self.create(Server(there, refusals=1))

    def test_a_hand_over_that_fails_does_no_harm(self):
        class Edited(Server):
            async def update_runtime(self, runtime: Object) -> Object:
                raise Conflict(Call("update", TRAINJOBS), "x", 409, "changed")

        assert self.create(Edited())["metadata"]["uid"] == "job-1"


def test_an_attempt_whose_job_is_gone_is_on_its_way_out():
    run = with_status(make_run(sft("base")), begun())
    assert observe.leaving(run, {}, START) == []
    [found] = observe.leaving(run, {("base", 1): []}, START)
    assert (found.state, found.leaving, found.uid) == (JobState.LIVE, True, "")
