"""Whose a pod is that a TrainJob's JobSet's Job has made: by controllers, link for link, and by nothing else."""

import asyncio
from typing import Any

import pytest
from builders import START, make_run, seen, sft
from pods import NOW, owner, said, terminated
from test_ownership import EARLIER, MINE, WEB, NoFigures, Object, labelled, stored

from controller.api.run import AlignmentRun
from controller.api.status import AttemptState
from controller.backends.cluster.backend import ClusterBackend
from controller.backends.cluster.settings import Settings
from controller.kube.resources import BATCH_JOBS, JOBSETS, PODS, PYTORCHJOBS, TRAINJOBS, Resource
from controller.memory import Memory
from controller.plan.decide import decide
from controller.plan.observed import JobState, Observed
from trainers.contract import FailureClass

NAME = "test-sft-1"
MAKER = owner("batch/v1", "Job", f"{NAME}-node-0", "batch-1")
SET = owner("jobset.x-k8s.io/v1alpha2", "JobSet", NAME, "set-1")
JOB = owner("trainer.kubeflow.org/v1alpha1", "TrainJob", NAME, "job-1")


class Shelf:
    """What an API server holds, by kind."""

    def __init__(self, **things: list[Object]) -> None:
        kinds = {
            "trainjobs": TRAINJOBS,
            "pytorchjobs": PYTORCHJOBS,
            "jobsets": JOBSETS,
            "jobs": BATCH_JOBS,
            "pods": PODS,
        }
        self.things = {kind: [stored(thing) for thing in things.get(name, ())] for name, kind in kinds.items()}
        self.deleted: list[tuple[str, str, str]] = []
        self.told_of: list[str] = []

    async def list_jobs(self, kind: Resource, namespace: str, labels: Object) -> list[Object]:
        return [t for t in self.things[kind] if labels.items() <= t["metadata"]["labels"].items()]

    async def list_pods(self, namespace: str, labels: Object) -> list[Object]:
        return await self.list_jobs(PODS, namespace, labels)

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None:
        return next((t for t in self.things[kind] if t["metadata"]["name"] == name), None)

    async def delete_job(self, kind: Resource, namespace: str, name: str, uid: str, propagation: str) -> None:
        self.deleted.append((name, uid, propagation))

    async def list_warnings(self, namespace: str, uid: str) -> list[Object]:
        self.told_of.append(uid)
        said = {"reason": "FailedCreate", "message": "exceeded quota", "metadata": {"creationTimestamp": NOW}}
        return [said] if uid == "batch-1" else []


def thing(name: str, uid: str, *owners: Object, labels: Object | None = None, **more: Any) -> Object:
    metadata = {"name": name, "uid": uid, "labels": labelled() if labels is None else labels, "creationTimestamp": NOW}
    return {"metadata": {**metadata, "ownerReferences": list(owners), **more}}


def train_job(*owners: Object, ended: str = "", uid: str = "job-1") -> Object:
    conditions = [{"type": ended, "status": "True", "lastTransitionTime": NOW}] if ended else []
    found = thing(NAME, uid, *owners, annotations={"alignment.dev/digest": "d"})
    return {**found, "kind": "TrainJob", "spec": {"trainer": {"numNodes": 1}}, "status": {"conditions": conditions}}


def a_pod(maker: Object = MAKER, state: Object | None = None, phase: str = "Running", **metadata: Any) -> Object:
    state = state or {"running": {"startedAt": NOW}}
    return {
        **thing(f"{NAME}-node-0-0-abcde", "pod-1", maker, **metadata),
        "spec": {"nodeName": "node-1", "containers": [{"name": "node", "image": "i:1"}]},
        "status": {"phase": phase, "containerStatuses": [{"name": "node", "state": state}]},
    }


BETWEEN: dict[str, list[Object]] = {
    "jobsets": [thing(NAME, "set-1", JOB)], "jobs": [thing(f"{NAME}-node-0", "batch-1", SET)],
}  # fmt: skip
DONE = a_pod(
    state={"terminated": terminated(0, said(None, digest="d", artifactDigest="a", metrics={}))}, phase="Succeeded",
    labels=labelled(**{"jobset.sigs.k8s.io/jobset-name": NAME}),
)  # fmt: skip
BARE = a_pod(
    state=DONE["status"]["containerStatuses"][0]["state"],
    phase="Succeeded",
    labels={"jobset.sigs.k8s.io/jobset-name": NAME},
)


