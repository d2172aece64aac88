"""The planner by tables: what only happens on a cluster. Queues, pods that never run or hang, strangers, clean-up."""

import math
from typing import Any

import pytest
from builders import START, after, diamond, job, make_run, results, seen, sft, started, stopped, with_status

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseProgress, PhaseState, PhaseStatus, QueueState, QueueStatus
from controller.plan.decide import Decision, decide, is_settled
from controller.plan.observed import JobState, Observed, ObservedJob
from controller.plan.timeouts import ENDING_SECONDS
from trainers.contract import FailureClass

FAILED, SUCCEEDED = JobState.FAILED, JobState.SUCCEEDED
INFRA, INTERRUPTED, BAD = FailureClass.INFRASTRUCTURE, FailureClass.INTERRUPTED, FailureClass.BAD_INPUT


def one(*, name: str = "base", suspend: bool = False, seed: int = 0, generation: int = 1, **spec: Any) -> AlignmentRun:
    """A run of one phase, as the API server numbers its edits."""
    run = make_run(sft(name), suspend=suspend, seed=seed, queueName="gpus", **spec)
    return run.model_copy(update={"metadata": run.metadata.model_copy(update={"generation": generation})})


RUN = one()


def waits(run: AlignmentRun = RUN, state: QueueState = QueueState.PENDING, **more: Any) -> ObservedJob:
    """In the queue: nothing of it runs, and nothing may."""
    return job(run, "base", queue=QueueStatus(state=state, message=f"{state.lower()}!"), **more)


def admitted(run: AlignmentRun = RUN, at: float = 0, **more: Any) -> ObservedJob:
    queue = QueueStatus(state=QueueState.ADMITTED, message="admitted!")
    return job(run, "base", queue=queue, **{"may_start_since": after(at), **more})


def runs(run: AlignmentRun = RUN, at: float = 0, **more: Any) -> ObservedJob:
    return admitted(run, at, running_since=after(at), started_at=after(at), **more)


def doomed(run: AlignmentRun = RUN, failure: FailureClass = INFRA, **more: Any) -> ObservedJob:
    """A pod has failed, the job has not."""
    return job(run, "base", failure=failure, **{"message": "a pod failed", **more})


def report(step: int, at: float, **more: Any) -> dict[str, PhaseProgress]:
    return {"base": PhaseProgress(step=step, total_steps=10, updated_at=after(at), **more)}


def story(*looks: tuple[AlignmentRun, Observed, float]) -> list[Decision]:
    """Looks one after the other, each with the status that the one before left."""
    decisions: list[Decision] = []
    for run, observed, at in looks:
        known = with_status(run, decisions[-1]) if decisions else run
        decisions.append(decide(known, observed, after(at)))
    return decisions


def phase(decision: Decision) -> PhaseStatus:
    return decision.status.phases[0]


def attempt(decision: Decision, number: int = 1) -> Attempt:
    return next(a for a in phase(decision).attempts if a.number == number)


def ends(decision: Decision, number: int = 1) -> str:
    """`Failed Stalled`"""
    found = attempt(decision, number)
    return f"{found.state} {found.failure}" if found.failure else str(found.state)


def condition(decision: Decision, kind: str) -> str:
    found = decision.status.condition(kind)
    return f"{found.status}/{found.reason}" if found else "absent"


# ---------------------------------------------------------------- queues

ADMISSION = {
    "before Kueue has seen it": (job(RUN, "base"), "absent", "base"),
    "waits for quota": (waits(), "False/Pending", "Queued"),
    "has quota": (waits(state=QueueState.QUOTA_RESERVED), "False/QuotaReserved", "Queued"),
    "is admitted": (admitted(), "True/Admitted", "base"),
    "is preempted": (waits(state=QueueState.PREEMPTED), "False/Preempted", "Queued"),
    "has no queue": (waits(state=QueueState.MISSING), "False/Missing", "Queued"),
}


@pytest.mark.parametrize("sentence", ADMISSION)
def test_what_the_queue_says(sentence: str) -> None:
    observed, admission, column = ADMISSION[sentence]
    decision = decide(RUN, seen(observed), START)
    assert (condition(decision, meta.ADMITTED), decision.status.phase) == (admission, column)
    assert phase(decision).state == PhaseState.RUNNING


def test_a_job_that_is_preempted_and_admitted_again_is_the_same_attempt() -> None:
    looks = (waits(), runs(at=10), waits(state=QueueState.PREEMPTED), runs(at=500))
    decisions = story(*((RUN, seen(observed), at) for observed, at in zip(looks, (0, 10, 100, 500), strict=True)))
    assert [ends(d) for d in decisions] == ["Running"] * 4
    assert not any(d.actions for d in decisions)


