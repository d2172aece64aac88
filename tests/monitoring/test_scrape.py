"""What a real Prometheus has of real runs, against the tables of metrics, the pods, the statuses and the runs' files."""

import json
import re
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from cluster.processes import wait_for

from controller.api.meta import LABEL_MANAGED_BY, LABEL_NAME, LABEL_RUN, PRODUCT
from controller.api.status import AttemptState, PhaseState
from controller.backends.cluster.scrape import OUTCOMES
from controller.operator import metrics as operator_metrics
from monitoring.observed import Observed
from monitoring.prometheus import Labels, promtool
from trainers import metrics as trainer_metrics
from trainers.contract import FailureClass
from trainers.metrics import MetricDef
from trainers.phases import REGISTRY

pytestmark = pytest.mark.slow


class Declared(NamedTuple):
    """A metric of one of the tables, and which labels its series have, those of their target included."""

    metric: MetricDef
    labels: frozenset[str]

    @property
    def series(self) -> list[tuple[str, frozenset[str]]]:
        if self.metric.kind != "histogram":
            return [(self.metric.name, self.labels)]
        name = self.metric.name
        return [(f"{name}_bucket", self.labels | {"le"}), (f"{name}_sum", self.labels), (f"{name}_count", self.labels)]


POD = {"job", "instance", "namespace", "pod", "container"}
TRAINERS = {
    metric.name: Declared(metric, frozenset({*trainer_metrics.COMMON_LABELS, *metric.labels, *POD}))
    for metric in trainer_metrics.METRICS
}
OPERATOR = {
    metric.name: Declared(metric, frozenset({*metric.labels, *POD, "endpoint"})) for metric in operator_metrics.METRICS
}
EVERY = {**TRAINERS, **OPERATOR}
NEEDS_A_GPU = {name for name in TRAINERS if "_gpu_" in name or "peak_flops" in name}
# Nothing is served beside these runs; tests/trainers/test_teacher_metrics.py has them of a real phase's page.
NEEDS_A_TEACHER = {name for name in TRAINERS if "_teacher_" in name}
WITH_DATA = sorted(EVERY.keys() - NEEDS_A_GPU - NEEDS_A_TEACHER)

# Every value that a label may have, where that can be said. `le` are the table's buckets.
VALUES = {
    "type": {kind.name for kind in REGISTRY},
    "part": set(trainer_metrics.PARTS),
    "class": {str(one) for one in FailureClass},
    "rank": {"0", "1"},
    "outcome": {*map(str, PhaseState), *map(str, AttemptState), "ok", "conflict", "api", "bug", *OUTCOMES},
    "state": {*map(str, PhaseState), *operator_metrics.RUN_STATES},
}
# Those that name one object each grow with the number of objects, `metric` with a run's models and benchmarks: which
# these may be is compared with the runs below. Everything else has a few values.
OBJECTS = {"run", "phase", "uid", "namespace", "pod", "instance", "metric"}
A_FEW = 30
# These take seconds: one refuses its input, one writes a few answers, one copies files. They may end before they are seen.
BRIEF = {"bad-sft-1-worker-0", "quickstart-traces-1-worker-0", "quickstart-package-1-worker-0"}


def series(observed: Observed, matcher: str) -> list[Labels]:
    return observed.prometheus.series(matcher, start=observed.begin, end=observed.end)


def last(observed: Observed, selector: str) -> dict[tuple[str, ...], float]:
    """Each series' last value in the whole time, by its values of run, phase and what else the selector leaves open."""
    samples = observed.prometheus.query(f"last_over_time({selector}[{observed.window}])", observed.end)
    return {tuple(v for k, v in sorted(s.labels.items()) if k not in POD | {"endpoint"}): s.value for s in samples}


def raw(observed: Observed, selector: str) -> set[float]:
    """Every value that was ever scraped."""
    lines = observed.prometheus.query_range(selector, observed.begin, observed.end, step=0.5)
    return {value for line in lines for _, value in line.points}


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_metric_has_data_with_exactly_the_declared_labels(observed: Observed, name: str):
    for part, expected in EVERY[name].series:
        found = [labels.keys() - {"__name__"} for labels in series(observed, part)]
        assert found, f"{part} has no data"
        assert set().union(*found) == expected
        # A label without a value is none.
        assert all(labels <= expected for labels in found)


