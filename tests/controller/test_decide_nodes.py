"""The planner when there are fewer nodes than were asked for: after one was lost, or from the beginning."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from builders import START, digests, job, make_run, results, seen, sft, stopped

from controller.api.run import AlignmentRun
from controller.api.status import AttemptState, PhaseProgress, PhaseState, PhaseStatus
from controller.plan.check import check_run
from controller.plan.decide import Apply, Decision, decide
from controller.plan.observed import JobState, ObservedJob
from controller.plan.sizes import run_sizes, sentence
from trainers.contract import FailureClass

STARTUP = 60
LOST = {"state": JobState.FAILED, "failure": FailureClass.INFRASTRUCTURE, "message": "a node is gone"}


def run_on(nodes: int, least: int | None, **policy: Any) -> AlignmentRun:
    policy = {"startupTimeoutSeconds": STARTUP, "backoff": {"initialSeconds": 0}} | policy
    template = {"nodes": nodes} | ({} if least is None else {"minNodes": least})
    return make_run(sft("base"), template=template, failurePolicy=policy)


@dataclass
class Cluster:
    """A run and its jobs, where as many pods find a place as there are nodes free."""

    run: AlignmentRun
    now: Any = START
    jobs: list[ObservedJob] = field(default_factory=list)

    def look(self, seconds: float = 1, **more: Any) -> Decision:
        self.now += timedelta(seconds=seconds)
        decision = decide(self.run, seen(*self.jobs, **more), self.now)
        self.run = self.run.model_copy(update={"status": decision.status})
        return decision

    def ask(self) -> int:
        """How many nodes the attempt has that is asked for now."""
        (action,) = self.look().actions
        assert isinstance(action, Apply)
        self.jobs.append(job(self.run, "base", action.job.attempt, may_start_since=self.now))
        return action.job.nodes

    def now_is(self, **facts: Any) -> None:
        """The newest job is seen like this."""
        ended = {"finished_at": self.now} if "state" in facts else {}
        self.jobs[-1] = job(self.run, "base", self.jobs[-1].attempt, **{"may_start_since": self.now} | ended | facts)

    def give_up(self, placed: int) -> None:
        """Nothing more finds a place until the startup timeout, and the job is deleted."""
        self.now_is(placed=placed)
        self.look()
        assert stopped(self.look(STARTUP + 1)) == [f"base-{self.jobs[-1].attempt}"]
        self.jobs.pop()

    def suspend(self, wanted: bool) -> None:
        self.run = self.run.model_copy(update={"spec": self.run.spec.model_copy(update={"suspend": wanted})})

    @property
    def phase(self) -> PhaseStatus:
        assert self.run.status is not None
        return self.run.status.phases[0]


def test_after_a_lost_node_a_phase_goes_on_with_those_that_are_left() -> None:
    cluster = Cluster(run_on(4, 2))
    assert cluster.ask() == 4
    cluster.now_is(running_since=START)
    cluster.look()
    cluster.now_is(**LOST)
    assert cluster.ask() == 4, "another node may be free"
    cluster.give_up(placed=3)
    assert cluster.ask() == 3
    assert cluster.phase.message == "starting, on 3 of 4 nodes"
    assert [(a.failure, a.nodes, a.placed) for a in cluster.phase.attempts] == [
        ("Infrastructure", 4, 0), ("StartupTimeout", 4, 3), (None, 3, 0),
    ]  # fmt: skip
    assert {j.digest for j in cluster.jobs} == {digests(cluster.run)["base"]}, "so it goes on from the checkpoint"
    cluster.now_is(running_since=START)
    cluster.look()
    assert cluster.phase.message == "on 3 of 4 nodes", "for as long as it lasts"


def test_what_it_needs_is_of_the_nodes_that_it_has() -> None:
    cluster = Cluster(run_on(4, 2))
    cluster.ask()
    assert cluster.phase.needs.endswith("on each of 4 devices")
    cluster.give_up(placed=3)
    cluster.ask()
    cluster.now_is(running_since=START)
    cluster.look()
    assert cluster.phase.needs.endswith("on each of 3 devices")
    cluster.suspend(True)
    cluster.look()
    cluster.now_is(state=JobState.FAILED, failure=FailureClass.INTERRUPTED)
    cluster.look()
    cluster.suspend(False)
    cluster.ask()
    assert cluster.phase.needs.endswith("on each of 4 devices")


def test_what_it_needs_is_of_what_has_been_halved_for_it() -> None:
    cluster = Cluster(run_on(4, None))
    cluster.ask()
    whole = cluster.phase.needs
    cluster.now_is(state=JobState.FAILED, failure=FailureClass.OUT_OF_MEMORY)
    cluster.ask()
    cluster.now_is(running_since=START)
    cluster.look()
    smaller = make_run(
        sft("base", parallel={"microBatchTokens": cluster.run.phases[0].spec.parallel.micro_batch_tokens // 2}),
        template={"nodes": 4},
    )
    assert cluster.phase.needs == sentence(run_sizes(smaller, {})["base"]) != whole


def test_between_attempts_it_is_as_far_as_the_last_one_was() -> None:
    """The next one goes on from a checkpoint, so the share that is done does not fall to nothing meanwhile."""
    cluster = Cluster(run_on(4, 2))
    cluster.ask()
    report = PhaseProgress(step=70, total_steps=100, loss=1.0, tokens_per_second=9.0, eta_seconds=9.0, updated_at=START)
    cluster.now_is(running_since=START)
    cluster.look(progress={"base": report})
    assert (cluster.run.status.percent, cluster.run.status.eta) == (70, "9s")
    cluster.now_is(**LOST)
    cluster.ask()
    assert (cluster.run.status.percent, cluster.run.status.step, cluster.run.status.eta) == (70, "70/100", "")
    cluster.give_up(placed=3)
    cluster.ask()
    cluster.now_is(running_since=START)
    cluster.look(progress={"base": PhaseProgress(stage="loading", updated_at=START)})
    assert (cluster.run.status.percent, cluster.phase.progress.stage) == (70, "loading")
    cluster.look(progress={"base": PhaseProgress(step=60, total_steps=100, updated_at=START)})
    assert cluster.run.status.percent == 60
    cluster.suspend(True)
    cluster.look()
    cluster.now_is(state=JobState.FAILED, failure=FailureClass.INTERRUPTED)
    cluster.look()
    assert (cluster.phase.state, cluster.run.status.percent) == (PhaseState.SUSPENDED, 60)


def test_a_phase_that_was_edited_is_at_its_beginning() -> None:
    cluster = Cluster(run_on(1, None))
    cluster.ask()
    cluster.now_is(running_since=START)
    cluster.look(progress={"base": PhaseProgress(step=70, total_steps=100, updated_at=START)})
    edited = make_run(sft("base", optim={"lr": 1}), failurePolicy={"startupTimeoutSeconds": STARTUP})
    cluster.run = cluster.run.model_copy(update={"spec": edited.spec})
    cluster.look()
    assert (cluster.phase.progress, cluster.run.status.percent) == (None, 0)


def test_it_can_become_smaller_as_often_as_there_are_nodes() -> None:
    """The budget of startup timeouts is for those that nothing follows from."""
    cluster = Cluster(run_on(4, 1, retries={"startupTimeout": 0}))
    for left in (3, 2, 1):
        cluster.ask()
        cluster.give_up(placed=left)
    assert cluster.ask() == 1
    cluster.give_up(placed=0)
    cluster.look()
    assert (cluster.phase.state, cluster.phase.failure) == (PhaseState.FAILED, "StartupTimeout")


@pytest.mark.parametrize(("least", "placed"), [(None, 3), (3, 2), (1, 4), (1, 0)])
def test_too_few_nodes_and_pods_that_do_not_start_for_another_reason_are_failures(
    least: int | None, placed: int
) -> None:
    cluster = Cluster(run_on(4, least))
    for _ in range(2):
        assert cluster.ask() == 4
        cluster.give_up(placed)
    cluster.look()
    assert (cluster.phase.state, cluster.phase.failure) == (PhaseState.FAILED, "StartupTimeout")


def test_a_smaller_attempt_is_asked_for_again_as_it_was_and_followed_by_one_as_small() -> None:
    cluster = Cluster(run_on(4, 2))
    cluster.ask()
    cluster.give_up(placed=3)
    cluster.ask()
    cluster.jobs.pop()
    assert cluster.ask() == 3, "nobody has seen it"
    cluster.now_is(running_since=START)
    cluster.look()
    cluster.now_is(**LOST)
    assert cluster.ask() == 3


def test_an_attempt_that_does_not_run_yet_is_replaced_when_the_number_of_nodes_is_edited() -> None:
    cluster = Cluster(run_on(4, None))
    cluster.ask()
    cluster.now_is(placed=2)
    cluster.look()
    edited = run_on(2, None)
    cluster.run = cluster.run.model_copy(update={"spec": edited.spec})
    assert stopped(cluster.look()) == ["base-1"]
    cluster.jobs.pop()
    assert cluster.ask() == 2
    assert cluster.phase.attempts[-1].number == 2
    assert AttemptState.FAILED not in {a.state for a in cluster.phase.attempts}


def test_one_that_runs_is_left_alone_when_the_number_of_nodes_is_edited() -> None:
    cluster = Cluster(run_on(4, None))
    cluster.ask()
    cluster.now_is(running_since=START)
    cluster.look()
    cluster.run = cluster.run.model_copy(update={"spec": run_on(2, None).spec})
    decision = cluster.look()
    assert not decision.actions
    cluster.now_is(**LOST)
    assert cluster.ask() == 2, "the next one has as many as are wanted now"


def test_an_edit_asks_for_all_nodes_again() -> None:
    cluster = Cluster(run_on(4, 2))
    cluster.ask()
    cluster.give_up(placed=3)
    cluster.run = cluster.run.model_copy(update={"spec": run_on(4, 1).spec})
    assert cluster.ask() == 4


FULL = "0/4 nodes are available"


@pytest.mark.parametrize(
    ("nodes", "least", "placed", "said"),
    [
        (4, 2, 3, f"3 of 4 nodes found, which are enough after startupTimeoutSeconds {STARTUP}; {FULL}"),
        (4, 2, 1, f"1 of 4 nodes found; {FULL}"),
        (4, None, 3, f"3 of 4 nodes found; {FULL}"),
        (4, None, 4, FULL),
        (1, None, 0, FULL),
    ],
)
def test_while_it_waits_it_says_how_many_nodes_there_are_and_what_follows(nodes, least, placed, said) -> None:
    cluster = Cluster(run_on(nodes, least))
    cluster.ask()
    cluster.now_is(placed=placed, message=FULL)
    cluster.look()
    assert cluster.phase.message == said


@pytest.mark.parametrize("asleep_before_its_end", [False, True])
def test_a_resumption_asks_for_all_nodes_again(asleep_before_its_end: bool) -> None:
    """And forgets the timeouts for which there was no budget."""
    cluster = Cluster(run_on(4, 1, retries={"startupTimeout": 0}))
    cluster.ask()
    cluster.give_up(placed=3)
    if not asleep_before_its_end:
        assert cluster.ask() == 3
        cluster.now_is(running_since=START)
        cluster.look()
    cluster.suspend(True)
    cluster.look()
    if not asleep_before_its_end:
        cluster.now_is(state=JobState.FAILED, failure=FailureClass.INTERRUPTED)
        cluster.look()
    assert cluster.phase.state == PhaseState.SUSPENDED
    cluster.suspend(False)
    assert cluster.ask() == 4
    cluster.give_up(placed=2)
    assert cluster.ask() == 2, "there are fewer still"


def test_more_nodes_at_least_than_at_most() -> None:
    (problem,) = check_run(run_on(2, 3))
    assert str(problem) == "spec.template.minNodes: 3 is more than nodes, 2"
    own = sft("base") | {"template": {"minNodes": 3}}
    (problem,) = check_run(make_run(own, template={"nodes": 2}))
    assert str(problem) == "spec.phases[base].template.minNodes: 3 is more than nodes, 2"


def test_a_phase_with_fewer_nodes_than_the_runs_least_has_them_all() -> None:
    run = make_run(sft("base") | {"template": {"nodes": 1}}, template={"nodes": 4, "minNodes": 2})
    assert check_run(run) == []
    cluster = Cluster(run)
    assert cluster.ask() == 1


def test_a_finished_phase_says_how_many_nodes_it_had() -> None:
    cluster = Cluster(run_on(2, 1))
    cluster.ask()
    cluster.give_up(placed=1)
    cluster.ask()
    cluster.now_is(state=JobState.SUCCEEDED)
    decision = decide(cluster.run, seen(*cluster.jobs, results=results(cluster.run, "base")), cluster.now)
    assert [a.nodes for a in decision.status.phases[0].attempts] == [2, 1]
