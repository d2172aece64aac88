"""Trying again without an edit: what an annotation's number asks for, once, whatever comes twice, late or in between."""

from datetime import timedelta
from typing import Any

import pytest
from builders import START, after, artifact, diamond, job, results, seen, started, stopped, with_status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stories import BAD, INTERRUPTED, attempt, condition, one, phase, runs

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseState, RetryStatus, RunStatus
from controller.operator import events
from controller.plan import again
from controller.plan.again import chosen, is_news
from controller.plan.bounded import LIMIT, bounded
from controller.plan.decide import Apply, Decision, Delete, decide, rests
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from trainers.contract import FailureClass

OOM = FailureClass.OUT_OF_MEMORY


def asking(run: AlignmentRun, text: str | None, status: RunStatus | None = None) -> AlignmentRun:
    annotations = {} if text is None else {meta.ANNOTATION_RETRY: text}
    metadata = run.metadata.model_copy(update={"annotations": annotations})
    return run.model_copy(update={"metadata": metadata, "status": status or run.status})


def ended(run: AlignmentRun, failure: FailureClass = BAD, number: int = 1, at: float = 0) -> AlignmentRun:
    """The attempt runs and fails, and both are seen."""
    first = decide(run, seen(runs(run, at, attempt=number)), after(at))
    gone = runs(
        run, at, attempt=number, state=JobState.FAILED, failure=failure, finished_at=after(at + 1), message="no"
    )
    return with_status(run, decide(with_status(run, first), seen(gone), after(at + 1)))


def state(decision: Decision) -> dict[str, str]:
    return {p.name: str(p.state) for p in decision.status.phases}


class TestRetry:
    def test_what_failed_for_good_tries_again_at_once(self) -> None:
        run = ended(one())
        assert run.status is not None
        assert run.status.is_true(meta.FAILED)
        assert rests(run)
        asked = asking(run, "1")
        assert not rests(asked)
        decision = decide(asked, seen(), after(9))
        assert started(decision) == ["base-2"]
        assert condition(decision, meta.FAILED) == "False/NotFinished"
        assert decision.status.retry is not None
        assert decision.status.retry.number == 1
        assert decision.status.started_at == after(9), "the run has its time anew"
        assert decision.status.finished_at is None
        assert [e.reason for e in events.transitions(run.status, decision.status)] == ["RetryAsked", "AttemptStarted"]

    def test_once(self) -> None:
        run = asking(ended(one()), "1")
        run = with_status(run, decide(run, seen(), after(9)))
        run = ended(run, number=2, at=20)
        assert run.status is not None
        assert run.status.is_true(meta.FAILED)
        assert rests(run)
        assert decide(run, seen(), after(99)).status == run.status
        assert started(decide(run, seen(), after(99))) == []
        assert started(decide(asking(run, "2"), seen(), after(99))) == ["base-3"]

    def test_budgets_are_anew_and_memory_stays_halved(self) -> None:
        run = one(failurePolicy={"retries": {"outOfMemory": 1}, "backoff": {"initialSeconds": 0}})
        for number in (1, 2):
            run = ended(run, OOM, number, at=number * 10)
        assert run.status is not None
        assert run.status.is_true(meta.FAILED)
        run = asking(run, "1")
        decision = decide(run, seen(), after(99))
        assert (started(decision), attempt(decision, 3).halvings) == (["base-3"], 2)
        run = ended(with_status(run, decision), OOM, 3, at=100)
        assert run.status is not None
        assert not run.status.is_true(meta.FAILED), "one more is in the budget"
        run = ended(run, OOM, 4, at=200)
        assert run.status is not None
        assert run.status.is_true(meta.FAILED)

    def test_a_wait_ends_at_once(self) -> None:
        run = ended(one(failurePolicy={"backoff": {"initialSeconds": 500, "maxSeconds": 500}}), INTERRUPTED)
        assert started(decide(run, seen(), after(9))) == []
        assert started(decide(asking(run, "1"), seen(), after(9))) == ["base-2"]

    def test_what_runs_and_what_has_finished_is_left_alone(self) -> None:
        run = diamond()
        view = seen(job(run, "dpo"), results=results(run, "base"))
        run = with_status(run, decide(run, view, START))
        decision = decide(asking(run, "1"), view, after(5))
        assert stopped(decision) == []
        assert state(decision) == state(decide(run, view, after(5)))

    def test_one_that_took_too_long_has_its_time_anew(self) -> None:
        run = one(failurePolicy={"phaseDeadlineSeconds": 50})
        run = with_status(run, decide(run, seen(runs(run)), after(0)))
        run = with_status(run, decide(run, seen(runs(run)), after(60)))
        run = with_status(run, decide(run, seen(runs(run, state=JobState.FAILED, failure=INTERRUPTED)), after(70)))
        assert run.status is not None
        assert run.status.is_true(meta.FAILED)
        assert started(decide(asking(run, "1"), seen(), after(80))) == ["base-2"]

    def test_of_a_suspended_run_waits_for_it_to_go_on(self) -> None:
        run = asking(ended(one()), "1")
        held = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
        decision = decide(held, seen(), after(9))
        assert (phase(decision).state, started(decision)) == (PhaseState.SUSPENDED, [])
        assert started(decide(with_status(run, decision), seen(), after(10))) == ["base-2"]

    def test_a_missed_gate_is_no_failure_of_an_attempt(self) -> None:
        """Its work is done: nothing is gained by reading the same result again."""
        run = one()
        status = decide(run, seen(), START).status
        missed = status.phases[0].model_copy(update={"state": PhaseState.FAILED, "failure": FailureClass.GATE_FAILED})
        run = with_status(run, Decision(bounded(status.model_copy(update={"phases": (missed,)}), run)))
        asked = asking(run, "1")
        assert decide(asked, seen(), after(1)).status.phases[0].attempts == missed.attempts

    def test_a_run_that_is_refused_keeps_the_request(self) -> None:
        run = asking(ended(one()), "1")
        refused = decide(run, seen(problems=("spec.workspace: is not set",)), after(9))
        assert refused.status.retry is None
        assert started(decide(with_status(run, refused), seen(), after(10))) == ["base-2"]


