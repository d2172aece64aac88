"""The planner against a world that does it no favours, and a user who changes their mind.

Writes get lost, views are old, jobs wait in queues, hang, crash, are about to crash, or are deleted by strangers, and a
deletion takes its time. The world is a second, tiny implementation of a cluster; the invariants are checked against it
and against what each status says after the one before.
"""

import json
import os
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import NamedTuple

from builders import START, dpo, make_run, ppo, reward, sft
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseProgress, PhaseState, QueueState, QueueStatus, RunStatus
from controller.operator import events
from controller.plan.attempts import budget
from controller.plan.decide import Apply, Decision, Delete, decide, is_final, is_terminal
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.resolve import resolve
from trainers.contract import FailureClass

FAILURES = [
    FailureClass.INFRASTRUCTURE, FailureClass.OUT_OF_MEMORY, FailureClass.INTERRUPTED, FailureClass.INTERNAL,
    FailureClass.BAD_INPUT,
]  # fmt: skip
CAPACITY = 2
NEEDS = {"base": set(), "dpo": {"base"}, "reward": {"base"}, "ppo": {"base", "reward"}}
RETRIES = {"infrastructure": 2, "interrupted": 2, "outOfMemory": 1, "startupTimeout": 1, "stalled": 1, "internal": 0}
POLICY = {
    "startupTimeoutSeconds": 100,
    "stallTimeoutSeconds": 300,
    "phaseDeadlineSeconds": 9000,
    "runDeadlineSeconds": 30000,
}
Key = tuple[str, int]
FIGURE = 7.0
"""The one metric that every phase leaves."""


class Spec(NamedTuple):
    edited: tuple[str, ...] = ()
    """Phases with other settings than at first."""
    suspended: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    """Phases with a gate that their results miss."""
    lean: bool = False
    """Whether all phases have other micro-batches, which changes no result."""
    suspend: bool = False
    removed: bool = False
    """Whether the last phase is not in it."""
    more: int = 0
    """What the budgets have more."""


@cache
def run_of(spec: Spec) -> AlignmentRun:
    phases = [sft("base"), dpo("dpo", "base"), reward("reward", "base"), ppo("ppo", "base", "reward")]
    for phase in phases:
        name, (kind,) = phase["name"], phase.keys() - {"name"}
        settings = phase[kind]
        settings["seed"] = int(name in spec.edited)
        settings["gates"] = [{"metric": "parameters", "atLeast": FIGURE + (name in spec.strict)}]
        settings["parallel"] = {"microBatchTokens": 64 if spec.lean else 8192}
        phase["suspend"] = name in spec.suspended
    phases = phases[:-1] if spec.removed else phases
    retries = {name: number + spec.more for name, number in RETRIES.items()}
    return make_run(*phases, queueName="gpus", suspend=spec.suspend, failurePolicy={**POLICY, "retries": retries})


@cache
def settings_of(spec: Spec) -> dict[str, str]:
    return {phase.name: phase.settings for phase in resolve(run_of(spec))}


def queued(state: QueueState) -> QueueStatus:
    return QueueStatus(state=state, message=state.lower())


