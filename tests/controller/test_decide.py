"""The planner by tables: what it starts, stops and says for given observations."""

import pytest
from builders import (
    START,
    after,
    artifact,
    diamond,
    dpo,
    job,
    make_run,
    results,
    seen,
    sft,
    started,
    stopped,
    with_status,
)

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseState
from controller.plan.decide import Decision, decide
from controller.plan.observed import JobState, ObservedResult
from trainers.contract import FailureClass

FAILED, SUCCEEDED = JobState.FAILED, JobState.SUCCEEDED
INFRA, BAD, OOM = FailureClass.INFRASTRUCTURE, FailureClass.BAD_INPUT, FailureClass.OUT_OF_MEMORY


def states(decision: Decision) -> dict[str, str]:
    return {phase.name: str(phase.state) for phase in decision.status.phases}


def reason(decision: Decision, kind: str) -> str:
    condition = decision.status.condition(kind)
    assert condition is not None
    return f"{condition.status}/{condition.reason}"


RUN = diamond()

STARTS = {
    "a new run starts what needs nothing": (seen(), ["base-1"]),
    "a running input holds back what needs it": (seen(job(RUN, "base")), []),
    "independent phases start side by side": (seen(results=results(RUN, "base")), ["dpo-1", "reward-1"]),
    "capacity limits how many": (seen(results=results(RUN, "base"), capacity=1), ["dpo-1"]),
    "what runs takes up capacity": (seen(job(RUN, "dpo"), results=results(RUN, "base"), capacity=1), []),
    "a finished phase is not started again": (seen(results=results(RUN, "base", "dpo", "reward")), ["ppo-1"]),
    "a result of other settings does not count": (seen(results={"base": ObservedResult("other", "x")}), ["base-1"]),
    "a result whose data changed does not count": (
        seen(results={"base": ObservedResult(results(RUN, "base")["base"].digest, "x", stale="data changed: f")}),
        ["base-1"],
    ),
    "numbers of earlier attempts are taken": (seen(job(RUN, "base", 3, FAILED, past=True)), ["base-4"]),
    "a live attempt at other settings is waited for": (
        seen(job(diamond(seed=1), "base", 1), results={}),
        [],
    ),
}


@pytest.mark.parametrize("sentence", STARTS)
def test_starts(sentence: str) -> None:
    observed, expected = STARTS[sentence]
    assert started(decide(RUN, observed, START)) == expected


def test_an_artifact_that_changed_reruns_what_depends_on_it() -> None:
    before = results(RUN, "base", "dpo", "reward", "ppo")
    new = {**before, "base": ObservedResult(before["base"].digest, "another artifact")}
    assert started(decide(RUN, seen(results=new), START)) == ["dpo-1", "reward-1"]


def test_a_live_attempt_at_other_settings_is_stopped() -> None:
    old = job(diamond(seed=1), "base", 1)
    decision = decide(RUN, seen(old), START)
    assert stopped(decision) == ["base-1"]
    gone = decide(with_status(RUN, decision), seen(), after(1))
    assert started(gone) == ["base-2"]


def test_a_lost_apply_is_asked_for_again_under_the_same_name() -> None:
    first = decide(RUN, seen(), START)
    again = decide(with_status(RUN, first), seen(), after(1))
    assert started(first) == started(again) == ["base-1"]


def test_a_job_with_no_result_is_tried_again() -> None:
    ended = seen(job(RUN, "base", 1, SUCCEEDED, finished_at=START))
    assert decide(RUN, ended, START).status.phases[0].state == PhaseState.BACKING_OFF
    assert started(decide(RUN, ended, after(60))) == ["base-2"]


def test_everything_finished_is_success_and_stays_it() -> None:
    done = decide(RUN, seen(results=results(RUN, "base", "dpo", "reward", "ppo")), START)
    assert reason(done, meta.SUCCEEDED) == "True/AllPhasesSucceeded"
    assert done.status.finished_at == START
    assert done.status.phase_status("ppo").artifact_digest == artifact("ppo")  # type: ignore[union-attr]
    # Observations that vanish afterwards change nothing.
    later = decide(with_status(RUN, done), seen(), after(5))
    assert (later.status, later.actions) == (done.status, ())


# ---------------------------------------------------------------- failures