def test_waiting_in_a_queue_takes_no_time() -> None:
    """Neither of the start-up timeout nor of the phase's deadline: the phase has not started."""
    run = one(failurePolicy={"startupTimeoutSeconds": 60, "phaseDeadlineSeconds": 100})
    *_, waited, began = story(
        (run, seen(waits(run)), 0), (run, seen(waits(run)), 5000), (run, seen(runs(run, 5000)), 5099)
    )  # fmt: skip
    assert (phase(waited).started_at, waited.requeue_after) == (None, None)
    assert (phase(began).started_at, stopped(began)) == (after(5000), [])
    late = decide(with_status(run, began), seen(runs(run, 5000)), after(5100))
    assert stopped(late) == ["base-1"]


def test_what_was_about_to_end_and_is_queued_again_was_not_the_end() -> None:
    first, second = story((RUN, seen(doomed()), 0), (RUN, seen(waits(state=QueueState.EVICTED)), 5))
    assert (attempt(first).failure, attempt(second).failure) == (INFRA, None)
    assert condition(second, meta.ADMITTED) == "False/Evicted"


# ---------------------------------------------------------------- jobs that never start, or hang

QUICK = one(failurePolicy={"startupTimeoutSeconds": 60, "stallTimeoutSeconds": 30})


def test_pods_that_never_run_are_given_up_and_that_is_a_failure() -> None:
    stuck = admitted(QUICK, message="Unschedulable: 0/2 nodes")
    before, late, gone, again = story(
        (QUICK, seen(stuck), 59), (QUICK, seen(stuck), 60), (QUICK, seen(), 61), (QUICK, seen(), 80)
    )  # fmt: skip
    assert (stopped(before), before.requeue_after and before.requeue_after.total_seconds()) == ([], 1)
    assert (stopped(late), ends(late)) == (["base-1"], "Stopping StartupTimeout")
    assert (ends(gone), phase(gone).state) == ("Failed StartupTimeout", PhaseState.BACKING_OFF)
    assert attempt(gone).message == "not running after 60 s: Unschedulable: 0/2 nodes"
    assert started(again) == ["base-2"]


def test_a_deletion_takes_its_time_and_nothing_starts_meanwhile() -> None:
    stuck = admitted(QUICK)
    *_, later = story(*((QUICK, seen(stuck), at) for at in (60, 61, 100)))
    assert (stopped(later), started(later)) == (["base-1"], [])


def test_a_phase_that_does_not_go_on_is_given_up() -> None:
    before, late, over = story(
        (QUICK, seen(runs(QUICK), progress=report(4, 100)), 129),
        (QUICK, seen(runs(QUICK), progress=report(4, 100)), 130),
        (QUICK, seen(job(QUICK, "base", state=FAILED, failure=INTERRUPTED, message="ended by SIGTERM")), 140),
    )
    assert (stopped(before), before.requeue_after and before.requeue_after.total_seconds()) == ([], 1)
    assert (stopped(late), ends(late)) == (["base-1"], "Stopping Stalled")
    # Not Interrupted, which is what its pods say: that was us.
    assert (ends(over), attempt(over).message) == ("Failed Stalled", "no progress for 30 s since step 4")


NOT_STALLED = {
    "it has never reported": (runs(QUICK), {}),
    "it has just begun again after a preemption": (runs(QUICK, 980), report(4, 100)),
    "it waits in its queue again": (waits(QUICK, QueueState.PREEMPTED), {}),
    "it is about to end": (doomed(QUICK), report(4, 100)),
}


@pytest.mark.parametrize("why", NOT_STALLED)
def test_no_stall(why: str) -> None:
    observed, progress = NOT_STALLED[why]
    assert stopped(decide(QUICK, seen(observed, progress=progress), after(1000))) == []


def test_a_timed_out_attempt_that_succeeds_all_the_same_has_succeeded() -> None:
    stuck = admitted(QUICK)
    done = job(QUICK, "base", state=SUCCEEDED)
    *_, end = story((QUICK, seen(stuck), 60), (QUICK, seen(done, results=results(QUICK, "base")), 70))
    assert end.status.is_true(meta.SUCCEEDED)


def test_a_reason_that_is_too_long_for_a_status_is_cut() -> None:
    *_, late = story((QUICK, seen(admitted(QUICK, message="x" * 5000)), 60))
    assert len(attempt(late).message) == 1024


# ---------------------------------------------------------------- jobs that are about to fail


