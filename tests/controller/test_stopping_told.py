"""While an attempt that is not wanted any more ends, its run says which pod is waited for, and how long that may take."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from builders import START, after, job, make_run, seen, sft, started, with_status
from pods import job as pytorchjob
from pods import pod, terminated

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import Condition, PhaseStatus
from controller.backends.cluster import observe
from controller.operator.events import transitions
from controller.plan.decide import Decision, decide
from controller.plan.observed import ObservedJob
from trainers.contract import FailureClass

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
UNTIL = "2026-01-01T00:12:00Z"
RUN = make_run(sft("base"))
TRAINS = job(RUN, "base", running_since=START, name="test-base-1", left="pod test-base-1-worker-0 has not ended")
SAVES = "pod test-base-1-worker-0 has until 2026-01-01T00:02:30Z to save its work"
ENDS = replace(TRAINS, leaving=True, left=SAVES)


def running(index: int = 0, **metadata: Any) -> dict[str, Any]:
    found = pod(index, running={"startedAt": "2026-01-01T00:00:30Z"})
    return {**found, "metadata": {**found["metadata"], **metadata}}


@pytest.mark.parametrize(
    ("pods", "left"),
    [
        ([], ""),
        ([running()], "pod job-worker-0 has not ended"),
        ([running(deletionTimestamp=UNTIL)], f"pod job-worker-0 has until {UNTIL} to save its work"),
        ([running(), running(1)], "pod job-worker-0, one of several, has not ended"),
        ([pod(terminated=terminated(143)), running(1)], "pod job-worker-1 has not ended"),
        ([running(deletionTimestamp="2026-01-01T00:09:00Z")], ""),
    ],
    ids=["no pods", "runs", "saves", "two", "one has ended", "given up: its time is long over"],
)
def test_a_job_tells_what_of_it_goes_on(pods: list[dict[str, Any]], left: str):
    assert observe.observed_job(pytorchjob("Running"), pods, None, NOW).left == left


def after_looks(*looks: tuple[AlignmentRun, ObservedJob | None]) -> list[Decision]:
    decisions: list[Decision] = []
    for number, (run, found) in enumerate(looks):
        known = with_status(run, decisions[-1]) if decisions else run
        decisions.append(decide(known, seen(found) if found else seen(), after(number * 30)))
    return decisions


def phase(decision: Decision) -> PhaseStatus:
    return decision.status.phases[0]


def condition(decision: Decision, kind: str) -> Condition:
    found = decision.status.condition(kind)
    assert found is not None
    return found


def test_of_an_edit():
    other = make_run(sft("base", seed=1))
    *_, trains, edited, saves, gone = after_looks(
        (RUN, None), (RUN, TRAINS), (other, TRAINS), (other, ENDS), (other, None)
    )
    assert condition(trains, meta.PROGRESSING).message == "running: base"
    assert phase(edited).message == "stopping an attempt for other settings; pod test-base-1-worker-0 has not ended"
    assert phase(saves).message == f"stopping an attempt for other settings; {SAVES}"
    progressing = condition(saves, meta.PROGRESSING)
    assert (progressing.status, progressing.reason) == ("True", "Stopping")
    assert progressing.message == f"base: {phase(saves).message}"
    assert list(transitions(edited.status, saves.status)) == [], "that it goes on is no news"
    assert (started(saves), started(gone)) == ([], ["base-2"])


def test_of_a_pause_and_of_going_on_meanwhile():
    asleep = make_run(sft("base"), suspend=True)
    *_, pauses, saves, awake = after_looks((RUN, None), (RUN, TRAINS), (asleep, TRAINS), (asleep, ENDS), (RUN, ENDS))
    assert phase(saves).message == f"suspended; {SAVES}"
    for kind in (meta.SUSPENDED, meta.PROGRESSING):
        assert condition(saves, kind).message == f"spec.suspend is true; base: {SAVES}"
    assert [event.reason for event in transitions(pauses.status, saves.status)] == []
    assert phase(awake).message == f"waits for the end of an attempt that was stopped; {SAVES}"
    assert condition(awake, meta.PROGRESSING).reason == "Stopping"


def test_of_a_phase_that_is_paused_alone():
    asleep = make_run({**sft("base"), "suspend": True})
    *_, saves = after_looks((RUN, None), (RUN, TRAINS), (asleep, TRAINS), (asleep, ENDS))
    assert condition(saves, meta.SUSPENDED).message == f"suspended: base; base: {SAVES}"


def test_of_a_phase_that_was_taken_out():
    other = make_run(sft("another"))
    *_, saves = after_looks((RUN, None), (RUN, TRAINS), (other, TRAINS), (other, ENDS))
    removed = saves.status.phase_status("base")
    assert removed is not None
    assert removed.message == f"is not in the spec any more: its attempt is being stopped; {SAVES}"
    assert condition(saves, meta.PROGRESSING).message == f"base: {removed.message}; starting: another"


def test_of_an_attempt_that_fails_while_a_pod_of_it_saves():
    fails = replace(ENDS, leaving=False, failure=FailureClass.INFRASTRUCTURE, message="its node is lost")
    *_, saves = after_looks((RUN, None), (RUN, TRAINS), (RUN, fails))
    assert phase(saves).message == f"Infrastructure: its node is lost; {SAVES}"


def test_what_trains_says_nothing_of_its_pods():
    *_, trains = after_looks((RUN, None), (RUN, TRAINS))
    assert phase(trains).message == ""


def test_beside_one_that_trains_both_are_told():
    two = make_run(sft("base"), sft("other", seed=2))
    edited = make_run(sft("base", seed=1), sft("other", seed=2))
    other = job(two, "other", running_since=START)
    first = decide(two, seen(), START)
    trains = decide(with_status(two, first), seen(TRAINS, other), after(30))
    saves = decide(with_status(edited, trains), seen(ENDS, other), after(60))
    told = condition(saves, meta.PROGRESSING)
    assert (told.reason, told.message) == ("PhasesRunning", f"running: other; base: {phase(saves).message}")