def test_bad_input_is_never_retried_and_others_go_on() -> None:
    observed = seen(
        job(RUN, "dpo", 1, FAILED, failure=BAD, message="no such file"),
        job(RUN, "reward"),
        results=results(RUN, "base"),
    )
    decision = decide(RUN, observed, after(10_000))
    assert started(decision) == []
    assert states(decision) == {"base": "Succeeded", "dpo": "Failed", "reward": "Running", "ppo": "Waiting"}
    assert reason(decision, meta.FAILED) == "False/NotFinished"


def test_a_run_fails_once_nothing_can_move() -> None:
    observed = seen(job(RUN, "base", 1, FAILED, failure=BAD, message="no such file"))
    decision = decide(RUN, observed, START)
    assert states(decision) == {"base": "Failed", "dpo": "Blocked", "reward": "Blocked", "ppo": "Blocked"}
    assert reason(decision, meta.FAILED) == "True/PhaseFailed"
    assert decision.status.condition(meta.FAILED).message == "phase base: BadInput: no such file"  # type: ignore[union-attr]


@pytest.mark.parametrize(("failure", "attempts"), [(INFRA, 6), (OOM, 4), (FailureClass.INTERRUPTED, 11), (BAD, 1)])
def test_each_class_has_its_own_budget(failure: FailureClass, attempts: int) -> None:
    """Default retries: 5 infrastructure, 3 out of memory, 10 interrupted, none for bad input."""
    run, now, jobs = RUN, START, []
    for number in range(1, 30):
        decision = decide(run, seen(*jobs), now)
        run = with_status(run, decision)
        if decision.status.is_true(meta.FAILED):
            break
        if started(decision):
            assert started(decision) == [f"base-{number}"]
            jobs.append(job(RUN, "base", number, FAILED, failure=failure, finished_at=now))
        now = now.replace(year=now.year + 1)
        decision = decide(run, seen(*jobs), now)
    assert len(jobs) == attempts


def test_backoff_doubles_and_is_announced() -> None:
    waits = []
    jobs = []
    for number in range(1, 5):
        jobs.append(job(RUN, "base", number, FAILED, failure=INFRA, finished_at=START))
        decision = decide(RUN, seen(*jobs), START)
        assert started(decision) == []
        assert decision.requeue_after is not None
        waits.append(decision.requeue_after.total_seconds())
    for number, wait in enumerate(waits):
        assert 10 * 2**number <= wait <= 12.5 * 2**number


def test_stopping_is_not_a_failure() -> None:
    suspended = diamond(suspend=True)
    running = with_status(suspended, decide(RUN, seen(job(RUN, "base")), START))
    first = decide(running, seen(job(RUN, "base")), after(1))
    assert stopped(first) == ["base-1"]
    ended = job(RUN, "base", 1, FAILED, failure=FailureClass.INTERRUPTED)
    second = decide(with_status(suspended, first), seen(ended), after(2))
    assert reason(second, meta.SUSPENDED) == "True/RunSuspended"
    resumed = decide(with_status(RUN, second), seen(ended), after(3))
    assert started(resumed) == ["base-2"]


def test_a_suspended_phase_holds_only_what_needs_it() -> None:
    run = make_run(sft("base"), {**dpo("dpo", "base"), "suspend": True}, dpo("other", "base"))
    decision = decide(run, seen(results=results(run, "base")), START)
    assert started(decision) == ["other-1"]
    done = decide(run, seen(results=results(run, "base", "other")), START)
    assert reason(done, meta.SUSPENDED) == "True/PhasesSuspended"
    assert not done.status.is_true(meta.SUCCEEDED)


def test_a_stopped_attempt_that_shows_up_late_is_stopped_again() -> None:
    """Its start was on the way when it was given up."""
    suspended = diamond(suspend=True)
    asked = with_status(suspended, decide(RUN, seen(), START))
    given_up = decide(asked, seen(), after(1))
    assert stopped(given_up) == ["base-1"]
    settled = decide(with_status(suspended, given_up), seen(), after(2))
    late = decide(with_status(suspended, settled), seen(job(RUN, "base")), after(3))
    assert stopped(late) == ["base-1"]


# ---------------------------------------------------------------- deadlines, selections, conditions