def test_there_is_no_metric_that_no_table_has(observed: Observed):
    declared = {part for one in EVERY.values() for part, _ in one.series}
    found = {labels["__name__"] for labels in series(observed, '{__name__=~"alignment_.+"}')}
    assert found <= declared
    assert not found & NEEDS_A_GPU


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_metric_is_described_as_declared(observed: Observed, name: str):
    metric, metadata = EVERY[name].metric, observed.watch.metadata
    found = metadata.get(name) or metadata.get(name.removesuffix("_total"))  # OpenMetrics names a counter's family
    assert found, f"{name} has no metadata"
    assert (found["type"], found["help"]) == (metric.kind, metric.help)


@pytest.mark.parametrize("name", WITH_DATA)
def test_labels_have_few_values(observed: Observed, name: str):
    for part, _ in EVERY[name].series:
        found = series(observed, part)
        for label in set().union(*found) - OBJECTS - {"__name__", "le"}:
            values = {labels[label] for labels in found if label in labels}
            assert values <= VALUES.get(label, values), label
            assert len(values) <= A_FEW, (label, values)


def test_no_label_value_is_an_object_that_is_not_there(observed: Observed):
    """Deleted runs' series go; names of runs and phases come from the runs."""
    names = {"quickstart", "bad", "retried", "queued", "suspended"}
    phases = {(run, phase["name"]) for run in names for phase in observed.runs.status(run)["phases"]}
    for labels in series(observed, '{__name__=~"alignment_.+", phase!=""}'):
        if labels["namespace"] == observed.runs.namespace:
            assert (labels["run"], labels["phase"]) in phases


@pytest.mark.parametrize("what", ["trainers", "operator"])
def test_promtool_is_content_with_the_page(observed: Observed, what: str):
    port = ":8080/" if what == "operator" else ":94"
    pages = [page for url, page in observed.watch.pages.items() if port in url]
    assert len(pages) >= 2
    for page in pages:
        assert promtool("check", "metrics", text=page).strip() == ""


def test_the_targets_are_exactly_the_labelled_pods(observed: Observed):
    found = {(t["namespace"], t["pod"], t["instance"]) for t in series(observed, "up")}
    labelled = {
        (pod["metadata"]["namespace"], name, f"{pod['status']['podIP']}:{port['containerPort']}")
        for name, pod in observed.watch.pods.items()
        for port in _metrics_ports(pod)
        if PRODUCT in (pod["metadata"]["labels"].get(LABEL_MANAGED_BY), pod["metadata"]["labels"].get(LABEL_NAME))
    }
    assert found <= labelled
    assert {pod for _, pod, _ in labelled - found} <= BRIEF
    assert "stranger" in observed.watch.pods
    runs = Counter(pod["metadata"]["labels"].get(LABEL_RUN) for pod in observed.watch.pods.values())
    assert runs["quickstart"] == 12
    assert runs["retried"] == 2


def _metrics_ports(pod: Any) -> list[Any]:
    """Trainers have one more, for torchrun."""
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    return [port for port in ports if re.fullmatch(r"metrics(-\d+)?|http", port["name"])]


def test_every_process_of_a_pod_is_a_target(observed: Observed):
    info = series(observed, 'alignment_trainer_info{run="retried"}')
    assert {(labels["pod"], labels["rank"]) for labels in info} == {
        (f"retried-sft-{attempt}-worker-0", rank) for attempt in "12" for rank in "01"
    }
    assert {labels["processes"] for labels in info} == {"2"}
    assert len({labels["instance"] for labels in info}) == 4


def test_every_target_was_up(observed: Observed):
    """Trainers once they train, the operator always."""
    ever = observed.prometheus.query(f"max_over_time(up[{observed.window}])", observed.end)
    down = {sample.labels["pod"] for sample in ever if sample.value == 0}
    assert down <= BRIEF, "only such a phase may end before it is seen"
    always = observed.prometheus.query(
        f'avg_over_time(up{{job=~".*/{PRODUCT}"}}[{observed.window}]) > 0.8', observed.end
    )
    assert len(always) == 2


def test_counters_never_go_down_within_a_pod(observed: Observed):
    counted = [
        part
        for one in EVERY.values()
        if one.metric.kind != "gauge" and one.metric.name not in NEEDS_A_GPU
        for part, _ in one.series
    ]
    compared = 0
    for name in counted:
        for line in observed.prometheus.query_range(name, observed.begin, observed.end, step=1):
            assert all(later >= earlier for (_, earlier), (_, later) in pairwise(line.points)), line.labels
            compared += len(line.points)
    assert compared > 1000


