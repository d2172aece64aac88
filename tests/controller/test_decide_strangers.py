"""What decide() does about objects that are not the run's: passed by if only the name is theirs, waited for if they may write."""

from datetime import timedelta

from builders import START, after, job, make_run, results, seen, sft, started, stopped, with_status

from controller.api import meta
from controller.api.status import AttemptState, PhaseState, RunStatus
from controller.operator import events
from controller.plan.decide import Decision, decide, rests
from controller.plan.observed import JobState

THEIRS = "PyTorchJob test-base-1 of Deployment web"
EARLIER = "PyTorchJob test-base-1 of AlignmentRun test (uid 7)"


def asked():
    run = make_run(sft("base"))
    return with_status(run, decide(run, seen(), START))


def told(before, decision: Decision):
    return [(e.type, e.reason, e.note) for e in events.transitions(before.status or RunStatus(), decision.status)]


class TestANameThatIsTaken:
    def test_is_passed_by_and_told(self):
        run = asked()
        passed = decide(run, seen(taken={("base", 1): THEIRS}), after(1))
        assert (started(passed), stopped(passed)) == (["base-2"], [])
        first, second = passed.status.phases[0].attempts
        assert (first.state, first.taken_by, first.failure) == (AttemptState.STOPPED, THEIRS, None)
        assert second.state == AttemptState.ASKED
        said = (
            f"phase base, attempt 1: its job's name is taken by {THEIRS}, which is left alone; "
            "the next attempt has another name"
        )
        assert ("Warning", "JobNameTaken", said) in told(run, passed)

    def test_stays_told_while_the_next_attempt_runs_and_after_the_end(self):
        run = asked()
        run = with_status(run, decide(run, seen(taken={("base", 1): THEIRS}), after(1)))
        running = decide(run, seen(job(run, "base", 2)), after(2))
        assert [a.taken_by for a in running.status.phases[0].attempts] == [THEIRS, ""]
        assert "JobNameTaken" not in [reason for _, reason, _ in told(run, running)]
        run = with_status(run, running)
        done = job(run, "base", 2, JobState.SUCCEEDED)
        ended = decide(run, seen(done, results=results(run, "base")), after(3))
        assert ended.status.is_true(meta.SUCCEEDED)
        assert [a.taken_by for a in ended.status.phases[0].attempts] == [THEIRS, ""]
        assert rests(with_status(run, ended))

    def test_uses_up_no_budget_however_many_there_are_and_one_is_remembered(self):
        run = asked()
        for number in range(1, 20):
            run = with_status(run, decide(run, seen(taken={("base", number): THEIRS}), after(number)))
        assert run.status is not None
        assert [(a.number, bool(a.taken_by)) for a in run.status.phases[0].attempts] == [(19, True), (20, False)]
        assert run.status.phases[0].state == PhaseState.RUNNING

    def test_of_an_attempt_that_ran_and_whose_job_is_gone(self):
        run = asked()
        run = with_status(run, decide(run, seen(job(run, "base", name="test-base-1")), after(1)))
        taken = seen(taken={("base", 1): THEIRS})
        deleted = decide(run, taken, after(2))
        assert started(deleted) == [], "somebody has deleted it, too: that backs off"
        assert started(decide(with_status(run, deleted), taken, after(20))) == ["base-2"]

    def test_does_not_touch_an_attempt_that_has_ended(self):
        run = asked()
        failed = job(run, "base", 1, JobState.FAILED, finished_at=after(1))
        run = with_status(run, decide(run, seen(failed), after(1)))
        decision = decide(run, seen(taken={("base", 1): THEIRS}), after(2))
        assert decision.status.phases[0].attempts[0].taken_by == ""


class TestAnEarlierRun:
    def test_is_waited_for_and_told(self):
        run = make_run(sft("base"))
        held = decide(run, seen(held={"base": EARLIER}), START)
        phase = held.status.phases[0]
        assert (started(held), phase.state, phase.held_by, phase.attempts) == ([], PhaseState.READY, EARLIER, ())
        assert phase.message == f"waits for {EARLIER} to end: it may still write to this phase's folder"
        condition = held.status.condition(meta.PROGRESSING)
        assert condition is not None
        assert (condition.status, condition.reason) == ("True", "WaitingForEarlierRun")
        assert condition.message == f"base: {phase.message}"
        assert held.status.phase == "Waiting"
        assert ("Warning", "WaitingForEarlierRun", f"phase base {phase.message}") in told(run, held)
        assert held.requeue_after == timedelta(seconds=15), "nobody need tell of its end"

    def test_when_it_has_gone_the_run_goes_on_by_itself(self):
        run = make_run(sft("base"))
        run = with_status(run, decide(run, seen(held={"base": EARLIER}), START))
        decision = decide(run, seen(), after(15))
        assert started(decision) == ["base-1"]
        assert decision.status.phases[0].held_by == ""

    def test_holds_up_no_other_phase_and_is_no_failure(self):
        run = make_run(sft("base"), sft("other", seed=3))
        decision = decide(run, seen(held={"base": EARLIER}), START)
        assert started(decision) == ["other-1"]
        run = with_status(run, decision)
        failed = decide(run, seen(job(run, "other", 1, JobState.FAILED), held={"base": EARLIER}), after(1))
        assert not failed.status.is_true(meta.FAILED), "base may still run"

    def test_a_job_that_a_stranger_deleted_is_not_made_again_while_its_pods_save(self):
        run = asked()
        run = with_status(run, decide(run, seen(job(run, "base", name="test-base-1")), after(1)))
        held = seen(held={"base": "Pod test-base-1-worker-0 of PyTorchJob test-base-1"})
        run = with_status(run, decide(run, held, after(2)))
        saving = decide(run, held, after(20))
        assert started(saving) == []
        assert saving.status.phases[0].message.startswith("waits for Pod test-base-1-worker-0")
        assert started(decide(with_status(run, saving), seen(), after(21))) == ["base-2"]

    def test_a_job_of_ours_that_runs_is_not_disturbed(self):
        run = asked()
        decision = decide(run, seen(job(run, "base"), held={"base": EARLIER}), after(1))
        assert (stopped(decision), decision.status.phases[0].held_by) == ([], "")
