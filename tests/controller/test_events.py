"""Events: one for each thing that happens, none for what only repeats."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import START, after, diamond, job, make_run, results, seen, sft

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import (
    Attempt,
    AttemptState,
    PhaseProgress,
    PhaseState,
    PhaseStatus,
    QueueState,
    QueueStatus,
    RunStatus,
)
from controller.operator import events
from controller.operator.events import Event, render, transitions
from controller.plan.decide import decide
from controller.plan.observed import JobState, Observed
from trainers.contract import FailureClass

INFRA, BAD = FailureClass.INFRASTRUCTURE, FailureClass.BAD_INPUT
RUN = make_run(sft("base"))


def told(*looks: tuple[AlignmentRun, Observed, float]) -> list[list[str]]:
    """The reasons of each look's events, each look with the status that the one before left."""
    said, status = [], RunStatus()
    for run, observed, at in looks:
        decision = decide(run.model_copy(update={"status": status}), observed, after(at))
        said.append([event.reason for event in transitions(status, decision.status)])
        assert not list(transitions(decision.status, decision.status))
        status = decision.status
    return said


def failed(number: int, failure: FailureClass = INFRA, at: float = 0) -> Any:
    return job(RUN, "base", number, JobState.FAILED, failure=failure, message="why", finished_at=after(at))


SUSPENDED = make_run(sft("base"), suspend=True)

