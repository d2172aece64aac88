"""One look at one run, with an API server and a backend that only remember what they were told."""

from dataclasses import replace
from datetime import timedelta

import pytest
from builders import START, after, job, results, seen
from desk import RUN, Desk

from controller.api.run import JOB_SECONDS
from controller.api.status import PhaseProgress, RunStatus
from controller.api.workspace import Workspace
from controller.kube.answers import ApiError, Conflict
from controller.kube.calls import Call
from controller.kube.resources import RUNS
from controller.memory import Key
from controller.operator.reconciler import POLL
from controller.operator.specs import Specs
from controller.plan.observed import JobState, Observed, ObservedJob
from trainers.contract import FailureClass


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


def test_a_run_that_may_not_be_deleted_stays_and_that_is_said_once(caplog: pytest.LogCaptureFixture):
    """By an operator that is newer than its chart: each try logged that it was deleted, and failed."""
    desk = Desk(runTtlSecondsAfterFinished=60)
    words = 'alignmentruns.alignment.dev "test" is forbidden: User "u" cannot delete resource "alignmentruns"'
    desk.server.undeletable = ApiError(Call("delete", RUNS), "test", 403, words)
    desk.look(seen(results=results(RUN, "base")))
    with caplog.at_level("INFO"):
        desk.look(at=60)
        desk.look(at=61)
    told = [record.levelname for record in caplog.records if "deleted" in record.message or "right" in record.message]
    assert told == ["WARNING"]
    desk.server.undeletable = ApiError(Call("delete", RUNS), "test", 500, "no")
    with pytest.raises(ApiError):
        desk.look(at=62)


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