def test_a_job_that_vanishes_when_it_was_about_to_fail_has_failed_once() -> None:
    decisions = story((RUN, seen(doomed()), 0), (RUN, seen(), 5), (RUN, seen(), 30), (RUN, seen(), 31))
    assert [ends(d) for d in decisions] == ["Running Infrastructure", *["Failed Infrastructure"] * 3]
    assert [started(d) for d in decisions] == [[], [], ["base-2"], ["base-2"]]


def test_a_job_that_a_stranger_deletes_is_made_again() -> None:
    """It had not failed, and what did not fail is not counted."""
    *_, gone = story((RUN, seen(runs()), 0), (RUN, seen(), 5))
    assert (started(gone), ends(gone)) == (["base-1"], "Running")


def test_what_was_said_while_it_went_down_is_the_reason() -> None:
    oom = doomed(failure=FailureClass.OUT_OF_MEMORY)
    cleaned = admitted()
    *_, end = story((RUN, seen(oom), 0), (RUN, seen(cleaned), 1), (RUN, seen(job(RUN, "base", state=FAILED)), 2))
    assert ends(end) == "Failed OutOfMemory"


def test_what_runs_again_was_not_about_to_fail() -> None:
    *_, again = story((RUN, seen(doomed()), 0), (RUN, seen(runs(at=5)), 10))
    assert (ends(again), phase(again).message) == ("Running", "")


def test_what_waits_for_what_will_never_come_is_ended() -> None:
    """An image name that cannot be: the pod waits for ever, and so would the job and the run."""
    run = one(template={"graceSeconds": 30})
    never = doomed(run, BAD, message="InvalidImageName")
    limit = 30 + ENDING_SECONDS
    first, before, late, over = story(
        (run, seen(never), 0), (run, seen(never), limit - 1), (run, seen(never), limit), (run, seen(), limit + 5)
    )  # fmt: skip
    assert first.requeue_after is not None
    assert first.requeue_after.total_seconds() == limit
    assert (stopped(before), stopped(late)) == ([], ["base-1"])
    assert condition(over, meta.FAILED) == "True/PhaseFailed"
    assert phase(over).message == "InvalidImageName"


def test_suspending_what_has_failed_already_does_not_unmake_the_failure() -> None:
    asleep = one(suspend=True, generation=2)
    *_, gone = story((RUN, seen(doomed()), 0), (asleep, seen(doomed()), 1), (asleep, seen(), 2))
    assert ends(gone) == "Failed Infrastructure"


# ---------------------------------------------------------------- attempts that are over


def test_a_live_job_whose_attempt_has_failed_is_ended() -> None:
    """It was taken for gone, and nobody else would ever end it."""
    stuck = admitted(QUICK)
    *_, back = story((QUICK, seen(stuck), 60), (QUICK, seen(), 61), (QUICK, seen(stuck), 62), (QUICK, seen(stuck), 99))
    assert (stopped(back), started(back)) == (["base-1"], [])


def test_a_stopped_attempt_whose_job_stays_behind_is_not_counted_later() -> None:
    """Its record goes when it has a successor; what is left of its job says Interrupted."""
    asleep, awake = one(suspend=True, generation=2), one(generation=3)
    ended = job(RUN, "base", state=FAILED, failure=INTERRUPTED)
    decisions = story(
        (RUN, seen(runs()), 0), (asleep, seen(runs()), 1), (asleep, seen(ended), 2), (awake, seen(ended), 3),
        (awake, seen(ended, job(RUN, "base", 2)), 4), (awake, seen(ended, job(RUN, "base", 2)), 5),
    )  # fmt: skip
    assert started(decisions[3]) == ["base-2"]
    assert [(a.number, a.state) for a in phase(decisions[-1]).attempts] == [(2, AttemptState.RUNNING)]


def test_a_stopped_attempt_that_ended_without_a_word_is_not_counted() -> None:
    asleep = one(suspend=True, generation=2)
    ended = job(RUN, "base", state=SUCCEEDED)
    *_, end = story((RUN, seen(runs()), 0), (asleep, seen(runs()), 1), (asleep, seen(ended), 2))
    assert ends(end) == "Stopped"


def test_an_attempt_at_other_settings_that_succeeded_is_no_failure() -> None:
    edited = one(seed=1, generation=2)
    *_, end = story((RUN, seen(runs()), 0), (edited, seen(job(RUN, "base", state=SUCCEEDED)), 1))
    assert ends(end) == "Succeeded"
    assert started(end) == ["base-2"]


# ---------------------------------------------------------------- deadlines and suspensions


