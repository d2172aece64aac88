"""Rules of decide() that clusters brought: queues, slow starts, stalls, reasons seen early, lost nodes, edits after the end."""

from dataclasses import replace
from datetime import timedelta

import pytest
from builders import (
    START,
    after,
    diamond,
    digests,
    is_settled,
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
from controller.api.status import AttemptState, PhaseProgress, PhaseState, QueueState, QueueStatus, RunStatus
from controller.plan.decide import Apply, decide
from controller.plan.observed import JobState
from trainers.contract import FailureClass

NO_WAIT = {"backoff": {"initialSeconds": 0, "maxSeconds": 0}}


def first(**policy):
    """A run of one phase whose first attempt has been asked for."""
    run = make_run(sft("base"), failurePolicy={**NO_WAIT, **policy})
    return with_status(run, decide(run, seen(), START))


def phase(decision, name="base"):
    return decision.status.phase_status(name)


def attempt(decision, name="base"):
    return phase(decision, name).attempts[-1]


class TestStart:
    def test_pods_that_do_not_run_in_time_are_given_up(self):
        run = first(startupTimeoutSeconds=60)
        waits = job(run, "base", may_start_since=START, message="Unschedulable: no GPU")
        early = decide(run, seen(waits), after(59))
        assert (stopped(early), early.requeue_after) == ([], timedelta(seconds=1))
        assert phase(early).message == "Unschedulable: no GPU"
        late = decide(run, seen(waits), after(60))
        assert stopped(late) == ["base-1"]
        assert attempt(late).state == AttemptState.STOPPING
        gone = decide(with_status(run, late), seen(), after(61))
        assert attempt(gone).number == 2, "the budget of start-up timeouts is one by default"
        failed = phase(gone).attempts[0]
        assert (failed.state, failed.failure) == (AttemptState.FAILED, FailureClass.STARTUP_TIMEOUT)
        assert failed.message == "not running after 60 s: Unschedulable: no GPU"

    def test_time_in_a_queue_does_not_count(self):
        run = first(startupTimeoutSeconds=60)
        queued = job(run, "base", queue=QueueStatus(state=QueueState.PENDING))
        assert stopped(decide(run, seen(queued), after(9999))) == []

    def test_pods_that_run_are_in_time(self):
        run = first(startupTimeoutSeconds=60)
        runs = job(run, "base", may_start_since=START, running_since=after(30))
        assert stopped(decide(run, seen(runs), after(9999))) == []


class TestStall:
    def report(self, seconds):
        return {"base": PhaseProgress(step=5, total_steps=9, updated_at=after(seconds))}

    def test_is_only_told_unless_a_timeout_is_set(self):
        run = first(stalledAfterSeconds=10)
        decision = decide(run, seen(job(run, "base", running_since=START), progress=self.report(0)), after(9999))
        assert decision.status.is_true(meta.STALLED)
        assert stopped(decision) == []

    def test_ends_the_attempt_and_counts_against_its_own_budget(self):
        run = first(stallTimeoutSeconds=100, retries={"stalled": 0})
        live = job(run, "base", running_since=START)
        assert stopped(decide(run, seen(live, progress=self.report(50)), after(149))) == []
        late = decide(run, seen(live, progress=self.report(50)), after(150))
        assert stopped(late) == ["base-1"]
        ended = job(run, "base", state=JobState.FAILED, failure=FailureClass.INTERRUPTED, message="stopped")
        failed = decide(with_status(run, late), seen(ended), after(151))
        assert phase(failed).state == PhaseState.FAILED
        assert (phase(failed).failure, phase(failed).message) == (
            FailureClass.STALLED,
            "no progress for 100 s since step 5",
        )

    def test_one_who_never_reported_cannot_be_told_from_one_we_cannot_hear(self):
        run = first(stallTimeoutSeconds=100)
        assert stopped(decide(run, seen(job(run, "base", running_since=START)), after(9999))) == []

    def test_a_job_that_its_queue_let_go_on_has_its_time_anew(self):
        run = first(stallTimeoutSeconds=100)
        again = job(run, "base", running_since=after(1000))
        assert stopped(decide(run, seen(again, progress=self.report(50)), after(1050))) == []
        assert stopped(decide(run, seen(again, progress=self.report(50)), after(1100))) == ["base-1"]


class TestReasonsSeenEarly:
    DOOMED = {"failure": FailureClass.INTERRUPTED, "message": "evicted", "node": "n1"}

    def test_a_live_job_that_is_about_to_fail_is_left_to_do_so(self):
        run = first()
        decision = decide(run, seen(job(run, "base", **self.DOOMED)), after(1))
        assert (started(decision), stopped(decision)) == ([], [])
        assert phase(decision).message == "Interrupted: evicted"

    GUESS = {"failure": FailureClass.INFRASTRUCTURE, "message": "its pods are gone", "guessed": True}

    @pytest.mark.parametrize("guess", [{}, GUESS], ids=["nothing", "a guess"])
    def test_the_reason_stays_when_the_pods_are_gone(self, guess):
        run = first()
        run = with_status(run, decide(run, seen(job(run, "base", **self.DOOMED)), after(1)))
        if guess:  # another pod of it is still on its way out
            run = with_status(run, decide(run, seen(job(run, "base", **guess)), after(1.5)))
        vague = job(run, "base", state=JobState.FAILED, **guess)
        decision = decide(run, seen(vague), after(2))
        failed = phase(decision).attempts[0]
        assert (failed.failure, failed.message, failed.node) == (FailureClass.INTERRUPTED, "evicted", "n1")

    def test_a_guess_is_better_than_nothing(self):
        run = first()
        run = with_status(run, decide(run, seen(job(run, "base")), after(1)))
        failed = phase(decide(run, seen(job(run, "base", state=JobState.FAILED, **self.GUESS)), after(2))).attempts[0]
        assert (failed.failure, failed.message) == (FailureClass.INFRASTRUCTURE, "its pods are gone")

    def test_a_pod_that_was_made_again_in_time_has_not_failed(self):
        """The Training Operator replaces a pod that vanishes; the attempt goes on and succeeds."""
        run = first()
        run = with_status(run, decide(run, seen(job(run, "base", **self.DOOMED)), after(1)))
        done = decide(run, seen(job(run, "base", state=JobState.SUCCEEDED), results=results(run, "base")), after(9))
        assert done.status.is_true(meta.SUCCEEDED)
        assert (attempt(done).state, attempt(done).failure) == (AttemptState.SUCCEEDED, None)

    def test_a_suspended_attempt_is_no_failure_whatever_its_pods_say(self):
        run = first()
        run = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
        run = with_status(run, decide(run, seen(job(run, "base")), after(1)))
        dying = job(run, "base", **self.DOOMED)
        run = with_status(run, decide(run, seen(dying), after(2)))
        decision = decide(run, seen(), after(3))
        assert decision.status.is_true(meta.SUSPENDED)
        assert not [a for a in phase(decision).attempts if a.state == AttemptState.FAILED]


class TestQueue:
    def run(self):
        run = make_run(sft("base"), queueName="gpus")
        return with_status(run, decide(run, seen(), START))

    @pytest.mark.parametrize("state", [s for s in QueueState if s != QueueState.ADMITTED])
    def test_waiting_is_told_on_the_run(self, state):
        run = self.run()
        decision = decide(run, seen(job(run, "base", queue=QueueStatus(state=state, message="why"))), after(1))
        admitted = decision.status.condition(meta.ADMITTED)
        assert (admitted.status, admitted.reason, admitted.message) == ("False", state, "base: why")
        assert decision.status.phase == "Queued"

    def test_admitted(self):
        run = self.run()
        decision = decide(run, seen(job(run, "base", queue=QueueStatus(state=QueueState.ADMITTED))), after(1))
        assert decision.status.is_true(meta.ADMITTED)
        assert decision.status.phase == "base"

    def test_a_preempted_job_is_waited_for_and_not_replaced(self):
        run = self.run()
        waits = job(run, "base", queue=QueueStatus(state=QueueState.PREEMPTED))
        decision = decide(run, seen(waits), after(9999))
        assert (started(decision), stopped(decision)) == ([], [])

    @pytest.mark.parametrize("made_for", ["", "cpus"])
    def test_another_queue_is_for_what_has_not_begun(self, made_for):
        """The queue of a job is said when it is made: it would have waited in the old one for ever."""
        run = self.run()
        waits, runs = job(run, "base", queue_name=made_for), job(run, "base", queue_name=made_for, running_since=START)
        moved, kept = decide(run, seen(waits), after(2)), decide(run, seen(runs), after(2))
        assert (stopped(moved), stopped(kept)) == (["base-1"], [])
        again = decide(with_status(run, moved), seen(), after(3))
        assert started(again) == ["base-2"]
        settled = decide(with_status(run, again), seen(job(run, "base", 2, queue_name="gpus")), after(4))
        assert (started(settled), stopped(settled)) == ([], [])

    def test_a_queue_that_is_not_asked_for_any_more_is_left(self):
        """It would have waited in it for ever."""
        run = first()
        waits = job(run, "base", queue_name="typo", queue_asked="typo")
        moved = decide(run, seen(waits), after(2))
        assert stopped(moved) == ["base-1"]
        assert "no queue is asked for any more" in moved.status.phases[0].attempts[0].message
        assert started(decide(with_status(run, moved), seen(), after(3))) == ["base-2"]
        assert stopped(decide(run, seen(replace(waits, running_since=START)), after(2))) == []

    def test_a_queue_that_the_cluster_gives_stays(self):
        """Kueue has a queue for jobs that name none, and other backends have no queues."""
        run = first()
        assert stopped(decide(run, seen(job(run, "base", queue_name="default")), after(1))) == []
        run = self.run()
        assert stopped(decide(run, seen(job(run, "base", queue_name=None)), after(1))) == []

    def test_one_that_a_run_has_not_named_is_told_too(self):
        run = first()
        held = job(run, "base", queue=QueueStatus(state=QueueState.MISSING, message="name one"))
        admitted = decide(run, seen(held), after(1)).status.condition(meta.ADMITTED)
        assert (admitted.status, admitted.reason, admitted.message) == ("False", "Missing", "base: name one")

    def test_runs_without_a_queue_say_nothing_of_it(self):
        run = first()
        decision = decide(run, seen(job(run, "base")), after(1))
        assert decision.status.condition(meta.ADMITTED) is None


class TestNodes:
    def test_the_next_attempt_avoids_where_the_infrastructure_failed(self):
        run = first(avoidFailedNodes=True)
        lost = job(run, "base", state=JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, node="n7")
        [action] = [a for a in decide(run, seen(lost), after(1)).actions if isinstance(a, Apply)]
        assert action.job.avoid_nodes == ("n7",)

    def test_a_node_is_not_blamed_for_memory(self):
        run = first(avoidFailedNodes=True)
        oom = job(run, "base", state=JobState.FAILED, failure=FailureClass.OUT_OF_MEMORY, node="n7")
        [action] = [a for a in decide(run, seen(oom), after(1)).actions if isinstance(a, Apply)]
        assert action.job.avoid_nodes == ()


class TestAfterTheEnd:
    def finished(self, **spec):
        run = diamond(**spec)
        everything = seen(results=results(run, "base", "dpo", "reward", "ppo"))
        return with_status(run, decide(run, everything, START)), everything

    def test_nobody_has_to_look_any_more(self):
        run, _ = self.finished(ttlSecondsAfterFinished=None)
        assert is_settled(run)
        assert not is_settled(self.finished(ttlSecondsAfterFinished=5)[0])
        assert not is_settled(self.finished(ttlSecondsAfterFinished=None, runTtlSecondsAfterFinished=5)[0])

    def test_jobs_go_when_their_time_has_come(self):
        run, _ = self.finished(ttlSecondsAfterFinished=60)
        jobs = seen(job(run, "base", state=JobState.SUCCEEDED), job(run, "dpo", state=JobState.SUCCEEDED))
        waits = decide(run, jobs, after(10))
        assert (stopped(waits), waits.requeue_after) == ([], timedelta(seconds=50))
        goes = decide(run, jobs, after(60))
        assert stopped(goes) == ["base-1", "dpo-1"]
        assert goes.status == run.status

    def edited(self, run, generation=2):
        return run.model_copy(update={"metadata": run.metadata.model_copy(update={"generation": generation})})

    def test_an_edit_that_changes_nothing_keeps_the_times(self):
        run, everything = self.finished()
        decision = decide(self.edited(run), everything, after(1000))
        assert (decision.status.started_at, decision.status.finished_at) == (START, START)

    def test_an_edit_that_does_has_the_clock_start_anew(self):
        """Else a deadline would have passed before the edited run has begun."""
        run, everything = self.finished(failurePolicy={"runDeadlineSeconds": 100})
        changed = self.edited(run).model_copy(update={"spec": run.spec.model_copy(update={"seed": 5})})
        decision = decide(changed, everything, after(1000))
        assert started(decision) == ["base-1"]
        assert (decision.status.started_at, decision.status.finished_at) == (after(1000), None)
        assert not decision.status.is_true(meta.SUCCEEDED)


def test_percent_counts_phases_alike_and_steps_within():
    run = diamond()
    run = with_status(run, decide(run, seen(results=results(run, "base")), START))
    half = {"dpo": PhaseProgress(step=5, total_steps=10)}
    live = seen(job(run, "dpo"), job(run, "reward"), results=results(run, "base"), progress=half)
    status = decide(run, live, after(1)).status
    assert (status.progress, status.percent) == ("1/4 (37%)", 37)


def test_a_status_survives_the_api_server():
    """Else every look at a run would write it again."""
    run = first(startupTimeoutSeconds=60)
    for observed in (
        seen(),
        seen(
            job(
                run, "base", may_start_since=START, message="Unschedulable", queue=QueueStatus(state=QueueState.PENDING)
            )
        ),
        seen(
            job(run, "base", running_since=START), progress={"base": PhaseProgress(step=1, loss=0.5, updated_at=START)}
        ),
        seen(job(run, "base", state=JobState.FAILED, failure=FailureClass.BAD_INPUT, message="x")),
        seen(results=results(run, "base")),
    ):
        status = decide(run, observed, after(1)).status
        assert RunStatus.model_validate(status.document()) == status
    assert digests(run)
