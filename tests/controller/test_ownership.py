"""What the backend takes for the run's own, out of all that has its labels or its names."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders import START, make_run, seen, sft
from pods import job, owner, pod, said, terminated

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, QueueState, QueueStatus
from controller.backends.cluster import observe, ownership
from controller.backends.cluster.backend import ClusterBackend
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.observe import PATIENCE_SECONDS
from controller.backends.cluster.orphans import COLLECTED_SECONDS
from controller.backends.cluster.pod import job_metadata
from controller.backends.cluster.settings import Settings
from controller.kube.resources import PYTORCHJOBS
from controller.memory import Memory
from controller.plan.decide import Apply, decide
from controller.plan.job import job_name
from controller.plan.observed import JobState, Observed, ObservedJob

Object = dict[str, Any]

PLAIN = Settings()
RUN = "alignment.dev/v1alpha1", "AlignmentRun", "test"
MINE = owner(*RUN, "run-1")
EARLIER = owner(*RUN, "run-0")
ANOTHERS = owner("alignment.dev/v1alpha1", "AlignmentRun", "other", "run-2")
WEB = owner("apps/v1", "Deployment", "web", "web-1")


class Shelf:
    """What an API server holds: as much of it as is asked for."""

    def __init__(self, *jobs: Object, pods: tuple[Object, ...] = (), workloads: tuple[Object, ...] = ()) -> None:
        self.jobs, self.pods, self.workloads = [*map(stored, jobs)], [*map(stored, pods)], workloads
        self.deleted: list[tuple[str, str]] = []
        self.updated: list[Object] = []
        self.asked: list[str] = []
        self.workloads_asked: list[str] = []

    async def list_jobs(self, kind: Any, namespace: str, labels: Object) -> list[Object]:
        return [job for job in self.jobs if labels.items() <= job["metadata"]["labels"].items()]

    async def list_pods(self, namespace: str, labels: Object) -> list[Object]:
        return [pod for pod in self.pods if labels.items() <= pod["metadata"]["labels"].items()]

    async def get_job(self, kind: Any, namespace: str, name: str) -> Object | None:
        self.asked.append(name)
        return next((job for job in self.jobs if kind == PYTORCHJOBS and job["metadata"]["name"] == name), None)

    async def update_job(self, kind: Any, job: Object) -> Object:
        self.updated.append(job)
        self.jobs = [{**job, "metadata": {**job["metadata"], "resourceVersion": "2"}}]
        return self.jobs[0]

    async def delete_job(self, kind: Any, namespace: str, name: str, uid: str, propagation: str) -> None:
        self.deleted.append((name, uid))

    async def get_workload(self, namespace: str, name: str) -> Object | None:
        self.workloads_asked.append(name)
        return next((found for found in self.workloads if found["metadata"]["name"] == name), None)

    async def list_workloads(self, namespace: str, labels: Object) -> list[Object]:
        self.workloads_asked.append("list")
        return list(self.workloads)

    async def list_warnings(self, namespace: str, uid: str) -> list[Object]:
        return []


def stored(thing: Object) -> Object:
    return {**thing, "metadata": {"namespace": "default", "resourceVersion": "1", **thing["metadata"]}}


class NoFigures:
    def progress(self, namespace: str, run: str, pods: Any) -> dict[str, Any]:
        return {}


def labelled(attempt: str = "1", phase: str = "sft", **more: str) -> Object:
    ours = {meta.LABEL_MANAGED_BY: meta.PRODUCT, meta.LABEL_RUN: "test"}
    return {**ours, meta.LABEL_PHASE: phase, meta.LABEL_ATTEMPT: attempt, **more}


def a_job(
    *owners: Object, name: str = "test-sft-1", uid: str = "job-1", labels: Object | None = None, ended: str = ""
) -> Object:
    found = labelled() if labels is None else labels
    conditions = (ended,) if ended else ("Running",)
    return job(*conditions, name=name, uid=uid, labels=found, ownerReferences=list(owners))


def a_run(asked: bool = True) -> AlignmentRun:
    run = make_run(sft("sft"), workspace={"claimName": "w"}, template={"image": "i:1"})
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": "run-1", "namespace": "default"})})
    return run.model_copy(update={"status": decide(run, seen(), START).status}) if asked else run


def backend(shelf: Shelf, settings: Settings = PLAIN) -> ClusterBackend:
    api: Any = shelf
    figures: Any = NoFigures()
    moment = datetime.now(UTC).replace(microsecond=0)
    return ClusterBackend(api, Memory(api), figures, settings, lambda: moment)


def look(shelf: Shelf, run: AlignmentRun | None = None, settings: Settings = PLAIN) -> Observed:
    """As the API server tells, and the same from what is remembered of it."""
    asked, run = backend(shelf, settings), run or a_run()
    found = asyncio.run(asked.observe(run))
    names, shelf.asked = shelf.asked, []
    assert asyncio.run(asked.observe(run, anew=False)) == found
    shelf.asked = names
    return found


class TestJobs:
    def test_the_runs_own_is_seen_with_its_uid_and_nobody_is_asked_again(self):
        shelf = Shelf(a_job(MINE))
        [found] = look(shelf).jobs
        assert (found.phase, found.attempt, found.name, found.uid) == ("sft", 1, "test-sft-1", "job-1")
        assert shelf.asked == []

    @pytest.mark.parametrize(
        "reference",
        [
            {**MINE, "controller": False},
            {**MINE, "kind": "Other"},
            {**MINE, "apiVersion": "evil.dev/v1"},
            {**MINE, "uid": "x"},
            WEB,
        ],
    )
    def test_labels_make_none_the_runs(self, reference: Object):
        observed = look(Shelf(a_job(reference)))
        assert observed.jobs == ()
        assert ("sft", 1) in observed.taken

    def test_a_name_that_is_taken_is_told_with_its_owner(self):
        observed = look(Shelf(a_job(WEB, labels={})))
        assert observed.taken == {("sft", 1): "PyTorchJob test-sft-1 of Deployment web (uid web-1)"}
        assert look(Shelf(a_job(labels={}))).taken == {("sft", 1): "PyTorchJob test-sft-1 of nobody"}
        evil = {**WEB, "kind": "\x1b[31mRun\n" + "x" * 999}
        told = look(Shelf(a_job(evil, labels={}))).taken["sft", 1]
        assert told.isprintable()
        assert len(told) < 500

    @pytest.mark.parametrize(
        "labels",
        [{}, labelled(attempt="x"), labelled(attempt="9"), labelled(phase="other"), labelled(attempt="9" * 60)],
        ids=["none", "no number", "another number", "another phase", "a number too long"],
    )
    def test_ours_stays_the_same_attempt_whatever_becomes_of_its_labels(self, labels: Object):
        [found] = look(Shelf(a_job(MINE, labels=labels))).jobs
        assert (found.phase, found.attempt) == ("sft", 1)
        assert found.unlabelled == (() if labels else ("PyTorchJob test-sft-1",))

    def test_an_older_operators_names_stay(self):
        """Recorded or not: the job is there, and it is the run's."""
        older = a_job(MINE, name="test-sft-0a1b2c3d-1")
        run = a_run()
        observed = look(Shelf(older), run)
        [found] = observed.jobs
        assert (found.phase, found.attempt, found.name, observed.taken) == ("sft", 1, "test-sft-0a1b2c3d-1", {})
        run = run.model_copy(update={"status": decide(run, observed, START).status})
        shelf = Shelf()
        look(shelf, run)
        assert shelf.asked == ["test-sft-0a1b2c3d-1"]

    def test_only_what_was_seen_is_deleted(self):
        shelf, run = Shelf(a_job(MINE)), a_run()
        [found] = look(shelf, run).jobs
        for seen_job in (found, None, ObservedJob("sft", 1, "d", JobState.FAILED, name="test-sft-1")):
            asyncio.run(backend(shelf).delete(run, "sft", 1, seen_job))
        assert shelf.deleted == [("test-sft-1", "job-1")]