def test_no_time_runs_while_a_run_is_suspended_and_it_begins_anew_afterwards() -> None:
    policy = {"phaseDeadlineSeconds": 100, "runDeadlineSeconds": 150}
    run = one(failurePolicy=policy)
    asleep = one(suspend=True, generation=2, failurePolicy=policy)
    awake = one(generation=3, failurePolicy=policy)
    *_, rests, wakes, again, late = story(
        (run, seen(runs(run)), 0),
        (asleep, seen(runs(run)), 50),
        (asleep, seen(), 60),
        (asleep, seen(), 9000),
        (awake, seen(), 9001),
        (awake, seen(job(run, "base", 2, started_at=after(9002))), 9101),
        (awake, seen(job(run, "base", 2, started_at=after(9002))), 9102),
    )
    assert condition(rests, meta.SUSPENDED) == "True/RunSuspended"
    assert rests.requeue_after is None
    assert started(wakes) == ["base-2"]
    assert (stopped(again), stopped(late)) == ([], ["base-2"])


def test_a_phase_that_took_too_long_is_not_revived_by_a_suspension() -> None:
    policy = {"phaseDeadlineSeconds": 100}
    run, asleep = diamond(failurePolicy=policy), diamond(failurePolicy=policy, suspend=True)
    live = job(run, "base", started_at=START)
    *_, slept = story((run, seen(live), 0), (run, seen(live), 100), (asleep, seen(live), 101), (asleep, seen(), 102))
    assert phase(slept).state == PhaseState.FAILED


def test_a_run_that_goes_on_after_its_end_has_its_phases_time_anew() -> None:
    """Raising a budget would be in vain if the phase's deadline had passed meanwhile."""

    def run(retries: int, generation: int) -> AlignmentRun:
        policy = {"phaseDeadlineSeconds": 100, "retries": {"infrastructure": retries}}
        return one(generation=generation, failurePolicy=policy)

    first = run(0, 1)
    failed = seen(job(first, "base", state=FAILED, failure=INFRA, started_at=START, finished_at=after(50)))
    end, goes_on = story((first, failed, 50), (run(1, 2), failed, 90_000))
    assert end.status.is_true(meta.FAILED)
    assert started(goes_on) == ["base-2"]
    live = seen(*failed.jobs, job(first, "base", 2, started_at=after(90_001)))
    assert stopped(decide(with_status(run(1, 2), goes_on), live, after(90_100))) == []
    assert stopped(decide(with_status(run(1, 2), goes_on), live, after(90_101))) == ["base-2"]


def test_a_phase_that_took_too_long_goes_on_only_with_another_deadline() -> None:
    def run(deadline: int, generation: int, ttl: int | None = None) -> AlignmentRun:
        policy = {"phaseDeadlineSeconds": deadline}
        return one(generation=generation, failurePolicy=policy, ttlSecondsAfterFinished=ttl)

    live = job(run(100, 1), "base", started_at=START)
    *_, end, edited, raised = story(
        (run(100, 1), seen(live), 0), (run(100, 1), seen(live), 100), (run(100, 1), seen(), 101),
        (run(100, 2, 3600), seen(), 102), (run(1000, 3, 3600), seen(), 103),
    )  # fmt: skip
    assert condition(end, meta.FAILED) == "True/DeadlineExceeded"
    assert condition(edited, meta.FAILED) == "True/DeadlineExceeded"
    assert started(raised) == ["base-2"]


def test_the_clock_is_told_of_a_deadline_during_a_backoff() -> None:
    run = one(failurePolicy={"phaseDeadlineSeconds": 15, "backoff": {"initialSeconds": 100}})
    failed = job(run, "base", state=FAILED, failure=INFRA, started_at=START, finished_at=after(10))
    decision = decide(run, seen(failed), after(10))
    assert decision.requeue_after is not None
    assert decision.requeue_after.total_seconds() == 5


# ---------------------------------------------------------------- runs that cannot be

LACKING = "spec.workspace: is not set"


def test_a_run_that_its_backend_cannot_do_is_rejected_and_what_runs_is_ended() -> None:
    running, rejected = story((RUN, seen(runs()), 0), (one(generation=2), seen(runs(), problems=(LACKING,)), 1))
    assert condition(running, meta.ACCEPTED) == "True/Valid"
    assert condition(rejected, meta.ACCEPTED) == condition(rejected, meta.FAILED).replace("True", "False")
    assert rejected.status.condition(meta.FAILED).message == LACKING  # type: ignore[union-attr]
    assert stopped(rejected) == ["base-1"]
    assert (phase(rejected).state, rejected.status.phase) == (PhaseState.WAITING, "Invalid")


