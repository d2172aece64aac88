"""Budgets refill with progress: what is lost again and again and still gets on may take weeks; what does not, ends."""

from builders import after, seen, with_status
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import INFRA, INTERRUPTED, attempt, one, report, runs

from controller.api.run import AlignmentRun
from controller.api.status import PhaseState
from controller.plan.attempts import OF_THE_PLATFORM, budget, judge
from controller.plan.decide import decide
from controller.plan.observed import JobState
from trainers.contract import FailureClass

HOUR = 3600.0
Life = tuple[FailureClass, int | None]
"""How an attempt ends, and the step of the newest checkpoint that it is seen to have."""


def lived(run: AlignmentRun, lives: list[Life]) -> AlignmentRun:
    """Attempts one after the other, an hour each, with a look while each runs, one at its end, and one before the next."""
    run = with_status(run, decide(run, seen(), after(0)))
    for number, (failure, saved) in enumerate(lives, 1):
        at = number * HOUR
        progress = report(1 + (saved or 0), at, checkpoint_step=saved) if saved is not None else {}
        live = runs(run, at, attempt=number)
        run = with_status(run, decide(run, seen(live, progress=progress), after(at)))
        end = runs(run, at, attempt=number, state=JobState.FAILED, failure=failure, finished_at=after(at + 60))
        run = with_status(run, decide(run, seen(end), after(at + 60)))
        if run.status and run.status.phases[0].state == PhaseState.FAILED:
            return run
        run = with_status(run, decide(run, seen(end), after(at + HOUR - 1)))
    return run


def ended_after(run: AlignmentRun, lives: list[Life]) -> int | None:
    """The attempt that was one too many."""
    found = lived(run, lives).status
    assert found is not None
    return found.phases[0].attempts[-1].number if found.phases[0].state == PhaseState.FAILED else None


def test_weeks_on_spot_nodes() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 2}})
    assert ended_after(run, [(INTERRUPTED, 10 * n) for n in range(1, 60)]) is None


def test_without_progress_the_budget_is_that_of_its_class() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 2}})
    assert ended_after(run, [(INTERRUPTED, None)] * 5) == 3
    assert ended_after(run, [(INTERRUPTED, 10)] * 9) == 3, "the same checkpoint again is no progress"
    assert ended_after(run, [(INTERRUPTED, 10), (INTERRUPTED, 10), (INTERRUPTED, 20), *[(INTERRUPTED, 20)] * 5]) == 5


def test_what_was_saved_at_the_very_end_counts_when_the_next_one_goes_on_from_there() -> None:
    """Nobody had seen that checkpoint of the first."""
    run = one(failurePolicy={"retries": {"interrupted": 1}})
    assert ended_after(run, [(INTERRUPTED, None), (INTERRUPTED, 40), (INTERRUPTED, 90)]) is None


def test_other_classes_of_the_platforms_are_given_back_too() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 1, "infrastructure": 1}})
    assert ended_after(run, [(INFRA, None), (INTERRUPTED, None), (INFRA, 10), (INTERRUPTED, 10)]) is None


def test_a_budget_of_none_stays_none() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 0}})
    assert ended_after(run, [(INTERRUPTED, 100)]) == 1


def test_memory_and_bugs_keep_their_budgets() -> None:
    run = one(failurePolicy={"retries": {"outOfMemory": 2, "internal": 1}})
    oom = FailureClass.OUT_OF_MEMORY
    assert ended_after(run, [(oom, 10), (oom, 20), (oom, 30)]) == 3
    assert ended_after(run, [(FailureClass.INTERNAL, 10), (FailureClass.INTERNAL, 20)]) == 2
    halved = lived(run, [(oom, 10), (INFRA, 20), (oom, 30)][:2])
    assert attempt(decide(halved, seen(), after(9 * HOUR)), 3).halvings == 1


def test_it_can_be_turned_off() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 2}, "refillOnProgress": False})
    assert ended_after(run, [(INTERRUPTED, 10 * n) for n in range(1, 9)]) == 3


def test_the_wait_is_short_again_after_progress() -> None:
    run = one(failurePolicy={"retries": {"interrupted": 9}})
    waits = []
    for last in ((INTERRUPTED, None), (INTERRUPTED, 10)):
        status = lived(run, [*[(INTERRUPTED, None)] * 4, last]).status
        assert status is not None
        failures = [a for a in status.phases[0].attempts if a.state.ended]
        verdict = judge(failures, run.spec.failure_policy, "test/base")
        assert verdict.retry_at is not None
        waits.append((verdict.retry_at - after(5 * HOUR + 60)).total_seconds())
    assert waits[0] > 150 > 13 > waits[1]


lives = st.lists(
    st.tuples(st.sampled_from([*OF_THE_PLATFORM, FailureClass.OUT_OF_MEMORY]), st.none() | st.integers(0, 3)),
    max_size=24,
)


@settings(deadline=None, max_examples=40)
@given(lives, st.integers(0, 3))
def test_however_old_failures_are_put_together_the_budget_is_that_of_the_rule(
    history: list[Life], allowed: int
) -> None:
    names = ("infrastructure", "interrupted", "startupTimeout", "stalled", "outOfMemory")
    run = one(failurePolicy={"retries": dict.fromkeys(names, allowed)})
    assert ended_after(run, history) == expected(history, run)


def expected(history: list[Life], run: AlignmentRun) -> int | None:
    """Of the rule, with all of the history at hand."""
    used: list[FailureClass] = []
    furthest = 0
    for number, (failure, saved) in enumerate(history, 1):
        if (saved or 0) > furthest:
            furthest = saved or 0
            used = [f for f in used if f not in OF_THE_PLATFORM]
        used.append(failure)
        if used.count(failure) > budget(run.spec.failure_policy.retries, failure):
            return number
    return None
