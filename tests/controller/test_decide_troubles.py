"""The planner by tables: what only happens on a cluster. Queues, pods that never run or hang, strangers, failures to come."""

from dataclasses import replace

import pytest
from builders import START, after, digests, job, make_run, results, seen, sft, started, stopped, with_status
from stories import (
    BAD,
    FAILED,
    INFRA,
    INTERRUPTED,
    RUN,
    SUCCEEDED,
    admitted,
    attempt,
    condition,
    doomed,
    ends,
    one,
    phase,
    report,
    runs,
    story,
    waits,
)

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, PhaseState, QueueState, QueueStatus
from controller.plan.decide import decide
from controller.plan.observed import ObservedJob
from controller.plan.timeouts import ENDING_SECONDS
from trainers.contract import FailureClass

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


def progressing(*jobs: ObservedJob, run: AlignmentRun = RUN) -> tuple[str, str]:
    told = decide(run, seen(*jobs), START).status.condition(meta.PROGRESSING)
    assert told is not None
    return told.reason, told.message


def test_a_run_that_only_waits_for_its_queue_says_that_and_not_that_it_runs() -> None:
    """It said "running: base"."""
    assert progressing(waits()) == ("Queued", "waiting for a queue: base: pending!")
    assert progressing(admitted()) == ("PhasesRunning", "running: base")
    two = make_run(sft("base"), sft("other", seed=1))
    both = [replace(waits(two), phase=name, digest=digests(two)[name]) for name in ("base", "other")]
    assert progressing(*both, run=two) == ("Queued", "waiting for a queue: base, other: pending!")
    told = decide(two, seen(*both), START).status.condition(meta.ADMITTED)
    assert told is not None
    assert told.message == "base, other: pending!", "once, though two wait for it"
    trains = replace(runs(two), phase="other", digest=digests(two)["other"])
    said = "running: other; waiting for a queue: base: pending!"
    assert progressing(both[0], trains, run=two) == ("PhasesRunning", said)


def test_what_nothing_queues_runs() -> None:
    off = QueueStatus(state=QueueState.MISSING, message="its integration is switched off")
    assert progressing(replace(runs(), queue=off))[0] == "PhasesRunning"


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
    """What is left of its job says Interrupted."""
    asleep, awake = one(suspend=True, generation=2), one(generation=3)
    ended = job(RUN, "base", state=FAILED, failure=INTERRUPTED)
    decisions = story(
        (RUN, seen(runs()), 0), (asleep, seen(runs()), 1), (asleep, seen(ended), 2), (awake, seen(ended), 3),
        (awake, seen(ended, job(RUN, "base", 2)), 4), (awake, seen(ended, job(RUN, "base", 2)), 5),
    )  # fmt: skip
    assert started(decisions[3]) == ["base-2"]
    [first, second] = phase(decisions[-1]).attempts
    assert (first.state, first.failure, second.state) == (AttemptState.STOPPED, None, AttemptState.RUNNING)


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