def test_a_trainer_that_has_ended_is_not_shown_as_live(observed: Observed):
    """Its last values stay in the past: a panel of what ended asks for `last_over_time`."""
    live = '{__name__=~"alignment_trainer_.+"}'
    wait_for(lambda: not observed.prometheus.query(live), 30, "nothing of the trainers is live")
    assert last(observed, "alignment_trainer_step")
    assert observed.prometheus.query('alignment_operator_run_state{run="quickstart"}')


def test_trained_figures_are_those_of_the_runs_own_files(observed: Observed):
    """Every value scraped is a line of metrics.jsonl, for every gauge that is made from them."""
    seen = set()
    for phase in observed.runs.status("quickstart")["phases"]:
        path = observed.runs.folder("quickstart") / phase["name"] / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for word, name in trainer_metrics.GAUGES_FROM_LOG.items():
            margin = word == "reward" and phase["type"] in trainer_metrics.PAIRWISE
            metric = f"{trainer_metrics.PREFIX}{'reward_margin' if margin else name}"
            values = raw(observed, f'{metric}{{run="quickstart", phase="{phase["name"]}"}}')
            assert values <= {line[word] for line in lines if word in line}, (phase["name"], word)
            seen |= {word} if values else set()
    assert seen == trainer_metrics.GAUGES_FROM_LOG.keys()


def test_the_operators_figures_are_those_of_the_statuses(observed: Observed):
    states, results, failures = {}, {}, Counter()
    for run in ("quickstart", "bad", "retried", "queued", "suspended"):
        for phase in observed.runs.status(run)["phases"]:
            states[phase["name"], run, phase["state"]] = 1.0
            results |= {(m, phase["name"], run): value for m, value in phase.get("metrics", {}).items()}
            failures.update(
                (attempt["failure"], phase["type"])
                for attempt in phase.get("attempts", []) if attempt["state"] == "Failed"
            )  # fmt: skip
    now = observed.prometheus.query(f'alignment_operator_phase_state{{namespace="{observed.runs.namespace}"}}')
    assert {(s.labels["phase"], s.labels["run"], s.labels["state"]): s.value for s in now} == states
    kept = observed.prometheus.query(f'alignment_operator_phase_result{{namespace="{observed.runs.namespace}"}}')
    assert {(s.labels["metric"], s.labels["phase"], s.labels["run"]): s.value for s in kept} == pytest.approx(results)
    # A deleted pod says that it was stopped, if it is still there when the operator looks; a busy machine may be too late.
    assert set(failures) - {("Interrupted", "sft"), ("Infrastructure", "sft")} == {("BadInput", "sft")}
    assert len(failures) == 2
    counted = observed.prometheus.query("sum by (class, type) (alignment_operator_attempt_failures_total) > 0")
    assert {(s.labels["class"], s.labels["type"]) for s in counted} >= set(failures)


def test_only_the_replica_that_acts_tells_of_runs(observed: Observed):
    (leader,) = observed.prometheus.query("alignment_operator_leader == 1")
    told = series(observed, f'alignment_operator_run_info{{namespace="{observed.runs.namespace}"}}')
    assert {labels["pod"] for labels in told} == {leader.labels["pod"]}
    assert {(labels["run"], labels.get("queue", "")) for labels in told} >= {
        ("quickstart", ""),
        ("queued", "nothing-left"),
    }


def test_the_states_of_a_run_follow_each_other(observed: Observed):
    """A run has one state at a time, and the right one at the end."""
    selector = f'alignment_operator_run_state{{namespace="{observed.runs.namespace}"}}'
    lines = observed.prometheus.query_range(f"count by (run) ({selector})", observed.begin, observed.end, step=1)
    assert {value for line in lines for _, value in line.points} == {1.0}
    at_the_end = {s.labels["run"]: s.labels["state"] for s in observed.prometheus.query(selector)}
    assert at_the_end == {
        "quickstart": "Succeeded", "retried": "Succeeded", "bad": "Failed",
        "queued": "Queued", "suspended": "Suspended",
    }  # fmt: skip


def test_the_rules_are_evaluated_without_an_error(observed: Observed):
    rules = observed.prometheus.rules()
    assert rules, "manifests/monitoring has rules"
    broken = {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"}
    assert broken == {}
    assert all(re.fullmatch(r"[A-Z]\w+|alignment:.+", rule["name"]) for rule in rules)
