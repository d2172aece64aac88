"""Commands against a cluster, without one: what they make of runs and pods that they have read."""

import io
from typing import Any

import pytest
from builders import START
from rich.console import Console

from controller.api.problems import InvalidRun
from controller.api.status import RunStatus
from controller.commands.cluster.follow import Mark, _fresh
from controller.commands.cluster.pods import Pod, of_attempt
from controller.commands.cluster.reading import Wanted, is_over, missing_peer, reading_of, why_silent
from controller.commands.cluster.run import ClusterRun, newest, the_one
from controller.commands.display import PlainLines, state_word, status_table, transition
from controller.commands.status import headline, notes

NOW = START.isoformat()


# ---------------------------------------------------------------- runs


def condition(kind: str, status: str = "True", reason: str = "Because", message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": NOW}


def phase(name: str, state: str = "Waiting", *attempts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "sft", "state": state, "attempts": list(attempts), **more}


def attempt(number: int = 1, state: str = "Running", **more: Any) -> dict[str, Any]:
    return {"number": number, "digest": "d", "state": state, **more}


def run(
    *phases: dict[str, Any], conditions: tuple[dict[str, Any], ...] = (condition("Accepted"),), seen: int = 1,
    name: str = "r", suspend: bool = False, created: str = NOW, **status: Any,
) -> ClusterRun:  # fmt: skip
    spec = {"suspend": suspend, "phases": [{"name": p["name"]} for p in phases]}
    written = {"observedGeneration": seen, "conditions": list(conditions), "phases": list(phases), **status}
    metadata = {"name": name, "generation": 1, "creationTimestamp": created}
    return ClusterRun({"metadata": metadata, "spec": spec, "status": written})


SUSPENDED = (condition("Suspended", reason="RunSuspended"),)
DONE = (condition("Succeeded"),)

STATES = {
    "nothing written": (run(conditions=()), "not seen by the operator yet"),
    "names of running phases": (run(phase="sft,dpo"), "running"),
    "a phase may have the name of a word": (run(phase="queued"), "running"),
    "a word": (run(phase="Queued"), "queued"),
    "an end": (run(conditions=DONE, phase="Succeeded"), "succeeded"),
    "an end before an edit": (run(conditions=DONE, phase="Succeeded", seen=0), "changed, not seen by the operator yet"),
    "asked to stop": (run(suspend=True, seen=0, phase="sft"), "stopping"),
    "saving": (run(phase("a", "Suspended", attempt(1, "Stopping")), suspend=True, conditions=SUSPENDED), "stopping"),
    "stopped": (
        run(phase("a", "Suspended", attempt(1, "Stopped")), suspend=True, conditions=SUSPENDED, phase="Suspended"),
        "suspended",
    ),
}


@pytest.mark.parametrize("sentence", STATES)
def test_state_of_a_run(sentence: str) -> None:
    found, expected = STATES[sentence]
    assert found.state == expected
    assert found.stopped == (sentence == "stopped")
    assert found.ended == (sentence == "an end")


def test_a_status_of_another_version_is_read_as_far_as_it_is_known() -> None:
    (found,) = run(phase("a", "Levitating", attempt(1, "Stopped"))).status.phases
    assert (found.name, found.state, found.attempts[0].number) == ("a", "Waiting", 1)


OLD, NEW = run(name="old", created="2026-01-01T00:00:00Z"), run(name="new", created="2026-01-02T00:00:00Z")


def test_the_newest_run_is_meant() -> None:
    assert newest([OLD, NEW], None, "n") is NEW
    assert newest([OLD, NEW], "old", "n") is OLD
    with pytest.raises(InvalidRun, match=r'namespace n: no run "odl" here; runs are: new, old \(did you mean old\?\)'):
        newest([OLD, NEW], "odl", "n")
    with pytest.raises(InvalidRun, match="namespace n: no runs here"):
        newest([], None, "n")
    with pytest.raises(InvalidRun, match="namespace n: no run x here"):
        newest([], "x", "n")


def test_nobody_stops_a_run_by_accident() -> None:
    assert the_one([OLD, NEW], None, [OLD], "n") is OLD
    assert the_one([OLD, NEW], None, [], "n") is NEW
    assert the_one([OLD, NEW], "new", [OLD], "n") is NEW
    with pytest.raises(InvalidRun, match="say which run you mean with --run: new, old"):
        the_one([OLD, NEW], None, [OLD, NEW], "n")


def test_headline() -> None:
    status = RunStatus(progress="3/8 (41%)", started_at=START, finished_at=START.replace(minute=2))
    assert headline("r", "running", status, counting=False) == "run r: running (3/8 phases, 41%, 2m00s)"
    assert headline("r", "running", RunStatus(progress="3/8"), counting=True) == "run r: running (3/8 phases)"
    assert headline("r", "invalid", RunStatus(), counting=True) == "run r: invalid"


NOTES: dict[str, tuple[ClusterRun, list[str]]] = {
    "nothing to say": (run(phase("a", "Running", attempt())), []),
    "a failure": (run(conditions=(condition("Failed", message="phase a: Diverged: nan"),)), ["Failed: phase a: Diverged: nan"]),
    "a condition without message": (run(conditions=SUSPENDED), ["Suspended: spec.suspend is true"]),
    "suspended phases": (
        run(conditions=(condition("Suspended", reason="PhasesSuspended", message="suspended: a, b"),)), ["Suspended: a, b"],
    ),
    "what does not hold": (run(conditions=(condition("Failed", "False"), condition("Stalled", "False"))), []),
    "a refused run is not told twice": (
        run(conditions=(condition("Accepted", "False", message="bad"), condition("Failed", message="bad"))),
        ["Not accepted: bad"],
    ),
    "a queue": (
        run(phase("a", "Running", queue={"state": "Pending", "message": "no quota"})), ["a: queue: Pending: no quota"],
    ),
    "an admitted phase": (run(phase("a", "Running", queue={"state": "Admitted", "message": "go"})), []),
    "attempts": (
        run(
            phase(
                "a", "Running",
                attempt(1, "Failed", failure="Infrastructure", message="lost", node="n-1"),
                attempt(2, "Stopped", message="for other settings"),
                attempt(3, "Running", message="Unschedulable: no node"),
            ),
            phase("b", "Succeeded", attempt(1, "Failed", failure="OutOfMemory", message="healed")),
        ),
        ["a, attempt 1: Infrastructure on n-1: lost", "a, attempt 3: Running: Unschedulable: no node"],
    ),
    "a failure is told once, but for its node": (
        run(
            phase(
                "a", "Failed",
                attempt(1, "Failed", failure="Diverged", message="nan"),
                attempt(2, "Failed", failure="Diverged", message="nan", node="n"),
            ),
            conditions=(condition("Failed", message="phase a: Diverged: nan"),),
        ),
        ["Failed: phase a: Diverged: nan", "a, attempt 2: Diverged on n: nan"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", NOTES)
def test_notes(sentence: str) -> None:
    found, lines = NOTES[sentence]
    assert list(notes(found.status)) == lines


def test_a_table_shows_messages_as_they_are_and_counts_no_time_of_what_rests() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    status = run(
        phase("a", "Failed", message="spec.phases[dpo].beta: bad [/x]"), phase("b", "Suspended", startedAt=NOW)
    ).status
    console.print(status_table(status, START.replace(hour=1)))
    rows = [line.rstrip() for line in console.export_text().splitlines()]
    assert rows[1].endswith("spec.phases[dpo].beta: bad [/x]")
    assert rows[2].split() == ["b", "sft", "Suspended"]
    assert transition(status.phases[1].model_copy(update={"message": "suspended"})) == "suspended"


@pytest.mark.parametrize(
    ("state", "word", "said"),
    [
        ("Pending", "Queued", "queued: no quota"), ("Preempted", "Queued", "queued: no quota"),
        ("Admitted", "Running", "started"), ("Missing", "Queued", "queued: no quota"), ("Missing, runs", "Running", "started"),
    ],
)  # fmt: skip
def test_what_waits_in_a_queue_is_not_said_to_run(state: str, word: str, said: str) -> None:
    begun = attempt(startedAt=NOW if "runs" in state else None)
    queue = {"state": state.partition(",")[0], "message": "no quota"}
    (found,) = run(phase("a", "Running", begun, queue=queue)).status.phases
    assert (state_word(found), transition(found)) == (word, said)


def test_a_phase_is_said_to_start_when_its_queue_lets_it_go() -> None:
    lines: list[str] = []
    told = PlainLines(lines.append)
    for state in ("Pending", "Pending", "Admitted"):
        told.show(run(phase("a", "Running", attempt(), queue={"state": state, "message": "no quota"})).status)
    assert [line.partition(" ")[2] for line in lines] == ["a: queued: no quota", "a: started"]


# ---------------------------------------------------------------- logs


def pod(attempt: int = 1, index: int = 0, created: str = "1", **status: Any) -> Pod:
    labels = {"alignment.dev/attempt": str(attempt), "training.kubeflow.org/replica-index": str(index)}
    name = f"r-a-{attempt}-worker-{index}"
    owner = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "name": f"r-a-{attempt}",
        "uid": "j",
        "controller": True,
    }
    metadata = {"name": name, "uid": f"{name}-{created}", "labels": labels, "creationTimestamp": created}
    metadata["ownerReferences"] = [owner]
    spec = {"containers": [{"name": "pytorch", "image": "trainer:1"}]}
    return Pod({"metadata": metadata, "spec": spec, "status": {"phase": "Pending", **status}})


def container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "pytorch", "state": state}]}