class TestEarlierRuns:
    def test_their_jobs_hold_the_phase_while_they_live(self):
        assert look(Shelf(a_job(EARLIER)), a_run(asked=False)).held == {
            "sft": "PyTorchJob test-sft-1 of AlignmentRun test (uid run-0)"
        }
        assert look(Shelf(a_job())).held == {"sft": "PyTorchJob test-sft-1 of nobody"}
        assert look(Shelf(a_job(EARLIER, ended="Failed"))).held == {}

    @pytest.mark.parametrize(
        "made",
        [
            {"name": "by-hand"},
            {"name": "test-other-1"},
            {"digest": None},
            {"labels": labelled(phase="other"), "name": "other"},
            {"labels": labelled(attempt="x"), "name": "test-sft-x"},
        ],
    )
    def test_what_nobody_owns_is_one_only_if_the_operator_could_have_made_it(self, made: Object):
        """Labels are words: one made by hand had held the phase up for as long as it lived."""
        by_hand = a_job(name=made.get("name", "test-sft-1"), labels=made.get("labels"))
        if "digest" in made:
            del by_hand["metadata"]["annotations"]
        observed = look(Shelf(by_hand), a_run(asked=False))
        assert (observed.held, observed.jobs, observed.taken) == ({}, (), {})

    @pytest.mark.parametrize("reference", [WEB, ANOTHERS])
    def test_what_is_somebody_elses_holds_nothing(self, reference: Object):
        assert look(Shelf(a_job(reference))).held == {}

    def test_a_job_that_has_ended_holds_it_while_a_pod_of_it_saves(self):
        saving = pod(running={"startedAt": "2026-01-01T00:00:00Z"})
        job, told = a_job(EARLIER, ended="Failed"), "PyTorchJob test-sft-1 of AlignmentRun test (uid run-0)"
        assert look(Shelf(job, pods=(labels_on(saving),))).held == {"sft": told}
        later = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
        held = look(Shelf(job, pods=(labels_on(saving, deletionTimestamp=later),))).held
        assert held == {"sft": f"{told}, whose pod job-worker-0 has until {later} to save its work,"}

    def test_pods_whose_job_is_gone_hold_it(self):
        later = (datetime.now(UTC) + timedelta(seconds=20)).isoformat()
        saving = labels_on(pod(running={"startedAt": "2026-01-01T00:00:00Z"}), deletionTimestamp=later)
        assert look(Shelf(pods=(saving,))).held == {
            "sft": f"Pod job-worker-0 of PyTorchJob test-sft-1 (uid job-1), which has until {later} to save its work,"
        }
        assert look(Shelf(pods=(labels_on(pod(phase="Succeeded")),))).held == {}

    @pytest.mark.parametrize("deleted", [False, True])
    @pytest.mark.parametrize("stopping", [False, True])
    def test_pods_that_say_they_are_of_a_job_that_is_gone_hold_it_no_longer_than_a_phases_would(
        self, deleted: bool, stopping: bool
    ):
        """Whoever may create pods gives them an owner that nobody collects, or a grace of ten days, one after the other."""
        run = a_run()
        assert run.status is not None
        if stopping:
            [phase] = run.status.phases
            [attempt] = phase.attempts
            asked = attempt.model_copy(update={"state": AttemptState.STOPPING, "job": "test-sft-1"})
            changed = run.status.model_copy(update={"phases": (phase.model_copy(update={"attempts": (asked,)}),)})
            run = run.model_copy(update={"status": changed})
        clock = [datetime.now(UTC).replace(microsecond=0)]
        begun = clock[0]

        def waits(seconds: float, *uids: str) -> bool:
            clock[0] = begun + timedelta(seconds=seconds)
            far = {"deletionTimestamp": (begun + timedelta(days=10)).isoformat()} if deleted else {}
            pods = [labels_on(pod(running={"startedAt": "2026-01-01T00:00:00Z"}), uid=uid, **far) for uid in uids]
            shelf.pods = [*map(stored, pods)]
            found = asyncio.run(asked_of.observe(run))
            return bool([job for job in found.jobs if job.leaving] if stopping else found.held)

        shelf = Shelf()
        asked_of = backend(shelf)
        asked_of.now = lambda: clock[0]
        last = COLLECTED_SECONDS + (120 + PATIENCE_SECONDS if deleted else 0)
        assert waits(0, "a") and waits(last / 2, "a", "b") and waits(last - 1, "b", "c")
        assert not waits(last + 1, "b", "c") and not waits(last + 2, "d")
        assert not waits(last + 3)
        assert waits(last + 4, "e"), "after a time without any they are waited for again"

    def test_pods_of_a_strangers_job_that_has_none_of_our_labels_hold_nothing(self):
        theirs = a_job(WEB, labels={}, name="test-sft-1")
        assert look(Shelf(theirs, pods=(labels_on(pod()),)), a_run(asked=False)).held == {}


