"""What is written to the API server is what is read from it: else every look at a run would write it again."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders import START
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.api.status import (
    Attempt,
    AttemptState,
    Condition,
    PhaseProgress,
    PhaseState,
    PhaseStatus,
    QueueState,
    QueueStatus,
    RunStatus,
)
from controller.api.text import plain
from trainers.contract import FailureClass

WORDS = st.text(max_size=20)
NAMES = st.text(min_size=1, max_size=20).filter(plain)
# Kubernetes' times have whole seconds; local runs' have fractions.
MOMENTS = st.integers(0, 10**9).map(lambda us: START + timedelta(microseconds=us)) | st.just(START)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


ATTEMPTS = st.builds(
    Attempt, number=st.integers(1, 99), digest=NAMES, state=st.sampled_from(AttemptState),
    failure=maybe(st.sampled_from(FailureClass)), message=WORDS, job=WORDS, node=WORDS,
    started_at=maybe(MOMENTS), finished_at=maybe(MOMENTS),
)  # fmt: skip
PROGRESS = st.builds(
    PhaseProgress, step=st.integers(0, 9), total_steps=st.integers(0, 9), loss=maybe(FINITE),
    tokens_per_second=maybe(FINITE), eta_seconds=maybe(FINITE), stage=WORDS, updated_at=maybe(MOMENTS),
)  # fmt: skip
PHASES = st.builds(
    PhaseStatus, name=NAMES, type=NAMES, state=st.sampled_from(PhaseState), message=WORDS, digest=maybe(NAMES),
    artifact_digest=maybe(NAMES), failure=maybe(st.sampled_from(FailureClass)),
    attempts=st.lists(ATTEMPTS, max_size=3).map(tuple), started_at=maybe(MOMENTS), finished_at=maybe(MOMENTS),
    retry_at=maybe(MOMENTS), progress=maybe(PROGRESS),
    queue=maybe(st.builds(QueueStatus, state=st.sampled_from(QueueState), message=WORDS)),
    metrics=st.dictionaries(NAMES, FINITE, max_size=3),
)  # fmt: skip
CONDITIONS = st.builds(
    Condition, type=NAMES, status=st.sampled_from(["True", "False", "Unknown"]), reason=NAMES, message=WORDS,
    observed_generation=maybe(st.integers(0, 9)), lastTransitionTime=MOMENTS,
)  # fmt: skip
STATUSES = st.builds(
    RunStatus, observed_generation=maybe(st.integers(0, 9)), phase=WORDS, progress=WORDS, percent=st.integers(0, 100),
    step=WORDS, loss=WORDS, tokens_per_second=WORDS, eta=WORDS, started_at=maybe(MOMENTS), finished_at=maybe(MOMENTS),
    phases=st.lists(PHASES, max_size=3).map(tuple), conditions=st.lists(CONDITIONS, max_size=3).map(tuple),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STATUSES)
def test_round_trip(status: RunStatus) -> None:
    text = json.dumps(status.document(), allow_nan=False)
    assert RunStatus.model_validate(json.loads(text)) == status


EMPTY = {
    "a status": RunStatus(),
    "a report of nothing": RunStatus(phases=(PhaseStatus(name="p", type="sft", progress=PhaseProgress()),)),
    "a metric of zero": RunStatus(phases=(PhaseStatus(name="p", type="sft", metrics={"loss": 0.0}),)),
    "a queue without words": RunStatus(
        phases=(PhaseStatus(name="p", type="sft", queue=QueueStatus(state=QueueState.PENDING)),)
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_empty_comes_back(name: str) -> None:
    assert RunStatus.model_validate(EMPTY[name].document()) == EMPTY[name]


def test_what_is_empty_is_not_written() -> None:
    """People read this in `kubectl describe`."""
    phase = PhaseStatus(name="p", type="sft")
    assert RunStatus(phases=(phase,)).document() == {
        "percent": 0, "phases": [{"name": "p", "type": "sft", "state": "Waiting"}],
    }  # fmt: skip


def test_a_newer_operators_fields_are_no_error() -> None:
    assert RunStatus.model_validate({"phase": "sft", "fromTheFuture": {"a": 1}}).phase == "sft"


def test_times_are_written_as_kubernetes_writes_them() -> None:
    document = RunStatus(started_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)).document()
    assert document["startedAt"] == "2026-01-02T03:04:05Z"
