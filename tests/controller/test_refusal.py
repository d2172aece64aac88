"""Runs that make no sense, to anybody or to this operator: what has begun goes on, and so does the run when it is mended."""

from dataclasses import replace

import pytest
from builders import after, artifact, dpo, is_settled, job, make_run, results, seen, sft, started, stopped, with_status
from statuses import crowded, stored
from stories import FAILED, INFRA, RUN, SUCCEEDED, attempt, condition, ends, one, phase, report, runs, story

from controller.api import meta
from controller.api.status import PhaseState, RunStatus
from controller.operator import events
from controller.operator.reconciler import as_far_as_known
from controller.plan.bounded import LIMIT
from controller.plan.decide import Decision, decide, refused

LACKING = ("spec.workspace: is not set",)
"""What an operator says whose default is gone."""


def names(before: Decision, after_: Decision) -> list[str]:
    return [event.reason for event in events.transitions(before.status, after_.status)]


def test_an_operator_that_lost_its_default_stops_nothing() -> None:
    """One restart without it ended every running attempt of the cluster once."""
    going = seen(runs(), progress=report(4, 1))
    lacking = seen(runs(), problems=LACKING, progress=report(4, 1))
    before, during, mended = story((RUN, going, 0), (RUN, lacking, 1), (RUN, going, 2))
    assert (stopped(during), started(during)) == ([], [])
    assert condition(during, meta.ACCEPTED) == "False/InvalidSpec"
    assert condition(during, meta.PROGRESSING) == "True/PhasesRunning"
    assert condition(during, meta.FAILED) == "False/InvalidSpec", "something of it runs"
    assert during.status.condition(meta.ACCEPTED).message == LACKING[0]  # type: ignore[union-attr]
    assert (phase(during).state, during.status.phase, during.status.step) == (PhaseState.RUNNING, "Invalid", "4/10")
    assert (stopped(mended), started(mended)) == ([], [])
    assert mended.status == before.status.model_copy(update={"conditions": mended.status.conditions})
    assert (names(before, during), names(during, mended)) == (["RunRejected"], ["RunAccepted"])


@pytest.mark.parametrize("generation", [1, 2], ids=["by itself", "by an edit"])
def test_a_run_of_which_nothing_runs_goes_on_when_it_is_mended(generation: int) -> None:
    """Being refused was an end once, which only an edit could change."""
    refused, mended = story((RUN, seen(problems=LACKING), 0), (one(generation=generation), seen(), 1))
    assert condition(refused, meta.FAILED) == "True/InvalidSpec"
    assert not is_settled(with_status(RUN, refused))
    assert condition(mended, meta.FAILED) == "False/NotFinished"
    assert started(mended) == ["base-1"]


def test_an_edit_that_makes_no_sense_leaves_what_runs_alone() -> None:
    bad = make_run(dpo("base", "nowhere"))
    (refused,) = story((with_status(bad, story((RUN, seen(runs()), 0))[0]), seen(runs()), 1))
    assert (stopped(refused), phase(refused).type) == ([], "sft")
    assert phase(refused).state == PhaseState.RUNNING


def test_what_ended_meanwhile_is_known_though_its_pods_are_gone() -> None:
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"), problems=LACKING)
    *_, during, mended = story((RUN, seen(runs()), 0), (RUN, done, 1), (RUN, seen(), 2))
    assert (phase(during).artifact_digest, phase(during).state) == (artifact("base"), PhaseState.WAITING)
    assert (ends(during), mended.status.phase, phase(mended).finished_at) == ("Succeeded", "Succeeded", after(1))


@pytest.mark.parametrize("word", ["", "\x1f", "a\x1fb"])
def test_a_word_that_is_no_digest_is_no_reason_to_write_again_and_again(word: str) -> None:
    odd = {"base": replace(results(RUN, "base")["base"], artifact_digest=word)}
    done = seen(job(RUN, "base", state=SUCCEEDED), results=odd, problems=LACKING)
    *_, during = story((RUN, seen(runs()), 0), (RUN, done, 1))
    assert RunStatus.model_validate(during.status.document()) == during.status


def test_what_failed_meanwhile_has_failed() -> None:
    failed = seen(job(RUN, "base", state=FAILED, failure=INFRA, message="gone", finished_at=after(1)), problems=LACKING)
    *_, during, mended = story((RUN, seen(runs()), 0), (RUN, failed, 1), (RUN, seen(), 2))
    assert (ends(during), attempt(during).message) == ("Failed Infrastructure", "gone")
    assert phase(mended).state == PhaseState.BACKING_OFF


def test_what_was_asked_for_and_is_not_there_is_asked_for_when_the_run_is_mended() -> None:
    *_, during, mended = story((RUN, seen(), 0), (RUN, seen(problems=LACKING), 1), (RUN, seen(), 2))
    assert (started(during), phase(during).state) == ([], PhaseState.WAITING)
    assert condition(during, meta.FAILED) == "True/InvalidSpec"
    assert started(mended) == ["base-1"]


def test_a_refusal_leaves_a_status_that_can_be_written() -> None:
    """Of all that can have been said before, and of problems without end."""
    run, crowd = crowded(meta.MAX_PHASES)
    problems = "; ".join("<" * 4000 for _ in range(64))
    for known in (run, as_far_as_known({"metadata": {"name": "test"}})):
        status = refused(known, crowd, problems, seen(), after(1)).status
        assert stored(status.document()) <= LIMIT
        assert refused(known, status, problems, seen(), after(1)).status == status
        assert len(status.phases) == meta.MAX_PHASES


def test_who_suspends_it_stops_it() -> None:
    asleep = one(suspend=True, generation=2)
    lacking, gone = seen(runs(), problems=LACKING), seen(problems=LACKING)
    *_, stops, rests, mended = story(
        (RUN, seen(runs()), 0), (asleep, lacking, 1), (asleep, gone, 2), (one(generation=3), seen(), 3)
    )
    assert stopped(stops) == ["base-1"]
    assert condition(rests, meta.SUSPENDED) == "True/RunSuspended"
    assert (ends(rests), ends(mended), started(mended)) == ("Stopped", "Stopped", ["base-2"])


def test_a_stop_that_was_asked_for_before_is_asked_for_again() -> None:
    asleep = one(suspend=True, generation=2)
    awake = one(generation=3)
    *_, refused = story((RUN, seen(runs()), 0), (asleep, seen(runs()), 1), (awake, seen(runs(), problems=LACKING), 2))
    assert stopped(refused) == ["base-1"]


def test_an_end_stays_whatever_the_operator_lacks_later() -> None:
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"))
    end, later = story((RUN, done, 0), (RUN, seen(problems=LACKING), 1))
    assert later.status == end.status


def test_a_mended_run_that_has_nothing_left_to_do_has_an_end() -> None:
    """Without its time, its jobs would never go."""
    done = seen(job(RUN, "base", state=SUCCEEDED), results=results(RUN, "base"))
    *_, mended = story(
        (RUN, seen(runs()), 0), (one(generation=2), seen(problems=LACKING), 1), (one(generation=3), done, 2)
    )
    assert (mended.status.finished_at, mended.status.phase) == (after(2), "Succeeded")


def test_a_job_of_a_phase_that_nobody_knows_is_ended() -> None:
    bad = make_run(sft("other"), dpo("dpo", "nowhere"))
    decision = decide(bad, seen(job(RUN, "base")), after(1))
    assert (condition(decision, meta.ACCEPTED), stopped(decision)) == ("False/InvalidSpec", ["base-1"])
