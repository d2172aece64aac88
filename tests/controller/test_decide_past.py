"""Attempts that have trained stay in the status, with why they ended; they weigh nothing any more, and are counted in the end."""

from dataclasses import replace
from typing import Any

from builders import START, after, job, make_run, seen, sft, started, with_status
from hypothesis import given
from hypothesis import strategies as st

from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus
from controller.plan.attempts import KEPT, KINDS, halvings, nodes, prune
from controller.plan.bounded import LIMIT, size
from controller.plan.decide import Decision, decide
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from trainers.contract import FailureClass

RUN = make_run(sft("base"))
EDITED = make_run(sft("base", seed=1))


def trains(run: AlignmentRun, attempt: int = 1, **more: Any) -> ObservedJob:
    return job(run, "base", attempt, started_at=START, running_since=START, may_start_since=START, **more)


def story(*looks: tuple[AlignmentRun, Observed]) -> list[Decision]:
    decisions: list[Decision] = []
    for number, (run, found) in enumerate(looks):
        known = with_status(run, decisions[-1]) if decisions else run
        known = known.model_copy(update={"metadata": known.metadata.model_copy(update={"generation": number})})
        decisions.append(decide(known, found, after(number * 60)))
    return decisions


def phase(decision: Decision) -> PhaseStatus:
    return decision.status.phases[0]


def told(decision: Decision) -> list[tuple[int, str, str]]:
    return [(a.number, str(a.state), a.message) for a in phase(decision).attempts]


def test_one_that_was_preempted_and_moved_to_another_queue():
    here, there = make_run(sft("base"), queueName="a"), make_run(sft("base"), queueName="b")
    taken_back = job(here, "base", started_at=START, queue_name="a")
    *_, moved, gone, again = story(
        (here, seen()), (here, seen(trains(here, queue_name="a"))), (there, seen(taken_back)), (there, seen()),
        (there, seen(trains(there, 2, queue_name="b"))),
    )  # fmt: skip
    assert told(moved) == [(1, "Stopping", "stopped: queue b is asked for")]
    assert started(gone) == ["base-2"]
    assert told(again) == [(1, "Stopped", "stopped: queue b is asked for"), (2, "Running", "")]


def test_one_that_was_paused():
    asleep = make_run(sft("base"), suspend=True)
    *_, again = story(
        (RUN, seen()), (RUN, seen(trains(RUN))), (asleep, seen(trains(RUN))), (asleep, seen()), (RUN, seen()),
        (RUN, seen(trains(RUN, 2))),
    )  # fmt: skip
    assert told(again) == [(1, "Stopped", "stopped: suspended"), (2, "Running", "")]


def test_one_that_had_other_settings():
    *_, again = story(
        (RUN, seen()), (RUN, seen(trains(RUN))), (EDITED, seen(trains(RUN))), (EDITED, seen()),
        (EDITED, seen(trains(EDITED, 2))),
    )  # fmt: skip
    assert told(again) == [(1, "Stopped", "stopped: its settings or inputs have changed"), (2, "Running", "")]


def test_one_that_only_waited_leaves_nothing_behind():
    here, there = make_run(sft("base"), queueName="a"), make_run(sft("base"), queueName="b")
    *_, again = story(
        (here, seen()), (here, seen(job(here, "base", queue_name="a"))), (there, seen(job(here, "base", queue_name="a"))),
        (there, seen()), (there, seen(trains(there, 2, queue_name="b"))),
    )  # fmt: skip
    assert [number for number, *_ in told(again)] == [2]


def test_failures_of_other_settings_stay_and_count_neither_there_nor_when_these_are_asked_for_again():
    """The budget of a class is one; they would end the phase at once."""
    policy = {"failurePolicy": {"retries": {"internal": 0}}}
    run, edited = make_run(sft("base"), **policy), make_run(sft("base", seed=1), **policy)
    failed = replace(trains(run), state=JobState.FAILED, failure=FailureClass.INTERNAL, message="a bug")
    *_, ended, other, trained, back = story(
        (run, seen()), (run, seen(trains(run))), (run, seen(failed)), (edited, seen()), (edited, seen(trains(edited, 2))),
        (run, seen()),
    )  # fmt: skip
    assert phase(ended).state == PhaseState.FAILED
    assert started(other) == ["base-2"]
    assert told(trained) == [(1, "Failed", "a bug"), (2, "Running", "")]
    assert (phase(back).state, started(back)) == (PhaseState.RUNNING, ["base-3"])
    assert next((a.number, a.failure, a.forgiven) for a in phase(back).attempts) == (1, "Internal", True)


