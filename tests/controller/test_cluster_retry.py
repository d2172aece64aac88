"""What `retry` and `rerun` of a run in a cluster say where it does not begin at once."""

from typing import Any

import pytest
from builders import document, dpo, sft

from controller.api.problems import InvalidRun
from controller.commands.cluster import retry
from controller.commands.cluster.run import ClusterRun
from controller.commands.where import Place

FAILED = {"name": "dpo", "type": "dpo", "state": "Failed", "failure": "BadInput"}


class Runs:
    """A namespace with one run in it."""

    namespace = "ns"

    def __init__(self, run: ClusterRun) -> None:
        self.found = run
        self.asked: list[str] = []

    def runs(self) -> list[ClusterRun]:
        return [self.found]

    def annotate(self, run: ClusterRun, name: str, value: str) -> bool:
        self.asked.append(value)
        return True


def condition(kind: str, status: str, message: str = "") -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": "Because",
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Of a run whose dpo has failed: what it was asked, and what was said."""

    def ask(*phases: str, accepted: str = "", suspended: bool = False, **metadata: str) -> tuple[list[str], list[str]]:
        run = document(sft("base"), {**dpo("dpo", "base"), **({"suspend": True} if suspended else {})})
        conditions = [condition("Accepted", "False" if accepted else "True", accepted), condition("Failed", "True")]
        run["metadata"] = {"name": "helpful", "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1, **metadata}
        run["status"] = {"observedGeneration": 1, "conditions": conditions, "phases": [FAILED]}
        there = Runs(ClusterRun(run))
        monkeypatch.setattr(retry, "Cluster", lambda place: there)
        retry.cluster_retry(Place(namespace="ns"), "helpful", phases)
        return there.asked, capsys.readouterr().out.splitlines()

    return ask


def test_one_that_may_go_on_is_watched(asks: Any) -> None:
    [asked], said = asks()
    assert asked.isdigit()
    assert said[0] == "run helpful: dpo tries again"
    assert said[1:] == ["watch it with: alignctl status --watch -n ns --run helpful"]


def test_one_that_is_invalid_begins_when_it_is_not(asks: Any) -> None:
    """It said that phases try again."""
    [asked], said = asks("*", accepted="spec.x: is wrong")
    assert asked.endswith(" *")
    assert said == ["run helpful: all phases run anew", "it begins when the run is valid: spec.x: is wrong"]


def test_a_phase_that_is_suspended_stays_so(asks: Any) -> None:
    _, said = asks("dpo", suspended=True)
    assert said[-1] == "phase dpo stays suspended: its own `suspend` is true"


@pytest.mark.parametrize("phases", [(), ("dpo",), ("*",)])
def test_one_that_is_being_deleted_is_not_asked(asks: Any, phases: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRun, match="run helpful: is being deleted: apply it once more when it is gone"):
        asks(*phases, deletionTimestamp="2026-01-01T00:00:01Z")
