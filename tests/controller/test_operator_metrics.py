"""The operator's own figures: names as Prometheus wants them, labels that cannot grow, counts that count once."""

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from builders import after, job, make_run, results, seen, sft
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from controller.api import meta
from controller.api.status import Attempt, AttemptState, Condition, PhaseState, PhaseStatus, RunStatus
from controller.clock import seconds_now
from controller.kube.calls import CALLS, LEASE_CALLS
from controller.memory import Key
from controller.operator import metrics
from controller.operator.meter import OperatorMetrics, state_of
from controller.operator.metrics import METRICS, PREFIX, RUN_METRICS, RUN_STATES
from controller.operator.queue import WorkQueue
from controller.operator.run_series import ENDED, RESULTS
from controller.plan.decide import decide, refused
from controller.plan.observed import JobState
from trainers.contract import FailureClass

INFRA = FailureClass.INFRASTRUCTURE
RUN = make_run(sft("base"))
KEY = Key("ns", "a")


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
    phase = PhaseStatus(name="base", type="sft", state=PhaseState.FAILED, started_at=after(0), finished_at=after(9))
    fell = Attempt(
        number=1, digest="d", state=AttemptState.FAILED, failure=INFRA, started_at=after(0), finished_at=after(9)
    )
    again = Attempt(number=2, digest="d", state=AttemptState.ASKED)
    started = again.model_copy(update={"state": AttemptState.RUNNING, "started_at": after(20)})
    born = RUN.model_copy(update={"metadata": RUN.metadata.model_copy(update={"creation_timestamp": after(-5)})})
    asked = RunStatus(phases=(phase.model_copy(update={"attempts": (fell, again)}),))
    gone_on = RunStatus(phases=(phase.model_copy(update={"attempts": (fell, started), "metrics": {"x": 1.0}}),))
    measured.transition(KEY, RUN, RunStatus(), asked)
    measured.transition(KEY, RUN, asked, gone_on)
    measured.run_seen(KEY, born, RunStatus(started_at=after(0), finished_at=after(9), phases=gone_on.phases))
    measured.reconciled("ok", 0.1)
    measured.waited(0.1)
    measured.queue([])
    for call in (*CALLS, *LEASE_CALLS):
        measured.called(call, "200", 0.01)
    measured.leads(True)
    measured.watched("pods")
    measured.watches(["pods"], [])
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
    assert not re.search(r"_created[ {]", used().page().decode())


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


def test_only_series_that_end_with_their_run_have_its_name():
    """Others would grow for ever."""
    names = {name for metric in METRICS if metric not in RUN_METRICS for name in metric.labels}
    few = {"namespace", "state", "type", "outcome", "class", "verb", "resource", "code", "version"}
    assert names == few
    measured = used()
    measured.run_gone(KEY)
    ours = {metric.name.removeprefix(PREFIX) for metric in RUN_METRICS}
    assert not ours & {name for name, *_ in samples(measured)}


# ---------------------------------------------------------------- counts


def counted(*looks: tuple[Any, float]) -> dict[tuple[str, ...], float]:
    """One run, looked at like this."""
    measured, status = OperatorMetrics(), RunStatus()
    for observed, at in looks:
        decision = decide(RUN.model_copy(update={"status": status}), observed, after(at))
        measured.transition(KEY, RUN, status, decision.status)
        measured.transition(KEY, RUN, decision.status, decision.status)
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
    assert found["phase_transitions_total", "BackingOff", "sft"] == 1
    assert found["phase_transitions_total", "Running", "sft"] == 2
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


def test_failures_count_from_zero():
    """A counter that appears with its first failure has not increased in Prometheus' eyes."""
    found = samples(OperatorMetrics())
    for failure in FailureClass:
        assert found["attempt_failures_total", "ppo", failure] == found["retries_total", "ppo", failure] == 0


@pytest.mark.parametrize("sentence", RETRIES)
def test_what_is_a_retry(sentence):
    before, now, count = RETRIES[sentence]
    measured = OperatorMetrics()
    measured.transition(KEY, RUN, attempts(*before), attempts(*now))
    assert samples(measured).get(("retries_total", "sft", "Infrastructure"), 0) == count


