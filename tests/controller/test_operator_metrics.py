"""The operator's own figures: names as Prometheus wants them, labels that cannot grow, counts that count once."""

import re
from itertools import pairwise
from typing import Any

import pytest
from builders import after, job, make_run, results, seen, sft
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from controller.api import meta
from controller.api.status import Attempt, AttemptState, Condition, PhaseState, PhaseStatus, RunStatus
from controller.kube import CALLS, LEASE_CALLS
from controller.operator import metrics
from controller.operator.metrics import METRICS, PREFIX, RUN_STATES, OperatorMetrics, state_of
from controller.operator.queue import Key
from controller.plan.decide import decide
from controller.plan.observed import JobState
from trainers.contract import FailureClass

INFRA = FailureClass.INFRASTRUCTURE
RUN = make_run(sft("base"))


def samples(measured: OperatorMetrics) -> dict[tuple[str, ...], float]:
    """Name without its prefix, and label values in the table's order, to the value."""
    order = [*dict.fromkeys(name for metric in METRICS for name in metric.labels), "le"]
    families = text_string_to_metric_families(measured.page().decode())
    return {
        (s.name.removeprefix(PREFIX), *(s.labels[name] for name in order if name in s.labels)): s.value
        for family in families
        for s in family.samples
    }


def used() -> OperatorMetrics:
    """Every figure has been touched once."""
    measured = OperatorMetrics()
    measured.run_seen(Key("ns", "a"), RunStatus())
    phase = PhaseStatus(name="base", type="sft", state=PhaseState.FAILED, started_at=after(0), finished_at=after(9))
    fell = Attempt(number=1, digest="d", state=AttemptState.FAILED, failure=INFRA)
    again = Attempt(number=2, digest="d", state=AttemptState.ASKED)
    measured.transition(RunStatus(), RunStatus(phases=(phase.model_copy(update={"attempts": (fell, again)}),)))
    measured.reconciled("ok", 0.1)
    measured.waited(0.1, 3)
    for call in (*CALLS, *LEASE_CALLS):
        measured.called(call, "200", 0.01)
    measured.leads(True)
    measured.watched("pods")
    return measured


# ---------------------------------------------------------------- names


def test_the_table_is_what_is_served():
    families = {f.name: f for f in text_string_to_metric_families(used().page().decode())}
    assert {m.name.removesuffix("_total"): m.kind for m in METRICS} == {name: f.type for name, f in families.items()}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.documentation == metric.help
        assert {name for s in family.samples for name in s.labels} - {"le"} == set(metric.labels)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_names_are_as_promtool_wants_them(metric):
    """What `promtool check metrics` looks at."""
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not metric.name.endswith(("_bucket", "_sum", "_count"))
    assert not re.search(r"_(milli|micro|nano)?(minutes|hours|days|ms|kilobytes|megabytes|percent)(_|$)", metric.name)
    assert metric.kind not in metric.name.removesuffix("_total").split("_"), "a name does not repeat its type"
    assert metric.help.endswith(".")
    assert not {"le", "quantile", "instance", "job"} & set(metric.labels)
    assert (metric.kind == "histogram") == bool(metric.buckets)
    assert all(low < high for low, high in pairwise(metric.buckets))


def test_no_series_says_when_a_counter_began():
    assert "_created" not in used().page().decode()


# ---------------------------------------------------------------- labels


CONDITIONS = st.dictionaries(
    st.sampled_from([meta.SUCCEEDED, meta.FAILED, meta.SUSPENDED, meta.STALLED, meta.ADMITTED]), st.booleans()
)


@given(
    CONDITIONS, st.sampled_from(["", "Queued", "Waiting", "BackingOff", "Invalid", "sft", "a,b", "queued", "running"])
)
def test_a_run_is_in_one_of_few_states_whatever_its_phases_are_called(held: dict[str, bool], word: str) -> None:
    conditions = tuple(
        Condition(type=kind, status="True" if holds else "False", reason="R", last_transition_time=after(0))
        for kind, holds in held.items()
    )
    assert state_of(RunStatus(phase=word, conditions=conditions)) in RUN_STATES


