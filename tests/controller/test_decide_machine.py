"""The planner against a world in which writes get lost, observations repeat or are old, jobs crash, and it forgets.

The world is a second, tiny implementation of what a backend does; the invariants are checked against it.
"""

from datetime import timedelta

from builders import START, artifact, diamond
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.api import meta
from controller.plan.decide import Apply, Decision, Delete, decide
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from trainers.contract import FailureClass

FAILURES = [FailureClass.INFRASTRUCTURE, FailureClass.OUT_OF_MEMORY, FailureClass.INTERRUPTED, FailureClass.BAD_INPUT]
CAPACITY = 2
NEEDS = {"base": set(), "dpo": {"base"}, "reward": {"base"}, "ppo": {"base", "reward"}}


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.run = diamond()
        self.now = START
        self.jobs: dict[tuple[str, int], ObservedJob] = {}
        self.results: dict[str, ObservedResult] = {}
        self.starts: list[tuple[str, int]] = []
        self.old = self.look()
        self.failed_for_good = False

    def look(self) -> Observed:
        return Observed(jobs=tuple(self.jobs.values()), results=dict(self.results), capacity=CAPACITY)

    def live(self) -> list[ObservedJob]:
        return [job for job in self.jobs.values() if job.state == JobState.LIVE]

    # -- the controller

    def step(self, observed: Observed, lose_writes: bool, lose_status: bool) -> Decision:
        decision = decide(self.run, observed, self.now)
        assert decision == decide(self.run, observed, self.now), "the same arguments give the same answer"
        settled = decide(self.run.model_copy(update={"status": decision.status}), observed, self.now)
        again = decide(self.run.model_copy(update={"status": settled.status}), observed, self.now)
        assert settled.status == again.status, "feeding the status back comes to rest"
        if not lose_status:
            self.run = self.run.model_copy(update={"status": decision.status})
            # As in reconcile(): the status is saved before anything is done.
            if not lose_writes:
                self.act(decision)
        return decision

    def act(self, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, Apply):
                self.apply(action.job)
            elif isinstance(action, Delete):
                self.delete(action.phase, action.attempt)

    def apply(self, job: PhaseJob) -> None:
        key = (job.phase, job.attempt)
        if key in self.jobs:
            return
        assert NEEDS[job.phase] <= set(self.results), "a phase starts only after its inputs"
        assert job.phase not in {other.phase for other in self.live()}, "two attempts never write to one directory"
        self.starts.append(key)
        self.jobs[key] = ObservedJob(job.phase, job.attempt, job.digest, JobState.LIVE, started_at=self.now)

    def delete(self, phase: str, attempt: int) -> None:
        job = self.jobs.get((phase, attempt))
        if job is not None and job.state == JobState.LIVE:
            self.end(job, FailureClass.INTERRUPTED)

    def end(self, job: ObservedJob, failure: FailureClass | None) -> None:
        state = JobState.FAILED if failure else JobState.SUCCEEDED
        ended = ObservedJob(job.phase, job.attempt, job.digest, state, failure, "", job.started_at, self.now)
        self.jobs[job.phase, job.attempt] = ended

    @rule(lose_writes=st.booleans(), lose_status=st.booleans())
    def reconcile(self, lose_writes: bool, lose_status: bool) -> None:
        self.step(self.look(), lose_writes, lose_status)

    @rule()
    def reconcile_on_an_old_view(self) -> None:
        """A cache that lags: it decides, and what it asks for must do no harm."""
        self.step(self.old, lose_writes=False, lose_status=False)

    @rule()
    def remember_this_view(self) -> None:
        self.old = self.look()

    # -- the world

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def a_job_succeeds(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.live()))
        self.results[job.phase] = ObservedResult(job.digest, artifact(job.phase))
        self.end(job, None)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def a_job_fails(self, data: st.DataObject, failure: FailureClass) -> None:
        self.end(data.draw(st.sampled_from(self.live())), failure)

    @rule(seconds=st.integers(1, 2000))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # -- what must always hold

    @invariant()
    def within_capacity(self) -> None:
        assert len(self.live()) <= CAPACITY

    @invariant()
    def an_end_stays(self) -> None:
        status = self.run.status
        if status is not None and (status.is_true(meta.SUCCEEDED) or status.is_true(meta.FAILED)):
            assert decide(self.run, self.look(), self.now) == Decision(status)

    def teardown(self) -> None:
        """Left alone in a world where everything works, the run comes to an end."""
        for _ in range(60):
            decision = self.step(self.look(), lose_writes=False, lose_status=False)
            if decision.status.is_true(meta.SUCCEEDED):
                assert set(self.results) == set(NEEDS)
                return
            if decision.status.is_true(meta.FAILED):
                assert any(job.state == JobState.FAILED for job in self.jobs.values())
                return
            for job in self.live():
                self.a_job_succeeds_now(job)
            self.now += timedelta(seconds=1000)
        raise AssertionError(f"did not end: {self.run.status}")

    def a_job_succeeds_now(self, job: ObservedJob) -> None:
        self.results[job.phase] = ObservedResult(job.digest, artifact(job.phase))
        self.end(job, None)


TestWorld = World.TestCase
TestWorld.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
