"""What the operator sets for runs that do not say, and what they keep of it from the look in which they began."""

from typing import Any

import pytest
from builders import after, job, make_run, seen, sft
from desk import RUN, Desk

from controller.api.status import QueueState, QueueStatus
from controller.api.workspace import Workspace
from controller.operator.defaults import Defaults
from controller.plan.observed import JobState
from trainers.contract import FailureClass


def at(claim: str) -> Defaults:
    return Defaults(workspace=Workspace(claim_name=claim))


def test_a_run_stays_in_the_workspace_in_which_it_began_whatever_the_default_is_later():
    """Its checkpoint and the models of its phases are there."""
    desk = Desk(at("old"))
    desk.look(seen())
    assert desk.backend.workspaces == [Workspace(claim_name="old")]
    desk.reconciler.defaults = at("new")
    failed = job(RUN, "base", 1, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(5))
    desk.look(seen(failed), at=10)
    writes = len(desk.server.said)
    desk.look(seen(failed), at=500)
    assert desk.backend.workspaces == [Workspace(claim_name="old")] * 2
    assert desk.status.workspace == Workspace(claim_name="old")
    assert len(desk.server.said) > writes


def test_a_run_that_says_where_is_asked_and_one_that_has_not_begun_takes_todays_default():
    desk = Desk(at("old"), workspace={"claimName": "mine"})
    desk.look(seen())
    assert desk.backend.workspaces == [Workspace(claim_name="mine")]
    waiting = Desk(at("old"), suspend=True)
    waiting.look(seen())
    assert waiting.status.workspace is None
    waiting.reconciler.defaults = at("new")
    waiting.edit(suspend=False)
    waiting.look(seen(), at=1)
    assert waiting.backend.workspaces == [Workspace(claim_name="new")]


@pytest.mark.parametrize(("named", "begun"), [({}, ["", "trainer:1"]), ({"template": {"image": "own:1"}}, ["", ""])])
def test_a_phase_goes_on_with_the_image_that_it_began_with_whatever_the_default_is_later(named: Any, begun: list[str]):
    """Its checkpoints are of that program, and another one would begin anew."""
    desk = Desk(Defaults(image="trainer:1"), **named)
    desk.look(seen())
    desk.reconciler.defaults = Defaults(image="trainer:2")
    run = make_run(sft("base"), **named)
    failed = job(run, "base", 1, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(5))
    desk.look(seen(failed), at=10)
    desk.look(seen(failed), at=500)
    assert desk.backend.images == begun


def test_a_phase_that_is_another_now_has_todays_default_image():
    desk = Desk(Defaults(image="trainer:1"))
    desk.look(seen())
    desk.reconciler.defaults = Defaults(image="trainer:2")
    desk.edit(phases=[sft("base", seed=7)])
    desk.look(seen(), at=1)
    desk.look(seen(), at=2)
    assert desk.server.said[-1] == "apply base-2"
    assert (desk.backend.images[-1], desk.status.phases[0].image) == ("trainer:2", "trainer:2")


def test_runs_of_one_name_in_two_namespaces_have_folders_of_their_own():
    desk = Desk(at("shared"))
    desk.look(seen())
    assert desk.status.folder == "ns.test"
    assert desk.backend.folders == ["ns.test"]
    desk.look(seen(job(RUN, "base")), at=1)
    assert desk.status.folder == "ns.test"


def test_a_run_that_began_before_folders_had_namespaces_stays_in_its_own():
    """Its checkpoints and the models of its phases are there; a new operator reruns none and loses none."""
    desk = Desk(at("shared"))
    desk.look(seen())
    assert desk.server.stored is not None
    # As an operator of then has written it.
    desk.server.store(status={k: v for k, v in desk.server.stored["status"].items() if k != "folder"})
    failed = job(RUN, "base", 1, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(5))
    desk.look(seen(failed), at=10)
    desk.look(seen(failed), at=500)
    assert desk.status.folder == "test"
    assert desk.backend.folders[1:] == ["test"]


def test_what_is_remembered_is_no_reason_to_write():
    desk = Desk(Defaults(workspace=Workspace(claim_name="old"), image="trainer:1"))
    desk.look(seen())
    running = seen(job(RUN, "base", started_at=after(0)))
    desk.look(running, at=1)
    writes = list(desk.server.said)
    desk.look(running, at=2)
    assert desk.server.said == writes


@pytest.mark.parametrize(
    ("operators", "runs", "used"), [("gpus", None, "gpus"), ("gpus", "mine", "mine"), (None, None, None)]
)
def test_the_operators_queue_is_for_runs_that_name_none(operators: str | None, runs: str | None, used: str | None):
    desk = Desk(Defaults(queue=operators), **({"queueName": runs} if runs else {}))
    desk.look()
    assert desk.backend.queues == [used]
    waits = job(RUN, "base", queue=QueueStatus(state=QueueState.PENDING, message="no room"))
    desk.look(seen(waits if used else job(RUN, "base")), at=1)
    assert (desk.status.condition("Admitted") is not None) == (used is not None)
    assert desk.server.stored is not None
    assert desk.server.stored["spec"].get("queueName") == runs, "the run's own document stays as it was written"