STORIES = {
    "a run that succeeds": (
        [(RUN, seen(), 0), (RUN, seen(job(RUN, "base")), 1),
         (RUN, seen(job(RUN, "base", 1, JobState.SUCCEEDED), results=results(RUN, "base")), 2)],
        [["AttemptStarted"], [], ["PhaseSucceeded", "RunSucceeded"]],
    ),
    "a failure and a retry": (
        [(RUN, seen(failed(1)), 0), (RUN, seen(failed(1)), 5), (RUN, seen(failed(1)), 60)],
        [["AttemptFailed"], [], ["AttemptStarted"]],
    ),
    "the last failure is the phase's": (
        [(RUN, seen(failed(1, BAD)), 0), (RUN, seen(failed(1, BAD)), 5)],
        [["PhaseFailed", "RunFailed"], []],
    ),
    "a suspension and its end": (
        [(RUN, seen(job(RUN, "base")), 0), (SUSPENDED, seen(job(RUN, "base")), 1), (SUSPENDED, seen(), 2), (RUN, seen(), 3)],
        [["AttemptStarted"], ["PhaseSuspended", "RunSuspended"], [], ["AttemptStarted", "RunResumed"]],
    ),
    "a failure while it is suspended": (
        [(RUN, seen(job(RUN, "base", failure=INFRA)), 0), (SUSPENDED, seen(failed(1)), 1)],
        [["AttemptStarted"], ["AttemptFailed", "PhaseSuspended", "RunSuspended"]],
    ),
    "a run that cannot be": ([(RUN, seen(problems=("no workspace",)), 0)] * 2, [["RunRejected"], []]),
    "a queue": (
        [(make_run(sft("base"), queueName="q"), seen(job(RUN, "base", queue=QueueStatus(state=state))), 0)
         for state in (QueueState.PENDING, QueueState.PENDING, QueueState.ADMITTED, QueueState.PREEMPTED)],
        [["AttemptStarted", "QueuePending"], [], ["QueueAdmitted"], ["QueuePreempted"]],
    ),
    "no progress, and progress again": (
        [(RUN, seen(job(RUN, "base"), progress={"base": PhaseProgress(step=1, updated_at=after(at))}), now)
         for at, now in ((0, 1), (0, 2000), (0, 3000), (3001, 3001))],
        [["AttemptStarted"], ["RunStalled"], [], []],
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", STORIES)
def test_what_is_told(sentence: str) -> None:
    looks, expected = STORIES[sentence]
    assert told(*looks) == expected


def test_a_phase_with_other_settings_is_told_once() -> None:
    edited = make_run(sft("base"), seed=1)
    edited = edited.model_copy(update={"metadata": edited.metadata.model_copy(update={"generation": 2})})
    done = seen(results=results(RUN, "base"))
    assert told((RUN, done, 0), (edited, done, 1), (edited, done, 2)) == [
        ["PhaseSucceeded", "RunSucceeded"], ["PhaseChanged", "AttemptStarted"], [],
    ]  # fmt: skip


def test_what_is_blocked_is_told() -> None:
    run = diamond()
    bad = seen(job(run, "base", state=JobState.FAILED, failure=BAD))
    (reasons,) = told((run, bad, 0))
    assert reasons == ["PhaseFailed", *["PhaseBlocked"] * 3, "RunFailed"]


# ---------------------------------------------------------------- one failure, one event


def status(state: PhaseState, *attempts: tuple[AttemptState, FailureClass | None]) -> RunStatus:
    records = [Attempt(number=i + 1, digest="d", state=s, failure=f) for i, (s, f) in enumerate(attempts)]
    phase = PhaseStatus(name="base", type="sft", state=state, attempts=tuple(records), message="why")
    return RunStatus(phases=(phase,))


RUNS, FELL = (AttemptState.RUNNING, None), (AttemptState.FAILED, INFRA)
FAILURES = {
    "running to failed": (status(PhaseState.RUNNING, RUNS), status(PhaseState.BACKING_OFF, FELL)),
    "never seen running": (RunStatus(), status(PhaseState.BACKING_OFF, FELL)),
    "the last one": (status(PhaseState.RUNNING, RUNS), status(PhaseState.FAILED, FELL)),
    "of a phase that had failed before": (status(PhaseState.FAILED, RUNS), status(PhaseState.FAILED, FELL)),
    "taken for a success": (
        status(PhaseState.RUNNING, (AttemptState.SUCCEEDED, None)), status(PhaseState.BACKING_OFF, FELL),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", FAILURES)
def test_every_failure_has_one(sentence: str) -> None:
    before, now = FAILURES[sentence]
    found = [event for event in transitions(before, now) if event.type == "Warning"]
    assert len(found) == 1
    assert "failed" in found[0].note


def test_the_node_is_told() -> None:
    observed = seen(job(RUN, "base", 1, JobState.FAILED, failure=INFRA, message="lost", node="node-7"))
    notes = [e.note for e in transitions(RunStatus(), decide(RUN, observed, START).status)]
    assert notes == ["phase base, attempt 1 failed on node node-7: Infrastructure: lost"]


def test_it_is_told_when_an_attempt_has_less_than_was_asked_for() -> None:
    asked = status(PhaseState.RUNNING, (AttemptState.ASKED, None)).phases[0]
    for said, told_ in (("starting", ""), ("starting, on 1 of 2 nodes", ", on 1 of 2 nodes"), ("no room", "")):
        now = RunStatus(phases=(asked.model_copy(update={"message": said}),))
        assert [e.note for e in transitions(RunStatus(), now)] == [f"phase base, attempt 1 started{told_}"]


# ---------------------------------------------------------------- types


def reasons_in_the_source() -> set[str]:
    """What is given to an Event, and the names of states that are part of one."""
    source = Path(events.__file__).read_text().split("class Event")[1]
    literal = set(re.findall(r'"((?:Retry|Phase|Attempt|Job|Run|Labels|Owner|WillNot)[A-Z]?[A-Za-z]+)"', source))
    return (
        literal
        | set(events.MEDDLING.values())
        | {f"Queue{state}" for state in QueueState}
        | {meta.WAITING_FOR_EARLIER_RUN}
    )


def test_each_reason_has_its_type_in_the_table_and_no_other_has() -> None:
    assert set(events.TYPES) == reasons_in_the_source()


@pytest.mark.parametrize("state", QueueState)
def test_a_queue_that_is_not_there_is_a_warning_and_what_queues_do_is_none(state: QueueState) -> None:
    waits = job(RUN, "base", queue=QueueStatus(state=state, message="why"))
    before = decide(RUN, seen(job(RUN, "base")), START).status
    [event] = transitions(before, decide(RUN.model_copy(update={"status": before}), seen(waits), after(1)).status)
    assert (event.reason, event.type) == (f"Queue{state}", "Warning" if state == QueueState.MISSING else "Normal")


# ---------------------------------------------------------------- the object


def rendered(event: Event, version: str = "7") -> dict[str, Any]:
    metadata = RUN.metadata.model_copy(update={"namespace": "ns", "uid": "u", "resource_version": version})
    return render(
        event, RUN.model_copy(update={"metadata": metadata}), "operator-" * 40, START + timedelta(microseconds=5)
    )


def test_the_same_event_of_the_same_version_is_one() -> None:
    event = Event("PhaseSucceeded", "phase base succeeded")
    assert rendered(event)["metadata"]["name"] == rendered(event)["metadata"]["name"]
    assert rendered(event)["metadata"]["name"] != rendered(event, "8")["metadata"]["name"]
    other = Event("PhaseSucceeded", "phase dpo succeeded")
    assert rendered(event)["metadata"]["name"] != rendered(other)["metadata"]["name"]


def test_it_stays_within_what_kubernetes_takes() -> None:
    found = rendered(Event("RunFailed", "Ä" * 5000))
    assert len(found["note"].encode()) <= events.NOTE_LIMIT
    assert len(found["reportingInstance"]) <= 128
    assert found["eventTime"] == "2026-01-01T00:00:00.000005Z"
    assert found["regarding"]["kind"] == meta.KIND