def test_a_phase_that_takes_too_long_is_stopped_and_has_failed() -> None:
    run = diamond(failurePolicy={"phaseDeadlineSeconds": 60})
    live = job(run, "base", started_at=START)
    first = decide(run, seen(live), after(59))
    assert stopped(first) == []
    assert first.requeue_after is not None
    assert first.requeue_after.total_seconds() == 1
    late = decide(with_status(run, first), seen(live), after(60))
    assert stopped(late) == ["base-1"]
    over = decide(with_status(run, late), seen(), after(61))
    assert reason(over, meta.FAILED) == "True/DeadlineExceeded"


def test_a_run_that_takes_too_long_is_stopped_and_has_failed() -> None:
    run = diamond(failurePolicy={"runDeadlineSeconds": 60})
    first = decide(run, seen(job(run, "base")), START)
    late = decide(with_status(run, first), seen(job(run, "base")), after(60))
    assert stopped(late) == ["base-1"]
    assert not late.status.is_true(meta.FAILED)
    over = decide(with_status(run, late), seen(), after(61))
    assert reason(over, meta.FAILED) == "True/DeadlineExceeded"


def test_a_selection_starts_nothing_else_and_ends_with_itself() -> None:
    base = seen(results=results(RUN, "base"))
    assert started(decide(RUN, base, START, only={"dpo"})) == ["dpo-1"]
    done = decide(RUN, seen(results=results(RUN, "base", "dpo")), START, only={"dpo"})
    assert done.status.is_true(meta.SUCCEEDED)


def test_an_invalid_run_is_not_accepted() -> None:
    decision = decide(make_run(dpo("dpo", "nowhere")), seen(), START)
    assert reason(decision, meta.ACCEPTED) == "False/InvalidSpec"
    assert started(decision) == []


def test_transition_times_move_only_with_the_status() -> None:
    first = decide(RUN, seen(), START)
    second = decide(with_status(RUN, first), seen(job(RUN, "base")), after(9))
    progressing = second.status.condition(meta.PROGRESSING)
    assert progressing is not None
    assert (progressing.reason, progressing.last_transition_time) == (meta.PHASES_RUNNING, START)


def test_the_shape_of_a_job() -> None:
    """Frozen: backends and pods rely on these."""
    run = diamond(template={"image": "img", "procsPerNode": 2, "env": [{"name": "A", "value": "1"}]})
    (action,) = decide(run, seen(results=results(run, "base", "reward")), START, only={"ppo"}).actions
    made = action.job  # type: ignore[union-attr]
    assert (made.name, made.image, made.nodes, made.procs_per_node) == ("test-ppo-1", "img", 1, 2)
    assert made.digest == results(run, "ppo")["ppo"].digest
    file = made.phase_file("/ws", "/base")
    assert file.output == "/ws/test/ppo"
    assert {n: (i.path, i.digest) for n, i in file.inputs.items()} == {
        "base": ("/ws/test/base", artifact("base")),
        "reward": ("/ws/test/reward", artifact("reward")),
    }
    assert made.labels == {
        "app.kubernetes.io/name": "alignment-trainer",
        "app.kubernetes.io/part-of": "test",
        "app.kubernetes.io/component": "ppo",
        "app.kubernetes.io/managed-by": "alignment-operator",
        "alignment.dev/run": "test",
        "alignment.dev/phase": "ppo",
        "alignment.dev/attempt": "1",
    }


def test_the_job_says_whether_it_is_alone() -> None:
    def alone(run: AlignmentRun, **kwargs: object) -> list[bool]:
        return [a.job.alone for a in decide(run, seen(**kwargs), START).actions]  # type: ignore[union-attr,arg-type]

    assert alone(RUN) == [True]
    assert alone(RUN, results=results(RUN, "base")) == [False, False]
    assert alone(RUN, results=results(RUN, "base"), capacity=1) == [False]


def test_a_phase_that_ends_between_two_looks_has_a_start() -> None:
    """Of a thousand short ones at once hardly one was seen at work."""
    asked = with_status(RUN, decide(RUN, seen(), START))
    ended = job(RUN, "base", 1, SUCCEEDED, started_at=after(2), finished_at=after(3))
    phase = decide(asked, seen(ended, results=results(RUN, "base")), after(4)).status.phases[0]
    assert (phase.state, phase.started_at, phase.finished_at) == (PhaseState.SUCCEEDED, after(2), after(3))
