"""The planner by tables: deadlines, suspensions, runs that cannot be, and what is left of those that have ended."""

import math

import pytest
from builders import START, after, diamond, is_settled, job, results, seen, started, stopped, with_status
from stories import (
    BAD,
    FAILED,
    INFRA,
    INTERRUPTED,
    RUN,
    SUCCEEDED,
    condition,
    doomed,
    ends,
    one,
    phase,
    report,
    runs,
    story,
)

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseProgress, PhaseState
from controller.plan.decide import decide
from trainers.contract import FailureClass

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


# ---------------------------------------------------------------- after the end


def test_the_jobs_of_a_finished_run_go_when_their_time_has_come() -> None:
    run = one(ttlSecondsAfterFinished=60)
    done = seen(job(run, "base", state=SUCCEEDED), results=results(run, "base"))
    end, before, due, gone = story((run, done, 0), (run, done, 59), (run, done, 60), (run, seen(), 61))
    waits = [d.requeue_after and d.requeue_after.total_seconds() for d in (end, before, due, gone)]
    assert waits == [60, 1, None, None]
    assert [stopped(d) for d in (end, before, due, gone)] == [[], [], ["base-1"], []]
    assert due.status == end.status
    assert not is_settled(with_status(run, due))
    assert gone.status == end.status.model_copy(update={"jobs_deleted": True})
    assert is_settled(with_status(run, gone)), "else all that ever ran would be looked at after each restart"


def test_jobs_go_after_a_week_unless_set() -> None:
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"))
    week = 7 * 24 * 3600
    decisions = story((RUN, done, 0), (RUN, done, week - 1), (RUN, done, week))
    assert [stopped(d) for d in decisions] == [[], [], ["base-1"]]


def test_without_a_time_to_live_nothing_is_looked_at_again() -> None:
    run = one(ttlSecondsAfterFinished=None)
    done = seen(job(run, "base", state=SUCCEEDED), results=results(run, "base"))
    (end,) = story((run, done, 0))
    assert is_settled(with_status(run, end))
    assert not is_settled(with_status(one(generation=2, ttlSecondsAfterFinished=None), end))


def test_attempts_of_a_run_that_goes_on_do_not_fill_the_lists() -> None:
    """Days of interruptions on spot nodes."""
    run = one(ttlSecondsAfterFinished=60, failurePolicy={"backoff": {"initialSeconds": 0}})
    lost = job(run, "base", 1, FAILED, failure=INTERRUPTED, finished_at=after(10))
    second = runs(run, 20, attempt=2)
    looks = (seen(runs(run)), seen(lost), seen(lost, second), seen(lost, second), seen(second))
    decisions = story(*((run, look, at) for look, at in zip(looks, (0, 11, 20, 70, 80), strict=True)))
    assert [stopped(d) for d in decisions] == [[], [], [], ["base-1"], []]
    assert decisions[2].requeue_after is not None
    assert decisions[2].requeue_after.total_seconds() == 50
    assert decisions[4].status == decisions[3].status, "nothing is forgotten with them"
    assert ends(decisions[4], 1) == "Failed Interrupted"


def test_a_job_whose_end_the_status_does_not_have_yet_stays() -> None:
    run = one(ttlSecondsAfterFinished=0)
    done = seen(job(run, "base", state=SUCCEEDED, finished_at=START), results=results(run, "base"))
    end, due = story((run, done, 50), (run, done, 51))
    assert (stopped(end), stopped(due)) == ([], ["base-1"])


def test_the_run_itself_goes_if_wanted() -> None:
    run = one(ttlSecondsAfterFinished=60, runTtlSecondsAfterFinished=100)
    done = seen(job(run, "base", state=SUCCEEDED), results=results(run, "base"))
    decisions = story((run, done, 0), (run, done, 60), (run, seen(), 61), (run, seen(), 100))
    assert [d.delete_run for d in decisions] == [False, False, False, True]
    waits = [d.requeue_after and d.requeue_after.total_seconds() for d in decisions]
    assert waits == [60, 40, 39, None]


def test_a_run_that_is_asked_to_try_again_at_its_last_moment_stays() -> None:
    run = one(runTtlSecondsAfterFinished=100)
    gone = job(run, "base", state=FAILED, failure=BAD, finished_at=after(1))
    (_, end) = story((run, seen(runs(run)), 0), (run, seen(gone), 1))
    annotations = {meta.ANNOTATION_RETRY: "1"}
    asked = run.model_copy(update={"metadata": run.metadata.model_copy(update={"annotations": annotations})})
    decision = decide(with_status(asked, end), seen(), after(500))
    assert (decision.delete_run, started(decision)) == (False, ["base-2"])


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