def labels_on(thing: Object, **metadata: Any) -> Object:
    labels = {**thing["metadata"]["labels"], **labelled()}
    return {**thing, "metadata": {**thing["metadata"], "labels": labels, **metadata}}


def disowned(*owners: Object, uid: str = "job-1", run_uid: str = "run-1", **more: Any) -> Object:
    found = a_job(*owners, uid=uid, **more)
    notes = {meta.ANNOTATION_DIGEST: "d", **({meta.ANNOTATION_RUN_UID: run_uid} if run_uid else {})}
    return {**found, "metadata": {**found["metadata"], "annotations": notes}}


def a_run_of(uid: str = "job-1") -> AlignmentRun:
    """That has seen its job."""
    run = a_run()
    known = ObservedJob("sft", 1, "d", JobState.LIVE, name="test-sft-1", uid=uid)
    return run.model_copy(update={"status": decide(run, seen(known), START).status})


class TestDisowned:
    """A job that somebody has taken the owner reference from."""

    @pytest.mark.parametrize("owners", [(), ({**MINE, "controller": False},), ({**WEB, "controller": False},)])
    @pytest.mark.parametrize("labels", [None, {}], ids=["labelled", "bare"])
    def test_it_stays_the_runs(self, owners: tuple[Object, ...], labels: Object | None):
        observed = look(Shelf(disowned(*owners, labels=labels)), a_run_of())
        [found] = observed.jobs
        assert (found.attempt, found.uid, found.disowned) == (1, "job-1", True)
        assert (observed.taken, observed.held) == ({}, {})

    @pytest.mark.parametrize(
        "stranger",
        [
            disowned(uid="job-2"),
            disowned(run_uid="run-2"),
            disowned(run_uid=""),
            disowned(WEB),
        ],
        ids=["not remembered", "made for another run", "made by hand", "another's"],
    )
    def test_one_word_alone_makes_nothing_the_runs(self, stranger: Object):
        """Whoever may write only statuses, or only jobs, has the operator touch no job that it did not make."""
        shelf, run = Shelf(stranger), a_run_of()
        observed = look(shelf, run)
        assert observed.jobs == ()
        asyncio.run(backend(shelf).delete(run, "sft", 1, None))
        seen_before = ObservedJob("sft", 1, "d", JobState.LIVE, name="test-sft-1", uid="job-1", disowned=True)
        asyncio.run(backend(shelf).reclaim(run, seen_before))
        assert (shelf.deleted, shelf.updated) == ([], [])

    def test_a_run_without_a_uid_has_none(self):
        run = a_run_of()
        nobody = run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": None})})
        assert not ownership.is_made_for(disowned(run_uid=""), nobody)

    def test_one_that_was_given_to_somebody_else_is_waited_for(self):
        """It still writes to the phase's folder."""
        observed = look(Shelf(disowned(WEB)), a_run_of())
        theirs = "PyTorchJob test-sft-1 of Deployment web (uid web-1)"
        assert (observed.taken, observed.held) == ({("sft", 1): theirs}, {"sft": theirs})

    @pytest.mark.parametrize("others", [(), ({**WEB, "controller": False},)], ids=["none", "another owner"])
    def test_it_gets_its_reference_back_beside_what_else_it_has(self, others: tuple[Object, ...]):
        shelf, run = Shelf(disowned({**MINE, "controller": False}, *others)), a_run_of()
        [found] = look(shelf, run).jobs
        asyncio.run(backend(shelf).reclaim(run, found))
        [written] = shelf.updated
        assert written["metadata"]["ownerReferences"] == [*others, MINE]
        assert written["metadata"]["resourceVersion"] == "1"
        assert look(shelf, run).jobs[0].disowned is False

    def test_a_job_says_whose_it_is_twice(self):
        [action] = decide(a_run(asked=False), seen(), START).actions
        assert isinstance(action, Apply)
        made = job_metadata(action.job, Owner("default", "test", "run-1", "test"))
        assert made["annotations"][meta.ANNOTATION_RUN_UID] == made["ownerReferences"][0]["uid"] == "run-1"