class TestAnew:
    def finished(self) -> tuple[AlignmentRun, Observed]:
        run = diamond()
        view = seen(results=results(run, "base", "dpo", "reward", "ppo"))
        return with_status(run, decide(run, view, START)), view

    def test_the_phase_and_what_builds_on_it(self) -> None:
        run, view = self.finished()
        assert run.status is not None
        assert run.status.is_true(meta.SUCCEEDED)
        decision = decide(asking(run, "7 reward"), view, after(9))
        assert state(decision) == {"base": "Succeeded", "dpo": "Succeeded", "reward": "Running", "ppo": "Waiting"}
        assert started(decision) == ["reward-1"]
        (action,) = decision.actions
        assert isinstance(action, Apply)
        before = run.status.phase_status("reward")
        assert before is not None
        assert action.job.digest != before.digest, "nothing that was computed before has this identity"
        told = [e.note for e in events.transitions(run.status, decision.status) if e.reason == "PhaseChanged"]
        assert told == [f"phase {name}: it was asked to, so it runs again" for name in ("reward", "ppo")]

    def test_the_same_artifact_does_not_bring_old_results_of_dependents_back(self) -> None:
        run, view = self.finished()
        first = decide(asking(run, "7 reward"), view, after(9))
        anew = first.status.phase_status("reward")
        assert anew is not None
        assert anew.digest is not None
        left = {**view.results, "reward": ObservedResult(anew.digest, artifact("reward"))}
        decision = decide(asking(with_status(run, first), "7 reward"), seen(results=left), after(10))
        assert started(decision) == ["ppo-1"]

    def test_everything(self) -> None:
        run, view = self.finished()
        decision = decide(asking(run, "7 *"), view, after(9))
        assert state(decision) == {"base": "Running", "dpo": "Waiting", "reward": "Waiting", "ppo": "Waiting"}
        assert {p.again for p in decision.status.phases} == {7}

    def test_what_runs_saves_its_work_and_begins_anew(self) -> None:
        run = diamond()
        view = seen(job(run, "dpo", name="j"), results=results(run, "base"))
        run = with_status(run, decide(run, view, START))
        asked = asking(run, "1 dpo")
        first = decide(asked, view, after(1))
        assert (stopped(first), started(first)) == (["dpo-1"], ["reward-1"])
        second = decide(with_status(asked, first), seen(job(run, "reward"), results=results(run, "base")), after(2))
        assert started(second) == ["dpo-2"]

    def test_its_identity_is_the_same_wherever_the_same_is_asked_for(self) -> None:
        """A status that is lost, or comes from a backup, finds what the request has had computed."""
        run, view = self.finished()
        first = decide(asking(run, "7 base"), view, after(9))
        again = decide(asking(run, "7 base", RunStatus()), seen(), after(99))
        assert phase(first).digest == phase(again).digest
        assert phase(decide(asking(run, "8 base"), view, after(9))).digest != phase(first).digest

    def test_a_suspended_run_runs_it_when_it_goes_on(self) -> None:
        run, view = self.finished()
        held = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
        decision = decide(asking(held, "1 ppo"), view, after(9))
        assert (state(decision)["ppo"], started(decision)) == ("Suspended", [])
        assert started(decide(with_status(run, decision), view, after(10))) == ["ppo-1"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", '"" is not a number from 1 up to 15 digits'),
        ("abc", '"abc" is not a number from 1 up'),
        ("0", '"0" is not'),
        ("-1", '"-1" is not'),
        ("1.5 base", '"1.5 base" is not'),
        ("9" * 16, "is not a number"),
        ("9" * 5000, "is not a number"),
        ("²", "is not a number"),
        ("3 nobody", '"nobody" is not a phase of this run; phases are: base'),
        ("3 \x1b[2Jx", '"x" is not a phase'),
        ("3 " + "x" * 200_000, "is not a phase"),
    ],
)
def test_what_cannot_be_meant_is_told_once_and_changes_nothing(text: str, why: str) -> None:
    run = ended(one())
    asked = asking(run, text)
    assert run.status is not None
    decision = decide(asked, seen(), after(9))
    assert decision.status.retry is not None
    assert why in decision.status.retry.refused
    assert decision.status == run.status.model_copy(update={"retry": decision.status.retry})
    assert RunStatus.model_validate(decision.status.document()) == decision.status
    assert [e.reason for e in events.transitions(run.status, decision.status)] == ["RetryRefused"]
    assert rests(with_status(asked, decision))