def test_a_rejected_runs_job_is_ended_though_the_first_word_was_lost() -> None:
    bad = one(generation=2)
    *_, rejected, again, gone = story(
        (RUN, seen(runs()), 0), (bad, seen(runs(), problems=(LACKING,)), 1), (bad, seen(runs()), 2), (bad, seen(), 3)
    )  # fmt: skip
    assert (stopped(again), stopped(gone)) == (["base-1"], [])
    assert again.status == gone.status == rejected.status
    assert not is_settled(with_status(bad, rejected)), "someone has to look until the job is gone"


def test_what_a_rejection_stopped_has_not_failed_when_the_run_is_mended() -> None:
    ended = seen(job(RUN, "base", state=FAILED, failure=INTERRUPTED))
    bad, good = one(generation=2), one(generation=3)
    *_, mended = story((RUN, seen(runs()), 0), (bad, seen(runs(), problems=(LACKING,)), 1), (good, ended, 2))
    assert (ends(mended), started(mended)) == ("Stopped", ["base-2"])


def test_a_mended_run_that_has_nothing_left_to_do_has_an_end() -> None:
    """Without its time, its jobs would never go."""
    bad, good = one(generation=2), one(generation=3)
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"))
    *_, mended = story((RUN, seen(runs()), 0), (bad, seen(runs(), problems=(LACKING,)), 1), (good, done, 2))
    assert (mended.status.finished_at, mended.status.phase) == (after(2), "Succeeded")


# ---------------------------------------------------------------- after the end


def test_the_jobs_of_a_finished_run_go_when_their_time_has_come() -> None:
    run = one(ttlSecondsAfterFinished=60)
    done = seen(job(run, "base", state=SUCCEEDED), results=results(run, "base"))
    end, before, due, gone = story((run, done, 0), (run, done, 59), (run, done, 60), (run, seen(), 61))
    waits = [d.requeue_after and d.requeue_after.total_seconds() for d in (end, before, due, gone)]
    assert waits == [60, 1, None, None]
    assert [stopped(d) for d in (end, before, due, gone)] == [[], [], ["base-1"], []]
    assert gone.status == end.status
    assert not is_settled(with_status(run, end))


def test_without_a_time_to_live_nothing_is_looked_at_again() -> None:
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"))
    (end,) = story((RUN, done, 0))
    assert is_settled(with_status(RUN, end))
    assert not is_settled(with_status(one(generation=2), end))


# ---------------------------------------------------------------- nodes and figures

NODES = {
    "the infrastructure failed it there": (INFRA, True, ("node-2",)),
    "its own fault": (FailureClass.OUT_OF_MEMORY, True, ()),
    "not asked for": (INFRA, False, ()),
}


@pytest.mark.parametrize("why", NODES)
def test_nodes_that_are_avoided(why: str) -> None:
    failure, asked, avoided = NODES[why]
    run = one(failurePolicy={"avoidFailedNodes": asked})
    failed = job(run, "base", state=FAILED, failure=failure, node="node-2", finished_at=START)
    (action,) = decide(run, seen(failed), after(100)).actions
    assert action.job.avoid_nodes == avoided  # type: ignore[union-attr]


def test_a_node_is_remembered_from_when_the_job_went_down() -> None:
    run = one(failurePolicy={"avoidFailedNodes": True})
    *_, again = story((run, seen(doomed(run, node="node-2")), 0), (run, seen(), 1), (run, seen(), 60))
    (action,) = again.actions
    assert action.job.avoid_nodes == ("node-2",)  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_figures_that_json_does_not_know_are_left_out(bad: float) -> None:
    decision = decide(RUN, seen(runs(), progress=report(3, 0, loss=bad, eta_seconds=5.0)), START)
    found = phase(decision).progress
    assert found is not None
    assert (found.loss, found.eta_seconds, found.step) == (None, 5.0, 3)
    assert (decision.status.step, decision.status.loss, decision.status.percent) == ("3/10", "", 30)


PERCENT = {
    "nothing": ({}, None, 0),
    "half of the first of four": ({}, (5, 10), 12),
    "one of four": ({"base": 1}, None, 25),
    "a report of more steps than there are": ({}, (30, 10), 25),
    "a report without a total": ({}, (3, 0), 0),
}


@pytest.mark.parametrize("sentence", PERCENT)
def test_percent(sentence: str) -> None:
    done, steps, percent = PERCENT[sentence]
    run = diamond()
    progress = {"base": PhaseProgress(step=steps[0], total_steps=steps[1])} if steps else {}
    observed = seen(job(run, "base"), progress=progress) if steps else seen(results=results(run, *done))
    assert decide(run, observed, START).status.percent == percent
