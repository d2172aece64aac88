"""The planner against a world like a cluster: queues, pods that never start, slow deletions, strangers, edits at any time.

Beside ``test_decide_machine``, whose world is one machine. What must hold is checked against the world, not the status.
"""

import os
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from builders import START, diamond
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.api import meta
from controller.api.status import AttemptState, QueueState, QueueStatus, RunStatus
from controller.plan.attempts import budget
from controller.plan.decide import Apply, Decision, Delete, decide
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from trainers.contract import FailureClass

POLICY = {
    "backoff": {"initialSeconds": 1, "maxSeconds": 4},
    "startupTimeoutSeconds": 100,
    "retries": {"infrastructure": 2, "interrupted": 2, "outOfMemory": 1, "startupTimeout": 1},
}
TIMED_OUT = {FailureClass.STARTUP_TIMEOUT, FailureClass.STALLED}
FAILURES = [FailureClass.INFRASTRUCTURE, FailureClass.OUT_OF_MEMORY, FailureClass.INTERRUPTED, FailureClass.BAD_INPUT]


@dataclass(frozen=True)
class Job:
    digest: str
    created: datetime
    admitted: bool = False
    running_since: datetime | None = None
    doomed: FailureClass | None = None
    deleting: bool = False
    ended: FailureClass | str | None = None
    """A failure, `silent` for one whose reason was lost, or `good`."""


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        run = diamond(failurePolicy=POLICY, queueName="gpus")
        self.run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"generation": 1})})
        self.now = START
        self.jobs: dict[tuple[str, int], Job] = {}
        self.results: dict[str, ObservedResult] = {}
        self.taken: dict[tuple[str, int], str] = {}
        self.held: dict[str, str] = {}
        self.backups: list[RunStatus] = []

    # -- the world, seen

    def look(self) -> Observed:
        jobs = tuple(self.observed(key, job) for key, job in self.jobs.items())
        return Observed(jobs=jobs, results=dict(self.results), taken=dict(self.taken), held=dict(self.held))

    def observed(self, key: tuple[str, int], job: Job) -> ObservedJob:
        base = ObservedJob(key[0], key[1], job.digest, JobState.LIVE, name=f"{key[0]}-{key[1]}")
        if job.ended is not None and not job.deleting:
            good = job.ended == "good"
            failure = None if good or job.ended == "silent" else FailureClass(job.ended)
            return replace(
                base, state=JobState.SUCCEEDED if good else JobState.FAILED, failure=failure, finished_at=self.now
            )
        if not job.admitted:
            return replace(base, queue=QueueStatus(state=QueueState.PENDING))
        queue = QueueStatus(state=QueueState.ADMITTED)
        since = None if job.running_since else job.created
        return replace(base, queue=queue, failure=job.doomed, running_since=job.running_since, may_start_since=since)

    def alive(self) -> list[tuple[str, int]]:
        return [key for key, job in self.jobs.items() if job.ended is None or job.deleting]

    def change(self, key: tuple[str, int], **what: object) -> None:
        self.jobs[key] = replace(self.jobs[key], **what)

    # -- the controller

    def step(self, observed: Observed, lose_writes: bool = False, lose_status: bool = False) -> Decision:
        decision = decide(self.run, observed, self.now)
        assert decision == decide(self.run, observed, self.now)
        assert RunStatus.model_validate(decision.status.document()) == decision.status
        if not lose_status:
            self.backups.append(decision.status)
            self.run = self.run.model_copy(update={"status": decision.status})
            if not lose_writes:
                self.act(decision)
        return decision

    def act(self, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, Apply):
                self.apply(action.job)
            elif isinstance(action, Delete):
                self.delete((action.phase, action.attempt))

    def apply(self, job: PhaseJob) -> None:
        key = (job.phase, job.attempt)
        assert job.phase not in self.held, "an earlier run still writes there"
        if key in self.jobs or key in self.taken:
            return  # a conflict: it exists
        assert job.phase not in {phase for phase, _ in self.alive()}, "two attempts never write to one directory"
        self.jobs[key] = Job(job.digest, self.now)

    def delete(self, key: tuple[str, int]) -> None:
        """In the foreground: the job is there until its pods have ended."""
        job = self.jobs.get(key)
        if job is not None and job.ended is None and not job.deleting:
            self.change(key, deleting=True)

    @rule(lose_writes=st.booleans(), lose_status=st.booleans())
    def reconcile(self, lose_writes: bool, lose_status: bool) -> None:
        self.step(self.look(), lose_writes, lose_status)

    # -- what happens to jobs

    def some(self, data: st.DataObject, **having: bool) -> tuple[str, int] | None:
        found = [k for k in self.alive() if all(bool(getattr(self.jobs[k], n)) == v for n, v in having.items())]
        return data.draw(st.sampled_from(sorted(found))) if found else None

    @rule(data=st.data())
    def a_job_is_admitted(self, data: st.DataObject) -> None:
        if key := self.some(data, admitted=False, deleting=False):
            self.change(key, admitted=True, created=self.now)

    @rule(data=st.data())
    def a_job_is_preempted(self, data: st.DataObject) -> None:
        if key := self.some(data, admitted=True, deleting=False):
            self.change(key, admitted=False, running_since=None, doomed=None)

    @rule(data=st.data())
    def pods_run(self, data: st.DataObject) -> None:
        if key := self.some(data, admitted=True, running_since=False, deleting=False):
            self.change(key, running_since=self.now)

    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def a_pod_fails(self, data: st.DataObject, failure: FailureClass) -> None:
        if key := self.some(data, admitted=True, deleting=False):
            self.change(key, doomed=failure)

    @rule(data=st.data(), silent=st.booleans())
    def a_job_whose_pod_failed_fails(self, data: st.DataObject, silent: bool) -> None:
        if key := self.some(data, deleting=False):
            doomed = self.jobs[key].doomed
            if doomed is not None:
                self.change(key, ended="silent" if silent else doomed)

    @rule(data=st.data())
    def a_job_succeeds(self, data: st.DataObject) -> None:
        if key := self.some(data, running_since=True, deleting=False):
            self.finish(key)

    def finish(self, key: tuple[str, int]) -> None:
        digest = self.jobs[key].digest
        self.results[key[0]] = ObservedResult(digest, f"artifact-{digest[:8]}")
        self.change(key, ended="good", doomed=None)

    @rule(data=st.data())
    def a_stranger_deletes_a_job(self, data: st.DataObject) -> None:
        if self.jobs:
            del self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]

    @rule(phase=st.sampled_from(["base", "dpo"]), number=st.integers(1, 4))
    def a_stranger_takes_a_name(self, phase: str, number: int) -> None:
        if (phase, number) not in self.jobs:
            self.taken[phase, number] = "PyTorchJob x of nobody"

    @rule()
    def strangers_go(self) -> None:
        self.taken.clear()

    @rule(phase=st.sampled_from(["base", "ppo"]))
    def an_earlier_run_writes_or_ends(self, phase: str) -> None:
        if self.held.pop(phase, None) is None:
            self.held[phase] = "PyTorchJob y of AlignmentRun test"

    @rule(data=st.data())
    def a_deleted_jobs_pods_have_ended(self, data: st.DataObject) -> None:
        if key := self.some(data, deleting=True):
            del self.jobs[key]

    @rule(seconds=st.integers(1, 200))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # -- what users do

    def edit(self, **spec: object) -> None:
        metadata = self.run.metadata.model_copy(update={"generation": (self.run.metadata.generation or 0) + 1})
        self.run = self.run.model_copy(update={"metadata": metadata, "spec": self.run.spec.model_copy(update=spec)})

    @rule(seed=st.integers(0, 2))
    def a_user_edits_settings(self, seed: int) -> None:
        self.edit(seed=seed)

    @rule()
    def a_user_suspends_or_resumes(self) -> None:
        self.edit(suspend=not self.run.spec.suspend)

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def a_status_is_restored_from_a_backup(self, data: st.DataObject) -> None:
        """While jobs run on: none is started beside another, and numbers that are taken stay so."""
        age = data.draw(st.integers(1, len(self.backups)))
        self.run = self.run.model_copy(update={"status": self.backups[-age]})

    # -- what must always hold

    @invariant()
    def budgets_are_kept(self) -> None:
        for phase in self.run.status.phases if self.run.status else ():
            failed = [a for a in phase.attempts if a.state == AttemptState.FAILED and a.digest == phase.digest]
            for failure in FailureClass:
                count = sum(a.failure == failure for a in failed)
                assert count <= budget(self.run.spec.failure_policy.retries, failure) + 1, (phase.name, failure)

    @invariant()
    def what_we_ended_ourselves_is_no_failure(self) -> None:
        for phase in self.run.status.phases if self.run.status else ():
            for attempt in phase.attempts:
                if attempt.state == AttemptState.STOPPED:
                    assert attempt.failure is None or attempt.failure not in TIMED_OUT

    @invariant()
    def an_end_stays_until_an_edit(self) -> None:
        status = self.run.status or RunStatus()
        ended = status.is_true(meta.SUCCEEDED) or status.is_true(meta.FAILED)
        if ended and status.observed_generation == self.run.metadata.generation:
            decision = decide(self.run, self.look(), self.now)
            assert (decision.status, decision.actions) == (status, ())

    @precondition(lambda self: self.run.status is not None)
    @invariant()
    def numbers_of_attempts_are_used_once(self) -> None:
        for phase in self.run.status.phases:  # type: ignore[union-attr]
            numbers = [a.number for a in phase.attempts]
            assert numbers == sorted(set(numbers))

    def teardown(self) -> None:
        """In a world where everything works, woken by events and by the times it asks for alone, the run ends."""
        self.held.clear()
        if self.run.spec.suspend:
            self.edit(suspend=False)
        for _ in range(80):
            before = (self.run.status, dict(self.jobs))
            decision = self.step(self.look())
            if decision.status.is_true(meta.SUCCEEDED) or decision.status.is_true(meta.FAILED):
                return
            for key in self.alive():
                if self.jobs[key].deleting:
                    del self.jobs[key]
                elif self.jobs[key].doomed:
                    self.change(key, ended=self.jobs[key].doomed)
                elif not self.jobs[key].running_since:
                    self.change(key, admitted=True, running_since=self.now)
                else:
                    self.finish(key)
            if (self.run.status, self.jobs) == before:
                assert decision.requeue_after is not None, (
                    f"only time can help, and nobody looks again: {decision.status}"
                )
                self.now += decision.requeue_after
        raise AssertionError(f"did not end: {self.run.status}")


TestClusterWorld = World.TestCase
EXAMPLES = 300 if os.environ.get("SOAK") else 30
TestClusterWorld.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