def test_runs_are_counted_by_their_state_and_gone_ones_are_not():
    measured = OperatorMetrics()
    for name in ("a", "b"):
        measured.run_seen(Key("ns", name), RUN, RunStatus(phase="base"))
        measured.run_seen(Key("ns", name), RUN, RunStatus(phase="base"))
    measured.run_seen(Key("ns", "b"), RUN, RunStatus(phase="Queued"))
    found = samples(measured)
    assert (found["runs", "ns", "Running"], found["runs", "ns", "Queued"]) == (1, 1)
    measured.run_gone(Key("ns", "a"))
    measured.run_gone(Key("ns", "a"))
    found = samples(measured)
    assert {state: found["runs", "ns", state] for state in RUN_STATES if found["runs", "ns", state]} == {"Queued": 1}


def test_the_states_of_runs_are_documented_words():
    assert set(RUN_STATES) >= {state_of(RunStatus()), "Running", "Succeeded", "Failed", "Suspended", "Stalled"}
    assert metrics.PREFIX == "alignment_operator_"


# ---------------------------------------------------------------- series of a run


def shown(run: Any, status: RunStatus) -> dict[tuple[str, ...], float]:
    measured = OperatorMetrics()
    measured.run_seen(KEY, run, status)
    return samples(measured)


def test_a_state_has_one_series_and_the_state_before_has_none():
    measured = OperatorMetrics()
    measured.run_seen(KEY, RUN, RunStatus(phase="Queued"))
    measured.run_seen(KEY, RUN, RunStatus(phase="base"))
    states = [key for key in samples(measured) if key[0] == "run_state"]
    assert states == [("run_state", "ns", "Running", "a")]


def test_an_invalid_run_has_failed():
    """It cannot be read, so there is nothing to say of its phases."""
    invalid = refused(RUN, RunStatus(), "no such field", seen(), after(0)).status
    found = shown(None, invalid)
    assert found["run_state", "ns", "Failed", "a"] == 1
    assert not {name for name, *_ in found} & {"phase_state", "run_info"}


def test_gpus_are_those_of_all_pods_while_they_are_at_work():
    limits = {"nvidia.com/gpu": "8", "cpu": "64", "memory": "1Ti"}
    run = make_run(sft("base"), template={"nodes": 2, "resources": {"limits": limits}})
    waiting = PhaseStatus(name="base", type="sft", state=PhaseState.RUNNING, attempts=(attempt(1, AttemptState.ASKED),))
    running = waiting.model_copy(update={"attempts": (attempt(1, AttemptState.RUNNING, started_at=after(0)),)})
    assert shown(run, RunStatus(phases=(waiting,)))["phase_gpus", "ns", "sft", "a", "base"] == 0
    assert shown(run, RunStatus(phases=(running,)))["phase_gpus", "ns", "sft", "a", "base"] == 16
    measured = OperatorMetrics()
    stopped = attempt(1, AttemptState.STOPPED, started_at=after(0), finished_at=after(100))
    ended = running.model_copy(update={"attempts": (stopped,)})
    measured.transition(KEY, run, RunStatus(phases=(running,)), RunStatus(phases=(ended,)))
    measured.transition(KEY, run, RunStatus(phases=(ended,)), RunStatus(phases=(ended,)))
    assert samples(measured)["gpu_seconds_total", "ns", "sft", "Stopped"] == 1600


