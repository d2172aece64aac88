"""A run that fails again and again keeps its budgets and its backoff, and a status that can be written."""

import json
from datetime import timedelta

import pytest
from builders import START, after, job, make_run, seen, sft, with_status
from hypothesis import given
from hypothesis import strategies as st
from statuses import crowded, stored
from stories import INFRA, INTERRUPTED, one, phase

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, Condition, PhaseState, PhaseStatus, RetryStatus, RunStatus
from controller.api.text import stored_bytes, within
from controller.plan.attempts import KEPT
from controller.plan.bounded import LIMIT, bounded
from controller.plan.decide import Decision, decide
from controller.plan.observed import JobState, Observed
from trainers.contract import FailureClass

BUDGETS = {"infrastructure": 10, "interrupted": 10, "outOfMemory": 0}
RETRYABLE = [INFRA, INTERRUPTED]


def failing(run: AlignmentRun, failures: list[FailureClass]) -> list[Decision]:
    """Attempt after attempt, of which each ends like that, and its job is gone afterwards."""
    decisions: list[Decision] = []
    now, known = START, run
    for number, failure in enumerate(failures, 1):
        decisions.append(decide(known, seen(), now))
        known = with_status(run, decisions[-1])
        now += timedelta(hours=1)
        ended = job(run, "base", number, state=JobState.FAILED, failure=failure, message="m" * 900, finished_at=now)
        decisions.append(decide(known, seen(ended), now))
        known = with_status(run, decisions[-1])
        now += timedelta(hours=1)
    return decisions


def test_failures_beyond_the_last_few_are_counted_and_no_budget_is_longer_for_it() -> None:
    run = one(failurePolicy={"retries": BUDGETS})
    mixed = [RETRYABLE[i % 2] for i in range(20)]
    *_, before_last, last = failing(run, [*mixed, INFRA])
    assert [d.status.phases[0].state for d in (before_last, last)] == [PhaseState.RUNNING, PhaseState.FAILED]
    found = phase(last)
    assert (found.tries, len(found.attempts)) == (21, KEPT + 2 + 1)
    assert {a.failure: a.times for a in found.attempts[:2]} == {INFRA: 9, INTERRUPTED: 8}
    assert max(len(a.message) for a in found.attempts[:2]) < 200


def test_the_wait_before_another_attempt_goes_on_doubling() -> None:
    run = one(failurePolicy={"retries": BUDGETS, "backoff": {"initialSeconds": 1, "maxSeconds": 1e6}})
    waits = [phase(d).retry_at for d in failing(run, [INFRA] * 10) if phase(d).state == PhaseState.BACKING_OFF]
    since = [w - START - timedelta(hours=2 * i + 1) for i, w in enumerate(waits) if w]
    assert len(since) == 10
    assert all(2**i <= wait.total_seconds() <= 1.25 * 2**i for i, wait in enumerate(since))


def test_memory_is_halved_as_often_as_it_ran_out() -> None:
    run = one(failurePolicy={"retries": {"outOfMemory": 10}})
    last = failing(run, [FailureClass.OUT_OF_MEMORY] * 9)[-1]
    again = decide(with_status(run, last), seen(), after(1e6))
    assert phase(again).attempts[-1].halvings == 9


def test_a_status_stays_small_whatever_has_happened() -> None:
    run, status = crowded(meta.MAX_PHASES)
    # Each text is bounded as it is written (4,096 characters), which alone is not enough.
    assert len(json.dumps(status.document())) > 10 * LIMIT
    small = bounded(status, run)
    assert len(json.dumps(small.document())) <= LIMIT
    assert bounded(small, run) == small
    for found in small.phases:
        assert found.attempts[-1].number == 17
        assert found.metrics["parameters"] == 7.0


@pytest.mark.parametrize("char", ["a", '"', "é", "字", "😀", "<"])
@pytest.mark.parametrize("attempts", [1, 2, 18])
def test_it_is_bounded_in_bytes_whatever_the_language(char: str, attempts: int) -> None:
    run = make_run(*(sft(f"p{i:02}") for i in range(meta.MAX_PHASES)))
    failed = [
        Attempt(number=n, digest="d" * 64, state=AttemptState.FAILED, failure=INFRA, message=char * 1024)
        for n in range(1, attempts + 1)
    ]
    phases = [PhaseStatus(name=e.name, type="sft", message=char * 1024, attempts=tuple(failed)) for e in run.phases]
    told = [
        Condition(type=kind, status="True", reason="X", message=char * 4096, last_transition_time=START)
        for kind in (meta.ACCEPTED, meta.PROGRESSING, meta.SUSPENDED, meta.STALLED, meta.SUCCEEDED, meta.FAILED)
    ]
    refused = RetryStatus(refused=char * 4096)
    small = bounded(RunStatus(phases=tuple(phases), conditions=tuple(told), retry=refused), run)
    assert stored(small.document()) <= LIMIT
    assert bounded(small, run) == small
    assert small.phases[-1].message


@given(st.text(max_size=200), st.integers(0, 300))
def test_a_text_is_cut_to_what_it_takes_where_it_is_kept(text: str, limit: int) -> None:
    kept = within(text, limit)
    assert text.startswith(kept)
    assert stored(kept) - 2 == stored_bytes(kept) <= limit
    assert kept == text or limit - stored_bytes(kept) < 7, "no more is cut than is needed"


def test_what_fits_is_left_as_it_is() -> None:
    run, crowd = crowded(2)
    phases = tuple(p.model_copy(update={"attempts": p.attempts[-4:]}) for p in crowd.phases)
    status = RunStatus(phases=phases)
    assert bounded(status, run) == status


def test_a_run_of_many_failing_phases_comes_to_rest() -> None:
    """A status that is squeezed anew at every look would be written at every look."""
    names = [f"{'p' * 27}-{i:02}" for i in range(meta.MAX_PHASES)]
    run = make_run(*map(sft, names), failurePolicy={"retries": BUDGETS})
    known, now = run, START
    for number in range(1, 4):
        decision = decide(known, Observed(), now)
        now += timedelta(hours=1)
        jobs = [
            job(run, name, number, state=JobState.FAILED, failure=INFRA, message="m" * 1024, finished_at=now)
            for name in names
        ]
        decision = decide(with_status(run, decision), seen(*jobs), now)
        again = decide(with_status(run, decision), seen(*jobs), now)
        assert decide(with_status(run, again), seen(*jobs), now).status == again.status
        assert len(json.dumps(again.status.document())) <= LIMIT
        known, now = with_status(run, again), now + timedelta(hours=1)