def a_run(state: AttemptState | None = AttemptState.RUNNING) -> AlignmentRun:
    """With an attempt in this state; None: it has not begun."""
    run = make_run(sft("sft"), workspace={"claimName": "w"}, template={"image": "i:1"}, backend="TrainJob")
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": "run-1", "namespace": "default"})})
    if state is None:
        return run
    status = decide(run, seen(), START).status
    [phase] = status.phases
    attempt = phase.attempts[0].model_copy(update={"job": NAME, "state": state})
    return run.model_copy(
        update={"status": status.model_copy(update={"phases": (phase.model_copy(update={"attempts": (attempt,)}),)})}
    )


def backend(shelf: Shelf) -> ClusterBackend:
    api: Any = shelf
    figures: Any = NoFigures()
    memory = Memory(api)
    for kind, things in shelf.things.items():
        memory.saw(kind, things)
    return ClusterBackend(api, memory, figures, Settings())


def look(shelf: Shelf, run: AlignmentRun | None = None) -> Observed:
    asked, run = backend(shelf), run or a_run()
    found = asyncio.run(asked.observe(run))
    assert asyncio.run(asked.observe(run, anew=False)) == found
    return found


class TestChain:
    def test_what_the_jobs_own_pods_say_counts(self):
        found = look(Shelf(trainjobs=[train_job(MINE, ended="Complete")], pods=[DONE], **BETWEEN))
        assert found.results["sft"].artifact_digest == "a"

    @pytest.mark.parametrize(
        "between",
        [
            {"jobsets": [thing(NAME, "set-1", JOB)], "jobs": [thing(f"{NAME}-node-0", "batch-1", WEB)]},
            {"jobsets": [thing(NAME, "set-1", WEB)], "jobs": [thing(f"{NAME}-node-0", "batch-1", SET)]},
            {"jobsets": [thing(NAME, "set-9", JOB)], "jobs": [thing(f"{NAME}-node-0", "batch-1", SET)]},
            {"jobsets": [thing(NAME, "set-1", {**JOB, "uid": "job-9"})], "jobs": BETWEEN["jobs"]},
            {"jobsets": [], "jobs": []},
            {"jobsets": [], "jobs": [thing("x", "batch-1", {**MAKER, "uid": "batch-1"})]},
        ],
        ids=["a job of another", "a set of another", "another set", "another job", "nothing", "a circle"],
    )
    def test_a_broken_link_makes_it_nobodys_word(self, between: dict[str, list[Object]]):
        assert look(Shelf(trainjobs=[train_job(MINE, ended="Complete")], pods=[DONE], **between)).results == {}

    @pytest.mark.parametrize(("pod", "lost"), [(DONE, "what has made Pod"), (BARE, "Pod")], ids=["above", "the pod"])
    def test_what_has_lost_our_labels_is_found_link_for_link(self, pod: Object, lost: str):
        between = {
            kind: [{**one, "metadata": {**one["metadata"], "labels": {}}} for one in BETWEEN[kind]] for kind in BETWEEN
        }
        observed = look(Shelf(trainjobs=[train_job(MINE, ended="Complete")], pods=[pod], **between))
        assert observed.results["sft"].artifact_digest == "a"
        assert observed.jobs[0].unlabelled == (f"{lost} {NAME}-node-0-0-abcde",)

    def test_a_circle_of_controllers_ends(self):
        """Who may write owner references could have kept a worker of the operator busy for ever."""
        there = [thing(f"{NAME}-node-0", "batch-1", MAKER)]
        assert look(Shelf(pods=[a_pod()], jobs=there), a_run(None)).held == {}

    def test_a_failure_is_read_as_anywhere(self):
        killed = a_pod(state={"terminated": terminated(137, reason="OOMKilled")}, phase="Failed")
        [job] = look(Shelf(trainjobs=[train_job(MINE, ended="Failed")], pods=[killed], **BETWEEN)).jobs
        assert (job.state, job.failure, job.node) == (JobState.FAILED, FailureClass.OUT_OF_MEMORY, "node-1")

    def test_what_keeps_pods_from_being_made_is_asked_of_what_makes_them(self):
        shelf = Shelf(trainjobs=[train_job(MINE)], **BETWEEN)
        [job] = look(shelf).jobs
        assert job.message == "FailedCreate: exceeded quota"
        assert set(shelf.told_of) == {"job-1", "set-1", "batch-1"}