def test_no_label_has_a_runs_or_a_phases_name():
    names = {name for metric in METRICS for name in metric.labels}
    assert names == {"namespace", "state", "type", "outcome", "from", "to", "class", "verb", "resource", "code"}


# ---------------------------------------------------------------- counts


def counted(*looks: tuple[Any, float]) -> dict[tuple[str, ...], float]:
    """One run, looked at like this."""
    measured, status = OperatorMetrics(), RunStatus()
    for observed, at in looks:
        decision = decide(RUN.model_copy(update={"status": status}), observed, after(at))
        measured.transition(status, decision.status)
        measured.transition(decision.status, decision.status)
        status = decision.status
    return samples(measured)


def failed(number: int) -> Any:
    return job(RUN, "base", number, JobState.FAILED, failure=INFRA, started_at=after(0), finished_at=after(10))


def test_a_failure_and_its_retry_are_counted_once():
    found = counted(
        (seen(job(RUN, "base", started_at=after(0))), 0), (seen(failed(1)), 10), (seen(failed(1)), 11),
        (seen(failed(1)), 60), (seen(failed(1), job(RUN, "base", 2)), 61),
        (seen(failed(1), job(RUN, "base", 2)), 62), (seen(results=results(RUN, "base")), 90),
    )  # fmt: skip
    assert found["attempt_failures_total", "sft", "Infrastructure"] == 1
    assert found["retries_total", "sft", "Infrastructure"] == 1
    assert found["phase_transitions_total", "sft", "Running", "BackingOff"] == 1
    assert found["phase_transitions_total", "sft", "BackingOff", "Running"] == 1
    assert found["phase_duration_seconds_count", "sft", "Succeeded"] == 1


def attempts(*records: tuple[str, AttemptState]) -> RunStatus:
    made = [
        Attempt(number=i + 1, digest=digest, state=state, failure=INFRA if state == AttemptState.FAILED else None)
        for i, (digest, state) in enumerate(records)
    ]
    return RunStatus(phases=(PhaseStatus(name="base", type="sft", state=PhaseState.RUNNING, attempts=tuple(made)),))


FAILED, STOPPED, ASKED = AttemptState.FAILED, AttemptState.STOPPED, AttemptState.ASKED
RETRIES = {
    "after a failure": ([("a", FAILED)], [("a", FAILED), ("a", ASKED)], 1),
    "after a suspension": ([("a", FAILED), ("a", STOPPED)], [("a", FAILED), ("a", STOPPED), ("a", ASKED)], 0),
    "with other settings": ([("a", FAILED)], [("a", FAILED), ("b", ASKED)], 0),
    "the first": ([], [("a", ASKED)], 0),
}


@pytest.mark.parametrize("sentence", RETRIES)
def test_what_is_a_retry(sentence):
    before, now, count = RETRIES[sentence]
    measured = OperatorMetrics()
    measured.transition(attempts(*before), attempts(*now))
    assert samples(measured).get(("retries_total", "sft", "Infrastructure"), 0) == count


def test_runs_are_counted_by_their_state_and_gone_ones_are_not():
    measured = OperatorMetrics()
    for name in ("a", "b"):
        measured.run_seen(Key("ns", name), RunStatus(phase="base"))
        measured.run_seen(Key("ns", name), RunStatus(phase="base"))
    measured.run_seen(Key("ns", "b"), RunStatus(phase="Queued"))
    found = samples(measured)
    assert (found["runs", "ns", "Running"], found["runs", "ns", "Queued"]) == (1, 1)
    measured.run_gone(Key("ns", "a"))
    measured.run_gone(Key("ns", "a"))
    found = samples(measured)
    assert {state: found["runs", "ns", state] for state in RUN_STATES if found["runs", "ns", state]} == {"Queued": 1}


def test_the_states_of_runs_are_documented_words():
    assert set(RUN_STATES) >= {state_of(RunStatus()), "Running", "Succeeded", "Failed", "Suspended", "Stalled"}
    assert metrics.PREFIX == "alignment_operator_"