def artifact(job: ObservedJob) -> str:
    return f"{job.phase}-of-{job.digest[:8]}"


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.spec = Spec()
        self.generation = 1
        self.status: RunStatus | None = None
        self.now = START
        self.jobs: dict[Key, ObservedJob] = {}
        self.leaving: set[Key] = set()
        """Jobs that are being deleted."""
        self.wordless: set[Key] = set()
        """Jobs that succeeded, and whose word was lost."""
        self.progress: dict[str, PhaseProgress] = {}
        self.artifacts: set[str] = set()
        self.asked: set[Key] = set()
        self.failed: dict[str, Counter[FailureClass]] = {name: Counter() for name in NEEDS}
        """Failures of each phase with its present digest."""
        self.over: set[Key] = set()
        """Attempts that the status has forgotten."""
        self.old: Observed | None = None
        self.problems: tuple[str, ...] = ()

    @property
    def run(self) -> AlignmentRun:
        run = run_of(self.spec)
        metadata = run.metadata.model_copy(update={"generation": self.generation})
        return run.model_copy(update={"status": self.status, "metadata": metadata})

    def look(self) -> Observed:
        done = [job for job in self.jobs.values() if job.state == JobState.SUCCEEDED]
        words = [job for job in done if (job.phase, job.attempt) not in self.wordless]
        return Observed(
            jobs=tuple(self.jobs.values()),
            results={job.phase: ObservedResult(job.digest, artifact(job), {"parameters": FIGURE}) for job in words},
            progress=dict(self.progress),
            capacity=CAPACITY,
            problems=self.problems,
        )

    def live(self) -> list[ObservedJob]:
        return [job for job in self.jobs.values() if job.state == JobState.LIVE]

    def running(self) -> list[ObservedJob]:
        return [job for job in self.live() if job.running_since is not None]

    # -- the controller

    def step(self, observed: Observed, writes: int = 99, lose_status: bool = False) -> Decision:
        run, before = self.run, self.status or RunStatus()
        decision = decide(run, observed, self.now)
        self.check_stops(before, decision, observed)
        assert decision == decide(run, observed, self.now), "the same arguments give the same answer"
        self.check_status(before, decision.status)
        self.check_fixed_point(run, decision, observed)
        if lose_status:
            return decision
        self.remember(before, decision.status)
        self.status, self.old = decision.status, None
        # As in reconcile(): the status is saved before anything is done, and then the process may end at any time.
        for action in decision.actions[:writes]:
            self.act(action)
        return decision

    def check_stops(self, before: RunStatus, decision: Decision, observed: Observed) -> None:
        """That a backend cannot do the run now is no reason to end what runs."""
        if not observed.problems or self.spec.suspend or is_final(before, self.generation):
            return
        attempts = {(phase.name, a.number): a.state for phase in before.phases for a in phase.attempts}
        for action in decision.actions:
            assert isinstance(action, Delete), "nothing starts"
            state = attempts[action.phase, action.attempt]
            assert state == AttemptState.STOPPING or state.ended, "asked to stop before"

    def check_fixed_point(self, run: AlignmentRun, decision: Decision, observed: Observed) -> None:
        """An attempt that nobody sees stops, has stopped, and has a successor, a look each; then it is quiet."""
        status = decision.status
        for _ in range(4):
            before, status = status, decide(run.model_copy(update={"status": status}), observed, self.now).status
        assert status == before, "feeding the status back comes to rest"

    def check_status(self, before: RunStatus, after: RunStatus) -> None:
        text = json.dumps(after.document(), allow_nan=False)
        assert RunStatus.model_validate_json(text) == after, "else every look would write"
        told = list(events.transitions(before, after))
        assert not list(events.transitions(after, after))
        for name, old, new in changes(before, after):
            assert_may_follow(old, new)
            if new.state == AttemptState.FAILED and (old is None or old.state != AttemptState.FAILED):
                label = f"phase {name}, attempt {new.number} failed"
                assert any(label in e.note or e.note.startswith(f"phase {name} failed") for e in told), "it is told"

    def remember(self, before: RunStatus, after: RunStatus) -> None:
        for phase in after.phases:
            old = before.phase_status(phase.name)
            if old is not None and old.digest != phase.digest:
                self.failed[phase.name].clear()
            known = {a.number for a in old.attempts} if old else set()
            self.over |= {(phase.name, number) for number in known - {a.number for a in phase.attempts}}
        for name, old, new in changes(before, after):
            assert (name, new.number) not in self.over, "what is over does not come back"
            failed = new.state == AttemptState.FAILED and (old is None or old.state != AttemptState.FAILED)
            asked_for = new.digest == after.phase_status(name).digest and new.settings == self.settings(name)
            if failed and new.failure and asked_for:
                self.failed[name][new.failure] += 1

    def act(self, action: Apply | Delete) -> None:
        if isinstance(action, Apply):
            self.apply(action.job)
        elif (action.phase, action.attempt) in self.jobs:
            self.leaving.add((action.phase, action.attempt))

    def apply(self, job: PhaseJob) -> None:
        key = (job.phase, job.attempt)
        if key in self.jobs:
            return
        assert set(job.inputs) == NEEDS[job.phase]
        assert set(job.inputs.values()) <= self.artifacts, "a phase starts only after its inputs"
        assert job.phase not in {other.phase for other in self.live()}, "two attempts never write to one directory"
        if key not in self.asked:
            for failure, count in self.failed[job.phase].items():
                assert count <= budget(self.run.spec.failure_policy.retries, failure), "within the budget of each class"
        self.asked.add(key)
        waits = queued(QueueState.PENDING)
        self.jobs[key] = ObservedJob(job.phase, job.attempt, job.digest, JobState.LIVE, name=job.name, queue=waits)

    @rule(writes=st.sampled_from([0, 1, 99, 99, 99]), lose_status=st.sampled_from([False, False, True]))
    def reconcile(self, writes: int, lose_status: bool) -> None:
        self.step(self.look(), writes, lose_status)

    @rule()
    def look_now(self) -> None:
        """What is seen is acted on later. Never across a write of our own or an edit: views come from the API server, after
        the run was read, and a run that was written since refuses the status."""
        self.old = self.look()

    @precondition(lambda self: self.old is not None)
    @rule()
    def act_on_what_was_seen(self) -> None:
        assert self.old is not None
        self.step(self.old)

    # -- the user

    def settings(self, name: str) -> str:
        return settings_of(self.spec).get(name, "not in the spec")

    def edit(self, **changes: object) -> None:
        before = {name: self.settings(name) for name in NEEDS}
        self.spec, self.generation, self.old = self.spec._replace(**changes), self.generation + 1, None
        for name, settings_before in before.items():
            if self.settings(name) != settings_before:
                self.failed[name] = Counter(self.counted(name))

    def counted(self, name: str) -> list[FailureClass]:
        """Failures with the settings of now: an edit that is undone before anybody has looked has them again."""
        phase = self.status.phase_status(name) if self.status else None
        attempts = phase.attempts if phase else ()
        same = [a for a in attempts if a.settings == self.settings(name) and phase and a.digest == phase.digest]
        failed = [a for a in same if a.state == AttemptState.FAILED and not a.forgiven]
        return [a.failure for a in failed if a.failure for _ in range(a.times)]

    @rule(name=st.sampled_from(["base", "dpo", "ppo"]))
    def the_user_edits_a_phase(self, name: str) -> None:
        self.edit(edited=toggled(self.spec.edited, name))

    @rule(name=st.sampled_from(sorted(NEEDS)))
    def the_user_suspends_or_resumes_a_phase(self, name: str) -> None:
        self.edit(suspended=toggled(self.spec.suspended, name))

    @rule()
    def the_user_suspends_or_resumes_the_run(self) -> None:
        self.edit(suspend=not self.spec.suspend)

    @rule(name=st.sampled_from(sorted(NEEDS)))
    def the_user_asks_more_or_less_of_a_phase(self, name: str) -> None:
        self.edit(strict=toggled(self.spec.strict, name))

    @rule()
    def the_user_changes_what_changes_no_result(self) -> None:
        self.edit(lean=not self.spec.lean)

    @rule()
    def the_user_removes_the_last_phase_or_puts_it_back(self) -> None:
        self.edit(removed=not self.spec.removed)

    @precondition(lambda self: self.spec.more < 2)
    @rule()
    def the_user_raises_the_budgets(self) -> None:
        self.edit(more=self.spec.more + 1)

    @rule()
    def the_backend_cannot_do_it_or_can_again(self) -> None:
        self.problems = () if self.problems else ("spec.workspace: is not set",)
        self.old = None

    # -- the world

    def put(self, job: ObservedJob, **changes: object) -> None:
        self.jobs[job.phase, job.attempt] = replace(job, **changes)
        if changes.get("state") or changes.get("running_since", 1) is None:
            self.progress.pop(job.phase, None)

    def admit(self, job: ObservedJob) -> None:
        self.put(job, queue=queued(QueueState.ADMITTED), may_start_since=self.now)

    def begin(self, job: ObservedJob) -> None:
        self.put(job, running_since=self.now, started_at=job.started_at or self.now)

    def end(self, job: ObservedJob, state: JobState, failure: FailureClass | None = None) -> None:
        self.put(job, state=state, failure=failure, finished_at=self.now, may_start_since=None, running_since=None)
        if state == JobState.SUCCEEDED:
            self.artifacts.add(artifact(job))

    def vanish(self, key: Key) -> None:
        self.progress.pop(key[0], None)
        self.leaving.discard(key)
        self.wordless.discard(key)
        del self.jobs[key]

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def a_job_goes_on(self, data: st.DataObject) -> None:
        """Through its queue, to running, to a report."""
        job = data.draw(st.sampled_from(self.live()))
        if job.may_start_since is None and job.failure is None:
            self.admit(job)
        elif job.running_since is None:
            self.begin(replace(job, failure=None, may_start_since=job.may_start_since or self.now))
        else:
            report = PhaseProgress(step=3, total_steps=9, loss=float("nan"), updated_at=self.now)
            self.progress[job.phase] = report

    @precondition(lambda self: self.live())
    @rule(data=st.data(), word=st.sampled_from([True, True, False]))
    def a_job_succeeds(self, data: st.DataObject, word: bool) -> None:
        """Also one that is being deleted, or that has looked bad."""
        job = data.draw(st.sampled_from(self.live()))
        self.end(job, JobState.SUCCEEDED)
        if not word:
            self.wordless.add((job.phase, job.attempt))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def a_job_fails(self, data: st.DataObject, failure: FailureClass) -> None:
        self.end(data.draw(st.sampled_from(self.live())), JobState.FAILED, failure)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def a_job_is_about_to_fail(self, data: st.DataObject, failure: FailureClass) -> None:
        job = data.draw(st.sampled_from(self.live()))
        self.put(job, failure=failure, message="m" * 2000, may_start_since=None, running_since=None)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def the_reason_disappears(self, data: st.DataObject) -> None:
        """The pods are gone, the job has not ended yet."""
        job = data.draw(st.sampled_from(self.live()))
        self.put(job, failure=None, message="", may_start_since=self.now if job.queue else None, running_since=None)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def a_job_is_preempted_in_place(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.live()))
        waits = queued(QueueState.PREEMPTED)
        self.put(job, queue=waits, failure=None, message="", may_start_since=None, running_since=None)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_stranger_deletes_a_job(self, data: st.DataObject) -> None:
        self.leaving.add(data.draw(st.sampled_from(sorted(self.jobs))))

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def a_deletion_is_done(self, data: st.DataObject) -> None:
        self.vanish(data.draw(st.sampled_from(sorted(self.leaving))))

    @rule(seconds=st.sampled_from([1, 15, 60, 150, 400, 2000]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # -- what must always hold

    @invariant()
    def within_capacity(self) -> None:
        assert len(self.live()) <= CAPACITY

    @invariant()
    def an_end_stays_until_an_edit(self) -> None:
        if self.status is not None and is_final(self.status, self.generation):
            assert decide(self.run, self.look(), self.now).status == self.status

    def teardown(self) -> None:
        """With nobody but the planner left to act, events and its own clock bring the run to an end."""
        self.problems = ()
        self.edit(suspended=(), suspend=False)
        for _ in range(400):
            decision = self.step(self.look())
            if is_terminal(decision.status):
                assert not (self.spec.removed and [job for job in self.live() if job.phase == "ppo"]), (
                    "it has been stopped"
                )
                succeeded = [p.state == PhaseState.SUCCEEDED for p in decision.status.phases]
                assert not {p.name for p in decision.status.phases if p.state == PhaseState.SUCCEEDED} & {
                    *self.spec.strict
                }
                assert all(succeeded) == (decision.status.phase == "Succeeded")
                return
            if not self.something_happens():
                assert decision.requeue_after is not None, f"nothing will ever happen: {decision.status}"
                assert decision.requeue_after > timedelta()
                self.now += decision.requeue_after
        raise AssertionError(f"did not end: {self.status}")

    def something_happens(self) -> bool:
        """One event. Some jobs do nothing more: they never begin, hang at work, or are about to fail and never do."""
        for key in sorted(self.leaving):
            self.vanish(key)
            return True
        for key, job in self.jobs.items():
            fate = (len(job.phase) + job.attempt) % 4
            if job.state != JobState.LIVE or job.failure is not None:
                continue
            if job.may_start_since is None:
                self.admit(job)
                return True
            if job.running_since is None and fate != 1:
                self.begin(job)
                return True
            if job.running_since is not None and job.phase not in self.progress:
                self.progress[job.phase] = PhaseProgress(step=1, total_steps=2, updated_at=self.now)
                return True
            if job.running_since is not None and fate in (0, 3):
                self.end(job, JobState.SUCCEEDED)
                self.wordless.discard(key)
                return True
        return False


def toggled(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(sorted({*names} ^ {name}))


def changes(before: RunStatus, after: RunStatus) -> list[tuple[str, Attempt | None, Attempt]]:
    """Phase, and one of its attempts as it was and as it is."""
    found = []
    for phase in after.phases:
        old = before.phase_status(phase.name)
        known = {a.number: a for a in old.attempts} if old else {}
        found += [(phase.name, known.get(a.number), a) for a in phase.attempts]
        numbers = [a.number for a in phase.attempts]
        assert numbers == sorted(set(numbers))
    return found


def assert_may_follow(old: Attempt | None, new: Attempt) -> None:
    """What an attempt can become. A stop of ours is no failure; one for a reason of the attempt's own is."""
    state = AttemptState
    if old is None or old.state in (state.ASKED, state.RUNNING):
        return
    if old.state == state.STOPPING:
        end = state.STOPPED if old.failure is None else state.FAILED
        assert new.state in (state.STOPPING, end, state.SUCCEEDED), "an attempt that we stop ends for one reason"
        assert new.state == state.SUCCEEDED or new.failure == old.failure
    elif old.state == state.SUCCEEDED:
        assert new.state in (state.SUCCEEDED, state.FAILED)
    else:
        # It may be forgiven, and stand for older ones that ended alike.
        end_of = [(a.digest, a.state, a.failure, a.started_at, a.finished_at, a.job) for a in (old, new)]
        assert end_of[0] == end_of[1], "an end stays"


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=300 if os.environ.get("SOAK") else 30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
