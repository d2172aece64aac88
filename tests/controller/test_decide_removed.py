"""Phases that an edit takes out of the spec, or gives another name, while they train: nobody wants what they would leave."""

from dataclasses import replace

import pytest
from builders import START, after, artifact, digests, job, make_run, seen, sft, started, stopped, with_status

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, PhaseState
from controller.plan.decide import Decision, decide, rests
from controller.plan.observed import JobState, ObservedJob, ObservedResult

BOTH = make_run(sft("sft"), sft("other"))
LEFT = make_run(sft("other"))
LIVE = (job(BOTH, "sft"), job(BOTH, "other"))
DONE = {"other": ObservedResult(digests(BOTH)["other"], artifact("other"))}


def edited(run: AlignmentRun, *jobs: ObservedJob) -> Decision:
    """The look after the edit of a run whose phases both train."""
    asked = decide(BOTH, seen(), START)
    trains = decide(with_status(BOTH, asked), seen(*LIVE), after(1))
    return decide(with_status(run, trains), seen(*(jobs or LIVE)), after(2))


def names(decision: Decision) -> list[str]:
    return [phase.name for phase in decision.status.phases]


@pytest.mark.parametrize("run", [LEFT, make_run(sft("renamed"), sft("other"))], ids=["removed", "renamed"])
def test_an_attempt_at_a_phase_that_the_spec_has_no_more_is_stopped_and_told(run: AlignmentRun) -> None:
    """It kept its GPU to its own end, unknown to its run's status."""
    decision = edited(run)
    assert stopped(decision) == ["sft-1"]
    left = decision.status.phase_status("sft")
    assert left is not None
    assert left.message == "is not in the spec any more: its attempt is being stopped"
    assert [a.state for a in left.attempts] == [AttemptState.STOPPING]


def test_a_run_has_not_ended_before_what_was_removed_has() -> None:
    ending = decide(
        with_status(LEFT, edited(LEFT)),
        seen(LIVE[0], job(BOTH, "other", state=JobState.SUCCEEDED), results=DONE),
        after(3),
    )
    assert ending.status.phases[0].state == PhaseState.SUCCEEDED
    assert not ending.status.is_true(meta.SUCCEEDED)
    assert not rests(with_status(LEFT, ending))
    over = decide(with_status(LEFT, ending), seen(job(BOTH, "other", state=JobState.SUCCEEDED), results=DONE), after(4))
    assert (names(over), over.status.phase) == (["other"], "Succeeded")
    assert rests(with_status(LEFT, over))


def test_one_that_comes_back_while_its_attempt_ends_waits_for_that_and_then_begins_anew() -> None:
    back = decide(with_status(BOTH, edited(LEFT)), seen(*LIVE), after(3))
    assert (stopped(back), started(back)) == (["sft-1"], [])
    gone = decide(with_status(BOTH, back), seen(LIVE[1]), after(4))
    assert started(gone) == ["sft-2"]


def test_one_that_was_only_asked_for_is_stopped_when_it_shows_up() -> None:
    """Its start was on the way when the phase was removed."""
    asked = with_status(LEFT, decide(BOTH, seen(), START))
    first = decide(asked, seen(LIVE[1]), after(1))
    forgotten = decide(with_status(LEFT, first), seen(LIVE[1]), after(2))
    assert names(forgotten) == ["other"]
    late = decide(with_status(LEFT, forgotten), seen(*LIVE), after(3))
    assert stopped(late) == ["sft-1"]
    assert names(late) == ["other", "sft"]


def test_a_job_of_the_run_that_neither_spec_nor_status_knows_is_stopped() -> None:
    stranger = replace(LIVE[0], phase="never-heard-of", attempt=7, digest="unknown")
    decision = decide(LEFT, seen(LIVE[1], stranger), START)
    assert stopped(decision) == ["never-heard-of-7"]
    assert type(decision.status).model_validate(decision.status.document()) == decision.status
    assert not stopped(decide(with_status(LEFT, decision), seen(LIVE[1]), after(1)))


def test_of_one_that_had_ended_nothing_is_kept() -> None:
    ended = job(BOTH, "sft", state=JobState.SUCCEEDED)
    decision = edited(LEFT, ended, LIVE[1])
    assert (names(decision), stopped(decision)) == (["other"], [])


def test_what_is_removed_keeps_its_place_on_a_machine_until_it_is_gone() -> None:
    """Two would otherwise share what one has room in."""
    alone = decide(make_run(sft("sft")), seen(capacity=1), START)
    run = make_run(sft("other"))
    full = decide(with_status(run, alone), seen(LIVE[0], capacity=1), after(1))
    assert (stopped(full), started(full)) == (["sft-1"], [])
    free = decide(with_status(run, full), seen(capacity=1), after(2))
    assert started(free) == ["other-1"]
