"""One look at one run, with an API server and a backend that only remember what they were told."""

import asyncio
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from builders import START, after, document, dpo, job, make_run, results, seen, sft

from controller.api.run import JOB_SECONDS, AlignmentRun
from controller.api.status import PhaseProgress, QueueState, QueueStatus, RunStatus
from controller.api.workspace import Workspace
from controller.backends.cluster.backend import begun_with
from controller.kube.answers import ApiError, Conflict, NotFound
from controller.kube.calls import Call
from controller.kube.resources import RUNS
from controller.memory import Key, Memory
from controller.operator.defaults import Defaults
from controller.operator.meter import OperatorMetrics
from controller.operator.reconciler import NONE, POLL, Reconciler
from controller.operator.specs import Specs
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob
from controller.plan.place import folder_of
from trainers.contract import FailureClass

KEY = Key("ns", "test")
RUN = make_run(sft("base"))


@dataclass
class Server:
    stored: dict[str, Any] | None
    said: list[str] = field(default_factory=list)
    refusal: ApiError | None = None
    events: list[str] = field(default_factory=list)

    async def get_run(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.stored

    async def write_run_status(self, run: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        if self.stored is None:
            raise NotFound(Call("update", RUNS), "test", 404, "not found")
        if run["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
            raise Conflict(Call("update", RUNS), "test", 409, "modified")
        self.said.append("status")
        return self.store(status=status)

    def store(self, **changes: Any) -> dict[str, Any]:
        """As the API server: with each write a new version."""
        assert self.stored is not None
        metadata = {**self.stored["metadata"], **changes.pop("metadata", {})}
        version = str(int(metadata["resourceVersion"]) + 1)
        self.stored = {**self.stored, **changes, "metadata": {**metadata, "resourceVersion": version}}
        return self.stored

    async def delete_run(self, namespace: str, name: str, uid: str, version: str) -> None:
        self.said.append(f"delete {name} {uid} {version}")

    async def create_event(self, event: dict[str, Any]) -> None:
        self.events.append(event["reason"])
        raise ApiError(Call("create", RUNS), "event", 403, "events may not be written here")


@dataclass
class Backend:
    server: Server
    view: Observed = field(default_factory=Observed)
    looks: int = 0
    anew: int = 0
    """How many of them asked the API server."""
    lost: bool = False
    queues: list[str | None] = field(default_factory=list)
    workspaces: list[Workspace | None] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    async def observe(self, run: AlignmentRun, anew: bool = True) -> Observed:
        self.looks += not anew
        self.anew += anew
        return self.view

    async def apply(self, run: AlignmentRun, job: PhaseJob) -> None:
        self.server.said.append(f"apply {job.phase}-{job.attempt}")
        self.queues.append(job.queue_name)
        self.workspaces.append(job.workspace)
        self.images.append(begun_with(run, job))
        self.folders.append(folder_of(run))

    async def delete(self, run: AlignmentRun, phase: str, attempt: int, seen: ObservedJob | None) -> None:
        if self.lost:
            raise TimeoutError
        self.server.said.append(f"delete {phase}-{attempt}")


class Desk:
    """A run, and looks at it."""

    def __init__(self, defaults: Defaults = NONE, **spec: Any) -> None:
        stored = document(sft("base"), **spec)
        stored["metadata"] |= {"namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "1"}
        self.server = Server(stored)
        self.backend = Backend(self.server)
        self.now = START
        self.watched = True
        api: Any = self.server  # as much of it as is asked for
        self.memory = Memory(api)
        self.reconciler = Reconciler(
            api, self.memory, self.backend, OperatorMetrics(), "me", now=self.clock, defaults=defaults
        )

    def clock(self) -> datetime:
        return self.now

    def look(self, view: Observed | None = None, at: float = 0) -> timedelta | None:
        self.now, self.backend.view = after(at), view or self.backend.view
        if self.watched:
            self.watch()
        return asyncio.run(self.reconciler.look(KEY))

    def watch(self) -> None:
        """The watch delivers what is there."""
        found = self.server.stored
        gone = {"metadata": {"uid": "u", "resourceVersion": "999", "namespace": "ns", "name": "test"}}
        self.memory.event(RUNS, "MODIFIED" if found else "DELETED", found or gone)

    def edit(self, **spec: Any) -> None:
        assert self.server.stored is not None
        generation = self.server.stored["metadata"]["generation"] + 1
        self.server.store(metadata={"generation": generation}, spec={**self.server.stored["spec"], **spec})

    @property
    def status(self) -> RunStatus:
        assert self.server.stored is not None
        return RunStatus.model_validate(self.server.stored.get("status", {}))


def test_the_status_is_saved_before_anything_is_done_and_only_when_it_changes():
    desk = Desk()
    desk.look()
    assert desk.server.said == ["status", "apply base-1"]
    desk.server.said.clear()
    desk.look(seen(job(RUN, "base")), at=1)
    desk.look(seen(job(RUN, "base")), at=2)
    assert desk.server.said == ["status"]
    assert desk.server.events == ["AttemptStarted"], "and an event that is refused is no matter"


def test_a_run_that_was_edited_meanwhile_is_left_alone():
    desk = Desk()
    desk.server.refusal = Conflict(Call("update", RUNS), "test", 409, "modified")
    with pytest.raises(Conflict):
        desk.look()
    assert desk.server.said == []


def test_what_runs_and_what_is_on_its_way_out_is_looked_at_again():
    """A pod on a dead node says no more: that its time is over shows only when someone looks."""
    desk = Desk()
    desk.look()
    live = seen(job(RUN, "base"))
    assert desk.look(live, at=1) == POLL
    desk.edit(suspend=True)
    assert desk.look(live, at=2) == POLL
    assert desk.look(live, at=3) == POLL
    assert desk.look(seen(), at=4) is None


def test_the_planners_own_time_counts_if_it_is_sooner():
    desk = Desk(failurePolicy={"backoff": {"initialSeconds": 1}})
    desk.look()
    failed = job(RUN, "base", 1, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(1))
    wait = desk.look(seen(failed), at=1)
    assert wait is not None
    assert timedelta(seconds=1) <= wait <= timedelta(seconds=1.25)


def test_a_run_at_rest_costs_no_call():
    desk = Desk()
    desk.look(seen(results=results(RUN, "base")))
    assert desk.backend.looks == 1
    assert desk.look(at=1) == timedelta(seconds=JOB_SECONDS - 1), "its jobs are kept for a week"
    assert (desk.backend.looks, desk.server.said) == (1, ["status"])
    assert desk.look(seen(), at=JOB_SECONDS) is None
    assert (desk.backend.looks, desk.status.jobs_deleted) == (2, True)
    assert desk.look(at=2 * JOB_SECONDS) is None
    assert desk.backend.looks == 2, "and never again, also of a new process"


def test_a_run_that_has_had_its_time_is_deleted_as_it_was_read():
    desk = Desk(runTtlSecondsAfterFinished=60)
    assert desk.look(seen(results=results(RUN, "base"))) == timedelta(seconds=60)
    assert desk.look(at=59) == timedelta(seconds=1)
    desk.look(at=60)
    assert desk.server.said == ["status", "delete test u 2"]


def test_what_runs_of_a_refused_run_is_looked_at_again():
    desk = Desk()
    desk.look(seen())
    live = seen(job(RUN, "base"), problems=("spec.workspace: is not set",))
    assert desk.look(live, at=1) == POLL
    assert desk.status.phase == "Invalid"
    assert desk.look(seen(problems=live.problems), at=2) is None, "it is gone, and nothing follows"
    assert "delete base-1" not in desk.server.said


def test_a_run_that_cannot_be_read_is_told_so_once():
    desk = Desk(nonsense=1)
    assert desk.look() is None
    assert desk.look() is None
    assert desk.server.said == ["status"]
    failed = desk.status.condition("Failed")
    assert failed is not None
    assert "nonsense" in failed.message


def test_what_runs_of_a_run_that_cannot_be_read_any_more_is_watched():
    """An edit to what this version does not know said Invalid once, and nobody looked at the job any more."""
    desk = Desk()
    desk.look(seen())
    desk.look(seen(job(RUN, "base")), at=1)
    desk.edit(nonsense=1)
    assert desk.look(seen(job(RUN, "base")), at=2) == POLL
    assert (desk.status.phase, desk.status.phases[0].state) == ("Invalid", "Running")
    failed = job(RUN, "base", 1, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(3))
    desk.look(seen(failed), at=3)
    assert desk.status.phases[0].attempts[0].failure == FailureClass.INFRASTRUCTURE
    desk.edit(suspend=True)
    assert desk.look(seen(job(RUN, "base", 2)), at=4) == POLL
    assert desk.server.said[-1] == "delete base-2", "and it can be stopped"


def test_an_end_stays_though_the_run_cannot_be_read_any_more():
    desk = Desk()
    desk.look(seen(results=results(RUN, "base")))
    assert desk.server.stored is not None
    # A rule of a newer version, which begins with what it reads: nobody has edited the run.
    desk.reconciler._specs = Specs()
    desk.server.store(spec={**desk.server.stored["spec"], "nonsense": 1})
    assert desk.look(at=1) is None
    assert (desk.status.phase, desk.server.said) == ("Succeeded", ["status"])


NEWER = {
    "phase": "Running",
    "novelty": {"of": "the run"},
    "workspace": {"claimName": "c", "depth": 3},
    "phases": [
        {
            "name": "base", "type": "sft", "state": "Simmering", "digest": "d", "novelty": 7,
            "attempts": [
                {"number": 1, "digest": "d", "state": "Failed", "failure": "Infrastructure", "novelty": [1]},
                {"number": 2, "digest": "d", "state": "Failed", "failure": "CosmicRays", "message": "pling"},
                {"number": 3, "digest": "d", "state": "Levitating"},
            ],
        }
    ],
    "conditions": [{"type": "Blessed", "status": "True", "reason": "Yes", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
}  # fmt: skip


def test_a_status_of_a_newer_operator_is_read_as_far_as_it_is_known():
    """A roll-back forgot all attempts once, and their failures."""
    status = RunStatus.model_validate(NEWER)
    (phase,) = status.phases
    assert (phase.digest, [a.number for a in phase.attempts]) == ("d", [1, 2])
    assert [a.failure for a in phase.attempts] == [FailureClass.INFRASTRUCTURE, None]
    assert status.workspace == Workspace(claim_name="c")


def test_what_a_newer_operator_wrote_is_still_there_when_it_comes_back():
    desk = Desk()
    assert desk.server.stored is not None
    desk.server.store(status=NEWER)
    desk.look(seen(job(RUN, "base", 4)))
    found = desk.server.stored["status"]
    assert found["novelty"] == {"of": "the run"}
    assert found["phases"][0]["novelty"] == 7
    assert found["phases"][0]["state"] == "Running"


def test_a_run_that_is_gone_or_going_is_nobodys_business():
    desk = Desk()
    assert desk.server.stored is not None
    desk.server.store(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
    assert desk.look() is None
    desk.server.stored = None
    assert desk.look() is None
    assert desk.backend.looks == 0


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


def chain() -> tuple[Desk, AlignmentRun]:
    """A run of two phases, of which the first runs."""
    desk, run = Desk(), make_run(sft("base"), dpo("next", "base"))
    desk.edit(phases=[sft("base"), dpo("next", "base")])
    desk.look()
    desk.look(seen(job(run, "base", running_since=after(1))), at=1)
    return desk, run


class TestMemory:
    """What is remembered may be old; what is told of us may be our own."""

    def test_nothing_is_read_anew_but_for_a_start_and_an_end(self):
        desk = Desk()
        desk.look()
        assert desk.backend.anew == 1, "the job is asked for of what there is now"
        running = seen(job(RUN, "base", running_since=after(1)))
        for second in (1, 2, 3):
            desk.look(running, at=second)
        assert desk.backend.anew == 1
        desk.look(seen(results=results(RUN, "base")), at=4)
        assert desk.backend.anew == 2

    def test_what_follows_from_a_success_that_is_known_is_not_read_anew(self):
        desk, run = chain()
        done = seen(job(run, "base", state=JobState.SUCCEEDED), results=results(run, "base"))
        desk.look(done, at=2)
        assert desk.server.said[-2:] == ["status", "apply next-1"]
        assert desk.backend.anew == 1, "that the first job was asked for"

    @pytest.mark.parametrize(
        "doubt",
        [
            "without its word",
            "lives",
            "failed",
            "another's name",
            "another writes",
            "no room",
            "begun before",
            "to end",
        ],
    )
    def test_whatever_else_is_in_doubt_is_read_anew(self, doubt: str):
        desk, run = chain()
        first = job(run, "base", state=JobState.SUCCEEDED)
        done = seen(first, results=results(run, "base"))
        failed = job(run, "base", state=JobState.FAILED, failure=FailureClass.BAD_INPUT, finished_at=after(1))
        other = ObservedJob("next", 1, "another", JobState.LIVE)
        views = {
            "without its word": seen(first),
            "lives": replace(done, jobs=(job(run, "base"),)),
            "failed": seen(failed),
            "another's name": replace(done, taken={("next", 1): "somebody's"}),
            "another writes": replace(done, held={"next": "an earlier run's"}),
            "no room": replace(done, barred={("next", 1): "quota"}),
            "begun before": replace(done, jobs=(first, replace(other, state=JobState.FAILED))),
            "to end": replace(done, jobs=(first, other)),
        }
        desk.look(views[doubt], at=2)
        assert desk.backend.anew == 2

    def test_what_we_wrote_is_there_at_once_and_wakes_nobody(self):
        desk = Desk()
        desk.look()
        assert desk.server.stored is not None
        assert desk.memory.event(RUNS, "MODIFIED", desk.server.stored) is None
        desk.watched = False
        assert desk.look(seen(job(RUN, "base")), at=1) == POLL
        assert desk.server.said == ["status", "apply base-1", "status"]

    def test_nothing_is_started_for_what_a_run_was_before_an_edit(self):
        """The watch has not told of it yet, and no write would fail: the status says already that the job is asked for."""
        desk = Desk()
        desk.look()
        desk.look(seen(), at=1)
        desk.server.said.clear()
        desk.look(seen(), at=2)
        assert desk.server.said == ["apply base-1"]
        desk.edit(suspend=True)
        desk.watched = False
        with pytest.raises(Conflict):
            desk.look(seen(), at=3)
        assert desk.server.said == ["apply base-1"]
        desk.look(seen(), at=4)
        assert desk.status.is_true("Suspended"), "what was found out is remembered"

    def test_a_write_that_came_too_late_is_put_right_though_the_watch_is_silent(self):
        desk = Desk()
        desk.look()
        desk.edit(suspend=True)
        desk.watched = False
        with pytest.raises(Conflict):
            desk.look(seen(job(RUN, "base")), at=1)
        desk.look(seen(job(RUN, "base")), at=2)
        assert desk.server.said[-1] == "delete base-1"

    def test_a_run_that_is_gone_is_left_alone_though_the_watch_is_silent(self):
        desk = Desk()
        desk.look()
        desk.server.stored, desk.watched = None, False
        with pytest.raises(ApiError):
            desk.look(seen(), at=1)
        assert desk.server.said == ["status", "apply base-1"]


def test_when_many_train_each_is_looked_at_less_often():
    desk = Desk()
    desk.look()
    desk.reconciler._moving |= {Key("ns", str(i)) for i in range(1000)}
    wait = desk.look(seen(job(RUN, "base")), at=1)
    assert wait is not None
    assert 20 < wait.total_seconds() < 60


class TestCleaningUp:
    DONE = after(0)

    def ended(self) -> tuple[Desk, ObservedJob]:
        desk = Desk(ttlSecondsAfterFinished=3600)
        finished = job(RUN, "base", 1, JobState.SUCCEEDED, finished_at=self.DONE, uid="j")
        desk.look(seen(job(RUN, "base")))
        desk.look(seen(finished, results=results(RUN, "base")))
        desk.server.said.clear()
        return desk, finished

    def test_jobs_of_a_finished_run_go_after_its_time(self):
        desk, finished = self.ended()
        assert desk.look(seen(finished), at=60) == timedelta(seconds=3540)
        assert desk.server.said == []
        desk.look(seen(finished), at=3600)
        assert desk.server.said == ["delete base-1"]
        assert desk.look(seen(), at=3601) is None

    def test_what_is_on_its_way_out_is_not_deleted_again(self):
        """Each of its pods tells of its end, and each time the job would be."""
        desk, finished = self.ended()
        asked = desk.backend.anew
        desk.look(seen(replace(finished, leaving=True)), at=3600)
        assert (desk.server.said, desk.backend.anew) == ([], asked)

    def test_the_runs_own_time_counts(self):
        desk = Desk(ttlSecondsAfterFinished=7)
        desk.look(seen(results=results(RUN, "base")))
        assert desk.look(seen(), at=2) == timedelta(seconds=5)


def test_progress_is_not_written_at_each_look():
    """A pod's end is told before its job's, and the next job would wait for the write."""
    desk, ticks = Desk(), [0.0]
    desk.reconciler._clock = lambda: ticks[0]
    desk.look()
    running = job(RUN, "base", running_since=START)

    def going(step: int, *jobs: ObservedJob) -> Observed:
        return seen(*(jobs or (running,)), progress={"base": PhaseProgress(step=step, total_steps=9, updated_at=START)})

    def said() -> int:
        phase = desk.status.phase_status("base")
        return phase.progress.step if phase and phase.progress else 0

    desk.look(going(1))
    desk.look(going(2))
    assert said() == 1, "that it runs is news, and how far it is with it; what follows at once is not"
    ticks[0] = POLL.total_seconds()
    desk.look(going(3))
    assert said() == 3
    failed = replace(running, state=JobState.FAILED, failure=FailureClass.INTERRUPTED, message="gone")
    desk.look(going(5, failed))
    assert desk.status.phase_status("base").attempts[0].state == "Failed", "and whatever else there is to say is said"


def test_that_a_pod_tells_no_more_waits_for_its_job_to_end():
    desk, ticks = Desk(), [0.0]
    desk.reconciler._clock = lambda: ticks[0]
    desk.look()
    running, report = (
        job(RUN, "base", running_since=START),
        PhaseProgress(step=3, total_steps=9, loss=1.0, updated_at=START),
    )
    desk.look(seen(running, progress={"base": report}))
    ticks[0] = 10 * POLL.total_seconds()
    writes = len(desk.server.said)
    desk.look(seen(running))
    assert len(desk.server.said) == writes, "its end is a moment away"
    ticks[0] += POLL.total_seconds()
    desk.look(seen(running))
    phase = desk.status.phase_status("base")
    assert phase is not None
    assert phase.progress == PhaseProgress(step=3, total_steps=9), "it does not come, and the figures are of the past"
