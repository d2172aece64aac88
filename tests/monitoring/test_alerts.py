"""The rules in a Prometheus that saw real runs, as the Prometheus Operator handed them to it."""

from generate.alerts import ALERTS
from monitoring.observed import Observed


def fired(observed: Observed) -> dict[tuple[str, str], dict[str, str]]:
    """Labels by name and run, of all that fired at any time for these runs."""
    firing = f'ALERTS{{alertstate="firing", namespace="{observed.runs.namespace}"}}'
    found = observed.prometheus.series(firing, start=observed.begin, end=observed.end)
    return {(labels["alertname"], labels.get("run", "")): labels for labels in found}


def test_every_rule_was_evaluated_without_an_error(observed: Observed):
    rules = {rule["name"]: rule for rule in observed.prometheus.rules() if rule["type"] == "alerting"}
    assert {alert.name for alert in ALERTS} <= set(rules)
    assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}


def test_the_run_that_failed_fires_and_those_that_did_not_are_silent(observed: Observed):
    """Runs that succeed, were retried once, wait in a queue or are suspended wake nobody."""
    found = fired(observed)
    assert {name for name, run in found if run == "bad"} == {"AlignmentRunFailed"}
    assert {run for _, run in found} == {"bad"}
    assert found["AlignmentRunFailed", "bad"]["severity"] == "warning"