def test_gpus_of_a_phase_that_an_edit_took_out_count_until_it_is_gone():
    """Also in an operator that has been started since."""
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "8"}}}
    run, edited = make_run(sft("base"), sft("other"), template=gpus), make_run(sft("other"), template=gpus)
    begun = seconds_now() - timedelta(seconds=100)
    takes = {"nvidia.com/gpu": 8, "cpu": 64}
    base = PhaseStatus(name="base", type="sft", state=PhaseState.RUNNING)
    running, stopping = (
        RunStatus(phases=(base.model_copy(update={"attempts": (attempt(1, state, started_at=begun, takes=takes),)}),))
        for state in (AttemptState.RUNNING, AttemptState.STOPPING)
    )
    before, which = OperatorMetrics(), ("phase_gpus", "ns", "sft", "a", "base")
    before.run_seen(KEY, run, running)
    before.transition(KEY, edited, running, stopping)
    before.run_seen(KEY, edited, stopping)
    measured = OperatorMetrics()
    measured.run_seen(KEY, edited, stopping)
    assert samples(before)[which] == samples(measured)[which] == 8
    measured.transition(KEY, edited, stopping, RunStatus())
    measured.run_seen(KEY, edited, RunStatus())
    assert which not in samples(measured)
    assert 800 <= samples(measured)["gpu_seconds_total", "ns", "sft", "Stopped"] < 1600


def test_gpus_are_those_that_an_attempt_began_with_whatever_the_spec_says_since():
    limits = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    going = attempt(1, AttemptState.RUNNING, started_at=after(0), takes={"nvidia.com/gpu": 16, "memory": 2**40})
    over = attempt(1, AttemptState.STOPPED, started_at=after(0), finished_at=after(100))
    running, ended = (
        RunStatus(phases=(PhaseStatus(name="base", type="sft", state=PhaseState.RUNNING, attempts=(a,)),))
        for a in (going, over)
    )
    edited, measured = make_run(sft("base"), template=limits), OperatorMetrics()
    measured.run_seen(KEY, edited, running)
    assert samples(measured)["phase_gpus", "ns", "sft", "a", "base"] == 16
    measured.transition(KEY, edited, running, ended)
    assert samples(measured)["gpu_seconds_total", "ns", "sft", "Stopped"] == 1600


def attempt(number: int, state: AttemptState, **more: Any) -> Attempt:
    return Attempt(number=number, digest="d", state=state, **more)


def test_retries_used_are_the_failures_of_what_is_asked_for_now():
    old = Attempt(number=1, digest="old", state=AttemptState.FAILED, failure=INFRA)
    edited = Attempt(number=1, digest="d", settings="of before", state=AttemptState.FAILED, failure=INFRA)
    new = [attempt(n, AttemptState.FAILED, failure=INFRA) for n in (2, 3)]
    full = attempt(4, AttemptState.FAILED, failure=FailureClass.OUT_OF_MEMORY)
    phase = PhaseStatus(
        name="base", type="sft", digest="d", state=PhaseState.BACKING_OFF, attempts=(old, edited, *new, full)
    )
    run = make_run(sft("base"), failurePolicy={"retries": {"infrastructure": 3}})
    found = shown(run, RunStatus(phases=(phase,)))
    told = {(key[0], key[3]): value for key, value in found.items() if key[0].startswith("phase_retries")}
    assert told == {
        ("phase_retries_used", "Infrastructure"): 2, ("phase_retries_allowed", "Infrastructure"): 3,
        ("phase_retries_used", "OutOfMemory"): 1, ("phase_retries_allowed", "OutOfMemory"): 3,
    }  # fmt: skip


def test_the_wait_for_the_queue_is_measured_once():
    def status(*attempts: Attempt) -> RunStatus:
        return RunStatus(phases=(PhaseStatus(name="base", type="sft", state=PhaseState.RUNNING, attempts=attempts),))

    measured, now = OperatorMetrics(), datetime.now(UTC)
    looks = [status(), status(attempt(1, AttemptState.ASKED)), status(attempt(1, AttemptState.RUNNING)),
             status(attempt(1, AttemptState.RUNNING, started_at=now + timedelta(seconds=40))),
             status(attempt(1, AttemptState.SUCCEEDED, started_at=now + timedelta(seconds=40)))]  # fmt: skip
    for before, after_it in pairwise(looks):
        measured.transition(KEY, RUN, before, after_it)
    found = samples(measured)
    assert found["attempt_wait_seconds_count", "sft"] == 1
    assert found["attempt_wait_seconds_sum", "sft"] == pytest.approx(40, abs=1)