class TestPods:
    GOOD = said(None, digest="d", artifactDigest="a", metrics={})

    def done(self, *owners: Object, name: str = "test-sft-1-worker-0") -> Object:
        found = pod(0, "Succeeded", terminated=terminated(0, self.GOOD))
        return labels_on(found, name=name, ownerReferences=list(owners))

    def test_the_jobs_own_tell(self):
        own = owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")
        assert "sft" in look(Shelf(a_job(MINE, ended="Succeeded"), pods=(self.done(own),))).results

    @pytest.mark.parametrize(
        "reference",
        [
            None,
            owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "another"),
            owner("batch/v1", "Job", "test-sft-1", "job-1"),
        ],
    )
    def test_others_with_the_same_labels_do_not(self, reference: Object | None):
        forged = self.done(*([reference] if reference else []))
        observed = look(Shelf(a_job(MINE, ended="Succeeded"), pods=(forged,)))
        assert observed.results == {}

    def test_one_without_our_labels_is_found_as_its_controller_finds_it(self):
        own = owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")
        done = self.done(own)
        of_theirs = {name: value for name, value in done["metadata"]["labels"].items() if name not in labelled()}
        bare = {**done, "metadata": {**done["metadata"], "labels": of_theirs}}
        observed = look(Shelf(a_job(MINE, ended="Succeeded"), pods=(bare,)))
        assert observed.results["sft"].artifact_digest == "a"
        assert observed.jobs[0].unlabelled == ("Pod test-sft-1-worker-0",)
        both = look(Shelf(a_job(MINE, ended="Succeeded", labels={}), pods=(bare,)))
        assert both.jobs[0].unlabelled == ("PyTorchJob test-sft-1", "Pod test-sft-1-worker-0")

    def test_one_is_looked_for_when_it_is_late_or_the_job_has_ended(self):
        """Pods come after their job, and one of many nodes has them one by one."""
        made = datetime.fromisoformat(a_job(MINE)["metadata"]["creationTimestamp"])
        soon, late = made + timedelta(seconds=59), made + timedelta(seconds=61)
        assert [observe.lacks_pods(a_job(MINE), [], at) for at in (soon, late)] == [False, True]
        assert observe.lacks_pods(a_job(MINE, ended="Failed"), [], soon)
        assert not observe.lacks_pods(a_job(MINE), [pod()], late)
        leaving = {"deletionTimestamp": late.isoformat()}
        gone = a_job(MINE)
        assert not observe.lacks_pods({**gone, "metadata": {**gone["metadata"], **leaving}}, [], late)

    def test_rank_0_is_the_pod_of_that_name(self):
        own = owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")
        odd = self.done(own, name="anything")
        assert look(Shelf(a_job(MINE, ended="Succeeded"), pods=(odd,))).results == {}


