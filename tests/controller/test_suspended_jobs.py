"""What somebody does to jobs: suspended though they have no queue, kept by a finalizer, without labels or an owner."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from builders import START, after, job, make_run, seen, sft, started, stopped, with_status
from pods import job as pytorchjob
from pods import pod, terminated
from test_trainjob import job as trainjob

from controller.api.run import AlignmentRun
from controller.api.status import QueueState, QueueStatus
from controller.backends.cluster import observe
from controller.operator.events import transitions
from controller.plan.decide import Decision, Delete, Reclaim, decide
from controller.plan.observed import JobState, ObservedJob
from trainers.contract import FailureClass

NOW = datetime(2026, 1, 1, 1, tzinfo=UTC)
SINCE = "2026-01-01T00:30:00Z"
FIELDS = {"PyTorchJob": "spec.runPolicy.suspend", "TrainJob": "spec.suspend"}


def suspended(kind: str, at: str = SINCE) -> dict:
    """As the API server shows it; ``at``: when whoever carries the job out has noticed."""
    found = pytorchjob(suspend=True) if kind == "PyTorchJob" else trainjob()
    told = [{"type": "Suspended", "status": "True", "lastTransitionTime": at}] if at else []
    spec = {**found["spec"], "suspend": True} if kind == "TrainJob" else found["spec"]
    return {**found, "spec": spec, "status": {"conditions": told}}


@pytest.mark.parametrize("kind", FIELDS)
class TestSuspendedBySomebody:
    def test_it_says_so_and_counts_as_one_that_does_not_begin(self, kind):
        got = observe.observed_job(suspended(kind), [], None, NOW)
        assert got.message == (
            f"its job is suspended, and not by a queue; it goes on when {FIELDS[kind]} of {kind} test-sft-1 is false"
        )
        assert (got.state, got.may_start_since) == (JobState.LIVE, datetime(2026, 1, 1, 0, 30, tzinfo=UTC))

    def test_what_nobody_has_noticed_yet_is_new(self, kind):
        assert observe.observed_job(suspended(kind, at=""), [], None, NOW).may_start_since == NOW

    def test_its_pods_have_not_failed(self, kind):
        got = observe.observed_job(suspended(kind), [pod(phase="Failed", terminated=terminated(143))], None, NOW)
        assert (got.state, got.failure) == (JobState.LIVE, None)

    def test_one_that_its_queue_holds_waits_without_end(self, kind):
        """Kueue may manage jobs without its label, too: only their Workload says so, which it makes after the job."""
        pending = QueueStatus(state=QueueState.PENDING, message="waits for quota")
        assert observe.observed_job(suspended(kind), [], pending, NOW).may_start_since is None
        made = datetime.fromisoformat(suspended(kind)["metadata"]["creationTimestamp"])
        young = observe.observed_job(suspended(kind), [], None, made + timedelta(seconds=5))
        assert (young.message, young.may_start_since) == ("", None)
        assert observe.queue_status(suspended(kind), None, True, NOW) is None


def test_a_job_that_has_ended_stays_so_when_it_is_suspended():
    done = pytorchjob("Succeeded", suspend=True)
    assert observe.observed_job(done, [], None, NOW).state == JobState.SUCCEEDED


RUN = make_run(sft("base"), failurePolicy={"startupTimeoutSeconds": 60})


def looks(*steps: tuple[AlignmentRun, list[ObservedJob]]) -> list[Decision]:
    decisions: list[Decision] = []
    for number, (run, jobs) in enumerate(steps):
        known = with_status(run, decisions[-1]) if decisions else run
        decisions.append(decide(known, seen(*jobs), after(number * 30)))
    return decisions


def test_an_attempt_whose_job_stays_suspended_is_followed_by_another():
    trains = job(RUN, "base", running_since=START)
    held = job(RUN, "base", message="its job is suspended", may_start_since=after(60))
    _, _, first, _, second = looks((RUN, []), (RUN, [trains]), (RUN, [held]), (RUN, [held]), (RUN, [held]))
    assert first.status.phases[0].message == "its job is suspended"
    assert (stopped(first), stopped(second)) == ([], ["base-1"])
    [attempt] = second.status.phases[0].attempts
    assert (attempt.failure, attempt.message) == (
        FailureClass.STARTUP_TIMEOUT, "not running after 60 s: its job is suspended",
    )  # fmt: skip


# ---------------------------------------------------------------- finalizers


def test_only_finalizers_of_somebodys_keep_a_job_that_is_deleted():
    names = ["foregroundDeletion", "example.com/slow"]
    leaving = pytorchjob("Running", deletionTimestamp=SINCE, finalizers=names)
    assert observe.observed_job(leaving, [], None, NOW).kept_by == ("example.com/slow",)
    assert observe.observed_job(pytorchjob("Running", finalizers=names), [], None, NOW).kept_by == ()


def test_a_run_that_goes_on_after_its_suspension_says_what_keeps_the_attempt_before():
    """It said "stopping an attempt for other settings", and not what to do about it."""
    asleep = make_run(sft("base"), suspend=True)
    awake = make_run(sft("base"))
    trains = job(awake, "base", running_since=START, name="test-base-1")
    kept = replace(trains, leaving=True, kept_by=("example.com/slow",))
    held = "job test-base-1 was deleted and stays until somebody removes its finalizer example.com/slow"
    *_, resting, resumed, gone = looks(
        (awake, []), (awake, [trains]), (asleep, [trains]), (asleep, [kept]), (awake, [kept]), (awake, [])
    )
    assert resting.status.phases[0].message == f"suspended; {held}"
    assert resumed.status.phases[0].message == f"waits for the end of an attempt that was stopped; {held}"
    assert started(resumed) == []
    assert started(gone) == ["base-2"]


def test_one_that_is_stopped_for_other_settings_says_that():
    other = make_run(sft("base", seed=1))
    trains = job(RUN, "base", running_since=START, message="waits for a volume")
    *_, stops = looks((RUN, []), (RUN, [trains]), (other, [trains]))
    assert stops.status.phases[0].message == "stopping an attempt for other settings"


# ---------------------------------------------------------------- labels


def test_labels_that_somebody_took_away_are_told_once():
    trains = job(RUN, "base", running_since=START)
    bare = replace(trains, unlabelled=("PyTorchJob test-base-1", "Pod test-base-1-worker-0"))
    before, lost, again, given_back = (
        decision.status
        for decision in looks((RUN, []), (RUN, [trains]), (RUN, [bare]), (RUN, [bare]), (RUN, [trains]))[1:]
    )
    said = "somebody took labels away from PyTorchJob test-base-1, Pod test-base-1-worker-0"
    assert lost.phases[0].message == f"{said}: it goes on, and what becomes of it is noticed later"
    assert [(e.type, e.reason, e.note) for e in transitions(before, lost)] == [
        ("Warning", "LabelsLost", f"phase base: {lost.phases[0].message}")
    ]
    assert (list(transitions(lost, again)), given_back.phases[0].message) == ([], "")


# ---------------------------------------------------------------- owner references


def test_one_without_its_owner_reference_goes_on_gets_it_back_and_is_told_once():
    """It was told as deleted, and its phase waited for it as for a stranger's."""
    trains = job(RUN, "base", running_since=START, name="test-base-1", uid="job-1")
    lost = replace(trains, disowned=True)
    before, alone, again, whole = looks((RUN, []), (RUN, [trains]), (RUN, [lost]), (RUN, [lost]), (RUN, [trains]))[1:]
    assert [d.actions for d in (before, alone, again, whole)] == [(), (Reclaim("base", 1),), (Reclaim("base", 1),), ()]
    [attempt] = alone.status.phases[0].attempts
    assert (attempt.state, attempt.job_uid) == ("Running", "job-1")
    said = "somebody took the owner reference away from job test-base-1: it stays the run's, which puts it back where it may"
    assert [(e.type, e.reason, e.note) for e in transitions(before.status, alone.status)] == [
        ("Warning", "OwnerLost", f"phase base: {said}")
    ]
    assert (list(transitions(alone.status, again.status)), whole.status.phases[0].message) == ([], "")


