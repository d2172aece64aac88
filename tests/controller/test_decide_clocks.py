"""Times that a wrong clock has written: for them nothing is late too early, waits for ever, or is deleted at once."""

from datetime import timedelta

from builders import START, after, job, results, seen, started, stopped, with_status
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import RUN, ends, one, phase, runs

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseState
from controller.plan.decide import Decision, decide
from controller.plan.observed import JobState, Observed

DAY = 86400.0
LIMITS = {"runDeadlineSeconds": 3600, "phaseDeadlineSeconds": 3000, "startupTimeoutSeconds": 600}
offsets = st.floats(-10 * DAY, 10 * DAY)


def made(run: AlignmentRun, at: float = 0) -> AlignmentRun:
    """Made then, by the API server."""
    metadata = run.metadata.model_copy(update={"creation_timestamp": after(at)})
    return run.model_copy(update={"metadata": metadata})


def wrong(run: AlignmentRun, off: float, *looks: tuple[float, Observed]) -> AlignmentRun:
    """What an operator leaves whose clock is ``off``."""
    for at, observed in looks:
        run = with_status(run, decide(run, observed, after(at + off)))
    return run


@settings(deadline=None, max_examples=60)
@given(offsets, st.floats(1, 2900))
def test_nothing_is_late_before_its_time(off: float, later: float) -> None:
    run = made(one(failurePolicy=LIMITS), -60)
    run = wrong(run, off, (0, seen()))
    decision = decide(run, seen(runs(run, 10)), after(later))
    assert (stopped(decision), phase(decision).state) == ([], PhaseState.RUNNING)
    assert decision.status.started_at is not None
    assert after(-60) <= decision.status.started_at <= after(later)


@settings(deadline=None, max_examples=60)
@given(offsets)
def test_it_is_late_in_time_when_the_clock_is_right_again(off: float) -> None:
    """Within the limit from the first look by a right clock."""
    run = made(one(failurePolicy={"runDeadlineSeconds": 3600}), -60)
    run = wrong(run, off, (0, seen()), (10, seen(runs(run, 10))))
    run = with_status(run, decide(run, seen(runs(run, 10)), after(20)))
    assert stopped(decide(run, seen(runs(run, 10)), after(20 + 3600))) == ["base-1"]


@settings(deadline=None, max_examples=60)
@given(offsets)
def test_a_retry_waits_and_not_for_hours(off: float) -> None:
    """A deleted job has no end but the one that we have seen."""
    run = made(RUN, -1)
    run = wrong(run, off, (0, seen()), (1, seen(runs(RUN))), (2, seen()))
    first = decide(run, seen(), after(3))
    assert ends(first) == "Failed Interrupted"
    assert started(decide(with_status(run, first), seen(), after(3 + 13))) == ["base-2"]
    assert off < -5 or started(first) == [], "the wait is lost only where the end is hours in the past"


@settings(deadline=None, max_examples=60)
@given(offsets, st.floats(0, 3430))
def test_jobs_are_not_deleted_before_their_time(off: float, later: float) -> None:
    run = made(one(ttlSecondsAfterFinished=3600), -60)
    done = job(run, "base", 1, JobState.SUCCEEDED, started_at=after(5), finished_at=after(100))
    run = wrong(run, off, (0, seen()), (100, seen(done, results=results(run, "base"))))
    assert run.status is not None
    assert run.status.is_true(meta.SUCCEEDED)
    assert stopped(decide(run, seen(done), after(101 + later))) == [], "at the worst it ended when it was made"
    known = with_status(run, decide(run, seen(done), after(101)))
    assert stopped(decide(known, seen(done), after(101 + 3600))) == ["base-1"]


@settings(deadline=None, max_examples=60)
@given(offsets)
def test_a_node_whose_clock_is_ahead_makes_nothing_late_nor_ends_the_wait_for_it(off: float) -> None:
    run = made(one(failurePolicy=LIMITS), -60)
    ahead = abs(off)
    live = runs(run, ahead)
    run = wrong(run, 0, (0, seen()), (10, seen(live)))
    assert phase(decide(run, seen(live), after(2900))).state == PhaseState.RUNNING
    assert stopped(decide(run, seen(live), after(10 + 3000))) == ["base-1"]


def test_a_status_of_now_is_left_as_it_is() -> None:
    run = made(RUN, -60)
    run = wrong(run, 0, (0, seen()), (1, seen(runs(RUN))))
    again: Decision = decide(run, seen(runs(RUN)), START + timedelta(seconds=1))
    assert again.status == run.status