def test_pods_with_the_runs_labels_that_are_of_another_job_are_not_shown() -> None:
    """Anybody may write labels: a stranger's log is not to be taken for the run's."""
    theirs = pod(2)
    theirs.document["metadata"]["ownerReferences"][0]["name"] = "another"
    nobodys = pod(3)
    del nobodys.document["metadata"]["ownerReferences"]
    found = reading_of(
        run(phase("a", "Running", attempts=[attempt(1, "Running")])), [pod(1), theirs, nobodys], Wanted("r", "a")
    )
    assert [p.attempt for p in found.all_pods] == [1]
    passed = attempt(1, "Stopped", takenBy="PyTorchJob r-a-1 of nobody")
    assert not reading_of(run(phase("a", "Running", attempts=[passed])), [pod(1)], Wanted("r", "a", 1)).pods


class Warnings:
    def warning(self, found: Pod) -> str:
        return "FailedMount: no such secret" if "ContainerCreating" in str(found.document) else ""


UNSCHEDULED = {
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}]
}
INIT = {"initContainerStatuses": [{"name": "init", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}]}
LOST = attempt(1, "Failed", failure="Infrastructure", message="its node is lost", node="n")

SILENCE: dict[str, tuple[dict[str, Any], list[Pod], Wanted, str]] = {
    "waits": (phase("a", "Waiting", message="for b"), [], Wanted("r", "a"), "phase a was not started: Waiting: for b"),
    "reused": (phase("a", "Succeeded"), [], Wanted("r", "a"), "phase a was not started: an earlier result is reused"),
    "no pods yet": (phase("a", "Running", attempt()), [], Wanted("r", "a"), "a, attempt 1: its pods have not been made yet"),
    "queued": (
        phase("a", "Running", attempt(), queue={"state": "Pending", "message": "no quota"}), [], Wanted("r", "a"),
        "a, attempt 1: waits in its queue (Pending): no quota",
    ),
    "unschedulable": (
        phase("a", "Running", attempt()), [pod(**UNSCHEDULED)], Wanted("r", "a"),
        "pod r-a-1-worker-0 does not run yet: Unschedulable: no GPU",
    ),
    "no image": (
        phase("a", "Running", attempt()), [pod(**container(waiting={"reason": "ImagePullBackOff", "message": "not found"}))],
        Wanted("r", "a"), "pod r-a-1-worker-0 does not run yet: ImagePullBackOff trainer:1: not found",
    ),
    "init container": (
        phase("a", "Running", attempt()), [pod(**INIT, **container(waiting={"reason": "PodInitializing"}))], Wanted("r", "a"),
        "pod r-a-1-worker-0 does not run yet: init: ErrImagePull: no",
    ),
    "no mount": (
        phase("a", "Running", attempt()), [pod(**container(waiting={"reason": "ContainerCreating"}))], Wanted("r", "a"),
        "pod r-a-1-worker-0 does not run yet: FailedMount: no such secret",
    ),
    "nothing known": (
        phase("a", "Running", attempt()), [pod()], Wanted("r", "a"), "pod r-a-1-worker-0 does not run yet: not scheduled yet",
    ),
    "evicted at once": (
        phase("a", "Running", attempt()), [pod(phase="Failed", reason="Evicted", message="disk")], Wanted("r", "a"),
        "pod r-a-1-worker-0 never ran: Evicted: disk",
    ),
    "another pod": (
        phase("a", "Running", attempt()), [pod(), pod(index=1)], Wanted("r", "a", index=7),
        "no pod 7 of a, attempt 1; its pods are: 0, 1",
    ),
    "gone": (
        phase("a", "BackingOff", LOST), [], Wanted("r", "a"),
        "a, attempt 1: its pods are gone and their logs with them. It ended with Infrastructure: its node is lost",
    ),
    "forgotten": (phase("a", "Running", attempt(4)), [pod(4)], Wanted("r", "a", 2), "a, attempt 2: nothing is left of it"),
    "never made": (
        phase("a", "Running", attempt(2)), [pod(2)], Wanted("r", "a", 9), "a, attempt 9: there was none; the last is attempt 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", SILENCE)
def test_why_there_is_no_log(sentence: str) -> None:
    state, pods, wanted, expected = SILENCE[sentence]
    reading = reading_of(run(state), pods, wanted)
    assert reading.pod is None or not reading.pod.has_log
    assert why_silent(Warnings(), reading) == expected  # type: ignore[arg-type]


def test_a_pod_that_waits_for_another_says_so() -> None:
    runs, waits = pod(**container(running={"startedAt": NOW})), pod(index=1, **UNSCHEDULED)
    attempt_of_two = run(phase("a", "Running", attempt()))
    expected = "pod r-a-1-worker-1 does not run yet: Unschedulable: no GPU; the attempt's other pods wait for it"
    reading = reading_of(attempt_of_two, [runs, waits], Wanted("r", "a"))
    assert missing_peer(Warnings(), reading) == expected  # type: ignore[arg-type]
    both = [runs, pod(index=1, **container(running={"startedAt": NOW}))]
    assert missing_peer(Warnings(), reading_of(attempt_of_two, both, Wanted("r", "a"))) == ""  # type: ignore[arg-type]


def test_the_newest_attempt_is_read_and_of_its_pods_the_newest() -> None:
    pods = [pod(2, created="3"), pod(1, created="1"), pod(2, created="2"), pod(2, 1)]
    reading = reading_of(run(phase("a", "Running", attempt(1))), pods, Wanted("r", "a"))
    assert (reading.attempt, reading.pod and reading.pod.created) == (2, "3")
    assert sorted(of_attempt(pods, 2)) == [0, 1]


def test_an_unknown_phase_is_named() -> None:
    with pytest.raises(InvalidRun, match=r"sfd: not a phase of run r; phases are: sft, dpo \(did you mean sft\?\)"):
        reading_of(run(phase("sft"), phase("dpo")), [], Wanted("r", "sfd"))


OVER = {
    "a running phase": (run(phase("a", "Running", attempt())), Wanted("r", "a"), False),
    "a phase that is tried again": (run(phase("a", "BackingOff", LOST)), Wanted("r", "a"), False),
    "the attempt that was asked for": (run(phase("a", "BackingOff", LOST)), Wanted("r", "a", 1), True),
    "a finished phase": (run(phase("a", "Succeeded")), Wanted("r", "a"), True),
    "a finished phase before an edit": (run(phase("a", "Succeeded"), seen=0), Wanted("r", "a"), False),
    "a finished run": (run(phase("a", "Waiting"), conditions=DONE), Wanted("r", "a"), True),
}


@pytest.mark.parametrize("sentence", OVER)
def test_until_when_a_log_is_followed(sentence: str) -> None:
    found, wanted, expected = OVER[sentence]
    assert is_over(reading_of(found, [], wanted), wanted) == expected


def test_lines_of_a_log_are_printed_once_over_a_broken_connection() -> None:
    mark = Mark()
    first = [b"2026-01-01T00:00:01.1Z a\n", b"2026-01-01T00:00:01.2Z b c\n"]
    assert list(_fresh(iter(first), mark)) == ["a\n", "b c\n"]
    assert mark.since_seconds == 60
    # A clock that is set back later on loses nothing.
    again = [*first, b"2026-01-01T00:00:01.3Z \n", b"2026-01-01T00:00:01.0Z d\n", b"failed to try resolving symlinks\n"]
    assert list(_fresh(iter(again), mark)) == ["\n", "d\n", "failed to try resolving symlinks\n"]
