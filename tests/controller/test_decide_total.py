"""The planner has an answer to everything: any policy that the models take, any status, anything that is seen."""

import json
from datetime import UTC, datetime, timedelta

from builders import START, diamond
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.api import meta
from controller.api.run import AlignmentRun, FailurePolicy
from controller.api.status import (
    Attempt,
    AttemptState,
    Condition,
    PhaseProgress,
    PhaseState,
    PhaseStatus,
    QueueState,
    QueueStatus,
    RetryStatus,
    RunStatus,
)
from controller.api.text import plain
from controller.operator import events
from controller.plan.decide import decide
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.resolve import resolve
from trainers.contract import FailureClass

RUN = diamond()
NAMES = [phase.name for phase in RUN.phases]
DIGESTS = ["d", "unknown", "e" * 64]
SETTINGS = ["", "s", *(phase.settings for phase in resolve(RUN))]
ANY_TIME = st.datetimes(timezones=st.just(UTC))
"""From the year 1 to 9999: clocks are wrong, and a status can be edited."""
TIMES = st.none() | st.just(START) | ANY_TIME
NUMBERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats()
WRITTEN = st.floats(allow_nan=False, allow_infinity=False)
"""What a status holds is JSON."""
TEXTS = st.text(max_size=20)
WORDS = st.text(min_size=1, max_size=20).filter(plain)
SECONDS = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.sampled_from([5e-324, 1e308, 1.0])
CLASSES = st.none() | st.sampled_from(FailureClass)
QUEUES = st.none() | st.builds(QueueStatus, state=st.sampled_from(QueueState), message=TEXTS)

policies = st.builds(
    lambda **fields: FailurePolicy.model_validate({name: value for name, value in fields.items() if value is not None}),
    phaseDeadlineSeconds=st.none() | SECONDS,
    runDeadlineSeconds=st.none() | SECONDS,
    stalledAfterSeconds=st.none() | SECONDS,
    stallTimeoutSeconds=st.none() | SECONDS,
    startupTimeoutSeconds=st.none() | SECONDS,
    backoff=st.none() | st.fixed_dictionaries({"initialSeconds": SECONDS, "maxSeconds": SECONDS}),
    retries=st.none() | st.fixed_dictionaries({"infrastructure": st.integers(0, 10), "internal": st.integers(0, 10)}),
)


def reports(floats: st.SearchStrategy[float]) -> st.SearchStrategy[PhaseProgress]:
    return st.builds(
        PhaseProgress, step=NUMBERS, total_steps=NUMBERS, loss=st.none() | floats, tokens_per_second=st.none() | floats,
        eta_seconds=st.none() | floats, stage=TEXTS, updated_at=TIMES,
    )  # fmt: skip


attempts = st.builds(
    Attempt, number=NUMBERS, digest=st.sampled_from(DIGESTS), settings=st.sampled_from(SETTINGS), halvings=NUMBERS,
    nodes=NUMBERS, placed=NUMBERS, times=NUMBERS, state=st.sampled_from(AttemptState), failure=CLASSES, message=TEXTS,
    job=TEXTS, node=TEXTS, started_at=TIMES, finished_at=TIMES, forgiven=st.booleans(),
)  # fmt: skip
phases = st.builds(
    PhaseStatus, name=st.sampled_from([*NAMES, "gone"]), type=st.just("sft"), state=st.sampled_from(PhaseState),
    message=TEXTS, digest=st.none() | st.sampled_from(DIGESTS), artifact_digest=st.none() | WORDS, failure=CLASSES,
    attempts=st.lists(attempts, max_size=4).map(tuple), started_at=TIMES, finished_at=TIMES, retry_at=TIMES,
    progress=st.none() | reports(WRITTEN), queue=QUEUES, metrics=st.dictionaries(TEXTS, WRITTEN, max_size=3),
    again=st.just(0) | NUMBERS,
)  # fmt: skip
conditions = st.builds(
    Condition, type=st.sampled_from(["Accepted", "Failed", "Succeeded", "Suspended", "Stalled", "Odd"]),
    status=st.sampled_from(["True", "False", "Unknown"]), reason=WORDS, lastTransitionTime=ANY_TIME,
)  # fmt: skip
statuses = st.builds(
    RunStatus, observed_generation=st.none() | NUMBERS, started_at=TIMES, finished_at=TIMES,
    phases=st.lists(phases, max_size=4).map(tuple), conditions=st.lists(conditions, max_size=4).map(tuple),
    retry=st.none() | st.builds(RetryStatus, number=NUMBERS, refused=TEXTS),
)  # fmt: skip
jobs = st.builds(
    ObservedJob, phase=st.sampled_from([*NAMES, "gone"]), attempt=NUMBERS, digest=st.sampled_from(DIGESTS),
    state=st.sampled_from(JobState), failure=CLASSES, message=TEXTS, started_at=TIMES, finished_at=TIMES, name=TEXTS,
    node=TEXTS, may_start_since=TIMES, running_since=TIMES, placed=NUMBERS, queue=QUEUES, past=st.booleans(),
)  # fmt: skip
found = st.builds(
    ObservedResult,
    digest=st.sampled_from(DIGESTS),
    artifact_digest=TEXTS,
    metrics=st.dictionaries(TEXTS, FLOATS, max_size=3),
)
views = st.builds(
    Observed, jobs=st.lists(jobs, max_size=4).map(tuple), results=st.dictionaries(st.sampled_from(NAMES), found, max_size=2),
    progress=st.dictionaries(st.sampled_from(NAMES), reports(FLOATS), max_size=2), capacity=st.none() | st.integers(0, 9),
    problems=st.lists(WORDS, max_size=1).map(tuple),
)  # fmt: skip


def made(
    policy: FailurePolicy, status: RunStatus | None, generation: int, suspend: bool, ttl: int | None, asked: str | None
) -> AlignmentRun:
    spec = RUN.spec.model_copy(update={"failure_policy": policy, "suspend": suspend, "ttl_seconds_after_finished": ttl})
    annotations = {} if asked is None else {meta.ANNOTATION_RETRY: asked}
    metadata = RUN.metadata.model_copy(update={"generation": generation, "annotations": annotations})
    return RUN.model_copy(update={"spec": spec, "status": status, "metadata": metadata})


runs = st.builds(
    made,
    policies,
    st.none() | statuses,
    st.integers(1, 2),
    st.booleans(),
    st.none() | st.sampled_from([0, 1, 2**63 - 1]),
    st.none() | TEXTS | st.sampled_from(["1", "1 dpo", "3 *", "999999999999999999 ppo base"]),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(runs, views, ANY_TIME, st.none() | st.sets(st.sampled_from(NAMES)))
def test_there_is_always_an_answer_that_can_be_written_and_told(
    run: AlignmentRun, view: Observed, now: datetime, only: set[str] | None
) -> None:
    decision = decide(run, view, now, only)
    text = json.dumps(decision.status.document(), allow_nan=False)
    assert RunStatus.model_validate_json(text) == decision.status, "else every look would write"
    assert decision.requeue_after is None or decision.requeue_after >= timedelta()
    for event in events.transitions(run.status or RunStatus(), decision.status):
        assert event.note