@pytest.mark.parametrize("seen_before", [0, 7, 10**15 - 1, 10**15, 10**18 - 1])
@pytest.mark.parametrize("text", [None, "", "999999999999999999", "9" * 15, "9" * 19, "6", "7 base", "nonsense"])
def test_the_number_that_the_command_writes_is_always_obeyed(text: str | None, seen_before: int) -> None:
    """Whatever stands there: nobody can leave a number that none follows."""
    status = (ended(one()).status or RunStatus()).model_copy(update={"retry": RetryStatus(number=seen_before)})
    for _ in range(2):  # whether or not the operator has met what stands there
        number = again.following(text, status, 1_800_000_000)
        decision = decide(asking(ended(one()), str(number), status), seen(), after(9))
        assert decision.status.retry == RetryStatus(number=number)
        assert decision.status.phases[0].state != "Failed"
        if text is not None:
            status = decide(asking(ended(one()), text, status), seen(), after(9)).status


# ---------------------------------------------------------------- whatever order, restart or duplicate


class Asking(RuleBasedStateMachine):
    """Users write numbers in any order; looks come at any time, twice, and lose what they would write."""

    BUDGET = 1

    def __init__(self) -> None:
        super().__init__()
        policy = {"retries": {"interrupted": self.BUDGET}, "backoff": {"initialSeconds": 0}}
        run = diamond(failurePolicy=policy)
        self.run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"generation": 1})})
        self.text: str | None = None
        self.now = START
        self.jobs: dict[tuple[str, int], ObservedJob] = {}
        self.results: dict[str, ObservedResult] = {}
        self.obeyed: list[int] = []
        self.anew: dict[str, int] = dict.fromkeys(("base", "dpo", "reward", "ppo"), 0)
        self.digests: dict[str, set[str]] = {name: set() for name in self.anew}

    @property
    def status(self) -> RunStatus:
        return self.run.status or RunStatus()

    @rule(
        number=st.integers(1, 9),
        phases=st.lists(st.sampled_from(["base", "dpo", "reward", "ppo", "*", "no"]), max_size=2),
    )
    def somebody_asks(self, number: int, phases: list[str]) -> None:
        self.text = " ".join([str(number), *phases])

    @rule(text=st.none() | st.text(max_size=9))
    def somebody_writes_anything(self, text: str | None) -> None:
        self.text = text

    @rule(lose=st.sampled_from(["nothing", "nothing", "actions", "status"]))
    def a_look(self, lose: str) -> None:
        self.now += timedelta(seconds=5)
        run, before = asking(self.run, self.text), self.status
        view = Observed(jobs=tuple(self.jobs.values()), results=dict(self.results))
        decision = decide(run, view, self.now)
        assert decision == decide(run, view, self.now), "the same arguments give the same answer"
        if lose == "status":
            return
        self.told(before, decision.status)
        self.run = self.run.model_copy(update={"status": decision.status})
        for action in decision.actions if lose == "nothing" else ():
            self.act(action)

    def told(self, before: RunStatus, after: RunStatus) -> None:
        number = after.retry.number if after.retry else 0
        if before.retry is None or number != before.retry.number:
            self.obeyed += [number] if number else []
            names = (self.text or "").split()[1:] if number else []
            meant = chosen(self.run, names) if names and "no" not in names else frozenset()
            for name in meant:
                self.anew[name] += 1
        for found in after.phases:
            old = before.phase_status(found.name)
            if found.again != (old.again if old else None):
                assert found.again == number, "only a request changes it"
        assert not is_news(self.text, after), "the last word is obeyed, or refused, at the next look"

    def act(self, action: Apply | Delete) -> None:
        if isinstance(action, Delete):
            self.jobs.pop((action.phase, action.attempt), None)
            return
        wanted: PhaseJob = action.job
        live = {j.phase for j in self.jobs.values() if j.state == JobState.LIVE}
        key = (wanted.phase, wanted.attempt)
        if key not in self.jobs:
            assert wanted.phase not in live, "two attempts never write to one directory"
            self.digests[wanted.phase].add(wanted.digest)
            self.jobs[key] = ObservedJob(*key, wanted.digest, JobState.LIVE, running_since=self.now)

    @rule(data=st.data(), good=st.booleans())
    def a_job_ends(self, data: Any, good: bool) -> None:
        live = [job for job in self.jobs.values() if job.state == JobState.LIVE]
        if not live:
            return
        one = data.draw(st.sampled_from(live))
        state = JobState.SUCCEEDED if good else JobState.FAILED
        failure = None if good else INTERRUPTED
        end = ObservedJob(one.phase, one.attempt, one.digest, state, failure=failure, finished_at=self.now)
        self.jobs[one.phase, one.attempt] = end
        if good:
            self.results[one.phase] = ObservedResult(one.digest, artifact(one.phase))

    @invariant()
    def each_number_counts_once_and_none_comes_back(self) -> None:
        assert self.obeyed == sorted(set(self.obeyed))

    @invariant()
    def what_was_asked_for_is_computed_and_nothing_else(self) -> None:
        for name, digests in self.digests.items():
            assert len(digests) <= 1 + self.anew[name], "one identity for each request that meant the phase"

    @invariant()
    def attempts_are_within_the_budget_of_each_request(self) -> None:
        for name in self.anew:
            tries = sum(phase == name for phase, _ in self.jobs)
            assert tries <= (1 + self.BUDGET) * (1 + len(self.obeyed))

    @invariant()
    def the_status_stays_small(self) -> None:
        assert len(self.status.model_dump_json()) < LIMIT

    def teardown(self) -> None:
        """When everything works and somebody who has seen how it stands asks once more, the run succeeds."""
        self.a_look("nothing")
        self.text = f"{(self.obeyed or [0])[-1] + 1}"
        for _ in range(40):
            self.a_look("nothing")
            if self.status.is_true(meta.SUCCEEDED):
                return
            for live in [j for j in self.jobs.values() if j.state == JobState.LIVE]:
                self.jobs[live.phase, live.attempt] = ObservedJob(
                    live.phase, live.attempt, live.digest, JobState.SUCCEEDED, finished_at=self.now
                )
                self.results[live.phase] = ObservedResult(live.digest, artifact(live.phase))
        raise AssertionError(f"did not end: {self.status}")


TestAsking = Asking.TestCase
TestAsking.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
