"""Every alert in promtool: that it fires, with which words, and that it is silent when it should be."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from monitoring.prometheus import promtool

from alerts import operators, quickstart, runs, train
from alerts.scenario import Scenario
from controller.operator.metrics import METRICS as OPERATOR
from generate.alerts import ALERTS, OPERATOR_NAMESPACE, alerts_yaml
from trainers.metrics import COMMON_LABELS
from trainers.metrics import METRICS as TRAINERS

ROOT = Path(__file__).parents[2]
NAMES = [alert.name for alert in ALERTS]
SEVERITIES = {alert.name: alert.severity for alert in ALERTS}
SCENARIOS: tuple[Scenario, ...] = (*runs.SCENARIOS, *train.SCENARIOS, *operators.SCENARIOS, *quickstart.SCENARIOS)
NEAR_MISSES = 2
"""At least, of each alert."""


@pytest.fixture(scope="module")
def rules(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "alerts.yaml"
    path.write_text(alerts_yaml().replace(OPERATOR_NAMESPACE, "alignment-system"))
    return path


def test_prometheus_reads_the_rules(rules):
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", str(rules))


@pytest.fixture(scope="module")
def verdicts(rules) -> str:
    """Of all scenarios: promtool takes a second to begin. What it complains about has the scenario's name."""
    tests = [scenario.document(NAMES, SEVERITIES) for scenario in SCENARIOS]
    path = rules.with_name("tests.yaml")
    # JSON is YAML
    path.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    try:
        return promtool("test", "rules", str(path))
    except AssertionError as error:
        return str(error)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
def test_exactly_these_alerts_fire(scenario, verdicts):
    assert "SUCCESS" in verdicts or "name: " in verdicts, verdicts
    said = re.split(r"^ *name: ", verdicts, flags=re.MULTILINE)[1:]
    assert [text for text in said if text.startswith(f"{scenario.title},")] == []


def test_a_wrong_expectation_is_noticed(rules, tmp_path):
    """So that the test above cannot pass for want of promtool's attention."""
    silent_now = replace(runs.STALLS[0], moments={30: ()})
    document = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [silent_now.document(NAMES, SEVERITIES)],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(json.dumps(document))
    with pytest.raises(AssertionError, match=f"name: {silent_now.title},\\s+alertname: AlignmentRunStalled"):
        promtool("test", "rules", str(path))


@pytest.mark.parametrize("alert", NAMES)
def test_each_alert_is_tested_firing_and_silent(alert):
    fires = [s.title for s in SCENARIOS for found in s.moments.values() for fire in found if fire.alert == alert]
    near = [s.title for s in SCENARIOS if alert in s.nearly and () in s.moments.values()]
    assert fires
    assert len(near) >= NEAR_MISSES


def test_titles_are_unique():
    assert max(Counter(scenario.title for scenario in SCENARIOS).values()) == 1


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    assert sorted(path.stem for path in (ROOT / "docs/runbooks").glob("*.md")) == sorted([*NAMES, "README"])
    for name in NAMES:
        page = (ROOT / f"docs/runbooks/{name}.md").read_text()
        assert page.startswith(f"# {name}\n"), name
        assert f"({name}.md)" in (ROOT / "docs/runbooks/README.md").read_text(), name


LABELS = {metric.name: {*metric.labels, "namespace", "pod"} for metric in OPERATOR} | {
    metric.name: {*metric.labels, *COMMON_LABELS, "namespace", "pod"} for metric in TRAINERS
}
SUFFIXES = ("_bucket", "_sum", "_count")


def metrics_in(promql: str) -> set[str]:
    return set(re.findall(r"alignment_(?:trainer|operator)_\w+", promql))


def base(name: str) -> str:
    """A histogram's own name."""
    found = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.removesuffix(suffix) in LABELS), name)
    return name if name in LABELS else found


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_only_metrics_and_labels_of_the_tables_are_used(alert):
    names = {base(name) for name in metrics_in(alert.expr)}
    assert names
    assert names <= set(LABELS)
    for name, selector in re.findall(r"(alignment_\w+)\{(.*?)\}", alert.expr):
        assert set(re.findall(r"(\w+)(?:=|!)", selector)) <= LABELS[base(name)], selector


@pytest.mark.parametrize("page", sorted((ROOT / "docs/runbooks").glob("*.md")), ids=lambda page: page.stem)
def test_runbooks_ask_for_metrics_that_exist(page, tmp_path):
    text = page.read_text()
    assert {base(name) for name in metrics_in(text)} <= set(LABELS)
    queries = [line for block in re.findall(r"```promql\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    rules = [{"record": f"page:query{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "queries.yaml"))


def test_alertmanager_can_route_by_what_an_alert_is_about():
    """Of a run: by namespace and run, of a phase by the phase too; of the operator by its namespace."""
    for alert in ALERTS:
        fires = [f for s in SCENARIOS for found in s.moments.values() for f in found if f.alert == alert.name]
        wanted = {"namespace", "run"} if not alert.name.startswith("AlignmentOperator") else {"namespace"}
        assert all(wanted <= set(fire.labels) for fire in fires), alert.name