def test_one_that_is_to_end_is_only_ended():
    asleep = make_run(sft("base"), suspend=True)
    lost = replace(job(RUN, "base", running_since=START, name="test-base-1", uid="job-1"), disowned=True)
    *_, stops = looks((RUN, []), (RUN, [lost]), (asleep, [lost]))
    assert stops.actions == (Delete("base", 1),)


def test_one_whose_run_has_become_invalid_gets_it_back_too():
    lost = replace(job(RUN, "base", running_since=START, name="test-base-1", uid="job-1"), disowned=True)
    run = with_status(RUN, looks((RUN, []), (RUN, [lost]))[-1])
    refused = decide(run, seen(lost, problems=("spec.x: is wrong",)), after(60))
    assert (refused.actions, refused.status.phases[0].state) == ((Reclaim("base", 1),), "Running")


def test_one_that_was_given_to_somebody_else_is_not_told_as_deleted():
    trains = job(RUN, "base", running_since=START, name="test-base-1", uid="job-1")
    run = with_status(RUN, looks((RUN, []), (RUN, [trains]))[-1])
    theirs = "PyTorchJob test-base-1 of Deployment web (uid web-1)"
    gone = decide(run, seen(taken={("base", 1): theirs}, held={"base": theirs}), after(60))
    [attempt] = gone.status.phases[0].attempts
    assert (attempt.failure, attempt.message) == (
        FailureClass.INTERRUPTED, f"its job is not the run's any more: {theirs} has its name, and is left alone",
    )  # fmt: skip
    waits = decide(with_status(RUN, gone), seen(held={"base": theirs}), after(3600))
    assert (started(waits), waits.status.phases[0].held_by) == ([], theirs)