def told(queue: QueueStatus) -> AlignmentRun:
    """A run of which this was said."""
    run = a_run()
    assert run.status is not None
    [phase] = run.status.phases
    going = phase.attempts[0].model_copy(update={"job": "test-sft-1", "state": AttemptState.RUNNING})
    known = run.status.model_copy(update={"phases": (phase.model_copy(update={"queue": queue, "attempts": (going,)}),)})
    return run.model_copy(update={"status": known})


def test_a_strangers_workload_says_nothing_about_our_job():
    conditions = [{"type": "Admitted", "status": "True", "message": "forged"}]
    forged = {"metadata": {"name": "theirs", "ownerReferences": [WEB]}, "status": {"conditions": conditions}}
    ours = {
        "metadata": {"name": "w", "ownerReferences": [owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")]},
        "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "no room"}]},
    }
    queued = a_job(MINE, labels=labelled(**{"kueue.x-k8s.io/queue-name": "gpus"}))
    said = QueueStatus(state=QueueState.PENDING, message="no room", workload="w")
    [found] = look(Shelf(queued, workloads=(forged, ours))).jobs
    assert found.queue == said
    for named, asked in (("w", ["w"]), ("theirs", ["theirs", "list"]), ("gone", ["gone", "list"])):
        shelf = Shelf(queued, workloads=(forged, ours))
        [found] = look(shelf, told(QueueStatus(state=QueueState.PENDING, workload=named))).jobs
        assert (found.queue, shelf.workloads_asked) == (said, 2 * asked), "a name is known once it was found"


def test_names_that_the_status_remembers_are_those_that_jobs_get():
    shelf = Shelf()
    look(shelf)
    assert shelf.asked == [job_name("test", "sft", 1)]


def test_the_queue_of_a_job_that_it_let_go_is_not_asked_again():
    """It suspends the job before it says anything else."""

    class Asked(Shelf):
        times = 0

        async def list_workloads(self, namespace: str, labels: Object) -> list[Object]:
            self.times += 1
            return []

    queue = QueueStatus(state=QueueState.ADMITTED, message="admitted")
    run = told(queue)
    for suspended, times in ((False, 1), (True, 2)):
        queued = a_job(MINE, labels=labelled(**{"kueue.x-k8s.io/queue-name": "gpus"}))
        queued["spec"]["runPolicy"]["suspend"] = suspended
        shelf = Asked(queued)
        asked = backend(shelf)
        asyncio.run(asked.observe(run))
        [found] = asyncio.run(asked.observe(run, anew=False)).jobs
        assert shelf.times == times
        assert (found.queue == queue) is not suspended


@pytest.mark.parametrize("leaving", [False, True])
def test_progress_is_asked_of_attempts_that_are_to_go_on(leaving: bool):
    """Right after `retry` the status had the step of the attempt that was ending, under the next one's settings."""
    targets: list[Any] = []
    asked = backend(Shelf())
    asked.scraper.progress = lambda namespace, run, pods: targets.extend(pods) or {}  # type: ignore[method-assign]
    seen_job = ObservedJob("sft", 1, "d", JobState.LIVE, name="test-sft-1", leaving=leaving)
    runs = pod(running={"startedAt": "2026-01-01T00:00:00Z"}, podIP="10.0.0.1")
    asked._progress(a_run(), [seen_job], {"test-sft-1": [runs]})
    assert targets == ([] if leaving else ["sft"])