LEAVING = "2999-01-01T00:00:00Z"
"""When its grace is over."""


class TestLeaving:
    """A TrainJob is gone at once when it is deleted, its pods go on."""

    def test_what_we_ended_is_over_when_its_pods_are(self):
        run, saving = a_run(AttemptState.STOPPING), a_pod(deletionTimestamp=LEAVING)
        [job] = look(Shelf(pods=[saving]), run).jobs
        assert (job.state, job.leaving, job.attempt) == (JobState.LIVE, True, 1)
        gone = a_pod(deletionTimestamp=NOW)
        assert look(Shelf(pods=[gone]), run).jobs == ()

    def test_it_is_not_asked_to_end_twice(self):
        run, shelf = a_run(AttemptState.STOPPING), Shelf(pods=[a_pod(deletionTimestamp=LEAVING)])
        [job] = look(shelf, run).jobs
        asyncio.run(backend(shelf).delete(run, "sft", 1, job))
        assert shelf.deleted == []

    def test_what_somebody_else_ended_is_told_at_once_and_waited_for(self):
        found = look(Shelf(pods=[a_pod(deletionTimestamp=LEAVING)]), a_run())
        assert found.jobs == ()
        said = (
            f"Pod {NAME}-node-0-0-abcde of Job {NAME}-node-0 (uid batch-1), which has until {LEAVING} to save its work,"
        )
        assert found.held == {"sft": said}

    @pytest.mark.parametrize(
        "left", [{}, {"jobs": BETWEEN["jobs"]}, BETWEEN], ids=["nothing", "the job", "the set too"]
    )
    def test_an_earlier_runs_pods_are_waited_for_whatever_is_left_above_them(self, left: dict[str, list[Object]]):
        assert "sft" in look(Shelf(pods=[a_pod()], **left), a_run(None)).held

    def test_pods_of_a_strangers_job_hold_nothing(self):
        theirs = thing(f"{NAME}-node-0", "batch-1", labels={})
        assert look(Shelf(pods=[a_pod()], jobs=[theirs]), a_run(None)).held == {}

    def test_it_is_deleted_so_that_the_trainer_makes_nothing_anew(self):
        shelf, run = Shelf(trainjobs=[train_job(MINE)], **BETWEEN), a_run()
        [job] = look(shelf, run).jobs
        asyncio.run(backend(shelf).delete(run, "sft", 1, job))
        assert shelf.deleted == [(NAME, "job-1", "Background")]


class TestOtherKinds:
    def test_an_earlier_run_may_have_left_jobs_of_another_kind(self):
        older: Object = {**thing(NAME, "old-1", EARLIER), "kind": "PyTorchJob"}
        older |= {"spec": {"pytorchReplicaSpecs": {"Worker": {}}}, "status": {}}
        found = look(Shelf(pytorchjobs=[older]), a_run(None))
        assert found.held == {"sft": f"PyTorchJob {NAME} of AlignmentRun test (uid run-0)"}

    def test_a_run_is_told_where_its_kind_is_not_installed(self):
        asked = backend(Shelf())
        asked.absent = frozenset({TRAINJOBS, JOBSETS})
        [problem] = asyncio.run(asked.observe(a_run(None))).problems
        why = "the cluster has no trainjobs.trainer.kubeflow.org that the operator may read"
        assert problem == f"spec.backend: TrainJob: {why}; install Kubeflow Trainer v2.3 with JobSet"
        other = make_run(sft("sft"), workspace={"claimName": "w"}, template={"image": "i:1"})
        assert asyncio.run(asked.observe(other)).problems == ()