def test_one_that_succeeded_before_an_edit_is_not_taken_for_one_without_a_result_when_that_is_undone():
    done = replace(trains(RUN), state=JobState.SUCCEEDED, finished_at=after(90))
    result = {"base": ObservedResult(done.digest, "artifact-of-base")}
    *_, finished, edited, trained, _, undone = story(
        (RUN, seen()),
        (RUN, seen(done, results=result)),
        (EDITED, seen()),
        (EDITED, seen(trains(EDITED, 2))),
        (RUN, seen(trains(EDITED, 2))),
        (RUN, seen()),
    )
    assert phase(finished).state == PhaseState.SUCCEEDED
    assert started(edited) == ["base-2"]
    assert told(trained) == [(1, "Succeeded", ""), (2, "Running", "")]
    assert [a.failure for a in phase(undone).attempts] == [None, None, None]
    assert started(undone) == ["base-3"], "its own program finds what was left"


def record(number: int, state: AttemptState, digest: str, **more: Any) -> Attempt:
    return Attempt(number=number, digest=digest, state=state, started_at=START, **more)


ENDS = st.sampled_from(
    [(AttemptState.STOPPED, None), (AttemptState.SUCCEEDED, None)]
    + [(AttemptState.FAILED, failure) for failure in (FailureClass.INTERRUPTED, FailureClass.OUT_OF_MEMORY)]
)


@given(st.lists(st.tuples(ENDS, st.sampled_from("ab")), min_size=1, max_size=60))
def test_none_is_lost_and_what_counts_stays_as_it_was(ends: list[tuple[tuple[AttemptState, FailureClass | None], str]]):
    """Pruned after each, as a run's are."""
    kept: tuple[Attempt, ...] = ()
    for number, ((state, failure), digest) in enumerate(ends, 1):
        kept = prune((*kept, record(number, state, digest, failure=failure)), "a")
    assert sum(a.times for a in kept) == len(ends)
    assert len(kept) <= 2 * (KEPT + KINDS) + 1
    assert kept[-1].number == len(ends)
    wanted = sum(1 for (_, failure), digest in ends if (failure, digest) == (FailureClass.OUT_OF_MEMORY, "a"))
    counted = [a for a in kept if (a.state, a.digest) == (AttemptState.FAILED, "a")]
    assert (halvings(counted), nodes(counted, 4)) == (wanted, 4)


def test_a_thousand_stops_are_a_few_lines():
    kept: tuple[Attempt, ...] = ()
    for number in range(1, 1001):
        said = "stopped: " + "x" * 1000
        kept = prune(
            (*kept, record(number, AttemptState.STOPPED, f"{number}", message=said, checkpoint_step=2000 - number)), "a"
        )
    assert [(a.number, a.times) for a in kept] == [(996, 996), (997, 1), (998, 1), (999, 1), (1000, 1)]
    assert kept[0].checkpoint_step == 1004, "steps of other settings are none of these"


def test_sixty_four_phases_that_were_stopped_again_and_again_fit_into_a_status():
    names = [f"p{i}" for i in range(64)]
    run = make_run(*(sft(name) for name in names))
    decision = decide(run, seen(), START)
    stops = tuple(record(n, AttemptState.STOPPED, str(n), message="stopped: " + "é" * 900) for n in range(1, 9))
    status = decision.status.model_copy(
        update={"phases": tuple(p.model_copy(update={"attempts": stops}) for p in decision.status.phases)}
    )
    assert size(decide(run.model_copy(update={"status": status}), seen(), after(60)).status) <= LIMIT
