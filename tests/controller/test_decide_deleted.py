"""A job that somebody deletes: the attempt's end, counted, told, and not made again at once for ever."""

from builders import job, seen, started, stopped
from stories import INFRA, RUN, attempt, ends, one, phase, runs, story

from controller.api.status import PhaseState
from controller.operator import events
from controller.plan.decide import decide
from controller.plan.observed import JobState

NOTHING = seen()
RUNNING = seen(runs())
SAID = "its job was deleted, and not by the operator"


def test_it_is_the_attempts_end_backs_off_and_is_told() -> None:
    *_, running, gone, waits, again = story(
        (RUN, NOTHING, 0), (RUN, RUNNING, 10), (RUN, NOTHING, 20), (RUN, NOTHING, 25), (RUN, NOTHING, 40)
    )
    assert (ends(gone), started(gone), phase(gone).state) == ("Failed Interrupted", [], PhaseState.BACKING_OFF)
    assert phase(gone).message == f"Interrupted: {SAID}"
    [event] = events.transitions(running.status, gone.status)
    assert (event.type, event.reason) == ("Warning", "AttemptFailed")
    assert event.note == f"phase base, attempt 1 failed: Interrupted: {SAID}"
    assert waits.status == gone.status
    assert started(again) == ["base-2"]


def test_whoever_deletes_each_ends_the_phase_by_its_budget() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 2}})
    looks, at = [], 0.0
    for number in (1, 2, 3):
        looks += [(run, NOTHING, at), (run, seen(runs(run, at, attempt=number)), at + 1), (run, NOTHING, at + 2)]
        at += 1000
    *_, last = story(*looks)
    assert (phase(last).state, phase(last).message) == (PhaseState.FAILED, SAID)


def test_one_that_was_only_asked_for_is_asked_for_again() -> None:
    """A write may get lost."""
    *_, again = story((RUN, NOTHING, 0), (RUN, NOTHING, 20))
    assert started(again) == ["base-1"]


def test_a_status_from_a_backup_loses_no_job_and_counts_nothing() -> None:
    """It says that attempt 1 runs; the cluster is two attempts further."""
    run = one(failurePolicy={"retries": {"interrupted": 0}})
    *_, old = story((run, NOTHING, 0), (run, seen(runs(run)), 10))
    now = seen(runs(run, 3000, attempt=3))
    *_, decision = story((run, NOTHING, 0), (run, seen(runs(run)), 10), (run, now, 3600))
    assert (started(decision), stopped(decision), phase(decision).state) == ([], [], PhaseState.RUNNING)
    assert [(a.number, a.state) for a in phase(decision).attempts] == [(1, "Stopped"), (3, "Running")]
    assert attempt(old).state == "Running"


def test_one_that_was_asked_for_in_a_backup_is_not_asked_for_behind_a_later_one() -> None:
    later = seen(runs(attempt=2, state=JobState.FAILED, failure=INFRA))
    *_, decision = story((RUN, NOTHING, 0), (RUN, later, 3600))
    assert started(decision) == []
    assert [a.number for a in phase(decision).attempts if not a.state.ended] == []
    assert (ends(decision, 2), phase(decision).state) == ("Failed Infrastructure", PhaseState.BACKING_OFF)


def test_a_run_without_its_status_finds_its_job() -> None:
    lost = decide(RUN, seen(job(RUN, "base", 2)), story((RUN, NOTHING, 0))[0].status.started_at)
    assert (started(lost), stopped(lost), attempt(lost, 2).state) == ([], [], "Running")