def test_what_a_figure_is_called_comes_through_quotes_and_all():
    name = 'as "said"\\nhere'
    phase = PhaseStatus(name="p", type="sft", state=PhaseState.SUCCEEDED, metrics={name: 1e-7})
    measured = OperatorMetrics()
    measured.run_seen(Key("ns", "run"), RUN, RunStatus(started_at=after(0), phases=(phase,)))
    families = {f.name: f for f in text_string_to_metric_families(measured.page().decode())}
    [sample] = families["alignment_operator_phase_result"].samples
    assert (sample.labels, sample.value) == (
        {"namespace": "ns", "run": "run", "phase": "p", "type": "sft", "metric": name}, 1e-7,
    )  # fmt: skip


def test_a_thousand_runs_make_a_page_in_moderate_time_and_size():
    """Eight phases each; what Prometheus takes in every half minute."""
    phases = tuple(
        PhaseStatus(name=f"p{i}", type="sft", state=PhaseState.SUCCEEDED, started_at=after(0), finished_at=after(9))
        for i in range(8)
    )
    measured = OperatorMetrics()
    for i in range(1000):
        measured.run_seen(Key("ns", f"run-{i}"), RUN, RunStatus(started_at=after(0), phases=phases))
    page = measured.page()
    assert page.count(b"alignment_operator_phase_state{") == 8000
    assert len(page) < 8e6


def test_final_figures_are_bounded_and_those_of_the_newest_runs_stay():
    """Two hundred of one evaluation, times runs that stay for months, would be more than all other series."""
    figures = {f"model/quality/{i}": 0.5 for i in range(200)}
    measured = OperatorMetrics()
    for i in range(150):
        phase = PhaseStatus(name="eval", type="evaluate", state=PhaseState.SUCCEEDED, metrics=figures)
        measured.run_seen(Key("ns", f"run-{i}"), RUN, RunStatus(started_at=after(i), phases=(phase,)))
    found = samples(measured)
    told = Counter(key[3] for key in found if key[0] == "phase_result")
    assert sum(told.values()) == RESULTS == 20_000
    assert told == {f"run-{i}": 200 for i in range(50, 150)}
    assert len([key for key in found if key[0] == "run_state"]) == 150


def test_of_runs_that_have_ended_the_newest_are_shown():
    """Ten thousand that nobody has deleted would make a page of 60 MB; those that go on are all there."""
    over = (Condition(type="Succeeded", status="True", reason="r", last_transition_time=after(0)),)
    measured = OperatorMetrics()
    for i in range(2 * ENDED + 20):
        measured.run_seen(Key("ns", f"old-{i}"), None, RunStatus(started_at=after(i), conditions=over))
    for i in range(50):
        measured.run_seen(Key("ns", f"new-{i}"), None, RunStatus(started_at=after(0), phase="base"))
    measured.run_seen(Key("small", "only"), None, RunStatus(started_at=after(0), conditions=over))
    found = samples(measured)
    shown = {key[3] for key in found if key[0] == "run_state"}
    assert len(shown) == ENDED + 50
    assert {"only", "new-0", f"old-{2 * ENDED + 19}"} <= shown
    assert found["runs", "ns", "Succeeded"] == 2 * ENDED + 20, "all are counted"


def test_runs_that_wait_are_seen_when_nothing_takes_them():
    measured, queue = OperatorMetrics(), WorkQueue()
    measured.queue(queue)
    queue.add(KEY)
    assert samples(measured)["workqueue_depth",] == 0, "a replica that stands by collects what it will have to look at"
    measured.leads(True)
    assert samples(measured)["workqueue_depth",] == 1


def test_states_count_from_zero():
    """The first phase of a type that fails is one that a panel must show."""
    found = samples(OperatorMetrics())
    assert {state: found["phase_transitions_total", state, "ppo"] for state in PhaseState} == dict.fromkeys(
        PhaseState, 0
    )


def test_gpu_seconds_count_from_zero():
    """A day's attempt is counted at its end: without the zero before, an increase() would not see it."""
    measured = OperatorMetrics()
    measured.run_seen(KEY, RUN, attempts(("d", AttemptState.RUNNING)))
    assert samples(measured)["gpu_seconds_total", "ns", "sft", "Succeeded"] == 0
